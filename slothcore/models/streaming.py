"""Writing on from one text, a token at a time as it is asked for, with what was read before kept for the next time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slothcore.layers.kv_cache import KvCache
from slothcore.models.cache_room import cache_options
from slothcore.models.decode_steps import DecodeSteps
from slothcore.models.generation_mode import GenerationMode
from slothcore.models.graph_runs import CudaRecorder, Recorder
from slothcore.models.language_model import LanguageModel
from slothcore.models.prompt_passes import PromptPasses
from slothcore.models.requests import Request
from slothcore.models.row_state import RowState, StepKind
from slothcore.models.weight_watch import WeightWatch

if TYPE_CHECKING:
    from slothcore.layers.rope import RopeParameters

# A cache grows by doubling, from this many tokens on.
SMALLEST_CACHE = 512


class TextCache:
    """Keys and values of one text, so that a text that begins like it is read from where it differs.

    What is found again is what the whole text would give, up to the rounding of sums in another order. Where angles
    depend on the length of the text (longrope, dynamic) and the new length asks for other ones, all is read anew; and
    so it is where weights may have changed, the vocabulary has grown, or the model has moved to another device.

    Attributes:
        ids: the tokens whose keys and values are held.
        tokens_read: how many tokens went through the model so far, for whoever wants to know what was spared.
        mode: in which the model is while it writes.
    """

    def __init__(self, model: LanguageModel, *, recorder: Recorder | None = None) -> None:
        """
        Args:
            recorder: records decode steps and passes over what is new; default: as CUDA graphs, on a GPU.
        """
        self.model = model
        self.mode = GenerationMode(model)
        self.ids: list[int]
        self.tokens_read = 0
        self._given_recorder = recorder
        self._watch: WeightWatch | None = None
        self._begin_anew()

    @torch.inference_mode(False)
    def _begin_anew(self) -> None:
        """Keep nothing, and make what depends on the model's device and vocabulary."""
        self.ids = []
        self._device, self._vocab_size = self.model.device, self.model.config.vocab_size
        self._recorder = self._given_recorder
        if self._recorder is None and self._device.type == "cuda":
            self._recorder = CudaRecorder(self._device)
        self.mode.recorder = self._recorder
        self._cache: KvCache | None = None
        self._state = RowState(1, self._vocab_size, self._device)
        self._prompts: PromptPasses | None = None
        self._steps: DecodeSteps | None = None

    def begin(self, request: Request, key: int) -> None:
        """Choose tokens as a request has it; `key` is that of its random draws."""
        if (self._device, self._vocab_size) != (self.model.device, self.model.config.vocab_size):
            self._begin_anew()
        if self.mode.was_training:
            self.ids, self._watch = [], None
        elif self._watch is None or not self._watch.is_unchanged():
            self.ids, self._watch = [], WeightWatch(self.model)
        self._state.begin([0], [request], [key], [[]])
        if self._steps is not None and self._prompts is not None and self._steps.refresh():
            self._prompts.forget()
            self.mode.factors.forget()

    def next_token(self, text: Sequence[int], count: int, kind: StepKind) -> int:
        """The token behind `text`, of which the last `count` tokens were given by calls before.

        One more token is read, or, at first and where longrope's long factors begin, all that is new or turned anew.
        """
        begins_long = any(
            rope.rope_type == "longrope" and len(text) == rope.original_max_position_embeddings + 1
            for rope in self._ropes()
        )
        if count == 0 or begins_long:
            hidden = self.read(text)
            row, counts = self._state.sent(torch.tensor([[0], [count]], device="cpu"))
            chosen = self._state.choose(self.model.logits(hidden), row, counts, kind)
        else:
            self._make_room(len(text), len(text) - 1)
            assert self._steps is not None
            chosen = self._steps.run([0], [count], kind)
            self.ids.append(text[-1])
            self.tokens_read += 1
        return int(chosen.tokens[0])

    def read(self, ids: Sequence[int]) -> Tensor:
        """The hidden state of the last of `ids`, [1, H]; what stands before is read only as far as it is new."""
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, ids, strict=False)))
        # The last token always goes through the model, whose state behind it is what is asked for.
        kept = min(kept, len(ids) - 1)
        if not all(_angles_stay(rope, len(self.ids), len(ids)) for rope in self._ropes()):
            kept = 0
        return self._read_from(kept, ids)

    def _read_from(self, kept: int, ids: Sequence[int]) -> Tensor:
        cache = self._make_room(len(ids), kept)
        assert self._prompts is not None
        # Not what it says until the pass is through: Ctrl-C may come in the middle of it.
        self.ids = self.ids[:kept]
        cache.shorten(0, kept)
        hidden = self._prompts.read_on(0, ids[kept:]) if kept else self._prompts.read([0], [ids])
        self.ids = list(ids)
        self.tokens_read += len(ids) - kept
        return hidden

    def _make_room(self, length: int, kept: int) -> KvCache:
        """The cache, for at least `length` tokens; the first `kept` stay."""
        cache, ids = self._cache, self.ids
        if cache is not None and cache.capacity >= length:
            return cache
        # What was recorded knows the old addresses. And nothing is held until all is made, for memory may run out.
        self._cache = self._steps = self._prompts = None
        self.ids = []
        if cache is not None and kept:
            cache.grow(max(length, 2 * cache.capacity))
        else:
            cache, ids = None, []  # freed before the new one is made
            options = cache_options(self.model)
            # The whole text in every layer, so that any beginning of it can be kept.
            options["windows"] = [None] * len(options["windows"])
            cache = KvCache(rows=1, capacity=max(length, SMALLEST_CACHE), **options)
        self._prompts = PromptPasses(self.model, cache, recorder=self._recorder)
        self._steps = DecodeSteps(self.model, cache, self._state, idle_row=0, recorder=self._recorder)
        self._steps.refresh()
        self._cache, self.ids = cache, ids
        return cache

    def _ropes(self) -> Iterator[RopeParameters]:
        config = self.model.config
        yield config.rope
        if config.local_rope is not None:
            yield config.local_rope


def _angles_stay(rope: RopeParameters, held: int, length: int) -> bool:
    """Whether keys of a text of `held` tokens are turned as those of a text of `length` tokens."""
    if rope.rope_type == "longrope":
        limit = rope.original_max_position_embeddings
        return (held > limit) == (length > limit)
    return rope.rope_type != "dynamic" or max(held, length) <= rope.max_position_embeddings


def stream_tokens(cache: TextCache, request: Request, key: int) -> Iterator[int]:
    """The tokens that follow the prompt of a request, each when it is asked for; one of its `eos_ids` is the last.

    The cache's mode must be on while a token is computed.
    """
    text, kind = list(request.prompt_ids), StepKind.of([request])
    for count in range(request.max_new_tokens):
        with cache.mode.passes():
            if count == 0:
                cache.begin(request, key)
            token = cache.next_token(text, count, kind)
        yield token
        if token in request.eos_ids:
            return
        text.append(token)
