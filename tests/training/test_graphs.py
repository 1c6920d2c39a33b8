"""Training through graphs. On a CPU each graph is its Python run again, which is what a graph has to equal."""

import pytest
import torch

from slothcore.training.optimizer_step import OptimizerStep
from tests.training.tiny import random_rows, tiny_model, train

STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


def test_graphs_change_nothing_but_rounding(tmp_path, graphs) -> None:
    runs = {}
    for name, chosen in (("eager", False), ("null", None), ("true", True)):
        runs[name] = train(tmp_path / name, random_rows(16), max_steps=8, cuda_graphs=chosen, **STEP)
    assert runs["eager"][0].replays_graphs is False
    assert graphs[1].replays > 0
    for name in ("null", "true"):
        for ours, theirs in zip(runs[name][2], runs["eager"][2], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        expected = weights(runs["eager"][0])
        for weight, value in weights(runs[name][0]).items():
            assert torch.allclose(value, expected[weight], rtol=1e-3, atol=2e-5), weight


def test_a_resumed_run_gives_the_same_bits(tmp_path, graphs) -> None:
    """What was captured before is not part of a checkpoint."""
    options = {"save_steps": 5, "lr_scheduler_type": "constant", "max_grad_norm": 0.01, **STEP}
    straight, _, _ = train(tmp_path / "straight", random_rows(16), max_steps=10, **options)
    train(tmp_path / "halves", random_rows(16), max_steps=5, **options)
    resumed, _, _ = train(
        tmp_path / "halves", random_rows(16), max_steps=10, resume_from_checkpoint="latest", **options
    )
    assert graphs[-1].replays > 0
    expected = weights(straight)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


def test_long_passes_are_measured_by_the_same_vector(tmp_path, graphs, monkeypatch) -> None:
    """A step of which graphs run a part, and Python the rest: gradients meet in one place."""
    seen = []
    original = OptimizerStep._clip

    def clip(self):
        norm = original(self)
        seen.append((self.flat.is_attached(), self.flat.groups[0].gradients_vector.norm().item(), norm.item()))
        return norm

    monkeypatch.setattr(OptimizerStep, "_clip", clip)
    train(tmp_path, random_rows(16), max_steps=4, graph_tokens=50, max_grad_norm=0.0, **STEP)
    assert graphs[-1].eager > 0
    assert graphs[-1].replays + graphs[-1].padded > 0
    for attached, of_vector, norm in seen:
        assert attached
        assert norm == pytest.approx(of_vector, rel=1e-6)


def test_what_trains_outside_of_the_layers_trains_too(tmp_path, graphs) -> None:
    logs = []
    for chosen in (False, True):
        model = tiny_model()
        model.lm_head.weight.requires_grad_(True)
        trainer, _, log = train(tmp_path / str(chosen), random_rows(16), model, max_steps=3, cuda_graphs=chosen, **STEP)
        assert "lm_head.weight" in trainer.parameters
        logs.append(log)
    assert graphs[-1].flat is not None
    for eager, replayed in zip(*logs, strict=True):
        assert replayed["grad_norm"] == pytest.approx(eager["grad_norm"], rel=1e-4)
        assert replayed["loss"] == pytest.approx(eager["loss"], rel=1e-5)


def test_the_model_is_given_back_as_it_was(tmp_path, graphs) -> None:
    trainer, _, _ = train(tmp_path, random_rows(8), max_steps=2, **STEP)
    assert trainer.replays_graphs
    assert trainer.model.graphs is None
    assert all(parameter.grad is None for parameter in trainer.parameters.values())


def test_the_configuration_decides_and_not_what_the_model_came_with(tmp_path, graphs) -> None:
    model = tiny_model()
    model.enable_graphs()
    train(tmp_path, random_rows(8), model, max_steps=2, cuda_graphs=False, **STEP)
    assert graphs[0].replays == graphs[0].padded == 0


@pytest.mark.parametrize(
    ("options", "model", "obstacle"),
    [
        ({}, {"dropout": 0.1}, "LoRA dropout draws its seed on the host"),
        ({"gradient_checkpointing": "offload"}, {}, 'gradient_checkpointing is "offload"'),
    ],
)
def test_a_model_that_allows_no_graphs(tmp_path, graphs, options, model, obstacle) -> None:
    """Asked for, they are an error; by default the run goes without."""
    with pytest.raises(ValueError, match=r"cuda_graphs is true, and cannot be: .*; set it to null or false") as caught:
        train(tmp_path / "asked", random_rows(4), tiny_model(**model), max_steps=1, cuda_graphs=True, **options)
    assert obstacle in str(caught.value)
    assert not (tmp_path / "asked").exists()
    trainer, _, _ = train(tmp_path / "default", random_rows(4), tiny_model(**model), max_steps=1, **options)
    assert not trainer.replays_graphs


def test_graphs_need_a_gpu(tmp_path, capsys) -> None:
    with pytest.raises(ValueError, match="cuda_graphs is true, and cannot be: the model is on cpu"):
        train(tmp_path / "asked", random_rows(4), max_steps=1, cuda_graphs=True)
    trainer, _, _ = train(tmp_path / "default", random_rows(4), max_steps=1)
    assert not trainer.replays_graphs
    assert "CUDA" not in capsys.readouterr().out
