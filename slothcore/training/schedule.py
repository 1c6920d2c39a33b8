"""Learning-rate schedules, as transformers defines them.

With w warm-up steps of n in all, the factor at step s (0 for the first step) is s / max(1, w) while s < w. After that,
with p = (s - w) / max(1, n - w), L the learning rate and what `lr_scheduler_kwargs` gives in brackets:

linear                (n - s) / max(1, n - w)
cosine                (1 + cos(2 pi c p)) / 2                        [num_cycles c, 0.5]
cosine_with_restarts  (1 + cos(pi (c p mod 1))) / 2, 0 from n on     [num_cycles c, 1]
cosine_with_min_lr    m + (1 - m) (1 + cos(2 pi c p)) / 2            [min_lr_rate m or min_lr m L; num_cycles c, 0.5]
polynomial            (e + (L - e) (1 - p)^k) / L                    [lr_end e, 1e-7; power k, 1]
inverse_sqrt          ((s - w + t) / t)^(-1/2)                       [timescale t, w or else 10,000]
constant              1, without a warm-up
constant_with_warmup  1
warmup_stable_decay   1 for k steps, d steps that fall to m, then m  [num_decay_steps d; num_stable_steps k, n - w - d;
                      min_lr_ratio m, 0; num_cycles, 0.5; decay_type cosine, linear or 1-sqrt;
                      warmup_type linear, cosine or 1-sqrt, which rises from m]
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slothcore.training.options import coerce

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "constant",
    "constant_with_warmup",
    "warmup_stable_decay",
]


@dataclass(frozen=True)
class _Kwarg:
    """What a value of lr_scheduler_kwargs may be."""

    type: Any
    least: float = -math.inf
    most: float = math.inf
    excludes_least: bool = False


_COUNT, _POSITIVE = _Kwarg(int, least=1), _Kwarg(float, least=0.0, excludes_least=True)
_SHARE, _RATE = _Kwarg(float, least=0.0, most=1.0), _Kwarg(float, least=0.0)
_SHAPE = _Kwarg(Literal["linear", "cosine", "1-sqrt"])

KWARGS: dict[Schedule, dict[str, _Kwarg]] = {
    "linear": {},
    "cosine": {"num_cycles": _POSITIVE},
    "cosine_with_restarts": {"num_cycles": _COUNT},
    "cosine_with_min_lr": {"num_cycles": _POSITIVE, "min_lr": _RATE, "min_lr_rate": _SHARE},
    "polynomial": {"lr_end": _RATE, "power": _POSITIVE},
    "inverse_sqrt": {"timescale": _COUNT},
    "constant": {},
    "constant_with_warmup": {},
    "warmup_stable_decay": {
        "num_decay_steps": _Kwarg(int, least=0),
        "num_stable_steps": _Kwarg(int, least=0),
        "warmup_type": _SHAPE,
        "decay_type": _SHAPE,
        "min_lr_ratio": _SHARE,
        "num_cycles": _POSITIVE,
    },
}
"""What `lr_scheduler_kwargs` may hold for each schedule."""


def checked_kwargs(schedule: Schedule, given: Mapping[str, Any], *, learning_rate: float) -> dict[str, Any]:
    """`lr_scheduler_kwargs` as numbers and words; null stands for the schedule's own value.

    Raises: ValueError for a name that the schedule does not take, a wrong value, or one that it cannot do without.
    """
    known = KWARGS[schedule]
    values = {}
    for name, value in given.items():
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise ValueError(f"lr_scheduler_kwargs has {name!r}, and lr_scheduler_type {schedule} {takes}; drop it")
        if value is not None:
            values[name] = _checked(f"{name} of lr_scheduler_kwargs", value, known[name])
    if schedule == "warmup_stable_decay" and "num_decay_steps" not in values:
        raise ValueError("lr_scheduler_type warmup_stable_decay needs num_decay_steps; set it in lr_scheduler_kwargs")
    if schedule == "cosine_with_min_lr" and ("min_lr" in values) == ("min_lr_rate" in values):
        raise ValueError(
            "lr_scheduler_type cosine_with_min_lr needs min_lr or min_lr_rate, and not both; "
            "set one of them in lr_scheduler_kwargs"
        )
    # transformers begins at 1e-7 too, and refuses a learning rate that is not above it.
    end = values.get("lr_end", 1e-7) if schedule == "polynomial" else 0.0
    if not learning_rate > end:
        raise ValueError(
            f"lr_end of lr_scheduler_kwargs must be below learning_rate ({learning_rate}), got {end}; lower it"
        )
    if values.get("min_lr", 0.0) > learning_rate:
        raise ValueError(
            f"min_lr of lr_scheduler_kwargs must not be above learning_rate ({learning_rate}), "
            f"got {values['min_lr']}; lower it"
        )
    return values


def check_steps(schedule: Schedule, kwargs: Mapping[str, Any], *, warmup_steps: int, total_steps: int) -> None:
    """Raise ValueError if the run is too short for the parts of its schedule."""
    if schedule != "warmup_stable_decay" or kwargs.get("num_stable_steps") is not None:
        return
    if warmup_steps + kwargs["num_decay_steps"] > total_steps:
        raise ValueError(
            f"warm-up ({warmup_steps} steps) and num_decay_steps ({kwargs['num_decay_steps']}) of lr_scheduler_kwargs "
            f"are more than the {total_steps} steps of the run; lower one of them"
        )


def learning_rate_factor(
    schedule: Schedule,
    step: int,
    *,
    warmup_steps: int,
    total_steps: int,
    learning_rate: float = 1.0,
    kwargs: Mapping[str, Any] | None = None,
) -> float:
    """What every learning rate is multiplied by in optimizer step `step`, which counts from 0.

    Args:
        learning_rate: the base one, for schedules whose end is given as a rate.
        kwargs: what `checked_kwargs` gives.
    """
    kwargs = kwargs or {}
    if schedule == "constant":
        return 1.0
    if schedule == "warmup_stable_decay":
        return _warmup_stable_decay(step, warmup_steps, total_steps, **kwargs)
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if schedule == "constant_with_warmup":
        return 1.0
    if schedule == "inverse_sqrt":
        timescale = kwargs.get("timescale", warmup_steps or 10_000)
        return 1.0 / math.sqrt((step + (timescale - warmup_steps)) / timescale)
    span = max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, (total_steps - step) / span)
    progress = (step - warmup_steps) / span
    if schedule == "polynomial":
        end = kwargs.get("lr_end", 1e-7)
        if step > total_steps:
            return end / learning_rate
        return ((learning_rate - end) * (1 - progress) ** kwargs.get("power", 1.0) + end) / learning_rate
    if schedule == "cosine_with_restarts":
        turn = (float(kwargs.get("num_cycles", 1)) * progress) % 1.0
        return 0.0 if progress >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * turn)))
    wave = _wave(progress, kwargs.get("num_cycles", 0.5))
    if schedule == "cosine_with_min_lr":
        least = kwargs["min_lr"] / learning_rate if "min_lr" in kwargs else kwargs["min_lr_rate"]
        wave = wave * (1 - least) + least
    return max(0.0, wave)


def resolve_warmup_steps(*, warmup_steps: int, warmup_ratio: float, total_steps: int) -> int:
    """The number of warm-up steps when it is given as a count, or as a share of all steps (rounded up)."""
    return warmup_steps if warmup_steps > 0 else math.ceil(total_steps * warmup_ratio)


def _warmup_stable_decay(
    step: int,
    warmup_steps: int,
    total_steps: int,
    *,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    if num_stable_steps is None:
        num_stable_steps = total_steps - warmup_steps - num_decay_steps
    decay_begins = warmup_steps + num_stable_steps
    if step < warmup_steps:
        progress = step / max(1, warmup_steps)
        rising = {
            "linear": progress,
            "cosine": 0.5 * (1.0 - math.cos(math.pi * progress)),
            "1-sqrt": 1.0 - math.sqrt(1.0 - progress),
        }
        factor = rising[warmup_type]
    elif step < decay_begins:
        return 1.0
    elif step < decay_begins + num_decay_steps:
        progress = (step - decay_begins) / max(1, num_decay_steps)
        falling = {
            "linear": 1.0 - progress,
            "cosine": _wave(progress, num_cycles),
            "1-sqrt": 1.0 - math.sqrt(progress),
        }
        factor = falling[decay_type]
    else:
        return min_lr_ratio
    return max(0.0, factor * (1.0 - min_lr_ratio) + min_lr_ratio)


def _wave(progress: float, num_cycles: float) -> float:
    # In this order, which rounds as transformers does.
    return 0.5 * (1.0 + math.cos(math.pi * float(num_cycles) * 2.0 * progress))


def _checked(what: str, value: Any, rule: _Kwarg) -> Any:
    value = coerce(what, value, rule.type)
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        raise ValueError(f"{what} must be finite, got {value}")
    if rule.excludes_least and value <= rule.least:
        raise ValueError(f"{what} must be greater than {rule.least:g}, got {value}")
    if not rule.least <= value <= rule.most:
        bounds = f"be at least {rule.least:g}" if rule.most == math.inf else f"lie in [{rule.least:g}, {rule.most:g}]"
        raise ValueError(f"{what} must {bounds}, got {value}")
    return value
