"""Writing on from token ids, one token of every row at a time. The text-level front is `slothcore.generate`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from slothcore.layers.packed import pack_inputs
from slothcore.models.engine import PREFILL_TOKENS, Engine
from slothcore.models.language_model import LanguageModel
from slothcore.models.requests import LARGEST_SEED, Request, check_seed
from slothcore.models.sampling import Sampling
from slothcore.models.streaming import TextCache, stream_tokens

MOST_ROWS = 256
"""So many prompts of a batch are continued together at most; others wait until rows are free."""


class Generates(LanguageModel):
    """A language model that writes: `generate` and `stream`."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        should_stop: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Continue each prompt; prompts are read packed, so padding never takes part.

        A greedy row is what it would be alone. With longrope, a row is read again when it outgrows the short factors,
        as by transformers' Phi-3; with the other types, keys in the cache stay as they were turned. A row ends with an
        end-of-sequence token, and is filled with `pad_token_id` while other rows go on. LoRA dropout is off meanwhile.
        Beyond `DecoderConfig.longest_document` a warning says that the model was not made for such positions.

        Args:
            input_ids: [B, S] prompts, or [S] for one.
            attention_mask: [B, S], zero at padding; left padding puts the new tokens right behind each prompt.
            max_new_tokens: most tokens to add to a row.
            temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty: see `Sampling`;
                temperature 0 is greedy.
            eos_token_id: one or several; default: the model's own. An empty sequence: none, so every row gets
                max_new_tokens.
            pad_token_id: default: the model's own, else its first end-of-sequence token.
            seed: of the random draws: row r draws what it would alone with the seed `seed + r`. None: each row takes a
                seed of torch's default generator.
            should_stop: called after each token with the new ids [B, new so far]; rows for which the returned [B] bool
                is true end there.
        Returns: [B, S + new] int64 on the model's device: the prompts as given, then the new tokens.
        Raises: ValueError for options or inputs that do not fit.
        """
        _check_count(max_new_tokens)
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
        )
        if input_ids.dim() == 1:
            input_ids = input_ids[None]
            attention_mask = attention_mask[None] if attention_mask is not None else None
        on_host = None if attention_mask is None else attention_mask.cpu()
        prompts = pack_inputs(input_ids.cpu(), attention_mask=on_host, vocab_size=self.config.vocab_size)
        eos, pad = _ending_ids(self, eos_token_id, pad_token_id)
        if seed is not None:
            seed = check_seed(seed)
        requests = [
            Request(
                prompt_ids=prompts.input_ids[start:end].tolist(),
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                eos_ids=frozenset(eos),
                seed=None if seed is None else (seed + row) % (LARGEST_SEED + 1),
            )
            for row, (start, end) in enumerate(pairwise(prompts.documents.cu_seqlens.tolist()))
        ]
        new = _generate(self, requests, pad, should_stop)
        return torch.cat([input_ids.to(torch.int64), new.to(input_ids.device)], dim=1).to(self.device)

    def stream(
        self,
        input_ids: Tensor | Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int | None = None,
        cache: TextCache | None = None,
    ) -> Iterator[int]:
        """The tokens that follow one prompt, each computed when it is asked for: those of `generate` for it alone.

        The model is in eval mode until the last token was taken or the iterator is closed.

        Args:
            input_ids: [S], or a list of ids.
            cache: of this model; keeps what it reads, so that a next prompt that begins with this text and its
                continuation costs only what is new. One iterator at a time may use it.
            max_new_tokens, temperature, ..., seed: see `generate`. An end-of-sequence token is given out, as the last.
        Raises: ValueError for options or ids that do not fit, at once.
        """
        _check_count(max_new_tokens)
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
        )
        ids = torch.as_tensor(input_ids, dtype=torch.int64, device="cpu")
        if ids.dim() != 1:
            raise ValueError(f"one prompt can be streamed, [S]; got the shape {tuple(ids.shape)}")
        prompt = pack_inputs(ids, vocab_size=self.config.vocab_size).input_ids.tolist()
        eos, _ = _ending_ids(self, eos_token_id, None)
        request = Request(
            prompt_ids=prompt, max_new_tokens=max_new_tokens, sampling=sampling, eos_ids=frozenset(eos), seed=seed
        )
        if cache is not None and cache.model is not self:
            raise ValueError("the cache holds keys and values of another model; make one with TextCache(model)")
        return _stream(cache or TextCache(self), request, request.random_key())


@torch.no_grad()
def _stream(cache: TextCache, request: Request, key: int) -> Iterator[int]:
    model, warned = cache.model, False
    limit = model.config.longest_document
    try:
        cache.mode.enter()
        for token in stream_tokens(cache, request, key):
            if len(cache.ids) > limit and not warned:
                warned = True
                warn_beyond(limit, stacklevel=4)  # the line that asked for the token
            yield token
    finally:
        cache.mode.leave()


def _generate(
    model: LanguageModel,
    requests: Sequence[Request],
    pad: int,
    should_stop: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """New tokens [rows, at most max_new_tokens], on the CPU."""
    capacity = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    engine = Engine(
        model,
        max_rows=min(len(requests), MOST_ROWS),
        capacity=capacity,
        prefill_tokens=min(PREFILL_TOKENS, sum(len(request.prompt_ids) for request in requests)),
    )
    limit, warned = model.config.longest_document, False
    rows = {engine.add(request): row for row, request in enumerate(requests)}
    numbers = list(rows)
    rounds = Rounds(len(requests), pad)
    try:
        while engine.has_work:
            for event in engine.step():
                row = rows[event.id]
                rounds.take(row, event.token, is_last=event.finished is not None)
                # The newest token has not been read yet.
                if len(requests[row].prompt_ids) + len(rounds.tokens[row]) - 1 > limit and not warned:
                    warned = True
                    warn_beyond(limit, stacklevel=5)  # where generate was called: torch.no_grad puts a frame between
            while should_stop is not None and rounds.has_whole:
                for row in rounds.end_where(should_stop(rounds.newest().to(model.device))):
                    engine.cancel(numbers[row])
    finally:
        engine.close()
    return rounds.all()


class Rounds:
    """Tokens of rows, which may come in any order, put into rounds: one token of every row that has not ended.

    Attributes:
        tokens: of each row.
    """

    def __init__(self, rows: int, pad: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self._ends: list[int | None] = [None] * rows
        self._pad, self._round = pad, 0

    def take(self, row: int, token: int, *, is_last: bool) -> None:
        """Note a token of a row; behind the last one none is taken."""
        self.tokens[row].append(token)
        if is_last:
            self._ends[row] = len(self.tokens[row])

    @property
    def has_whole(self) -> bool:
        """Whether the next round is complete."""
        lengths = [
            len(tokens) for tokens, end in zip(self.tokens, self._ends, strict=True) if end is None or end > self._round
        ]
        return bool(lengths) and min(lengths) > self._round

    def newest(self) -> Tensor:
        """All rounds up to the next one, [rows, rounds] int64; it counts as told."""
        self._round += 1
        return self._padded(self._round)

    def end_where(self, ended: Tensor) -> list[int]:
        """End the rows for which the caller says so after the round told last; gives those that had not ended."""
        rows = [row for row, is_over in enumerate(ended.tolist()) if is_over and not self._is_over(row)]
        for row in rows:
            self._ends[row] = self._round
            del self.tokens[row][self._round :]
        return rows

    def all(self) -> Tensor:
        """Everything, [rows, rounds] int64."""
        return self._padded(max(len(tokens) for tokens in self.tokens))

    def _is_over(self, row: int) -> bool:
        end = self._ends[row]
        return end is not None and end <= self._round

    def _padded(self, width: int) -> Tensor:
        rows = [tokens[:width] + [self._pad] * (width - len(tokens)) for tokens in self.tokens]
        return torch.tensor(rows, device="cpu")


def warn_beyond(limit: int, *, stacklevel: int) -> None:
    """Tell the user that positions come which the model was not made for."""
    warnings.warn(
        f"generation goes beyond the {limit} positions that the model was made for (max_position_embeddings); "
        "the text may degrade",
        stacklevel=stacklevel,
    )


def _check_count(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def _ending_ids(
    model: LanguageModel, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None
) -> tuple[tuple[int, ...], int]:
    """End-of-sequence ids and the padding id: the caller's, else the model's."""
    if eos_token_id is None:
        eos = model.eos_token_ids
    else:
        eos = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    if pad_token_id is None:
        pad_token_id = model.generation_config.get("pad_token_id", model.config.pad_token_id)
    if pad_token_id is None or pad_token_id < 0:
        pad_token_id = eos[0] if eos else 0
    vocab_size = model.config.vocab_size
    for name, value in (*(("eos_token_id", value) for value in eos), ("pad_token_id", pad_token_id)):
        if not isinstance(value, int) or not 0 <= value < vocab_size:
            raise ValueError(f"{name} must lie in 0..{vocab_size - 1} (the vocabulary), got {value!r}")
    return eos, pad_token_id
