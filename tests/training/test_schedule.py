"""Learning rates equal transformers' to the last bit."""

from typing import Any

import pytest
import torch
from transformers import get_scheduler

from slothcore.training.config import TrainConfig
from slothcore.training.schedule import (
    KWARGS,
    check_steps,
    checked_kwargs,
    learning_rate_factor,
    resolve_warmup_steps,
)
from tests.training.tiny import random_rows, train

RATE, TOTAL = 3e-4, 23
SCHEDULES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.75}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 4e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.3, "num_cycles": 0.75}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 7e-6, "power": 2.5}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 11}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("warmup_stable_decay", {"num_decay_steps": 9}),
    ("warmup_stable_decay", {"num_decay_steps": 6, "num_stable_steps": 5, "min_lr_ratio": 0.2, "num_cycles": 1.5}),
    ("warmup_stable_decay", {"num_decay_steps": 8, "decay_type": "linear", "warmup_type": "cosine"}),
    ("warmup_stable_decay", {"num_decay_steps": 8, "decay_type": "1-sqrt", "warmup_type": "1-sqrt"}),
    ("warmup_stable_decay", {"num_decay_steps": 0, "min_lr_ratio": 0.1}),
]


def test_every_schedule_and_every_value_is_compared() -> None:
    assert {name for name, _ in SCHEDULES} == KWARGS.keys()
    for schedule, known in KWARGS.items():
        assert {name for other, kwargs in SCHEDULES if other == schedule for name in kwargs} == known.keys()


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize(("name", "kwargs"), SCHEDULES)
def test_rates_equal_transformers(name, kwargs, warmup_steps) -> None:
    """Also beyond the end, and of every group of parameters by the same factor."""
    rates = RATE, 16 * RATE
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in rates]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=RATE)
    reference = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=TOTAL,
        scheduler_specific_kwargs=dict(kwargs),
    )
    seen = []
    values = checked_kwargs(name, kwargs, learning_rate=RATE)
    for step in range(TOTAL + 4):
        factor = learning_rate_factor(
            name, step, warmup_steps=warmup_steps, total_steps=TOTAL, learning_rate=RATE, kwargs=values
        )
        assert [rate * factor for rate in rates] == reference.get_last_lr(), step
        seen.append(factor)
        optimizer.step()
        reference.step()
    assert len(set(seen)) > 1 or name.startswith("constant")


def test_warmup_as_a_share_is_rounded_up() -> None:
    assert resolve_warmup_steps(warmup_steps=0, warmup_ratio=0.1, total_steps=23) == 3
    assert resolve_warmup_steps(warmup_steps=5, warmup_ratio=0.0, total_steps=23) == 5


@pytest.mark.parametrize(
    ("schedule", "kwargs", "message"),
    [
        ("cosine", {"power": 2}, "has 'power', and lr_scheduler_type cosine takes num_cycles; drop it"),
        ("linear", {"num_cycles": 2}, "has 'num_cycles', and lr_scheduler_type linear takes none; drop it"),
        ("cosine", {"num_cycles": "many"}, "num_cycles of lr_scheduler_kwargs must be a number, got 'many'"),
        ("cosine", {"num_cycles": 0}, "num_cycles of lr_scheduler_kwargs must be greater than 0, got 0.0"),
        ("cosine", {"num_cycles": "inf"}, "num_cycles of lr_scheduler_kwargs must be finite, got inf"),
        ("cosine_with_restarts", {"num_cycles": 1.5}, "must be a whole number, got 1.5"),
        ("cosine_with_restarts", {"num_cycles": 0}, "must be at least 1, got 0"),
        ("cosine_with_min_lr", {}, "needs min_lr or min_lr_rate, and not both"),
        ("cosine_with_min_lr", {"min_lr": 0, "min_lr_rate": 0}, "needs min_lr or min_lr_rate, and not both"),
        ("cosine_with_min_lr", {"min_lr_rate": 2}, r"min_lr_rate of lr_scheduler_kwargs must lie in \[0, 1\], got 2.0"),
        ("cosine_with_min_lr", {"min_lr": 1}, r"min_lr of .* must not be above learning_rate \(0.0003\), got 1.0"),
        ("polynomial", {"lr_end": 3e-4}, r"must be below learning_rate \(0.0003\), got 0.0003; lower it"),
        ("polynomial", {"power": -1}, "power of lr_scheduler_kwargs must be greater than 0, got -1.0"),
        ("inverse_sqrt", {"timescale": 0}, "timescale of lr_scheduler_kwargs must be at least 1, got 0"),
        ("warmup_stable_decay", {}, "needs num_decay_steps; set it in lr_scheduler_kwargs"),
        ("warmup_stable_decay", {"num_decay_steps": None}, "needs num_decay_steps"),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 3, "decay_type": "steep"},
            "decay_type of lr_scheduler_kwargs must be linear . cosine . 1-sqrt, got 'steep'",
        ),
    ],
)
def test_wrong_kwargs_are_one_sentence(schedule, kwargs, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        TrainConfig(learning_rate=RATE, lr_scheduler_type=schedule, lr_scheduler_kwargs=kwargs)
    assert "\n" not in str(caught.value)


def test_kwargs_are_read_from_text_and_kept_as_numbers(tmp_path) -> None:
    # YAML 1.1 reads 1e-6 as text.
    (tmp_path / "run.yaml").write_text("lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {lr_end: 1e-6, power: 2}\n")
    config = TrainConfig.from_yaml(tmp_path / "run.yaml")
    assert config.lr_scheduler_kwargs == {"lr_end": 1e-6, "power": 2.0}
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "again.yaml").lr_scheduler_kwargs == config.lr_scheduler_kwargs
    flags = {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": '{"timescale": 50}'}
    assert TrainConfig.from_sources(None, flags).lr_scheduler_kwargs == {"timescale": 50}
    assert TrainConfig(lr_scheduler_kwargs={}).lr_scheduler_kwargs is None
    assert TrainConfig(lr_scheduler_type="cosine", lr_scheduler_kwargs={"num_cycles": None}) == TrainConfig(
        lr_scheduler_type="cosine"
    )


def test_a_constant_rate_has_no_warmup() -> None:
    """transformers ignores it without a word."""
    for warmup in ({"warmup_steps": 5}, {"warmup_ratio": 0.1}):
        with pytest.raises(ValueError, match="constant has no warm-up; set it to constant_with_warmup, or drop"):
            TrainConfig(lr_scheduler_type="constant", **warmup)
        TrainConfig(lr_scheduler_type="constant_with_warmup", **warmup)


def test_a_run_is_long_enough_for_its_schedule(tmp_path) -> None:
    options = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 4}}
    with pytest.raises(ValueError, match=r"warm-up \(1 steps\) and num_decay_steps \(4\) .* more than the 4 steps"):
        train(tmp_path / "run", random_rows(4), max_steps=4, warmup_steps=1, **options)
    assert not (tmp_path / "run").exists()
    check_steps("warmup_stable_decay", {"num_decay_steps": 6}, warmup_steps=4, total_steps=10)
    with pytest.raises(ValueError, match=r"warm-up \(4 steps\) and num_decay_steps \(7\) .* more than the 10 steps"):
        check_steps("warmup_stable_decay", {"num_decay_steps": 7}, warmup_steps=4, total_steps=10)
    # Whoever gives both counts decides what is left out.
    kwargs = {"num_decay_steps": 7, "num_stable_steps": 7}
    check_steps("warmup_stable_decay", kwargs, warmup_steps=4, total_steps=10)
