"""Choosing in place: what is recorded once serves other rows, other options and other texts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from slothcore.models.requests import Request
from slothcore.models.row_state import Chosen, RowState, StepKind
from slothcore.models.sampling import Sampling
from tests.models.tape import taped
from tests.models.test_engine import SAMPLINGS

ROWS, VOCABULARY, LANES, IDLE = 7, 33, 4, 6
KINDS = {
    "greedy": StepKind(),
    "drawn": StepKind(draws=True),
    "cut": StepKind(draws=True, cuts=True),
    "penalized": StepKind(penalizes=True),
    "everything": StepKind(draws=True, cuts=True, penalizes=True, logprobs=20),
    "with logprobs": StepKind(logprobs=0),
}


def fits(sampling: Sampling, kind: StepKind) -> bool:
    wanted = StepKind.of([Request(prompt_ids=[1], max_new_tokens=1, sampling=sampling)])
    return all(getattr(kind, name) >= getattr(wanted, name) for name in ("draws", "cuts", "penalizes"))


def filled(kind: StepKind, seed: int) -> RowState:
    """Rows with options that the kind serves."""
    state = RowState(ROWS, VOCABULARY, torch.device("cpu"))
    begin(state, kind, seed)
    return state


def begin(state: RowState, kind: StepKind, seed: int) -> None:
    samplings = [sampling for sampling in SAMPLINGS if fits(sampling, kind)]
    rows = list(range(ROWS - 1))
    requests = [
        Request(prompt_ids=[row, seed, 30], max_new_tokens=4, sampling=samplings[(row + seed) % len(samplings)])
        for row in rows
    ]
    state.begin(rows, requests, [100 * seed + row for row in rows], [[seed, row, row] for row in rows])


def inputs_of(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, rows (the last lane is idle), and how many tokens each has drawn."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(LANES, VOCABULARY, generator=generator)
    rows = torch.cat([torch.randperm(ROWS - 1, generator=generator)[: LANES - 1], torch.tensor([IDLE])])
    return logits, rows, torch.randint(9, (LANES,), generator=generator)


def parts_of(chosen: Chosen) -> list[list[Any]]:
    return [part[:-1].tolist() for part in chosen.parts() if part is not None]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_recorded_choice_serves_whatever_comes(kind: StepKind) -> None:
    recorded = filled(kind, seed=0)
    static = [values.clone() for values in inputs_of(0)]
    outputs: list[Tensor] = []

    def step() -> None:
        outputs[:] = [part for part in recorded.choose(*static, kind).parts() if part is not None]

    tables = [table for table in (recorded._in_prompt, recorded._generated) if table is not None]
    replay = taped(step, recorded.newest, *tables)
    answers = set()
    for seed in range(1, 6):
        begin(recorded, kind, seed)
        direct = filled(kind, seed)
        # Three steps, so that what a step counts is read by the next.
        for step_number in range(3):
            values = inputs_of(10 * seed + step_number)
            for place, value in zip(static, values, strict=True):
                place.copy_(value)
            replay()
            expected = direct.choose(*values, kind)
            assert [part[:-1].tolist() for part in outputs] == parts_of(expected)
            assert recorded.newest[values[1][:-1]].tolist() == expected.tokens[:-1].tolist()
            answers.add(tuple(expected.tokens.tolist()))
    assert len(answers) > 10


def test_kinds_serve_all_requests_of_a_pass() -> None:
    def kind_of(*samplings: Sampling, logprobs: tuple[int | None, ...] = (None,)) -> StepKind:
        return StepKind.of(
            [
                Request(prompt_ids=[1], max_new_tokens=1, sampling=sampling, logprobs=count)
                for sampling in samplings
                for count in logprobs
            ]
        )

    assert kind_of(Sampling()) == StepKind()
    assert kind_of(Sampling(), Sampling(temperature=1.0)) == StepKind(draws=True)
    assert kind_of(Sampling(temperature=1.0, top_k=4)) == StepKind(draws=True, cuts=True)
    assert kind_of(Sampling(top_k=4)) == StepKind(), "without drawing nothing is cut"
    assert kind_of(Sampling(presence_penalty=0.1), Sampling(temperature=1.0)) == StepKind(draws=True, penalizes=True)
    assert kind_of(Sampling(), logprobs=(None, 0)) == StepKind(logprobs=0)
    assert kind_of(Sampling(), logprobs=(0, 3)) == kind_of(Sampling(), logprobs=(1, None)) == StepKind(logprobs=20)
