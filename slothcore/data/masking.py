"""Records to rows of token ids with labels: which tokens are learned, where a text begins and ends.

Begin and end: a text gets what the tokenizer adds around one, once, and the end-of-sequence token after it. A
conversation is exactly what its chat template writes, which has its own begin and end tokens.

Labels equal the ids, or -100 where nothing is to be learned. The model shifts them: the label of a position is
predicted by the position before it, so the label of a row's first token never counts.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, get_args

from slothcore.data.chat_rows import IGNORED_LABEL, ChatRows, TokenizedRow, leaves_out_thoughts
from slothcore.data.formats import ChatExample, Example, Record, TextExample, format_example
from slothcore.data.outcomes import TokenizeStats, nothing_left, why_nothing
from slothcore.data.running_text import FullRows
from slothcore.data.spans import Turn
from slothcore.data.text_rows import text_rows
from slothcore.data.tokenizer import Tokenizer
from slothcore.data.values import whole_characters

__all__ = ["IGNORED_LABEL", "TokenizeStats", "TokenizedRow", "tokenise_dataset", "tokenise_example", "tokenise_stream"]

# What is encoded at once: enough records for all cores, and not so much text that it matters in memory, where each
# character takes some fifty bytes until its tokens are counted.
RECORDS_PER_BATCH = 1000
CHARACTERS_PER_BATCH = 2_000_000
SKIP_HINT = "; or leave such rows out with on_bad_row: skip"

Overlength = Literal["truncate", "drop"]
OnBadRow = Literal["error", "skip"]


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
    running = FullRows(max_seq_length)
    unknown = tokenizer.unk_token_id
    batches = _batches(records, chats, on_bad_row, format, text_field)
    for batch, rows in _encoded_ahead(batches, tokenizer, chats, only_completions):
        whole_rows = iter(rows)
        for prepared in batch:
            is_later_piece = not isinstance(prepared, ValueError) and getattr(prepared.example, "part", 0) > 0
            stats.records += not is_later_piece
            if isinstance(prepared, ValueError):
                stats.skipped += 1
                _note(stats, prepared, on_bad_row)
                continue
            row = next(whole_rows)
            for fitted in _fit(row, prepared.example, running, overlength, stats):
                targets = fitted.num_targets
                if targets == 0:
                    stats.dropped_without_target += 1
                    # What was cut off might have been learned; that is counted, as other truncation is.
                    stops = on_bad_row == "error" and not row.num_targets
                    if stops or stats.first_skipped is None:
                        why = why_nothing(row, prepared.example, prepared.where, max_seq_length, tokenizer)
                        _note(stats, ValueError(why), "error" if stops else "skip")
                    continue
                stats.rows += 1
                stats.unwritten_thoughts += prepared.lost_thoughts
                stats.tokens += len(fitted.input_ids)
                stats.targets += targets
                stats.unknown_targets += 0 if unknown is None else fitted.labels[1:].count(unknown)
                yield fitted
    if not stats.rows:
        raise ValueError(nothing_left(stats, max_seq_length))


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
    """A record that could be read: its name in messages, what it says, and a conversation's text and turns.

    `lost_thoughts`: whether its chat template writes nothing of the assistant's thoughts.
    """

    where: str
    example: Example
    rendered: tuple[str, list[Turn]] | None
    lost_thoughts: bool

    @property
    def characters(self) -> int:
        if self.rendered is not None:
            return len(self.rendered[0])
        assert isinstance(self.example, TextExample)
        return len(self.example.prompt) + len(self.example.completion)


_Batch = list[_Prepared | ValueError]


def _batches(
    records: Iterable[tuple[str, Record | Example]],
    chats: ChatRows,
    on_bad_row: OnBadRow,
    format: str,
    text_field: str,
) -> Iterator[_Batch]:
    """Records, read and rendered, some at a time; a wrong one as what is wrong with it, and the last if it stops."""
    batch: _Batch = []
    characters = 0
    for where, record in records:
        try:
            example = record
            if not isinstance(example, TextExample | ChatExample):
                example = format_example(example, format=format, text_field=text_field, where=where)
            rendered = _rendered(example, chats, where)
            lost_thoughts = False
            if isinstance(example, ChatExample) and rendered is not None:
                lost_thoughts = leaves_out_thoughts(example.messages, rendered[0])
            prepared = _Prepared(where, example, rendered, lost_thoughts)
        except ValueError as error:
            batch.append(error)
            if on_bad_row == "error":
                break
            continue
        batch.append(prepared)
        characters += prepared.characters
        if len(batch) >= RECORDS_PER_BATCH or characters >= CHARACTERS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded_ahead(
    batches: Iterable[_Batch], tokenizer: Tokenizer, chats: ChatRows, only_completions: bool
) -> Iterator[tuple[_Batch, list[TokenizedRow]]]:
    """Each batch with its rows of any length; while one is encoded, which needs no Python, the next is rendered."""
    with ThreadPoolExecutor(1, thread_name_prefix="slothcore-encoder") as encoder:
        coming = None
        for batch in batches:
            before, coming = coming, (batch, encoder.submit(_whole_rows, batch, tokenizer, chats, only_completions))
            if before is not None:
                yield before[0], before[1].result()
        if coming is not None:
            yield coming[0], coming[1].result()


def _whole_rows(batch: _Batch, tokenizer: Tokenizer, chats: ChatRows, only_completions: bool) -> list[TokenizedRow]:
    """Rows of any length, in order; all plain texts are encoded in one call, and all conversations in another."""
    good = [prepared for prepared in batch if not isinstance(prepared, ValueError)]
    texts = [prepared.example for prepared in good if isinstance(prepared.example, TextExample)]
    from_texts = iter(text_rows(texts, tokenizer, only_completions))
    from_chats = iter(chats.tokenise([prepared.rendered for prepared in good if prepared.rendered is not None]))
    return [next(from_texts if prepared.rendered is None else from_chats) for prepared in good]


def _rendered(example: Example, chats: ChatRows, where: str) -> tuple[str, list[Turn]] | None:
    if isinstance(example, TextExample):
        return None
    try:
        text, turns = chats.render(example)
        return whole_characters(text, "the conversation"), turns
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _note(stats: TokenizeStats, error: ValueError, on_bad_row: OnBadRow) -> None:
    if on_bad_row == "error":
        # With good rows before it, the file is probably right and this row wrong.
        hint = SKIP_HINT if stats.rows and "on_bad_row" not in str(error) else ""
        raise ValueError(f"{error}{hint}") from error
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


def _fit(
    row: TokenizedRow, example: Example, running: FullRows, overlength: Overlength, stats: TokenizeStats
) -> Iterator[TokenizedRow]:
    """The row itself if it fits, else its pieces, its beginning or nothing."""
    max_seq_length = running.max_seq_length
    if isinstance(example, TextExample) and example.running:
        yield from running.add(row, example)
    elif len(row.input_ids) <= max_seq_length:
        yield row
    elif overlength == "truncate":
        stats.truncated += 1
        yield TokenizedRow(row.input_ids[:max_seq_length], row.labels[:max_seq_length])
    else:
        stats.dropped_overlength += 1
