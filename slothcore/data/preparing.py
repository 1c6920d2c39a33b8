"""From checked records to tokens in flat arrays: a batch at a time, each encoded on all cores at once.

While one batch is encoded, which needs no Python, a thread reads the records of the next. Large datasets are written to
files as they are made, and found there the next time (`prepared_cache`); small ones are prepared faster than found.
"""

import errno
import gc
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from tqdm import tqdm

from slothcore.data.dataset import BAR_DELAY, Dataset
from slothcore.data.formats import Example
from slothcore.data.masking import OnBadRow, Overlength, TokenizeStats, tokenise_stream
from slothcore.data.prepared_cache import HOME_VARIABLE, PreparedFolder, cache_key, find_prepared, prepared_folder
from slothcore.data.token_store import TokenStore, TokenWriter
from slothcore.data.tokenizer import Tokenizer

# Records that are encoded at once: enough for all cores, few enough not to matter in memory.
BATCH = 1000
# Bytes of files from which on their tokens are kept on disk.
CACHED_FROM = 4 << 20
# New objects after which Python searches for garbage in cycles.
SEARCHED_AFTER = 100_000
# Part of the name under which tokens are kept. Raise it with every change that makes other rows, labels or counts of
# the same records, tokenizer and settings: formats, masking, chat templates, TokenizeStats. Releases differ anyway.
PREPARING_REVISION = 4
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Settings:
    """What decides how an example becomes a row, beside the tokenizer; as in `masking.tokenise_dataset`."""

    max_seq_length: int
    completion_only_loss: bool | None = None
    mask_history: bool = False
    overlength: Overlength = "truncate"
    on_bad_row: OnBadRow = "error"


@dataclass
class Prepared:
    """The tokens of a dataset.

    Attributes:
        store: all rows.
        stats: what became of the records.
        notes: what else is worth saying, a line each.
    """

    store: TokenStore
    stats: TokenizeStats
    notes: list[str] = field(default_factory=list)


def prepare_dataset(dataset: Dataset, tokenizer: Tokenizer, settings: Settings, *, progress: bool = False) -> Prepared:
    """Tokenise every record, or find the result of an earlier time.

    Args:
        progress: show a bar if it takes long.
    Raises: ValueError for a record that the chat template rejects, or if no row is left.
    """
    size = dataset.size
    content = dataset.digest() if size is not None and size >= CACHED_FROM else None
    if content is None:
        return _in_memory(dataset, tokenizer, settings, progress)
    facts = {"content": content, "tokenizer": tokenizer.fingerprint(), "settings": asdict(settings)}
    key = cache_key({**facts, "revision": PREPARING_REVISION})
    if found := find_prepared(key):
        store, about = found
        note = f"{len(store):,} prepared rows were found in {prepared_folder(key)}"
        return Prepared(store, TokenizeStats(**about["stats"]), [note])
    try:
        folder = PreparedFolder(key)
    except OSError as error:
        prepared = _in_memory(dataset, tokenizer, settings, progress)
        prepared.notes.append(f"nothing is kept for the next run: {error}; set {HOME_VARIABLE} to a folder for it")
        return prepared
    with folder:
        try:
            stats, notes = _write(folder.writer, dataset, tokenizer, settings, progress)
            store, kept = folder.keep({"stats": asdict(stats), "notes": notes})
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise OSError(
                f"the prepared rows do not fit into {folder.path.parent} ({error.strerror}); "
                f"free some space there, or set {HOME_VARIABLE} to a folder on another disk"
            ) from None
    return Prepared(store, stats, [*notes, *kept])


def _in_memory(dataset: Dataset, tokenizer: Tokenizer, settings: Settings, progress: bool) -> Prepared:
    with TokenWriter() as writer:
        stats, notes = _write(writer, dataset, tokenizer, settings, progress)
        return Prepared(writer.finish({}), stats, notes)


def _write(
    writer: TokenWriter, dataset: Dataset, tokenizer: Tokenizer, settings: Settings, progress: bool
) -> tuple[TokenizeStats, list[str]]:
    """Tokenise into the writer. Returns what became of the records, and what there is to say."""
    stats = TokenizeStats()
    began = time.monotonic()
    bar_options: dict[str, Any] = {"delay": BAR_DELAY, "disable": not progress, "leave": False}
    with tqdm(total=len(dataset), desc="tokenizing", unit=" records", **bar_options) as bar, ExitStack() as stack:
        stack.enter_context(_rare_searches_for_garbage())
        examples = _read_ahead(dataset, bar, stack)
        for row in tokenise_stream(examples, tokenizer, stats, **asdict(settings)):
            writer.add(row)
    seconds = time.monotonic() - began
    if seconds < BAR_DELAY:
        return stats, []
    rate = (
        f"tokenized {stats.records:,} records in {seconds:.0f} s: {stats.records / seconds:,.0f} records/s, "
        f"{stats.tokens / seconds:,.0f} tokens/s on {os.cpu_count()} cores"
    )
    return stats, [rate]


def _read_ahead(dataset: Dataset, bar: tqdm, stack: ExitStack) -> Iterator[tuple[str, Example]]:
    """The examples of a dataset, those to come being read while the caller works on others."""
    examples = dataset.examples()

    def read() -> list[tuple[str, Example]]:
        return list(islice(examples, BATCH))

    reader = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="slothcore-reader"))
    coming = reader.submit(read)
    while batch := coming.result():
        coming = reader.submit(read)
        yield from batch
        bar.update(len(batch))


@contextmanager
def _rare_searches_for_garbage() -> Iterator[None]:
    """Rows and messages are many and hold no cycles; Python would look through them for a fifth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(SEARCHED_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
