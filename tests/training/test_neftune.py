"""NEFTune in a run: in its steps and nowhere else, the same at every call, and never in a graph."""

import copy

import pytest
import torch

from slothcore.training.config import TrainConfig
from slothcore.training.report import read_log
from slothcore.training.trainer import SFTTrainer
from tests.training.tiny import QUIET, random_rows, tiny_model, train

ROWS = random_rows(12)
OPTIONS = {"max_steps": 4, "learning_rate": 1e-3, "neftune_noise_alpha": 5.0}


def losses(log: list[dict]) -> list[float]:
    return [record["loss"] for record in log if "loss" in record]


def test_steps_have_noise_and_evaluations_none(tmp_path) -> None:
    model = tiny_model()
    plain = copy.deepcopy(model)
    trainer, result, log = train(tmp_path / "noisy", ROWS, model, eval_rows=random_rows(4, seed=1), **OPTIONS)
    assert model.neftune_noise_alpha is None, "no noise when the run is over"
    # What the first steps learned from had noise; what it came to is evaluated without.
    assert trainer.evaluate().loss == result.eval_loss
    _, _, without = train(tmp_path / "plain", ROWS, plain, **{**OPTIONS, "neftune_noise_alpha": None})
    assert all(a != b for a, b in zip(losses(log), losses(without), strict=True))
    assert losses(log)[0] == pytest.approx(losses(without)[0], rel=0.2)


def test_a_second_call_has_the_same_noise(tmp_path) -> None:
    model = tiny_model()
    start = copy.deepcopy(model.state_dict())
    config = TrainConfig(output_dir=str(tmp_path), overwrite_output_dir=True, **QUIET, **OPTIONS)
    trainer = SFTTrainer(model, None, ROWS, config=config)
    courses = []
    for _ in range(2):
        model.load_state_dict(start)
        trainer.train()
        courses.append(losses(read_log(tmp_path / "log.jsonl")))
    assert courses[0] == courses[1]
    assert len(courses[0]) == 4


def test_graphs_are_refused_with_the_reason(tmp_path, graphs) -> None:
    message = (
        "cuda_graphs is true, and cannot be: neftune_noise_alpha is set, and captures draw from its generator: "
        "a resumed run would see other noise; set it to null or false"
    )
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "asked", ROWS, cuda_graphs=True, **OPTIONS)
    _, _, log = train(tmp_path / "left", ROWS, **OPTIONS)
    _, _, eager = train(tmp_path / "eager", ROWS, cuda_graphs=False, **OPTIONS)
    assert losses(log) == losses(eager)
    assert not any(made.replays or made.padded for made in graphs)


def test_a_model_says_why_its_pass_is_no_graph(graphs) -> None:
    model = tiny_model().train()
    model.enable_graphs()
    ids = torch.arange(20)
    assert graphs[0].why_not() is None
    model.neftune_noise_alpha = 5.0
    model(ids, labels=ids).loss.backward()
    assert graphs[0].reason is not None
    assert graphs[0].reason.startswith("neftune_noise_alpha is set")
    model.neftune_noise_alpha = None
    assert graphs[0].why_not() is None
