"""How fast a large file becomes token arrays, and how much host memory that takes.

Writes JSON lines of random words, prepares them as a run does (checked, tokenised, kept in a cache, packed), and then
once more, when the cache has them. Nothing is downloaded. Ends with 1 if it took more memory than `--limit`.

Memory is the peak of the resident set, which counts the pages of mapped files too: of this process, which works in
threads, and of the largest that it started, if it started any. Processor time is what all cores spent together; where
others use the machine, it says more than the clock.

    python benchmarks/prepare_data.py --rows 1000000
    python benchmarks/prepare_data.py --rows 100000 --tokenizer path/to/a/model --chat
"""

import argparse
import json
import os
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer as TokenizerCore
from tokenizers import decoders, models, pre_tokenizers, trainers

from slothcore.data.dataset import open_dataset
from slothcore.data.packing import wasted_fraction
from slothcore.data.prepared_cache import HOME_VARIABLE
from slothcore.data.preparing import Settings, prepare_dataset
from slothcore.data.tokenizer import Tokenizer
from slothcore.training.batches import RowSet

WORDS = 20_000
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
MAX_SEQ_LENGTH = 2048


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="records of the file; default: 1,000,000")
    parser.add_argument("--words", type=int, default=52, help="words of a record, on average; default: 52")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; default: one trained on the words")
    parser.add_argument("--chat", action="store_true", help="write conversations in place of prompt and completion")
    parser.add_argument("--folder", type=Path, help="where file and cache are kept; default: a temporary folder")
    parser.add_argument("--limit", type=float, default=1500, help="MB of host memory that it may take; default: 1,500")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prepare-data-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[HOME_VARIABLE] = str(folder / "cache")
        source = random.Random(0)
        vocabulary = ["".join(source.choices("etaoinshrdlucmfwyp", k=source.randint(2, 9))) for _ in range(WORDS)]
        tokenizer = Tokenizer.from_folder(arguments.tokenizer or write_tokenizer(folder / "tokenizer", vocabulary))
        if arguments.chat and tokenizer.chat_template is None:
            tokenizer.use_chat_template("chatml")
        file = folder / "rows.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(rows(arguments.rows, arguments.words, vocabulary, source, chat=arguments.chat))
        print(f"{arguments.rows:,} rows, {file.stat().st_size / 1e6:,.0f} MB; memory before: {peak_memory():,.0f} MB")
        for attempt in ("first time", "from the cache"):
            prepare(file, tokenizer, attempt)
    if peak_memory() > arguments.limit:
        print(f"peak memory {peak_memory():,.0f} MB is over the limit of {arguments.limit:,.0f} MB", file=sys.stderr)
        return 1
    return 0


def prepare(file: Path, tokenizer: Tokenizer, attempt: str) -> None:
    """Do what a run does before its first step, and print how long each part took."""
    began, spent = time.perf_counter(), time.process_time()
    dataset = open_dataset(file)
    checked = time.perf_counter()
    prepared = prepare_dataset(dataset, tokenizer, Settings(MAX_SEQ_LENGTH))
    tokenised = time.perf_counter()
    rows = RowSet(prepared.store, capacity=MAX_SEQ_LENGTH)
    rows.fingerprint()
    packed = time.perf_counter()
    count, tokens, seconds = len(prepared.store), prepared.stats.tokens, packed - began
    wasted = wasted_fraction(rows.rows, rows.document_lengths, MAX_SEQ_LENGTH)
    print(
        f"{attempt}: checked in {checked - began:.1f} s, tokenised in {tokenised - checked:.1f} s, "
        f"packed in {packed - tokenised:.1f} s ({wasted:.2%} free); {count / seconds:,.0f} rows/s, "
        f"{tokens / seconds:,.0f} tokens/s at {tokens / count:.0f} tokens a row on {os.cpu_count()} cores, "
        f"{(time.process_time() - spent) / count * 1e6:.0f} us of processor time a row; "
        f"peak memory {peak_memory():,.0f} MB",
        flush=True,
    )


def rows(count: int, words: int, vocabulary: list[str], source: random.Random, *, chat: bool) -> Iterator[str]:
    """Lines of JSON with a third of the words in the question."""
    for _ in range(count):
        text = source.choices(vocabulary, k=max(3, int(source.gauss(words, words / 3))))
        asked, answer = " ".join(text[: len(text) // 3]), " ".join(text[len(text) // 3 :])
        record: dict[str, object] = {"prompt": asked + "\n", "completion": answer}
        if chat:
            turns = (("user", asked), ("assistant", answer))
            record = {"messages": [{"role": role, "content": content} for role, content in turns]}
        yield json.dumps(record) + "\n"


def write_tokenizer(folder: Path, vocabulary: list[str]) -> Path:
    """A byte-level BPE tokenizer with merges for the words."""
    core = TokenizerCore(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=["</s>", *CHATML_TOKENS], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([" " + " ".join(vocabulary)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}), encoding="utf-8")
    return folder


def peak_memory() -> float:
    """The most host memory that this process has had, and the largest of those that it started, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux lets `ru_maxrss` begin with what the process had that started this one.
        own = int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    return (own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * unit / 1e6


if __name__ == "__main__":
    sys.exit(main())
