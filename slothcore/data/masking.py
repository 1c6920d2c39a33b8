"""Records to rows of token ids with labels: which tokens are learned, where a text begins and ends.

Begin and end: a text gets what the tokenizer adds around one, once, and the end-of-sequence token after it. A
conversation is exactly what its chat template writes, which has its own begin and end tokens.

Labels equal the ids, or -100 where nothing is to be learned. The model shifts them: the label of a position is
predicted by the position before it, so the label of a row's first token never counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from slothcore.data.formats import ChatExample, Example, Record, TextExample, format_example
from slothcore.data.tokenizer import Tokenizer

IGNORED_LABEL = -100
RECORDS_PER_BATCH = 1000

Overlength = Literal["truncate", "drop"]


@dataclass(frozen=True)
class TokenizedRow:
    """Token ids and labels of one document, equally long."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_targets(self) -> int:
        """Labels that are learned; the first token is predicted by nothing."""
        return sum(label != IGNORED_LABEL for label in self.labels[1:])


@dataclass
class TokenizeStats:
    """What became of the records.

    Attributes:
        records: how many there were.
        rows: how many rows they gave.
        tokens: tokens of all rows.
        targets: tokens that are learned.
        truncated: rows cut at the maximum length.
        dropped_overlength: rows left out because they were longer than that.
        dropped_without_target: rows left out because nothing in them is learned.
    """

    records: int = 0
    rows: int = 0
    tokens: int = 0
    targets: int = 0
    truncated: int = 0
    dropped_overlength: int = 0
    dropped_without_target: int = 0

    def describe(self, max_seq_length: int) -> str:
        """One line for the user."""
        parts = [
            f"{self.records} records gave {self.rows} rows of {self.tokens} tokens, {self.targets} of them learned"
        ]
        if self.truncated:
            parts.append(f"{self.truncated} truncated to {max_seq_length} tokens")
        if self.dropped_overlength:
            parts.append(f"{self.dropped_overlength} longer than {max_seq_length} tokens dropped")
        if self.dropped_without_target:
            parts.append(f"{self.dropped_without_target} without a token to learn dropped")
        return "; ".join(parts)


def tokenise_dataset(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    completion_only_loss: bool | None = None,
    overlength: Overlength = "truncate",
    format: str = "auto",
    text_field: str = "text",
) -> tuple[list[TokenizedRow], TokenizeStats]:
    """All records as rows of at most `max_seq_length` tokens, each with something to learn.

    Running text (format `document`) is cut into full rows whatever `overlength` says.

    Args:
        max_seq_length: the longest row; at least 2.
        completion_only_loss: learn completions and assistants' turns only; None means yes. A text without a prompt
            is learned whole either way.
        overlength: what to do with a longer row.
        format, text_field: as in `load_dataset`; "auto" recognises each record by itself.
    Raises: ValueError for a record that its format or the chat template rejects, or if no row is left.
    """
    if max_seq_length < 2:
        raise ValueError(f"max_seq_length must be at least 2, got {max_seq_length}: nothing predicts the first token")
    if overlength not in ("truncate", "drop"):
        raise ValueError(f"overlength must be 'truncate' or 'drop', got {overlength!r}")
    only_completions = completion_only_loss is not False
    stats = TokenizeStats(records=len(records))
    rows: list[TokenizedRow] = []
    rejected: TokenizedRow | None = None
    for start in range(0, len(records), RECORDS_PER_BATCH):
        named = [
            (f"record {number}", record)
            for number, record in enumerate(records[start : start + RECORDS_PER_BATCH], start=start + 1)
        ]
        examples = [(w, format_example(r, format=format, text_field=text_field, where=w)) for w, r in named]
        for example, row in _whole_rows(examples, tokenizer, only_completions):
            for fitted in _fit(row, example, max_seq_length, overlength, stats):
                if fitted.num_targets == 0:
                    stats.dropped_without_target += 1
                    rejected = rejected or fitted
                    continue
                rows.append(fitted)
                stats.rows += 1
                stats.tokens += len(fitted.input_ids)
                stats.targets += fitted.num_targets
    if not rows:
        raise ValueError(_nothing_left(stats, rejected, tokenizer, max_seq_length))
    return rows, stats


def tokenise_example(
    record: Record,
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    completion_only_loss: bool | None = None,
    overlength: Overlength = "truncate",
    format: str = "auto",
    text_field: str = "text",
) -> TokenizedRow:
    """The row of one record; arguments and errors as in `tokenise_dataset`.

    Raises: ValueError also if the record is dropped, or is running text of several rows.
    """
    rows, _ = tokenise_dataset(
        [record],
        tokenizer,
        max_seq_length=max_seq_length,
        completion_only_loss=completion_only_loss,
        overlength=overlength,
        format=format,
        text_field=text_field,
    )
    if len(rows) > 1:
        raise ValueError(f"the document fills {len(rows)} rows of {max_seq_length} tokens; use tokenise_dataset")
    return rows[0]


def _whole_rows(
    examples: Sequence[tuple[str, Example]], tokenizer: Tokenizer, only_completions: bool
) -> Iterator[tuple[Example, TokenizedRow]]:
    """Rows of any length, in order; all plain texts are encoded in one call."""
    texts = [example for _, example in examples if isinstance(example, TextExample)]
    text_rows = iter(_text_rows(texts, tokenizer, only_completions))
    for where, example in examples:
        if isinstance(example, TextExample):
            yield example, next(text_rows)
            continue
        try:
            yield example, _chat_row(example, tokenizer, only_completions)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _text_rows(examples: Sequence[TextExample], tokenizer: Tokenizer, only_completions: bool) -> list[TokenizedRow]:
    """Targets begin at the first token that the prompt alone would not have given.

    The text is encoded as one piece, because a tokenizer may mark the beginning of each piece with a space. A token
    that joins the end of the prompt and the start of the completion is a target.
    """
    encoded = tokenizer.encode_batch([example.prompt + example.completion for example in examples])
    prompts = tokenizer.encode_batch([example.prompt for example in examples]) if only_completions else []
    rows = []
    for index, example in enumerate(examples):
        ids = tokenizer.single_begin(encoded[index])
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        skipped = 0
        if only_completions and example.prompt:
            skipped = _common_prefix(tokenizer.single_begin(prompts[index]), ids)
        rows.append(TokenizedRow(ids, [IGNORED_LABEL] * skipped + ids[skipped:]))
    return rows


def _chat_row(example: ChatExample, tokenizer: Tokenizer, only_completions: bool) -> TokenizedRow:
    """The rendered conversation; with `only_completions` the targets are the assistant's turns, end tokens included."""
    messages, tools = example.messages, example.tools
    text = tokenizer.apply_chat_template(messages, tools=tools)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not only_completions:
        return TokenizedRow(ids, list(ids))
    labels = [IGNORED_LABEL] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = _assistant_span(example, index, text, ids, tokenizer)
            labels[start:end] = ids[start:end]
    return TokenizedRow(ids, labels)


def _assistant_span(
    example: ChatExample, index: int, text: str, ids: list[int], tokenizer: Tokenizer
) -> tuple[int, int]:
    """Which of `ids` the assistant says in message `index`.

    The turn begins where the conversation before it, rendered with a generation prompt, ends. It reaches as far as
    the tokens of the conversation up to and including it agree with those of the whole: a template may close the last
    message with something that it leaves out between turns.

    Raises: ValueError if the template changes what the assistant said, or renders the turn differently once others
        follow, as templates that drop earlier reasoning do; then no token of it can be told apart safely.
    """
    messages, tools = example.messages, example.tools
    content = message_text(messages[index])
    with_turn = tokenizer.apply_chat_template(messages[: index + 1], tools=tools)
    if index:
        before = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True, tools=tools)
    else:
        # Most templates cannot render an empty conversation; the turn then begins with its content.
        before = with_turn[: max(with_turn.find(content), 0)]
    content_start = with_turn.find(content, len(before))
    content_end = content_start + len(content)
    if content_start < 0:
        raise ValueError(
            f"the chat template changes the text of message {index + 1}, so the assistant's tokens cannot be told "
            "apart; set completion_only_loss to false, or change the template"
        )
    if not text.startswith(before) or text[:content_end] != with_turn[:content_end]:
        raise ValueError(
            f"the chat template renders message {index + 1} differently depending on the messages after it, so the "
            "assistant's tokens cannot be told apart; set completion_only_loss to false, or change the template"
        )
    start = _common_prefix(tokenizer.encode(before, add_special_tokens=False), ids)
    end = _common_prefix(tokenizer.encode(with_turn, add_special_tokens=False), ids)
    return start, end


def message_text(message: Record) -> str:
    """The text of a message without its margins, which many templates trim; empty if it has none."""
    content = message["content"]
    return content.strip() if isinstance(content, str) else ""


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids two sequences share."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def _fit(
    row: TokenizedRow, example: Example, max_seq_length: int, overlength: Overlength, stats: TokenizeStats
) -> Iterator[TokenizedRow]:
    """The row itself if it fits, else its pieces, its beginning or nothing."""
    if len(row.input_ids) <= max_seq_length:
        yield row
    elif isinstance(example, TextExample) and example.running:
        # Neighbours share a token: the first of a row is no target, so each token is one exactly once.
        for start in range(0, len(row.input_ids) - 1, max_seq_length - 1):
            piece = slice(start, start + max_seq_length)
            yield TokenizedRow(row.input_ids[piece], row.labels[piece])
    elif overlength == "truncate":
        stats.truncated += 1
        yield TokenizedRow(row.input_ids[:max_seq_length], row.labels[:max_seq_length])
    else:
        stats.dropped_overlength += 1


def _nothing_left(
    stats: TokenizeStats, rejected: TokenizedRow | None, tokenizer: Tokenizer, max_seq_length: int
) -> str:
    """Why no row is left, with a row to look at."""
    if not stats.records:
        return "the dataset has no records"
    if rejected is None:
        return (
            f"all {stats.records} records are longer than max_seq_length = {max_seq_length} tokens and were dropped; "
            "raise max_seq_length or set overlength to truncate"
        )
    text = tokenizer.decode(rejected.input_ids, skip_special_tokens=False)
    shown = text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
    return (
        f"no row has a token to learn ({stats.describe(max_seq_length)}). With completion_only_loss a row needs a "
        f"completion or an assistant's turn within its first {max_seq_length} tokens. One of the rows is: {shown!r}"
    )
