"""A pass over texts, or over what is new of one: run by Python, or replayed as a CUDA graph.

A pass over few tokens takes the GPU some 10 ms, and Python 100 ms to launch. So it is padded to one of a few sizes and,
when that size comes for the second time, recorded; all that differs between two passes of one size stands in tensors
that never move.

    tokens     What is missing is one more document, of token 0. With whole texts its keys and values go nowhere; with
               more of one text they go behind it into its own pages, where the next tokens overwrite them.
    documents  Empty ones at the end, as in `layers/bucket.py`. The longest: as many tokens as the size has, a bound.

Whether Python runs a pass, as when a size is seen for the first time, or a graph does, the kernels are the same, and so
are the bits. They do depend on the size, as everywhere: products over other numbers of rows are other orders of sums.
Without a recorder, and beyond the largest size, nothing is padded. What follows, the scores and the choice of a token,
Python launches while the GPU is busy with the pass.

    T  tokens of a pass    D  its documents    H  hidden_size
"""

import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from slothcore.layers.bucket import FEWEST_SLOTS, TOKENS_A_SLOT, Bucket
from slothcore.layers.kv_cache import KvCache
from slothcore.layers.packed import ALIGNMENT, Documents
from slothcore.models.graph_runs import Recorder
from slothcore.models.language_model import LanguageModel

SIZES = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048)
"""Tokens of padded passes. With more, the GPU takes as long as Python."""
LARGEST_SIZE = SIZES[-1]
MOST_GRAPHS = 32
"""Passes of further shapes are run by Python."""


@dataclass(frozen=True)
class _Shape:
    """What makes passes alike.

    Attributes:
        longest: a bound on the tokens of a document.
        goes_on: whether it is over more tokens of one text, which attend to the cache; else over whole texts.
        is_size: whether passes are padded to it; else it is that of one pass alone.
    """

    bucket: Bucket
    longest: int
    goes_on: bool
    is_size: bool


class _Inputs:
    """What a pass reads, side by side in one tensor, so that one copy brings all of it.

    Attributes:
        everything: int64, what follows and gaps.
        ids, positions: [T] int64, the tokens, and their positions for RoPE.
        places: [T] int64, their positions in their rows of the cache; -1: nowhere.
        last: [D] int64, the last token of each document.
        rows: [T] int32, of the cache.
        boundaries: [D + 1] int32, of the documents.
    """

    def __init__(self, bucket: Bucket, everything: Tensor | None = None, *, pinned: bool = False) -> None:
        """`everything`: that of a pass of this bucket; None: zeros on the host."""
        tokens, documents = bucket.tokens, bucket.documents
        words = [tokens, tokens, tokens, documents, -(-tokens // 2), documents // 2 + 1]
        starts = list(accumulate((-(-count // ALIGNMENT) * ALIGNMENT for count in words), initial=0))
        if everything is None:
            everything = torch.zeros(starts[-1], dtype=torch.int64, device="cpu", pin_memory=pinned)
        self.everything = everything
        parts = [everything[start : start + count] for start, count in zip(starts, words, strict=False)]
        self.ids, self.positions, self.places, self.last, rows, boundaries = parts
        self.rows = rows.view(torch.int32)[:tokens]
        self.boundaries = boundaries.view(torch.int32)[: documents + 1]

    def set_texts(self, texts: Sequence[Sequence[int]]) -> None:
        """Fill in tokens, documents and positions from 0 on, those of the padding too."""
        lengths = [len(text) for text in texts]
        ends = torch.tensor(lengths, device="cpu").cumsum(0)
        count, tokens = len(lengths), sum(lengths)
        self.ids[:tokens] = torch.tensor(list(chain.from_iterable(texts)), device="cpu")
        self.last[:count] = ends - 1
        self.boundaries[1 : count + 1] = ends
        self.boundaries[count + 1 :] = len(self.ids)
        lengths.append(len(self.ids) - tokens)
        self.positions.copy_(torch.cat([torch.arange(length, device="cpu") for length in lengths]))


class PromptPasses:
    """Runs passes of a model over texts whose keys and values go into a cache.

    Attributes:
        replays: passes that were replayed, eager: passes that Python ran.
    """

    def __init__(self, model: LanguageModel, cache: KvCache, *, recorder: Recorder | None) -> None:
        """
        Args:
            recorder: what records passes; None: Python runs them all, unpadded.
        """
        self._model, self._cache, self._recorder = model, cache, recorder
        self._inputs: dict[_Shape, _Inputs] = {}
        self._outputs: dict[_Shape, Tensor] = {}
        self._recorded: dict[_Shape, Callable[[], None]] = {}
        self.replays = self.eager = 0

    @torch.no_grad()
    def read(self, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> Tensor:
        """Read whole texts, each into its row, whose text before is gone.

        Returns: the hidden state of the last token of each, [texts, H]; overwritten by the next pass.
        Raises: ValueError if the cache has too few pages.
        """
        lengths = [len(text) for text in texts]
        tokens = sum(lengths)
        shape = self._size_for(tokens, len(texts), goes_on=False)
        if shape is None:
            shape = _Shape(Bucket(tokens, len(texts)), max(lengths), goes_on=False, is_size=False)
        self._cache.count_prompt(rows, lengths)
        inputs = self._new_inputs(shape, texts)
        inputs.places[:tokens] = inputs.positions[:tokens]
        inputs.places[tokens:] = -1
        each = [torch.full((n,), row, dtype=torch.int32, device="cpu") for row, n in zip(rows, lengths, strict=True)]
        inputs.rows[:tokens] = torch.cat(each)
        return self._run(shape, inputs)[: len(texts)]

    @torch.no_grad()
    def read_on(self, row: int, tokens: Sequence[int]) -> Tensor:
        """Read more tokens of the text in a row.

        Returns: the hidden state of the last, [1, H]; overwritten by the next pass.
        Raises: ValueError if the cache has too few pages.
        """
        count, begin = len(tokens), self._cache.lengths_on_host[row]
        shape = self._size_for(count, 1, goes_on=True)
        if shape is None or begin + shape.bucket.tokens > self._cache.capacity:
            shape = _Shape(Bucket(count, 1), count, goes_on=True, is_size=False)
        self._cache.count_chunk(row, count, padding=shape.bucket.tokens - count)
        inputs = self._new_inputs(shape, [tokens])
        inputs.places.copy_(torch.arange(begin, begin + shape.bucket.tokens, device="cpu"))
        inputs.positions[:count] = inputs.places[:count]
        inputs.rows.fill_(row)
        return self._run(shape, inputs)[:1]

    def forget(self) -> None:
        """Let go of what was recorded, because weights, factors or options of layers are others by now."""
        self._outputs.clear()
        self._recorded.clear()

    def _size_for(self, tokens: int, documents: int, *, goes_on: bool) -> _Shape | None:
        """The smallest size that holds a pass; None: none does, or nothing is padded."""
        if self._recorder is None or tokens > SIZES[-1]:
            return None
        size = SIZES[bisect_left(SIZES, tokens)]
        slots = max(FEWEST_SLOTS, size // TOKENS_A_SLOT)
        while slots < documents + (tokens < size):
            slots *= 2
        return _Shape(Bucket(size, slots), size, goes_on, is_size=True)

    def _new_inputs(self, shape: _Shape, texts: Sequence[Sequence[int]]) -> _Inputs:
        """On the host, with the texts in them."""
        inputs = _Inputs(shape.bucket, pinned=self._model.device.type == "cuda")
        inputs.set_texts(texts)
        return inputs

    def _run(self, shape: _Shape, inputs: _Inputs) -> Tensor:
        """The hidden state of the last token of each document, [D, H]; anything for those that are empty."""
        device = self._model.device
        if not shape.is_size:
            self.eager += 1
            return self._pass(shape, _Inputs(shape.bucket, inputs.everything.to(device, non_blocking=True)))
        if shape not in self._inputs:
            self._inputs[shape] = _Inputs(shape.bucket, torch.empty_like(inputs.everything, device=device))
        static = self._inputs[shape]
        static.everything.copy_(inputs.everything, non_blocking=True)
        replay = self._recorded_pass(shape)
        if replay is not None:
            self.replays += 1
            replay()
        else:
            self.eager += 1
            self._outputs[shape] = self._pass(shape, static)
        return self._outputs[shape]

    def _pass(self, shape: _Shape, inputs: _Inputs) -> Tensor:
        """The pass itself; everything that it reads lies where it lay before."""
        place = self._cache.place_chunk if shape.goes_on else self._cache.place_prompt
        place(inputs.rows, inputs.places)
        documents = Documents(inputs.boundaries, shape.longest)
        hidden: Tensor = self._model.model(inputs.ids, inputs.positions, documents, self._cache)
        return hidden.index_select(0, inputs.last)

    def _recorded_pass(self, shape: _Shape) -> Callable[[], None] | None:
        """That of the shape, recorded now if Python has run one before, so that every kernel is compiled."""
        if self._recorder is None or shape in self._recorded or shape not in self._outputs:
            return self._recorded.get(shape)
        if len(self._recorded) == MOST_GRAPHS:
            return None
        inputs, output = self._inputs[shape], self._outputs[shape]

        def step() -> None:
            output.copy_(self._pass(shape, inputs))

        try:
            self._recorded[shape] = self._recorder(step)
        except Exception as error:
            self.forget()
            self._recorder = None
            first_line = str(error).partition("\n")[0]
            warnings.warn(
                f"a pass over {shape.bucket.tokens} tokens of prompts cannot be captured as a CUDA graph "
                f"({first_line}); generation goes on without such graphs, with the same results up to rounding",
                stacklevel=2,
            )
        return self._recorded.get(shape)
