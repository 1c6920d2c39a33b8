"""Writing on from one text, a token at a time as it is asked for, with what was read before kept for the next time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slothcore.layers.kv_cache import KvCache
from slothcore.layers.packed import Documents
from slothcore.models.sampling import Sampling, choose

if TYPE_CHECKING:
    from slothcore.layers.rope import RopeParameters
    from slothcore.models.decoder import Decoder

# A cache grows by doubling, from this many tokens on.
SMALLEST_CACHE = 256


class TextCache:
    """Keys and values of one text, so that a text that begins like it is read from where it differs.

    What is found again is what the whole text would give, up to the rounding of sums in another order. Where angles
    depend on the length of the text (longrope, dynamic) and the new length asks for other ones, all is read anew.

    Attributes:
        ids: the tokens whose keys and values are held.
        tokens_read: how many tokens went through the model so far, for whoever wants to know what was spared.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.ids: list[int] = []
        self.tokens_read = 0
        self._cache: KvCache | None = None

    def read(self, ids: Sequence[int]) -> Tensor:
        """The hidden state of the last of `ids`, [1, H]; what stands before is read only as far as it is new."""
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, ids, strict=False)))
        # The last token always goes through the model, whose state behind it is what is asked for.
        kept = min(kept, len(ids) - 1)
        if not all(_angles_stay(rope, len(self.ids), len(ids)) for rope in self._ropes()):
            kept = 0
        return self._read_from(kept, ids)

    def append(self, token: int) -> Tensor:
        """The hidden state of one more token, [1, H]. With longrope, all is read anew when the long factors begin."""
        length = len(self.ids) + 1
        begins_long = any(
            rope.rope_type == "longrope" and length == rope.original_max_position_embeddings + 1
            for rope in self._ropes()
        )
        return self._read_from(0 if begins_long else length - 1, [*self.ids, token])

    def _read_from(self, kept: int, ids: Sequence[int]) -> Tensor:
        model, count = self.model, len(ids) - kept
        cache = self._make_room(len(ids), kept)
        # Not what it says until the pass is through: Ctrl-C may come in the middle of it.
        self.ids = self.ids[:kept]
        cache.shorten(kept)
        new = torch.tensor(ids[kept:], dtype=torch.int64, device=model.device)
        documents = Documents(torch.tensor([0, count], dtype=torch.int32, device=model.device), count)
        if kept == 0:
            cache.begin_prompt(documents, count)
            positions = torch.arange(count, device=model.device)
        elif count == 1:
            positions = cache.begin_token()
        else:
            positions = cache.begin_chunk(count)
        hidden: Tensor = model.model(new, positions, documents, cache)
        self.ids = list(ids)
        self.tokens_read += count
        return hidden[-1:]

    def _make_room(self, length: int, kept: int) -> KvCache:
        """The cache, for at least `length` tokens; the first `kept` stay."""
        if self._cache is not None and kept and self._cache.capacity < length:
            self._cache.reserve(max(length, 2 * self._cache.capacity))
        elif self._cache is None or self._cache.capacity < length:
            config = self.model.config
            self._cache = None  # freed before the new one is made
            self._cache = KvCache(
                layers=config.num_hidden_layers,
                rows=1,
                capacity=max(length, SMALLEST_CACHE),
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                dtype=self.model.dtype,
                device=self.model.device,
            )
        return self._cache

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


def stream_tokens(
    cache: TextCache,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos: Collection[int],
    generator: torch.Generator | None,
) -> Iterator[int]:
    """The tokens that follow `prompt`, each when it is asked for; one of `eos` is the last."""
    model = cache.model
    seen: Tensor | None = None
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool, device=model.device)
        seen[0, torch.tensor(prompt, device=model.device)] = True
    token: int | None = None
    for _ in range(max_new_tokens):
        hidden = cache.read(prompt) if token is None else cache.append(token)
        token = int(choose(model.logits(hidden), sampling, seen, generator))
        if seen is not None:
            seen[0, token] = True
        yield token
        if token in eos:
            return
