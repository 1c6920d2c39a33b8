"""What became of the records of a dataset: the counts, and the sentences about those of which nothing is learned."""

from dataclasses import dataclass

from slothcore.data.chat_rows import IGNORED_LABEL, TokenizedRow
from slothcore.data.formats import Example, TextExample
from slothcore.data.tokenizer import Tokenizer
from slothcore.data.values import counted

LONGEST_SHOWN = 400


@dataclass
class TokenizeStats:
    """What became of the records.

    Attributes:
        records: how many there were.
        rows: how many rows they gave.
        tokens: tokens of all rows.
        targets: tokens that are learned.
        unknown_targets: those of them that stand for characters that the vocabulary lacks.
        unwritten_thoughts: rows whose chat template does not write what the assistant thinks in a field of its own.
        truncated: rows cut at the maximum length.
        dropped_overlength: rows left out because they were longer than that.
        dropped_without_target: rows left out because nothing in them is learned.
        skipped: records left out because they are wrong.
        first_skipped: what is wrong with the first of all that were left out for one of the last two reasons.
    """

    records: int = 0
    rows: int = 0
    tokens: int = 0
    targets: int = 0
    unknown_targets: int = 0
    unwritten_thoughts: int = 0
    truncated: int = 0
    dropped_overlength: int = 0
    dropped_without_target: int = 0
    skipped: int = 0
    first_skipped: str | None = None

    def describe(self, max_seq_length: int) -> str:
        """The counts in one line for the user; `first_skipped`, which may be long, is left to a line of its own."""
        gave = f"{counted(self.records, 'record')} gave {counted(self.rows, 'row')} with {self.tokens:,} tokens"
        others = {
            f"{self.truncated:,} truncated to {max_seq_length:,} tokens": self.truncated,
            f"{self.dropped_overlength:,} longer than {max_seq_length:,} tokens dropped": self.dropped_overlength,
            f"{self.dropped_without_target:,} dropped, having no token to learn": self.dropped_without_target,
            f"{counted(self.skipped, 'wrong one')} skipped": self.skipped,
        }
        happened = [text for text, count in others.items() if count]
        return "; ".join([f"{gave}, {self.targets:,} of them learned", *happened])


def why_nothing(row: TokenizedRow, example: Example, where: str, max_seq_length: int, tokenizer: Tokenizer) -> str:
    """The sentence about a row of which nothing is learned, with the row to look at."""
    if row.num_targets:
        answer = next(place for place, label in enumerate(row.labels) if place and label != IGNORED_LABEL)
        # Its text would say no more: what is to be learned stands beyond what a row can hold.
        return (
            f"{where}: nothing of it is learned, because the first word to learn is token {answer + 1:,}, and "
            f"max_seq_length is {max_seq_length:,}; raise max_seq_length, or shorten what stands before it"
        )
    if isinstance(example, TextExample):
        why = "its completion is empty" if example.prompt else "it has less than two tokens"
    elif not any(message["role"] == "assistant" for message in example.messages):
        why = f"it has no assistant's turn (roles: {', '.join(str(m['role']) for m in example.messages)})"
    elif any(message["role"] == "assistant" and message.get("weight", 1) == 0 for message in example.messages):
        why = "its answers have weight 0"
    elif example.prompt_answers:
        why = "its completion holds no answer"
    else:
        why = "the chat template writes nothing that the assistant says"
    text = tokenizer.decode(row.input_ids, skip_special_tokens=False)
    shown = text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN // 2]} ... {text[-LONGEST_SHOWN // 2 :]}"
    remedy = "take the record out, or set on_bad_row to skip"
    return f"{where}: nothing of it is learned, because {why}; {remedy}. The row is: {shown!r}"


def nothing_left(stats: TokenizeStats, max_seq_length: int) -> str:
    """Why no row is left."""
    if not stats.records:
        return "the dataset has no records"
    if stats.first_skipped:
        return f"no row is left ({stats.describe(max_seq_length)}; the first left out: {stats.first_skipped})"
    return (
        f"all {stats.records:,} records are longer than max_seq_length = {max_seq_length} tokens and were dropped; "
        "raise max_seq_length or set overlength to truncate"
    )
