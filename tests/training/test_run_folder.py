"""The folder of a run: what is kept, what is refused, what is never touched."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from slothcore.models.load import from_config
from slothcore.training import trainer
from slothcore.training.config import TrainConfig
from slothcore.training.optimizer_step import OptimizerStep
from slothcore.training.report import rewind_log
from slothcore.training.run_folder import Source, find_source
from slothcore.training.run_state import checkpoints
from tests.training.tiny import CONFIG, random_rows, train

WHOLE = {"full_finetuning": True, "bits": 32}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full once a file has so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_only_the_newest_checkpoints_are_kept(tmp_path) -> None:
    train(tmp_path, random_rows(8), max_steps=7, save_steps=2, save_total_limit=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-7"]
    assert not list(tmp_path.glob(".*"))


def test_a_second_run_does_not_overwrite_the_first(tmp_path) -> None:
    train(tmp_path, random_rows(4), max_steps=1)
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="already holds a run; choose another folder"):
        train(tmp_path, random_rows(4), max_steps=1)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    _, _, log = train(tmp_path, random_rows(4), max_steps=2, overwrite_output_dir=True)
    assert [record["step"] for record in log] == [1, 2]


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoints_alone(tmp_path) -> None:
    train(tmp_path, random_rows(8), max_steps=1, save_steps=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "log" not in path.name}
    with (
        files_of_at_most(20_000),  # the adapter takes 32 kB
        pytest.raises(OSError, match=r"checkpoint-2 cannot be written .*; make room") as caught,
    ):
        train(tmp_path, random_rows(8), max_steps=2, save_steps=1, resume_from_checkpoint="latest")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".*"))
    of_this_run = {"config.yaml", "run.json", "report.html"}
    assert all(path.read_bytes() == content for path, content in before.items() if path.name not in of_this_run)


def test_a_resumed_run_that_cannot_begin_leaves_its_options_and_its_log(tmp_path) -> None:
    train(tmp_path, random_rows(8), max_steps=2, save_steps=1)
    before = {name: (tmp_path / name).read_bytes() for name in ("config.yaml", "log.jsonl")}
    assert all(len(content) > 400 for content in before.values())
    with (
        files_of_at_most(400),
        pytest.raises(OSError, match=r"^\S+config.yaml cannot be written \(.*\); make room, or check the disk$"),
    ):
        train(tmp_path, random_rows(8), max_steps=3, resume_from_checkpoint="latest")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    with files_of_at_most(len(before["log.jsonl"]) - 100), pytest.raises(OSError, match=r"log\.jsonl cannot be"):
        rewind_log(tmp_path / "log.jsonl", tmp_path / "log.jsonl", 2)
    assert (tmp_path / "log.jsonl").read_bytes() == before["log.jsonl"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_log_that_cannot_be_written_is_named_and_the_run_is_noted_as_failed(tmp_path, monkeypatch) -> None:
    full, opened = OSError(errno.ENOSPC, "No space left on device"), Path.open

    def open_log(self, *arguments, **options):
        file = opened(self, *arguments, **options)
        if self.name == "log.jsonl" and arguments == ("a",):
            file = mock.Mock(wraps=file, flush=mock.Mock(side_effect=full), close=mock.Mock(side_effect=full))
        return file

    monkeypatch.setattr(Path, "open", open_log)
    with pytest.raises(OSError, match=r"log.jsonl cannot be written \(.*No space left.*\); make room"):
        train(tmp_path, random_rows(8), max_steps=2)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


def test_a_picture_that_cannot_be_written_costs_no_result(tmp_path, monkeypatch, capsys) -> None:
    figure = pytest.importorskip("matplotlib.figure")

    def full(self, path, **options) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", full)
    train(tmp_path, random_rows(8), max_steps=1, plot=True)
    assert "loss.png was not drawn: [Errno 28] No space left on device" in capsys.readouterr().out
    assert not (tmp_path / "loss.png").exists()
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"


def test_a_run_that_failed_before_its_first_line_is_in_nobodys_way(tmp_path, monkeypatch) -> None:
    def no_memory(self, *arguments) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(OptimizerStep, "run", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            train(tmp_path, random_rows(4), max_steps=1)
    train(tmp_path, random_rows(4), max_steps=1)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["adapter", "model"])
def test_a_folder_of_the_user_is_not_taken_for_a_result(tmp_path, name, overwrite) -> None:
    mine = tmp_path / name / "mine"
    mine.parent.mkdir()
    mine.write_text("precious")
    with pytest.raises(ValueError, match=f"holds {name}, which is of no run; choose another folder"):
        train(tmp_path, random_rows(4), max_steps=1, overwrite_output_dir=overwrite)
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("where", ["model", "adapter", "checkpoint-1"])
def test_the_base_model_is_not_where_the_run_would_replace_it(tmp_path, where) -> None:
    (tmp_path / where).mkdir()
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"lies in output_dir .*, where this run would replace it"):
        train(tmp_path, random_rows(4), max_steps=1, overwrite_output_dir=True, model_name=str(tmp_path / where))
    assert (tmp_path / where).is_dir()


def test_a_result_that_the_run_has_gone_beyond_is_not_taken_in_silence(tmp_path, monkeypatch) -> None:
    rows, result = random_rows(8), tmp_path / "adapter"
    train(tmp_path, rows, max_steps=2, save_steps=1)
    assert find_source(tmp_path) == Source(str(result), TrainConfig.from_yaml(tmp_path / "config.yaml"))
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "save_result", mock.Mock(side_effect=OSError("full")))
        with pytest.raises(OSError, match="full"):
            train(tmp_path, rows, max_steps=3, save_steps=1, resume_from_checkpoint="latest")
    source, newest = find_source(tmp_path), tmp_path / "checkpoint-3"
    assert source.path == str(result)
    expected = f"{result} is used, which the run saved before it went on; {newest} is newer: name that to use it"
    assert source.note == expected
    shutil.move(result, tmp_path / "before")
    source = find_source(tmp_path)
    assert (source.path, source.note) == (str(newest), f"the run {tmp_path} has no result yet; {newest} is used")

    train(tmp_path, rows, max_steps=3, save_steps=1, resume_from_checkpoint="latest")
    # As in a copy of the folder, whose files have other times.
    os.utime(result, (0, 0))
    assert (find_source(tmp_path).path, find_source(tmp_path).note) == (str(result), None)


def test_a_checkpoint_that_is_gone_is_not_looked_for_on_the_hub(tmp_path) -> None:
    train(tmp_path / "run", random_rows(8), max_steps=3, save_steps=1, save_total_limit=2)
    has = "the run .*run has adapter, checkpoint-2, checkpoint-3$"
    with pytest.raises(ValueError, match=rf"checkpoint-1 does not exist; {has}"):
        find_source(tmp_path / "run" / "checkpoint-1")
    assert find_source("run/checkpoint-1").config is None


@pytest.mark.parametrize("name", ["model", "checkpoint-1"])
def test_the_model_of_a_run_has_its_options_by_its_own_name_too(tmp_path, name) -> None:
    """Trained in 16 or 32 bits, it would be read with 4, the default of a plain model."""
    train(tmp_path, random_rows(4), from_config(CONFIG, bits=32, device="cpu"), max_steps=1, save_steps=1, **WHOLE)
    config = TrainConfig.from_yaml(tmp_path / "config.yaml")
    assert config.bits == 32
    assert find_source(tmp_path / name).config == find_source(tmp_path).config == config
    shutil.copytree(tmp_path / "model", tmp_path / "mine")
    assert find_source(tmp_path / "mine").config is None
