"""The folder of a run: what is kept, what is refused, what is never touched."""

import resource

import pytest
import torch

from slothcore.training.optimizer_step import OptimizerStep
from slothcore.training.run_state import checkpoints
from tests.training.tiny import random_rows, train


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
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the adapter takes 32 kB
    try:
        with pytest.raises(OSError, match=r"checkpoint-2 cannot be written .*; make room") as caught:
            train(tmp_path, random_rows(8), max_steps=2, save_steps=1, resume_from_checkpoint="latest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".*"))
    of_this_run = {"config.yaml", "run.json", "report.html"}
    assert all(path.read_bytes() == content for path, content in before.items() if path.name not in of_this_run)


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
