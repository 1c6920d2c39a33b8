"""A pass that does not fit: the step is done again as if nothing had been, in less memory, or the end is a sentence."""

import pytest
import torch

from slothcore.cli import main
from slothcore.training import trainer as trainer_module
from slothcore.training.config import TrainConfig
from slothcore.training.memory import memory_of
from slothcore.training.micro_batches import GIB
from slothcore.training.optimizer_step import OptimizerStep
from slothcore.training.out_of_memory import DoesNotFit, remedy
from slothcore.training.run_state import checkpoints, read_state
from tests.training.tiny import random_rows, tiny_model, train

OPTIONS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 1e-2}


def budget_for(tokens: int) -> float:
    """GiB with which a pass of the model below may have this many tokens, and none more."""
    return memory_of(model(), optim="adamw").peak(tokens, passes=2) / GIB


def model(**options):
    return tiny_model(dropout=0.2, **options)


def full_at(trained, *passes: int):
    """Let these forward passes of a model fail, counted from 1, when all else of them has been done."""
    count = 0

    def fail(*_) -> None:
        nonlocal count
        count += 1
        if count in passes:
            raise torch.OutOfMemoryError("CUDA out of memory")

    trained.register_forward_hook(fail)
    return trained


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


def same(first, second) -> bool:
    ours, theirs = weights(first), weights(second)
    return all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_a_step_is_done_again_as_if_it_had_not_been_tried(tmp_path, capsys) -> None:
    """The second pass of the first step fails: the first has left gradients, both have drawn dropout."""
    rows = random_rows(24)
    failed, _, log = train(
        tmp_path / "failed", rows, full_at(model(), 2), memory_budget=budget_for(90), max_steps=4, **OPTIONS
    )
    said = [line for line in capsys.readouterr().out.splitlines() if "did not fit" in line]
    budget = failed.cut.token_budget
    assert 0 < budget <= 45
    (line,) = said
    assert line.endswith(f"did not fit; the step is done again, and from now on a pass has at most {budget}")
    expected, _, expected_log = train(
        tmp_path / "expected", rows, model(), memory_budget=budget_for(budget), max_steps=4, **OPTIONS
    )
    assert expected.cut.token_budget == budget
    assert same(failed, expected)
    assert [record["loss"] for record in log] == [record["loss"] for record in expected_log]


def test_the_new_cut_is_resumed(tmp_path) -> None:
    def run(name: str, trained, **options):
        options = {**OPTIONS, "save_steps": 3, "lr_scheduler_type": "constant", **options}
        return train(tmp_path / name, random_rows(24), trained, memory_budget=budget_for(90), **options)[0]

    straight = run("straight", full_at(model(), 2), max_steps=6)
    run("halves", full_at(model(), 2), max_steps=3)
    (checkpoint,) = checkpoints(tmp_path / "halves")
    assert read_state(checkpoint).token_budget == straight.cut.token_budget < 90
    resumed = run("halves", model(), max_steps=6, resume_from_checkpoint="latest")
    assert same(straight, resumed)


def test_passes_are_halved_as_often_as_it_takes(tmp_path) -> None:
    trained = model()

    def fail(module, arguments, options, output) -> None:
        if len(options["cu_seqlens"]) > 2:
            raise torch.OutOfMemoryError

    trained.register_forward_hook(fail, with_kwargs=True)
    trainer, result, _ = train(tmp_path, random_rows(8), trained, memory_budget=1.0, max_steps=2, **OPTIONS)
    assert result.steps == 2
    assert all(len(rows) == 1 for rows in trainer.cut.passes(range(8)))


def test_decoded_weights_go_before_passes_are_divided(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(trainer_module, "choose_decoded_layers", lambda *_: 2)
    trained = full_at(model(bits=4), 1)
    kept = []
    original = OptimizerStep.run

    def run(self, *arguments):
        kept.append(sum(getattr(m, "has_decoded", lambda _: False)(torch.float32) for m in self.model.modules()))
        return original(self, *arguments)

    monkeypatch.setattr(OptimizerStep, "run", run)
    trainer, _, _ = train(tmp_path, random_rows(8), trained, memory_budget=1.0, max_steps=2, save_steps=2, **OPTIONS)
    assert kept == [14, 0]
    assert len(trainer.cut.passes(range(8))) == 1, "passes stay as they are"
    assert read_state(checkpoints(tmp_path)[0]).decoded_layers == 0
    assert "; the step is done again, and from now on no decoded weights are kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "rows", "ways"),
    [
        (
            {"memory_budget": 1.0},
            1,
            "set gradient_checkpointing to mlp, offload or true, or lower max_seq_length (128)",
        ),
        ({"memory_budget": 1.0, "gradient_checkpointing": True}, 1, "lower max_seq_length (128)"),
        (
            {"memory_budget": None, "gradient_checkpointing": "mlp"},
            2,
            "set memory_budget to auto, lower per_device_train_batch_size (and raise gradient_accumulation_steps), "
            "set gradient_checkpointing to offload or true, or lower max_seq_length (128)",
        ),
    ],
)
def test_where_nothing_is_left_to_divide_the_end_is_a_sentence(tmp_path, options, rows, ways) -> None:
    trained = model()
    trained.register_forward_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(tmp_path, random_rows(8), trained, max_steps=1, max_seq_length=128, **{**OPTIONS, **options})
    assert isinstance(caught.value, DoesNotFit)
    text = str(caught.value)
    count = "1 row with " if rows == 1 else "2 rows with "
    assert text.startswith(f"the GPU's memory does not take a pass of {count}")
    assert text.endswith(f" tokens; {ways}")
    assert all(parameter.grad is None for parameter in trained.parameters())
    assert not (tmp_path / "adapter").exists()


def test_lines_of_the_log_survive(tmp_path) -> None:
    """The step after a line fails for good: the line is there."""
    trained = full_at(model(), *range(9, 100))
    with pytest.raises(DoesNotFit):
        train(tmp_path, random_rows(8), trained, memory_budget=None, max_steps=4, **OPTIONS)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_the_command_ends_with_the_sentence(monkeypatch, capsys) -> None:
    sentence = remedy(TrainConfig(bits=16, max_seq_length=512), rows=1, tokens=4096)
    assert sentence.endswith("a pass of 1 row with 4,096 tokens; set gradient_checkpointing to mlp, offload or true, "
                             "lower max_seq_length (512), or set bits to 4")  # fmt: skip

    def fail(config) -> None:
        raise DoesNotFit(sentence)

    monkeypatch.setattr("slothcore.cli.train_from_config", fail)
    assert main(["train", "--model", "a", "--data", "b"]) == 2
    assert capsys.readouterr().err == f"slothcore: error: {sentence}\n"
