"""A pass that does not fit: the step is done again as if nothing had been, in less memory, or the end is a sentence."""

import pytest
import torch

from slothcore.cli import main
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config
from slothcore.training import readiness
from slothcore.training.config import TrainConfig
from slothcore.training.memory import memory_of
from slothcore.training.micro_batches import GIB
from slothcore.training.optimizer_step import OptimizerStep
from slothcore.training.out_of_memory import DoesNotFit, remedy
from slothcore.training.run_state import checkpoints, read_state
from slothcore.training.trainer import SFTTrainer
from tests.training.tiny import CONFIG, QUIET, random_rows, tiny_model, train

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
    monkeypatch.setattr(readiness, "choose_decoded_layers", lambda *_: 2)
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
    trained = model(bits=4)
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


@pytest.mark.parametrize("memory_budget", [None, 1e-6])
def test_graphs_go_before_the_run_does(tmp_path, capsys, graphs, memory_budget) -> None:
    """Their pool is of no use to a pass outside of them. A run that goes on from there gives the same bits."""

    def trained(*, fails: bool) -> Decoder:
        model, passes = tiny_model(), []

        def full_beside_graphs(*_) -> None:
            passes.append(1)
            if fails and len(passes) > 3 and model.graphs is not None:
                raise torch.OutOfMemoryError("CUDA out of memory")

        model.register_forward_hook(full_beside_graphs)
        return model

    def run(name: str, *, fails: bool = True, **options):
        options = {**OPTIONS, "memory_budget": memory_budget, "lr_scheduler_type": "constant", **options}
        options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_steps": 3}
        return train(tmp_path / name, random_rows(8), trained(fails=fails), **options)[0]

    straight = run("straight", max_steps=6)
    said = [line for line in capsys.readouterr().out.splitlines() if "did not fit" in line]
    assert len(said) == 1
    assert said[0].endswith("; the step is done again, and from now on no graphs are replayed")
    run("halves", max_steps=3)
    assert read_state(checkpoints(tmp_path / "halves")[0]).graphs_given_up
    resumed = run("halves", fails=False, max_steps=6, resume_from_checkpoint="latest")
    assert same(straight, resumed)
    assert graphs[-1].replays == graphs[-1].padded == 0, "it goes on without them"


def test_bits_are_those_of_the_model_whoever_loaded_it() -> None:
    """In Python the model comes loaded, and `bits` of the configuration says nothing of it."""
    assert remedy(TrainConfig(), bits=16, rows=1, tokens=1).endswith("set bits to 4")
    assert "bits" not in remedy(TrainConfig(bits=16), bits=4, rows=1, tokens=1)


@pytest.mark.parametrize(
    ("batch_size", "way"), [(2, "lower per_device_eval_batch_size (2)"), (1, "lower max_seq_length")]
)
def test_an_evaluation_that_does_not_fit_ends_in_a_sentence(tmp_path, batch_size, way) -> None:
    trained = full_at(model(), 2)
    options = {"max_steps": 1, "per_device_eval_batch_size": batch_size, **OPTIONS, "gradient_accumulation_steps": 1}
    with pytest.raises(DoesNotFit, match=r"a batch of evaluation with \d+ tokens; ") as caught:
        train(tmp_path, random_rows(2), trained, eval_rows=random_rows(3), **options)
    assert str(caught.value).endswith(f"; {way}")
    assert trained.training


@pytest.mark.parametrize(
    ("options", "ways"),
    [
        ({}, "set optim to adamw_8bit, or lower r"),
        ({"optim": "adafactor"}, "lower r"),
        ({"full_finetuning": True}, "set optim to adamw_8bit, or train a LoRA adapter"),
    ],
)
def test_an_update_that_does_not_fit_ends_in_a_sentence(tmp_path, options, ways) -> None:
    trained = from_config(CONFIG, device="cpu") if "full_finetuning" in options else tiny_model()
    config = TrainConfig(output_dir=str(tmp_path), max_steps=1, bits=32, **options, **QUIET)
    trainer = SFTTrainer(trained, None, random_rows(8), config=config)

    def fail(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.optimizer.register_step_pre_hook(fail)
    with pytest.raises(DoesNotFit) as caught:
        trainer.train()
    count = sum(parameter.numel() for parameter in trainer.parameters.values())
    assert str(caught.value) == f"the GPU's memory does not take the update of {count:,} weights and its state; {ways}"


def test_lines_of_the_log_survive(tmp_path) -> None:
    """The step after a line fails for good: the line is there."""
    trained = full_at(model(), *range(9, 100))
    with pytest.raises(DoesNotFit):
        train(tmp_path, random_rows(8), trained, memory_budget=None, max_steps=4, **OPTIONS)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_the_command_ends_with_the_sentence(monkeypatch, capsys) -> None:
    sentence = remedy(TrainConfig(max_seq_length=512), bits=16, rows=1, tokens=4096)
    assert sentence.endswith("a pass of 1 row with 4,096 tokens; set gradient_checkpointing to mlp, offload or true, "
                             "lower max_seq_length (512), or set bits to 4")  # fmt: skip

    def fail(config) -> None:
        raise DoesNotFit(sentence)

    monkeypatch.setattr("slothcore.run.train_from_config", fail)
    assert main(["train", "--model", "a", "--data", "b"]) == 1
    assert capsys.readouterr().err == f"slothcore: error: {sentence}\n"
