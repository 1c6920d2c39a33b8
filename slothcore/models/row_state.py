"""What the engine keeps on the device for every row: its newest token, its options, what it holds already.

R  rows of the engine    V  vocab_size    L  lanes of a pass: rows that take part in it
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from slothcore.kernels import largest, largest_eager
from slothcore.models.requests import MOST_LOGPROBS, Request
from slothcore.models.sampling import RowOptions, Sampling, draw, processed


@dataclass(frozen=True)
class StepKind:
    """What the rows of a pass need beyond the highest score; for each kind there is a graph of its own.

    Attributes:
        draws, cuts, penalizes: see `Sampling`; whether any of them does.
        logprobs: how many alternatives are reported with each token; None: no log-probabilities at all.
    """

    draws: bool = False
    cuts: bool = False
    penalizes: bool = False
    logprobs: int | None = None

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "StepKind":
        """What serves all of these."""
        samplings = {request.sampling for request in requests}
        wanted = {request.logprobs for request in requests} - {None}
        return cls(
            draws=any(sampling.draws for sampling in samplings),
            cuts=any(sampling.cuts for sampling in samplings),
            penalizes=any(sampling.penalizes for sampling in samplings),
            # Two numbers of alternatives, or there would be a graph for each.
            logprobs=None if not wanted else MOST_LOGPROBS if any(wanted) else 0,
        )


@dataclass(frozen=True)
class Chosen:
    """What a pass chose, [L, ..] each.

    Attributes:
        tokens: [L] int64.
        logprobs: [L] float32, or None.
        top_tokens, top_logprobs: [L, K] int64 and float32, or None.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None

    def parts(self) -> tuple[Tensor | None, ...]:
        """The tensors, in the order of the attributes."""
        return self.tokens, self.logprobs, self.top_tokens, self.top_logprobs


class RowState:
    """Tensors of all rows, which never move; a pass takes what its lanes need by the numbers of their rows.

    Attributes:
        newest: [R] int64, the last token of each row, which the next pass reads.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self.newest = torch.zeros(rows, dtype=torch.int64, device=device)
        self._rows, self._vocab_size, self._device = rows, vocab_size, device
        greedy = RowOptions.of([Sampling()] * rows, vocab_size)
        self._options = RowOptions(*(getattr(greedy, field.name).to(device) for field in fields(RowOptions)))
        self._keys = torch.zeros(rows, dtype=torch.int64, device=device)
        self._in_prompt: Tensor | None = None
        self._generated: Tensor | None = None

    def begin(
        self,
        rows: Sequence[int],
        requests: Sequence[Request],
        keys: Sequence[int],
        generated: Sequence[Sequence[int]],
    ) -> None:
        """Take the options of requests that begin in these rows; the host does not wait.

        Args:
            keys: of their random draws.
            generated: the tokens that each got before, if it was put back.
        """
        places = self.sent(torch.tensor(rows, device="cpu"))
        self._keys.index_copy_(0, places, self.sent(torch.tensor(keys, device="cpu")))
        options = RowOptions.of([request.sampling for request in requests], self._vocab_size)
        for field in fields(RowOptions):
            getattr(self._options, field.name).index_copy_(0, places, self.sent(getattr(options, field.name)))
        for row, request, tokens in zip(rows, requests, generated, strict=True):
            if request.sampling.penalizes:
                self._note_text(row, request.prompt_ids, tokens)

    def _note_text(self, row: int, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """Count what a row holds, for its penalties."""
        if self._in_prompt is None or self._generated is None:
            shape = self._rows, self._vocab_size
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._generated = torch.zeros(shape, dtype=torch.int32, device=self._device)
        self._in_prompt[row].zero_().index_fill_(0, self.sent(torch.tensor(prompt, device="cpu")), True)
        counts = self._generated[row].zero_()
        if generated:
            added = self.sent(torch.tensor(generated, device="cpu"))
            counts.index_add_(0, added, torch.ones_like(added, dtype=torch.int32))

    def sent(self, values: Tensor) -> Tensor:
        """A host tensor on the device, by a copy for which the host does not wait."""
        if self._device.type != "cuda":
            return values.to(self._device)
        return values.pin_memory().to(self._device, non_blocking=True)

    def choose(self, logits: Tensor, rows: Tensor, counts: Tensor, kind: StepKind) -> Chosen:
        """The next token of each lane, which becomes its row's newest one. Tensor operations only, for a graph.

        Args:
            logits: [L, V].
            rows, counts: [L] int64, the row of each lane, and how many tokens the request has drawn before. A lane
                without a request has a row without one.
        """
        if kind.draws or kind.penalizes:
            tokens = self._weighed(logits, rows, counts, kind)
        else:
            ops = largest if logits.is_cuda else largest_eager
            tokens = ops.largest(logits)
        self.newest.index_copy_(0, rows, tokens)
        if kind.logprobs is None:
            return Chosen(tokens)
        all_logprobs = logits.float().log_softmax(-1)
        logprobs = all_logprobs.gather(-1, tokens[:, None])[:, 0]
        if kind.logprobs == 0:
            return Chosen(tokens, logprobs)
        top = all_logprobs.topk(min(kind.logprobs, self._vocab_size))
        return Chosen(tokens, logprobs, top.indices, top.values)

    def _weighed(self, logits: Tensor, rows: Tensor, counts: Tensor, kind: StepKind) -> Tensor:
        """The tokens, where scores alone do not tell."""
        options = self._options.of_rows(rows)
        if not kind.penalizes:
            scores = processed(logits, options, cuts=kind.cuts)
            return draw(scores, options.temperature, self._keys.index_select(0, rows), counts)
        assert self._in_prompt is not None
        assert self._generated is not None
        in_prompt, generated = self._in_prompt.index_select(0, rows), self._generated.index_select(0, rows)
        scores = processed(logits, options, draws=kind.draws, cuts=kind.cuts, in_prompt=in_prompt, generated=generated)
        if kind.draws:
            tokens = draw(scores, options.temperature, self._keys.index_select(0, rows), counts)
        else:
            tokens = scores.argmax(-1)
        places = rows * self._vocab_size + tokens
        self._generated.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))
        return tokens
