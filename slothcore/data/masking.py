"""Records to rows of token ids with labels: which tokens are learned, where a text begins and ends.

Begin and end: a text gets what the tokenizer adds around one, once, and the end-of-sequence token after it. A
conversation is exactly what its chat template writes, which has its own begin and end tokens.

Labels equal the ids, or -100 where nothing is to be learned. The model shifts them: the label of a position is
predicted by the position before it, so the label of a row's first token never counts.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

from slothcore.data.chat_rows import IGNORED_LABEL, ChatRows, TokenizedRow
from slothcore.data.formats import ChatExample, Example, Record, TextExample, format_example
from slothcore.data.spans import Turn
from slothcore.data.text_rows import text_rows
from slothcore.data.tokenizer import Tokenizer
from slothcore.data.values import counted

__all__ = ["IGNORED_LABEL", "TokenizeStats", "TokenizedRow", "tokenise_dataset", "tokenise_example", "tokenise_stream"]

RECORDS_PER_BATCH = 1000
LONGEST_SHOWN = 400

Overlength = Literal["truncate", "drop"]
OnBadRow = Literal["error", "skip"]


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
        skipped: records left out because they are wrong.
        first_skipped: what is wrong with the first of all that were left out for one of the last two reasons.
    """

    records: int = 0
    rows: int = 0
    tokens: int = 0
    targets: int = 0
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


def tokenise_dataset(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    completion_only_loss: bool | None = None,
    mask_history: bool = False,
    overlength: Overlength = "truncate",
    on_bad_row: OnBadRow = "error",
    format: str = "auto",
    text_field: str = "text",
) -> tuple[list[TokenizedRow], TokenizeStats]:
    """All records as rows of at most `max_seq_length` tokens, each with something to learn.

    Running text (format `document`) is cut into full rows whatever `overlength` says.

    Args:
        max_seq_length: the longest row; at least 2.
        completion_only_loss: learn completions and assistants' turns only; None means yes. A text without a prompt
            is learned whole either way.
        mask_history: of a conversation learn the assistant's last turn only.
        overlength: what to do with a longer row.
        on_bad_row: what to do with a record that is wrong, or in which nothing is to be learned: "error" stops, "skip"
            leaves it out and counts it. A row that is cut before its answer is left out and counted in any case.
        format, text_field: as in `load_dataset`; "auto" recognises each record by itself.
    Raises: ValueError for a record that its format or the chat template rejects, or of which nothing would be learned,
        unless it is skipped; or if no row is left, or the arguments do not fit together.
    """
    stats = TokenizeStats()
    named = ((f"record {number}", record) for number, record in enumerate(records, start=1))
    rows = tokenise_stream(
        named,
        tokenizer,
        stats,
        max_seq_length=max_seq_length,
        completion_only_loss=completion_only_loss,
        mask_history=mask_history,
        overlength=overlength,
        on_bad_row=on_bad_row,
        format=format,
        text_field=text_field,
    )
    return list(rows), stats


def tokenise_stream(
    records: Iterable[tuple[str, Record | Example]],
    tokenizer: Tokenizer,
    stats: TokenizeStats,
    *,
    max_seq_length: int,
    completion_only_loss: bool | None = None,
    mask_history: bool = False,
    overlength: Overlength = "truncate",
    on_bad_row: OnBadRow = "error",
    format: str = "auto",
    text_field: str = "text",
) -> Iterator[TokenizedRow]:
    """The rows of records as they come, so that none but a batch of them is in memory; `stats` counts along.

    Args:
        records: each with what messages call it; what a record says (an `Example`) is taken as it is.
        others: as in `tokenise_dataset`.
    Raises: ValueError as `tokenise_dataset` does.
    """
    _check_arguments(max_seq_length, overlength, on_bad_row, completion_only_loss, mask_history)
    only_completions = completion_only_loss is not False
    chats = ChatRows(tokenizer, "last turn" if mask_history else "turns" if only_completions else "all")
    source = iter(records)
    while batch := list(islice(source, RECORDS_PER_BATCH)):
        stats.records += len(batch)
        examples: list[_Prepared] = []
        for where, record in batch:
            try:
                example = record
                if not isinstance(example, TextExample | ChatExample):
                    example = format_example(example, format=format, text_field=text_field, where=where)
                examples.append(_Prepared(where, example, _rendered(example, chats, where)))
            except ValueError as error:
                stats.skipped += 1
                _note(stats, error, on_bad_row)
        for prepared, row in _whole_rows(examples, tokenizer, chats, only_completions):
            for fitted in _fit(row, prepared.example, max_seq_length, overlength, stats):
                targets = fitted.num_targets
                if targets == 0:
                    stats.dropped_without_target += 1
                    # What was cut off might have been learned; that is counted, as other truncation is.
                    stops = on_bad_row == "error" and not row.num_targets
                    if stops or stats.first_skipped is None:
                        why = _why_nothing(row, prepared, max_seq_length, tokenizer)
                        _note(stats, ValueError(why), "error" if stops else "skip")
                    continue
                stats.rows += 1
                stats.tokens += len(fitted.input_ids)
                stats.targets += targets
                yield fitted
    if not stats.rows:
        raise ValueError(_nothing_left(stats, max_seq_length))


def tokenise_example(
    record: Record,
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    completion_only_loss: bool | None = None,
    mask_history: bool = False,
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
        mask_history=mask_history,
        overlength=overlength,
        format=format,
        text_field=text_field,
    )
    if len(rows) > 1:
        raise ValueError(f"the document fills {len(rows)} rows of {max_seq_length} tokens; use tokenise_dataset")
    return rows[0]


@dataclass(frozen=True)
class _Prepared:
    """A record that could be read: its name in messages, what it says, and a conversation's text and turns."""

    where: str
    example: Example
    rendered: tuple[str, list[Turn]] | None


def _rendered(example: Example, chats: ChatRows, where: str) -> tuple[str, list[Turn]] | None:
    if isinstance(example, TextExample):
        return None
    try:
        return chats.render(example)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _note(stats: TokenizeStats, error: ValueError, on_bad_row: OnBadRow) -> None:
    if on_bad_row == "error":
        raise error
    stats.first_skipped = stats.first_skipped or str(error)


def _check_arguments(
    max_seq_length: int, overlength: str, on_bad_row: str, completion_only_loss: bool | None, mask_history: bool
) -> None:
    if max_seq_length < 2:
        raise ValueError(f"max_seq_length must be at least 2, got {max_seq_length}: nothing predicts the first token")
    if overlength not in get_args(Overlength):
        raise ValueError(f"overlength must be 'truncate' or 'drop', got {overlength!r}")
    if on_bad_row not in get_args(OnBadRow):
        raise ValueError(f"on_bad_row must be 'error' or 'skip', got {on_bad_row!r}")
    if mask_history and completion_only_loss is False:
        raise ValueError(
            "mask_history learns the last answer only and completion_only_loss: false learns everything; choose one"
        )


def _whole_rows(
    examples: Sequence[_Prepared], tokenizer: Tokenizer, chats: ChatRows, only_completions: bool
) -> Iterator[tuple[_Prepared, TokenizedRow]]:
    """Rows of any length, in order; all plain texts are encoded in one call, and all conversations in another."""
    texts = [prepared.example for prepared in examples if isinstance(prepared.example, TextExample)]
    from_texts = iter(text_rows(texts, tokenizer, only_completions))
    from_chats = iter(chats.tokenise([prepared.rendered for prepared in examples if prepared.rendered is not None]))
    for prepared in examples:
        yield prepared, next(from_texts if prepared.rendered is None else from_chats)


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


def _why_nothing(row: TokenizedRow, prepared: _Prepared, max_seq_length: int, tokenizer: Tokenizer) -> str:
    """The sentence about a row of which nothing is learned, with the row to look at."""
    example = prepared.example
    remedy = "take the record out, or set on_bad_row to skip"
    if row.num_targets:
        answer = next(place for place, label in enumerate(row.labels) if place and label != IGNORED_LABEL)
        # Its text would say no more: what is to be learned stands beyond what a row can hold.
        return (
            f"{prepared.where}: nothing of it is learned, because the first word to learn is token {answer + 1:,}, and "
            f"max_seq_length is {max_seq_length:,}; raise max_seq_length, or shorten what stands before it"
        )
    if isinstance(example, TextExample):
        why = "its completion is empty" if example.prompt else "it has less than two tokens"
    elif not any(message["role"] == "assistant" for message in example.messages):
        why = f"it has no assistant's turn (roles: {', '.join(str(m['role']) for m in example.messages)})"
    else:
        why = "the chat template writes nothing that the assistant says"
    text = tokenizer.decode(row.input_ids, skip_special_tokens=False)
    shown = text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN // 2]} ... {text[-LONGEST_SHOWN // 2 :]}"
    return f"{prepared.where}: nothing of it is learned, because {why}; {remedy}. The row is: {shown!r}"


def _nothing_left(stats: TokenizeStats, max_seq_length: int) -> str:
    """Why no row is left."""
    if not stats.records:
        return "the dataset has no records"
    if stats.first_skipped:
        return f"no row is left ({stats.describe(max_seq_length)}; the first left out: {stats.first_skipped})"
    return (
        f"all {stats.records:,} records are longer than max_seq_length = {max_seq_length} tokens and were dropped; "
        "raise max_seq_length or set overlength to truncate"
    )
