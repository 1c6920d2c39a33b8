"""Lines of the log, one step late: in their order, with the same values, and none lost."""

import json
from pathlib import Path

import pytest
import torch

from slothcore.training import trainer as trainer_module
from slothcore.training.meter import Mark
from slothcore.training.optimizer_step import OptimizerStep
from slothcore.training.report import read_log
from slothcore.training.run_state import checkpoints, read_state
from tests.training.tiny import random_rows, tiny_model, train

CLOCK = {"elapsed", "tokens_per_second", "host_memory_gib"}


@pytest.fixture
def slow_device(monkeypatch) -> None:
    """A device that has never got there unless it is waited for, as a GPU with work to do."""
    monkeypatch.setattr(Mark, "passed", lambda self: False)


def records(folder: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in read_log(folder / "log.jsonl")]


def run(folder: Path, **options):
    evaluation = {"eval_rows": random_rows(3, seed=1), "eval_steps": 2}
    return train(folder, random_rows(16), tiny_model(dropout=0.1), **evaluation, max_steps=5, **options)


@pytest.mark.parametrize("logging_steps", [1, 2, 3])
def test_the_log_is_what_it_would_be_at_once(tmp_path, monkeypatch, logging_steps) -> None:
    _, at_once, _ = run(tmp_path / "at once", logging_steps=logging_steps, save_steps=3)
    monkeypatch.setattr(Mark, "passed", lambda self: False)
    _, late, _ = run(tmp_path / "late", logging_steps=logging_steps, save_steps=3)
    assert records(tmp_path / "late") == records(tmp_path / "at once")
    keys = [[*record] for record in read_log(tmp_path / "late" / "log.jsonl") if "loss" in record]
    clock = ["tokens_per_second", "elapsed", "host_memory_gib"]
    assert keys[0] == ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", *clock]
    assert late.train_loss == at_once.train_loss
    ours, theirs = ([read_state(path) for path in checkpoints(tmp_path / name)] for name in ("late", "at once"))
    assert len(ours) == 2
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.window_loss, mine.window_steps, mine.logged_loss) == (
            other.window_loss,
            other.window_steps,
            other.logged_loss,
        )


@pytest.mark.usefixtures("slow_device")
def test_a_line_is_read_while_the_next_step_runs(tmp_path, monkeypatch) -> None:
    written = []
    original = OptimizerStep.run

    def watched(self, *arguments):
        before = len(read_log(tmp_path / "log.jsonl"))
        result = original(self, *arguments)
        written.append((before, len(read_log(tmp_path / "log.jsonl"))))
        return result

    monkeypatch.setattr(OptimizerStep, "run", watched)
    train(tmp_path, random_rows(8), max_steps=4)
    assert written == [(0, 0), (0, 0), (1, 1), (2, 2)]
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4]


def test_a_line_that_is_ready_is_written_at_once(tmp_path, monkeypatch) -> None:
    """As all are on a CPU."""
    written = []
    original = OptimizerStep.run
    monkeypatch.setattr(
        OptimizerStep,
        "run",
        lambda *arguments: (written.append(len(read_log(tmp_path / "log.jsonl"))), original(*arguments))[1],
    )
    train(tmp_path, random_rows(8), max_steps=3)
    assert written == [0, 1, 2]


@pytest.mark.usefixtures("slow_device")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_ends_a_run_takes_no_line_with_it(tmp_path, monkeypatch, error) -> None:
    original, steps = OptimizerStep.run, []

    def interrupted(self, *arguments):
        steps.append(1)
        if len(steps) == 3:
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(OptimizerStep, "run", interrupted)
    with pytest.raises(error):
        train(tmp_path, random_rows(8), max_steps=5)
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [1, 2]


@pytest.mark.usefixtures("slow_device")
def test_lines_are_written_before_evaluation_and_checkpoint(tmp_path, monkeypatch) -> None:
    found = []

    def note(name):
        original = getattr(trainer_module, name)

        def noting(*arguments, **options):
            found.append((name, [record["step"] for record in read_log(tmp_path / "log.jsonl")]))
            return original(*arguments, **options)

        monkeypatch.setattr(trainer_module, name, noting)

    note("evaluate")
    note("write_checkpoint")
    run(tmp_path, save_steps=2)
    # An evaluation has a line of its own.
    assert found == [
        ("evaluate", [1, 2]),
        ("write_checkpoint", [1, 2, 2]),
        ("evaluate", [1, 2, 2, 3, 4]),
        ("write_checkpoint", [1, 2, 2, 3, 4, 4]),
        ("evaluate", [1, 2, 2, 3, 4, 4, 5]),
        ("write_checkpoint", [1, 2, 2, 3, 4, 4, 5, 5]),
    ]


@pytest.mark.usefixtures("slow_device")
def test_a_loss_that_is_no_number_is_in_no_line_and_no_checkpoint(tmp_path) -> None:
    model = tiny_model()
    weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    count = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        count.append(1)
        return gradient * (float("nan") if len(count) > 2 else 1.0)

    weight.register_hook(spoil)
    with pytest.raises(ValueError, match="the loss or its gradient is no longer finite"):
        train(tmp_path, random_rows(8), model, max_steps=6, save_steps=1, gradient_accumulation_steps=1)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "adapter").exists()


def test_nothing_is_evaluated_when_the_loss_of_a_line_to_come_is_no_number(tmp_path) -> None:
    """The line is due at step 4, evaluation before: it would write a NaN that is no JSON."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.lora_B.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss or its gradient is no longer finite"):
        train(tmp_path, random_rows(8), model, random_rows(2), max_steps=6, eval_steps=1, logging_steps=4)
    assert (tmp_path / "log.jsonl").read_text() == ""
