"""Running text of any length: the tokens of the whole text, and little memory."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from slothcore.data import pieces, readers, running_text
from slothcore.data.dataset import open_dataset
from slothcore.data.files import load_dataset
from slothcore.data.formats import TextExample
from slothcore.data.masking import tokenise_dataset
from slothcore.data.preparing import Settings, prepare_dataset
from slothcore.data.running_text import running_row
from slothcore.data.token_store import rows_of
from slothcore.data.tokenizer import Tokenizer
from tests.data.tiny_tokenizers import write_byte_tokenizer

LEDGER = Path(__file__).resolve().parents[2] / "examples" / "ledger" / "base"
TEXT = "".join(f"Line {n}: sold {n * 7 % 13} plums.\n{'' if n % 5 else chr(10)}  And {n}, too.  \n" for n in range(400))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces and blocks of a short text."""
    monkeypatch.setattr(pieces, "PIECE", 700)
    monkeypatch.setattr(pieces, "BEFORE", 40)
    monkeypatch.setattr(running_text, "BEFORE", 40)
    monkeypatch.setattr(running_text, "BLOCK", 150)
    monkeypatch.setattr(readers, "TEXT_BLOCK", 97)


def whole(text: str, tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer.single_begin(tokenizer.encode(text))
    return ids if tokenizer.eos_token_id in (None, ids[-1]) else [*ids, tokenizer.eos_token_id]


def cut(ids: list[int], length: int) -> list[list[int]]:
    """Rows that share a token with their neighbours, by definition."""
    return [ids[start : start + length] for start in range(0, max(1, len(ids) - 1), length - 1)]


@pytest.mark.parametrize(
    "text", [TEXT, TEXT.replace("\n", "\n\n"), TEXT.replace("\n", " "), "ä€😀" * 900, "a\n" * 1500]
)
@pytest.mark.parametrize("length", [7, 64, 100_000])
def test_pieces_of_a_file_are_the_whole_text(small, tmp_path: Path, text: str, length: int) -> None:
    tokenizer = Tokenizer.from_folder(LEDGER)
    (tmp_path / "a.txt").write_bytes(text.encode())
    dataset = open_dataset(tmp_path / "a.txt")
    assert len(dataset) > 3
    assert "".join(record["document"] for record in dataset) == text
    prepared = prepare_dataset(dataset, tokenizer, Settings(length))
    rows = rows_of(prepared.store)
    if text.isascii():
        assert [row.input_ids for row in rows] == cut(whole(text, tokenizer), length)
    assert all(row.labels == row.input_ids for row in rows)
    assert prepared.stats.records == 1
    assert prepared.stats.targets == sum(len(row.input_ids) - 1 for row in rows)
    # The same out of memory as out of the file.
    direct, _ = tokenise_dataset(load_dataset(tmp_path / "a.txt"), tokenizer, max_seq_length=length)
    assert direct == rows


def test_published_tokenizers_see_the_whole_text(small, shared_data: Path) -> None:
    """Though blocks are encoded one by one; some of these tokenizers begin each with a space of their own."""
    wiki = (shared_data / "datasets" / "wiki_demo.txt").read_text(encoding="utf-8")[:60_000]
    dolly = (shared_data / "datasets" / "dolly_3k.jsonl").read_text(encoding="utf-8")[:40_000]
    for folder in (*(shared_data / "tokenizers").iterdir(), LEDGER):
        tokenizer = Tokenizer.from_folder(folder)
        for text in (wiki, dolly, wiki.replace("\n", "\n\n"), Path(running_text.__file__).read_text()):
            row = running_row(TextExample("", text, running=True), tokenizer)
            assert row.input_ids == row.labels == whole(text, tokenizer), folder.name


def test_pieces_that_do_not_follow_one_another_begin_rows(small, tmp_path: Path) -> None:
    """As when some are held out for evaluation: no row goes across the gap."""
    tokenizer = Tokenizer.from_folder(LEDGER)
    (tmp_path / "a.txt").write_text(TEXT)
    dataset = open_dataset(tmp_path / "a.txt")
    kept, held_out = dataset.hold_out(0.3, seed=0)
    rows = [row for part in (kept, held_out) for row in rows_of(prepare_dataset(part, tokenizer, Settings(50)).store)]
    texts = [tokenizer.decode(row.input_ids[1:]) for row in rows]
    assert all(text in TEXT for text in texts)
    tokens = sum(len(row.input_ids) - 1 for row in rows)
    # A piece that begins anew has a first token that nothing predicts, and may end in one that fills no row.
    assert len(whole(TEXT, tokenizer)) - 1 - 3 * len(dataset) <= tokens <= len(whole(TEXT, tokenizer)) - 1


def test_a_byte_that_is_not_utf8_is_placed(small, tmp_path: Path) -> None:
    for name, content in {"a.txt": TEXT.encode(), "b.txt": "ä€\n".encode() * 500}.items():
        lines = content.splitlines(keepends=True)
        lines[300] = b"na\xefve\n"
        (tmp_path / name).write_bytes(b"".join(lines))
        with pytest.raises(ValueError, match=rf"{name}, line 301: byte 0xef is not UTF-8; save the file as UTF-8"):
            open_dataset(tmp_path / name)
    (tmp_path / "c.txt").write_bytes(TEXT.encode() + "€".encode()[:2])
    with pytest.raises(ValueError, match=r"c.txt, line \d+: byte 0xe2 is not UTF-8"):
        open_dataset(tmp_path / "c.txt")


def test_marks_gzip_and_blank_files(small, tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + TEXT.encode()))
    assert "".join(record["document"] for record in open_dataset(tmp_path / "a.txt.gz")) == TEXT
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf \n")
    with pytest.raises(ValueError, match=r"b.txt holds no records"):
        open_dataset(tmp_path / "b.txt")


@pytest.mark.slow
def test_a_large_text_takes_no_more_memory_than_a_small_one(tmp_path: Path) -> None:
    """Five times the text: what stays are its tokens, five bytes each, and those on disk."""
    write_byte_tokenizer(tmp_path / "bytes")
    program = (
        "import resource, sys; from slothcore.data.dataset import open_dataset; from slothcore.data.preparing import *;"
        "from slothcore.data.tokenizer import Tokenizer;"
        "prepare_dataset(open_dataset(sys.argv[1]), Tokenizer.from_folder(sys.argv[2]), Settings(512));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for times in (1, 5):
        path = tmp_path / f"{times}.txt"
        path.write_text(TEXT * (180 * times))
        assert path.stat().st_size > 2.2 * pieces.PIECE * times / 2
        command = [sys.executable, "-c", program, str(path), str(tmp_path / "bytes")]
        environment = {"SLOTHCORE_HOME": str(tmp_path / "home"), "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks.append(int(done.stdout) * (1 if sys.platform == "darwin" else 1024))
    assert peaks[1] - peaks[0] < 300e6, peaks
