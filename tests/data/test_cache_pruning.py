"""Making room in the cache of prepared tokens: what goes, what stays, and what other runs notice of it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slothcore.data import preparing
from slothcore.data.cache_pruning import DAY, GIB, LIMIT_VARIABLE, prune
from slothcore.data.dataset import open_dataset
from slothcore.data.masking import TokenizedRow
from slothcore.data.prepared_cache import HOME_VARIABLE, PreparedFolder, find_prepared
from slothcore.data.preparing import Settings, prepare_dataset
from slothcore.data.tokenizer import Tokenizer
from tests.data.tiny_tokenizers import write_byte_tokenizer

TOKENS = 1000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder; it may hold three of the entries that `make` makes."""
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setenv(LIMIT_VARIABLE, str(3.5 * size_of(make("measured")) / GIB))
    find_prepared("measured")
    for file in (tmp_path / "home/prepared/measured").iterdir():
        file.unlink()
    (tmp_path / "home/prepared/measured").rmdir()
    return tmp_path / "home" / "prepared"


def make(key: str, *, days_ago: float = 0.0) -> Path:
    """An entry that was last used so long ago."""
    with PreparedFolder(key) as entry:
        entry.writer.add(TokenizedRow([7] * TOKENS, [7] * TOKENS))
        _, notes = entry.keep({"stats": {}})
    path = Path(notes[0].split(" are kept in ")[1].split(" for the next run")[0])
    age(path, days_ago)
    return path


def age(path: Path, days: float) -> None:
    for file in (*path.iterdir(), path):
        os.utime(file, (time.time() - days * DAY,) * 2)


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.iterdir()))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_used_longest_ago_makes_room(folder: Path) -> None:
    for number, key in enumerate("abc"):
        make(key, days_ago=9 - number)
    assert find_prepared("a") is not None, "it is used now, and so not the oldest"
    with PreparedFolder("d") as entry:
        entry.writer.add(TokenizedRow([7] * TOKENS, [7] * TOKENS))
        _, notes = entry.keep({})
    assert names(folder) == ["a", "c", "d"]
    assert notes[1].startswith(f"1 older set of prepared rows, 0.00 GiB, removed from {folder}: it keeps ")
    assert notes[1].endswith(" GiB (SLOTHCORE_CACHE_GIB), and nothing unused for 30 days")


def test_what_was_not_used_for_a_month_goes_however_small(folder: Path) -> None:
    make("young", days_ago=29)
    make("old", days_ago=31)
    assert names(folder) == ["old", "young"]
    make("new")
    assert names(folder) == ["new", "young"]


def test_what_was_just_made_stays_however_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("old")
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    new = make("new")
    assert names(folder) == ["new"]
    assert find_prepared(new.name) is not None


def test_what_is_in_use_stays(folder: Path) -> None:
    """In this process and in others, until nobody holds it; and its arrays can be read all the time."""
    pytest.importorskip("fcntl")
    used = make("used", days_ago=40)
    found = find_prepared("used")
    assert found is not None
    store, _ = found
    program = (
        "from slothcore.data.prepared_cache import find_prepared; import sys;"
        "store, _ = find_prepared('elsewhere'); print('open', flush=True); sys.stdin.read(); print(store.ids.sum())"
    )
    elsewhere = make("elsewhere")
    other = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    for path in (used, elsewhere):
        age(path, 50)
    make("new")
    assert names(folder) == ["elsewhere", "new", "used"]
    assert int(store.ids.sum()) == 7 * TOKENS
    said, _ = other.communicate("")
    assert said == f"{7 * TOKENS}\n"
    del store, found
    make("newer")
    assert names(folder) == ["new", "newer"]


def test_what_a_dead_run_left_goes_after_a_day_and_what_is_being_made_stays(folder: Path) -> None:
    make("a")
    for name, days in ((".dead-1", 2.0), (".busy-1", 2.0), (".fresh-1", 0.1)):
        (folder / name).mkdir()
        (folder / name / "ids.int32").write_bytes(b"1234" * 9)
        age(folder / name, days)
    (folder / ".busy-1" / "ids.int32").write_bytes(b"1234" * 10)
    prune(folder, folder / "a")
    assert names(folder) == [".busy-1", ".fresh-1", "a"]


def test_a_damaged_entry_does_not_stand_in_the_way(folder: Path) -> None:
    damaged = make("damaged", days_ago=31)
    (damaged / "about.json").unlink()
    age(damaged, 31)
    (folder / "a file").write_text("not ours")
    make("new")
    assert names(folder) == ["a file", "new"]


@pytest.mark.parametrize("wrong", ["lots", "-1", "nan"])
def test_a_limit_that_is_no_number(folder: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, wrong)
    with pytest.raises(ValueError, match=f"SLOTHCORE_CACHE_GIB must be a number of GiB, at least 0, got '{wrong}'"):
        PreparedFolder("key")
    assert names(folder) == []


def test_runs_that_prepare_and_prune_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for nothing each removes what the others made and do not hold; all get their own rows."""
    tokenizer = write_byte_tokenizer(tmp_path / "bytes")
    program = (
        "import sys; from slothcore.data import preparing; from slothcore.data.dataset import open_dataset;"
        "from slothcore.data.tokenizer import Tokenizer; preparing.CACHED_FROM = 0;"
        "tokenizer = Tokenizer.from_folder(sys.argv[1]);"
        "sums = [int(preparing.prepare_dataset(open_dataset(path), tokenizer, preparing.Settings(50)).store.ids.sum())"
        " for _ in range(15) for path in sys.argv[2:]]; print(sums)"
    )
    files = []
    for number in range(3):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(f'{{"text": "{"abc"[number] * 20}"}}\n' * 3)
        files.append(str(path))
    environment = {**os.environ, LIMIT_VARIABLE: "0", "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tokenizer), *files], env=environment, stdout=-1, stderr=-1, text=True
        )
        for _ in range(3)
    ]
    said = [run.communicate() for run in runs]
    assert [error for _, error in said] == [""] * 3
    monkeypatch.setattr(preparing, "CACHED_FROM", 1 << 60)
    core = Tokenizer.from_folder(tokenizer)
    sums = [int(prepare_dataset(open_dataset(path), core, Settings(50)).store.ids.sum()) for path in files]
    assert [output for output, _ in said] == [f"{sums * 15}\n"] * 3
    assert len(names(folder)) <= 3
    assert not any(name.startswith(".") for name in names(folder))
