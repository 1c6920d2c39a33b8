"""A decode step, the newest token of several rows: run by Python, or replayed as a CUDA graph.

A step of an 8B model is a thousand launches, and takes the GPU less time than Python needs to issue them. So steps are
recorded: all that differs between two steps of one shape stands in tensors that never move. The number of lanes is
rounded up to one of a few, with idle lanes for the rest, and each has a graph for each `StepKind` that came.

Whether Python runs a step, as when a shape is seen for the first time, or a graph does, the kernels are the same, and
so are the bits.

    L  lanes: rows that take part in a step, and idle ones
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slothcore.layers.kv_cache import KvCache
from slothcore.layers.packed import Documents
from slothcore.layers.page_table import send
from slothcore.models.graph_runs import Recorder
from slothcore.models.graph_watch import GraphWatch
from slothcore.models.language_model import LanguageModel
from slothcore.models.row_state import Chosen, RowState, StepKind

MOST_GRAPHS = 48
"""Steps of further shapes and kinds are run by Python."""
WISHES = 16
"""So often a shape must come before it is recorded while a larger one that is recorded can serve it."""


def lanes_for(rows: int) -> int:
    """How many lanes a step of so many rows has: 1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, .."""
    lanes = 1 << (rows - 1).bit_length()
    return lanes * 3 // 4 if lanes > 32 and rows <= lanes * 3 // 4 else lanes


@dataclass(frozen=True)
class _Shape:
    """What a recorded step serves."""

    lanes: int
    kind: StepKind


class DecodeSteps:
    """Runs decode steps of a model over a cache.

    Attributes:
        replays: steps that were replayed, eager: steps that Python ran.
    """

    def __init__(
        self, model: LanguageModel, cache: KvCache, state: RowState, *, idle_row: int, recorder: Recorder | None
    ) -> None:
        """
        Args:
            idle_row: a row of the cache that never has a text; lanes without a request take it.
            recorder: what records steps; None: Python runs them all.
        """
        self._model, self._cache, self._state, self._idle_row = model, cache, state, idle_row
        self._recorder = recorder
        self._documents = Documents(torch.zeros(2, dtype=torch.int32, device=model.device), 1)
        self._inputs: dict[int, Tensor] = {}
        self._wishes: dict[_Shape, int] = {}
        self._outputs: dict[_Shape, Chosen] = {}
        self._recorded: dict[_Shape, Callable[[], None]] = {}
        self._watch: GraphWatch | None = None
        self.replays = self.eager = 0

    @torch.no_grad()
    def run(self, rows: Sequence[int], counts: Sequence[int], kind: StepKind) -> Chosen:
        """Read the newest token of each row and choose the next one.

        Args:
            rows: of the cache, in use.
            counts: how many tokens each has drawn before.
        Returns: tensors of at least as many lanes, in the order of `rows`; overwritten by the next step.
        Raises: ValueError if the cache has too few pages for another token of each.
        """
        shape = self._shape_for(len(rows), kind)
        self._cache.count_tokens(rows)
        idle = shape.lanes - len(rows)
        inputs = self._inputs_of(shape.lanes)
        lanes = [[*rows, *[self._idle_row] * idle], [*counts, *[0] * idle]]
        send(torch.tensor(lanes, device="cpu"), inputs)
        replay = self._recorded_step(shape, inputs)
        if replay is not None:
            self.replays += 1
            replay()
        else:
            self.eager += 1
            self._outputs[shape] = self._step(inputs, kind)
        return self._outputs[shape]

    def refresh(self) -> bool:
        """Forget what was recorded if weights, factors or options of layers are others by now; whether they are."""
        if self._watch is not None and self._watch.is_unchanged():
            return False
        self._forget()
        self._watch = GraphWatch(self._model)
        return True

    def _inputs_of(self, lanes: int) -> Tensor:
        if lanes not in self._inputs:
            self._inputs[lanes] = torch.zeros(2, lanes, dtype=torch.int64, device=self._model.device)
        return self._inputs[lanes]

    def _step(self, inputs: Tensor, kind: StepKind) -> Chosen:
        """The pass itself; everything that it reads lies where it lay before."""
        rows, counts = inputs
        positions = self._cache.place_tokens(rows.to(torch.int32))
        tokens = self._state.newest.index_select(0, rows)
        hidden = self._model.model(tokens, positions, self._documents, self._cache)
        return self._state.choose(self._model.logits(hidden), rows, counts, kind)

    def _shape_for(self, rows: int, kind: StepKind) -> _Shape:
        """The smallest shape; or a larger one that is recorded, as long as the smallest came too seldom for that."""
        shape = _Shape(lanes_for(rows), kind)
        if self._recorder is None or shape in self._recorded:
            return shape
        larger = [other for other in self._recorded if other.kind == kind and other.lanes > shape.lanes]
        self._wishes[shape] = self._wishes.get(shape, 0) + 1
        if not larger or self._wishes[shape] > WISHES:
            return shape
        return min(larger, key=lambda other: other.lanes)

    def _recorded_step(self, shape: _Shape, inputs: Tensor) -> Callable[[], None] | None:
        """That of the shape, recorded now if Python has run one before, so that every kernel is compiled."""
        if self._recorder is None or shape in self._recorded or shape not in self._outputs:
            return self._recorded.get(shape)
        if len(self._recorded) == MOST_GRAPHS:
            return None
        outputs = self._outputs[shape].parts()

        def step() -> None:
            for static, new in zip(outputs, self._step(inputs, shape.kind).parts(), strict=True):
                if static is not None and new is not None:
                    static.copy_(new)

        try:
            self._recorded[shape] = self._recorder(step)
        except Exception as error:
            self._forget()
            self._recorder = None
            first_line = str(error).partition("\n")[0]
            warnings.warn(
                f"a decode step of {shape.lanes} rows cannot be captured as a CUDA graph ({first_line}); generation "
                "goes on without graphs, with the same results",
                stacklevel=2,
            )
        return self._recorded.get(shape)

    def _forget(self) -> None:
        self._wishes.clear()
        self._outputs.clear()
        self._recorded.clear()
