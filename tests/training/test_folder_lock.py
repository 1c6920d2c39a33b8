"""A folder has one run at a time; a process that ends, however it does, lets go of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from slothcore.cli import main
from slothcore.training import folder_lock
from slothcore.training.folder_lock import held
from tests.training.tiny import random_rows, train, write_model, write_records

HOLDER = """
import sys, time
from pathlib import Path
from slothcore.training.folder_lock import held

with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""

pytestmark = pytest.mark.skipif(folder_lock.fcntl is None, reason="this system locks no folders")


@pytest.fixture
def holder(tmp_path):
    """Another process that has tmp_path/run."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_process_is_refused_until_the_first_is_gone(holder, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"output_dir .*run belongs to a run that is under way; choose"):
        held(tmp_path / "run").__enter__()
    with held(tmp_path / "another"):
        pass
    holder.kill()
    holder.wait()
    for _ in range(2):
        with held(tmp_path / "run"):
            assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("flags", [[], ["--overwrite-output-dir"], ["--resume-from-checkpoint", "latest"]])
def test_a_run_that_is_under_way_is_neither_overwritten_nor_resumed(flags, tmp_path, capsys, request) -> None:
    write_model(tmp_path / "model")
    write_records(tmp_path / "data.jsonl", 4)
    words = ["train", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--device", "cpu"]
    words += ["--output-dir", str(tmp_path / "run"), "--plot=false"]
    assert main([*words, "--max-steps", "2"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    request.getfixturevalue("holder")
    capsys.readouterr()
    assert main([*words, "--max-steps", "3", *flags]) == 1
    assert "belongs to a run that is under way" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_from_python_too(holder, tmp_path) -> None:
    with pytest.raises(ValueError, match="belongs to a run that is under way"):
        train(tmp_path / "run", random_rows(4), max_steps=1)
    assert list((tmp_path / "run").iterdir()) == []


def test_what_was_made_for_nothing_is_deleted_again(tmp_path, monkeypatch) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    monkeypatch.chdir(tmp_path)

    def fail() -> None:
        with held(Path("mine/new/run")):
            assert Path("mine/new/run").is_dir()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with held(mine):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    with held(Path("mine/run")):
        Path("mine/run/log.jsonl").touch()
    assert Path("mine/run/log.jsonl").is_file()


def test_where_nothing_can_be_locked_the_run_goes_on(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with held(folder):
            pass

    def unsupported(handle: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folder_lock.fcntl, "flock", unsupported)
    with held(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
