"""Early stopping and the best checkpoint: counted as transformers counts, kept, brought back, exact over a resume."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slothcore.models.load import from_config
from slothcore.run import train_from_config
from slothcore.training.best import count_evaluation, has_stopped_improving
from slothcore.training.config import TrainConfig
from slothcore.training.evaluation import EvalResult
from slothcore.training.optimizer_step import OptimizerStep
from slothcore.training.report import read_log
from slothcore.training.run_state import RunState, checkpoints, read_state
from slothcore.training.trainer import SFTTrainer
from tests.training.tiny import CONFIG, QUIET, random_rows, tiny_model, train, write_model, write_records

CLOCK = {"elapsed", "tokens_per_second", "host_memory_gib"}


class Killed(BaseException):
    """The process is gone."""


def state() -> RunState:
    return RunState(model_fingerprint="", data_fingerprint="", config={})


@pytest.fixture
def scripted(monkeypatch):
    """Lets evaluations of a run give these losses, one after the other; gives the weights that each of them saw."""

    def script(*losses: float) -> list[dict[str, torch.Tensor]]:
        seen: list[dict[str, torch.Tensor]] = []

        def evaluate(self: SFTTrainer) -> EvalResult:
            seen.append({name: weight.detach().clone() for name, weight in self.parameters.items()})
            return EvalResult(losses[len(seen) - 1], 10)

        monkeypatch.setattr(SFTTrainer, "evaluate", evaluate)
        return seen

    return script


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("patience", [1, 3])
def test_evaluations_are_counted_as_transformers_counts(threshold, patience) -> None:
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

    arguments = TrainingArguments(output_dir="unused", metric_for_best_model="loss", greater_is_better=False)
    callback = EarlyStoppingCallback(patience, threshold)
    theirs, control, ours = TrainerState(), TrainerControl(), state()
    config = TrainConfig(eval_steps=1, early_stopping_patience=patience, early_stopping_threshold=threshold)
    generator, ends = random.Random(7), []
    for step in range(1, 200):
        # Slow progress with ties and relapses.
        loss = round(3 - step / 100 + generator.uniform(-0.2, 0.2), 2)
        ours.step, control.should_training_stop = step, False
        is_best = count_evaluation(ours, loss, threshold=threshold)
        callback.on_evaluate(arguments, theirs, control, {"eval_loss": loss})
        assert is_best == (theirs.best_metric is None or loss < theirs.best_metric)
        if is_best:
            theirs.best_metric, theirs.best_global_step = loss, step
        assert ours.evaluations_without_improvement == callback.early_stopping_patience_counter
        assert has_stopped_improving(ours, config) == control.should_training_stop
        assert (ours.best_step, ours.best_eval_loss) == (theirs.best_global_step, theirs.best_metric)
        ends.append(control.should_training_stop)
    assert set(ends) == {True, False}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_is_no_number_is_never_the_best(loss) -> None:
    run = state()
    assert not count_evaluation(run, loss, threshold=0.0)
    assert run.best_step is None
    assert run.evaluations_without_improvement == 1
    assert count_evaluation(run, 2.0, threshold=0.5)
    assert run.evaluations_without_improvement == 0


def test_a_run_ends_when_evaluations_do_not_improve(tmp_path, scripted, capsys) -> None:
    scripted(3.0, 2.0, 1.99, 2.5, 1.5)
    options = {"max_steps": 30, "eval_steps": 2, "early_stopping_patience": 2, "early_stopping_threshold": 0.1}
    _, result, log = train(tmp_path, random_rows(16), eval_rows=random_rows(4, seed=1), save_steps=100, **options)
    assert (result.steps, result.best_step, result.stopped_early, result.interrupted) == (8, 6, True, False)
    assert result.eval_loss == 2.5
    assert [record["step"] for record in log if "eval_loss" in record] == [2, 4, 6, 8]
    assert result.path == tmp_path / "adapter"
    # It is an end like any other: with a checkpoint, because there are to be some.
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-8"]
    notes = json.loads((tmp_path / "run.json").read_text())
    assert notes["status"] == "finished"
    sentence = (
        "early stopping after step 8: 2 evaluations in a row without an improvement of more than 0.1; "
        "the lowest loss was 1.99, at step 6"
    )
    assert notes["early_stop"] == sentence
    assert sentence in capsys.readouterr().out


def test_an_early_end_leaves_no_step_out_of_the_log(tmp_path, scripted) -> None:
    scripted(1.0, 2.0)
    options = {"max_steps": 30, "eval_steps": 3, "early_stopping_patience": 1, "logging_steps": 4}
    _, result, log = train(tmp_path, random_rows(16), eval_rows=random_rows(4, seed=1), **options)
    assert result.stopped_early
    lines = [record for record in log if "loss" in record]
    assert [record["step"] for record in lines] == [4, 6]
    assert (4 * lines[0]["loss"] + 2 * lines[1]["loss"]) / 6 == pytest.approx(result.train_loss)


def test_patience_that_runs_out_at_the_last_step_is_no_early_end(tmp_path, scripted) -> None:
    scripted(1.0, 2.0)
    rows = random_rows(4, seed=1)
    _, result, _ = train(tmp_path, random_rows(8), None, rows, max_steps=4, eval_steps=2, early_stopping_patience=1)
    assert (result.steps, result.stopped_early) == (4, False)


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
def test_the_result_is_that_of_the_best_evaluation(tmp_path, scripted, full, capsys) -> None:
    seen = scripted(3.0, 1.0, 2.0, 0.9, 1.5, 1.2)
    torch.manual_seed(0)
    model = from_config(CONFIG, bits=32, dtype=torch.float32, device="cpu") if full else None
    options = {"full_finetuning": True, "bits": 32} if full else {}
    trainer, result, _ = train(
        tmp_path,
        random_rows(24),
        model,
        random_rows(4, seed=1),
        max_steps=12,
        eval_steps=2,
        save_steps=5,
        save_total_limit=1,
        learning_rate=1e-2,
        load_best_model_at_end=True,
        **options,
    )
    assert (result.steps, result.best_step, result.eval_loss) == (12, 8, 0.9)
    assert result.eval_perplexity == pytest.approx(math.exp(0.9))
    # The newest, and the best, which is no checkpoint of save_steps.
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-12"]
    best = seen[3]
    for name, weight in trainer.parameters.items():
        assert torch.equal(weight, best[name]), name
        assert not torch.equal(best[name], seen[-1][name]), name
    name = "model.safetensors" if full else "adapter_model.safetensors"
    saved, kept = load_file(result.path / name), load_file(tmp_path / "checkpoint-8" / name)
    assert saved.keys() == kept.keys()
    assert all(torch.equal(saved[key], kept[key]) for key in saved)
    notes = json.loads((tmp_path / "run.json").read_text())
    assert (notes["best_step"], notes["best_is_saved"]) == (8, True)
    assert "the result is that of step 8, whose evaluation loss 0.9 is the lowest" in capsys.readouterr().out


def test_a_checkpoint_is_written_at_each_new_best_only(tmp_path, scripted) -> None:
    scripted(3.0, 2.0, 2.5, 1.0, 1.0)
    options = {"max_steps": 5, "eval_steps": 1, "save_steps": 0, "save_total_limit": None}
    rows = random_rows(8), None, random_rows(4, seed=1)
    train(tmp_path, *rows, **options, load_best_model_at_end=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]


def test_the_evaluation_before_training_is_shown_and_never_the_best(tmp_path, scripted) -> None:
    scripted(0.5, 3.0, 2.0)
    rows = random_rows(8), None, random_rows(4, seed=1)
    _, result, log = train(tmp_path, *rows, max_steps=2, eval_steps=1, eval_on_start=True, load_best_model_at_end=True)
    evaluations = [(record["step"], record["eval_loss"]) for record in log if "eval_loss" in record]
    assert evaluations == [(0, 0.5), (1, 3.0), (2, 2.0)]
    assert result.best_step == 2


def test_evaluating_before_training_finds_the_untouched_model(tmp_path) -> None:
    rows = random_rows(6, seed=1)
    trainer, _, log = train(tmp_path, random_rows(8), None, rows, max_steps=1, eval_on_start=True)
    config = TrainConfig(output_dir=str(tmp_path / "untouched"), **QUIET)
    untouched = SFTTrainer(tiny_model(), None, random_rows(8), rows, config)
    assert log[0]["step"] == 0
    assert log[0]["eval_loss"] == untouched.evaluate().loss
    assert log[0]["eval_loss"] != trainer.evaluate().loss


def test_a_lost_best_checkpoint_does_not_cost_the_result(tmp_path, monkeypatch, scripted, capsys) -> None:
    seen = scripted(1.0, 2.0)

    def lose(*arguments: object) -> None:
        shutil.rmtree(tmp_path / "checkpoint-1", ignore_errors=True)

    original = OptimizerStep.run
    monkeypatch.setattr(OptimizerStep, "run", lambda *arguments: (lose(), original(*arguments))[1])
    rows = random_rows(8), None, random_rows(4, seed=1)
    trainer, result, _ = train(tmp_path, *rows, max_steps=2, eval_steps=1, load_best_model_at_end=True)
    assert result.path.is_dir()
    assert all(torch.equal(weight, seen[-1][name]) for name, weight in trainer.parameters.items())
    assert "the checkpoint of the best evaluation is gone; the result is that of step 2" in capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("best")
    write_model(folder / "model")
    write_records(folder / "data.jsonl", 40)
    return folder


def options(folder: Path, output: str, **changes) -> dict:
    """A run that learns its rows by heart, so that the held-out loss falls and rises again."""
    return {
        "model": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "device": "cpu",
        "bits": 32,
        "r": 8,
        "lora_dropout": 0.1,
        "output_dir": str(folder / output),
        "max_seq_length": 128,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 60,
        "logging_steps": 3,
        "save_steps": 10,
        "save_total_limit": 1,
        "eval_fraction": 0.2,
        "eval_steps": 4,
        "early_stopping_patience": 3,
        "load_best_model_at_end": True,
        "sample_prompts": ["Add 1 and 7.", "Add 2 and 1."],
        "sample_max_new_tokens": 4,
        "plot": False,
        "disable_tqdm": True,
        **changes,
    }


def lines(path: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in read_log(path)]


KINDS = {
    "adapter": {},
    "all weights": {"full_finetuning": True, "learning_rate": 3e-3, "lora_dropout": 0.0},
    # A base that the adapter has changed, and one in 4 bits.
    "pissa": {"init_lora_weights": "pissa", "learning_rate": 1e-2},
    "dora in nf4": {"use_dora": True, "bits": 4},
    "new tokens": {"new_tokens": ["<a>", "<b>"], "modules_to_save": ["embed_tokens", "lm_head"], "learning_rate": 5e-3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_it_ends_at_the_same_step_with_the_same_result(folder, kind, monkeypatch) -> None:
    full = KINDS[kind]
    whole, killed = folder / f"whole {kind}", folder / f"killed {kind}"
    expected = train_from_config(TrainConfig(**options(folder, whole.name, **full)))
    assert expected.stopped_early
    assert expected.best_step is not None
    # The best lies before the end, and is no step of save_steps alone.
    assert expected.best_step < expected.steps < 60

    # Killed twice: before the best, and between the best and the end.
    original, deadlines = OptimizerStep.run, [expected.best_step - 1, expected.steps - 1]
    for deadline in deadlines:
        count = [read_state(found[-1]).step if (found := checkpoints(killed)) else 0]

        def run(*arguments: object, deadline: int = deadline, count: list[int] = count):
            count[0] += 1
            if count[0] > deadline:
                raise Killed
            return original(*arguments)

        monkeypatch.setattr(OptimizerStep, "run", run)
        resumed = {"resume_from_checkpoint": "latest"} if checkpoints(killed) else {"overwrite_output_dir": True}
        with pytest.raises(Killed):
            train_from_config(TrainConfig(**options(folder, killed.name, **full, **resumed)))
    monkeypatch.setattr(OptimizerStep, "run", original)
    assert expected.best_step in [read_state(path).step for path in checkpoints(killed)]
    again = TrainConfig(**options(folder, killed.name, **full, resume_from_checkpoint="latest"))
    actual = train_from_config(again)

    for name in ("steps", "best_step", "eval_loss", "stopped_early", "tokens", "train_loss"):
        assert getattr(actual, name) == getattr(expected, name), name
    assert [p.name for p in checkpoints(killed)] == [p.name for p in checkpoints(whole)]
    parts = [path.relative_to(whole) for path in whole.rglob("*.safetensors")]
    assert len(parts) == 2 * 3 + 1
    for part in parts:
        expected_tensors, tensors = load_file(whole / part), load_file(killed / part)
        assert tensors.keys() == expected_tensors.keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in expected_tensors.items()), part
    assert lines(whole / "log.jsonl") == lines(killed / "log.jsonl")
    assert (whole / "samples.jsonl").read_text() == (killed / "samples.jsonl").read_text()
    states = [read_state(checkpoints(path)[-1]) for path in (whole, killed)]
    for one in states:
        one.config, one.elapsed, one.rows_made = {}, 0.0, None
    assert states[0] == states[1]


def test_killed_before_the_result_was_saved_it_only_saves_it(folder, monkeypatch, capsys) -> None:
    expected = train_from_config(TrainConfig(**options(folder, "saved")))
    result = (expected.path / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(expected.path)
    monkeypatch.setattr(OptimizerStep, "run", lambda *_: pytest.fail("a step was done"))
    config = TrainConfig(**options(folder, "saved", resume_from_checkpoint="latest"))
    actual = train_from_config(config)
    assert (actual.steps, actual.best_step, actual.stopped_early) == (expected.steps, expected.best_step, True)
    assert (actual.path / "adapter_model.safetensors").read_bytes() == result
    assert "to go on, raise early_stopping_patience" in capsys.readouterr().out


def test_going_on_in_another_folder_brings_the_best_along(folder, capsys) -> None:
    expected = train_from_config(TrainConfig(**options(folder, "first")))
    newest = checkpoints(folder / "first")[-1]
    config = TrainConfig(
        **options(
            folder,
            "second",
            resume_from_checkpoint=str(newest),
            early_stopping_patience=4,
            max_steps=expected.steps + 4,
        )
    )
    result = train_from_config(config)
    assert result.steps == expected.steps + 4
    assert result.best_step == expected.best_step
    assert expected.best_step in [read_state(path).step for path in checkpoints(folder / "second")]
    weights = [path / "adapter" / "adapter_model.safetensors" for path in (folder / "first", folder / "second")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    samples = [read_log(folder / name / "samples.jsonl") for name in ("first", "second")]
    assert samples[1][: len(samples[0])] == samples[0]
    assert "which has the lowest evaluation loss until now" in capsys.readouterr().out


def test_resuming_without_the_best_checkpoint_looks_for_the_best_anew(folder, capsys) -> None:
    expected = train_from_config(TrainConfig(**options(folder, "robbed")))
    shutil.rmtree(folder / "robbed" / f"checkpoint-{expected.best_step}")
    changes = {"early_stopping_patience": 6, "max_steps": expected.steps + 4, "resume_from_checkpoint": "latest"}
    result = train_from_config(TrainConfig(**options(folder, "robbed", **changes)))
    assert result.best_step == expected.steps + 4
    assert "is gone; the best is looked for from here on" in capsys.readouterr().out


def test_losses_on_other_data_are_not_compared(folder, tmp_path, capsys) -> None:
    first, other = (write_records(tmp_path / f"{count}.jsonl", count) for count in (4, 3))
    shared = {"eval_fraction": 0.0, "early_stopping_patience": None}
    train_from_config(TrainConfig(**options(folder, "switched", eval_data=str(first), max_steps=8, **shared)))
    changes = {"eval_data": str(other), "max_steps": 12, "resume_from_checkpoint": "latest"}
    result = train_from_config(TrainConfig(**options(folder, "switched", **shared, **changes)))
    assert "the evaluation data are not those of the checkpoint" in capsys.readouterr().out
    assert result.best_step == 12


@pytest.mark.parametrize("name", ["eval_on_start", "eval_steps"])
def test_evaluating_needs_data_to_evaluate_on(tmp_path, name) -> None:
    config = TrainConfig(output_dir=str(tmp_path / "run"), **{name: True if name == "eval_on_start" else 5})
    with pytest.raises(ValueError, match=rf"{name} is (true|5), but there is no evaluation data; give eval_data"):
        SFTTrainer(from_config(CONFIG, device="cpu"), None, random_rows(4), config=config)
    assert not (tmp_path / "run").exists()
