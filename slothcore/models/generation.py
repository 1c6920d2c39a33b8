"""Writing on from token ids, one token of every row at a time. The text-level front is `slothcore.generate`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from slothcore.layers.known_norms import known_norms
from slothcore.layers.kv_cache import KvCache
from slothcore.layers.packed import Documents, PackedInputs
from slothcore.models.sampling import Sampling, choose
from slothcore.models.streaming import TextCache, stream_tokens

if TYPE_CHECKING:
    from slothcore.models.decoder import Decoder


class Generates:
    """Gives a decoder its `generate` and its `stream`."""

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
            temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; temperature 0 is greedy.
            eos_token_id: one or several; default: the model's own. An empty sequence: none, so every row gets
                max_new_tokens.
            pad_token_id: default: the model's own, else its first end-of-sequence token.
            seed: of the random draws; None draws from torch's default generator.
            should_stop: called after each token with the new ids [B, new so far]; rows for which the returned [B] bool
                is true end there.
        Returns: [B, S + new] int64 on the model's device: the prompts as given, then the new tokens.
        Raises: ValueError for options or inputs that do not fit.
        """
        model = cast("Decoder", self)
        _check_count(max_new_tokens)
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        )
        if input_ids.dim() == 1:
            input_ids = input_ids[None]
            attention_mask = attention_mask[None] if attention_mask is not None else None
        prompts = model.pack(input_ids, attention_mask=attention_mask)
        eos, pad = _ending_ids(model, eos_token_id, pad_token_id)
        generator = _generator(model, seed)

        was_training = model.training
        model.eval()
        try:
            with known_norms(model, model.dtype):
                new = _generate(
                    model, prompts, len(input_ids), max_new_tokens, sampling, eos, pad, generator, should_stop
                )
        finally:
            model.train(was_training)
        return torch.cat([input_ids.to(model.device, torch.int64), new], dim=1)

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
        model = cast("Decoder", self)
        _check_count(max_new_tokens)
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        )
        ids = torch.as_tensor(input_ids, dtype=torch.int64)
        if ids.dim() != 1:
            raise ValueError(f"one prompt can be streamed, [S]; got the shape {tuple(ids.shape)}")
        prompt = model.pack(ids).input_ids.tolist()
        eos, _ = _ending_ids(model, eos_token_id, None)
        generator = _generator(model, seed)
        if cache is not None and cache.model is not model:
            raise ValueError("the cache holds keys and values of another model; make one with TextCache(model)")
        return _stream(
            cache or TextCache(model),
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos=eos,
            generator=generator,
        )


@torch.no_grad()
def _stream(cache: TextCache, prompt: list[int], **options: Any) -> Iterator[int]:
    model, warned = cache.model, False
    limit, was_training = model.config.longest_document, model.training
    model.eval()
    try:
        with known_norms(model, model.dtype):
            for token in stream_tokens(cache, prompt, **options):
                if len(cache.ids) > limit and not warned:
                    warned = True
                    _warn_beyond(limit, stacklevel=4)  # the line that asked for the token
                yield token
    finally:
        model.train(was_training)


def _generate(
    model: Decoder,
    prompts: PackedInputs,
    rows: int,
    max_new_tokens: int,
    sampling: Sampling,
    eos: Sequence[int],
    pad: int,
    generator: torch.Generator | None,
    should_stop: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """New tokens [rows, at most max_new_tokens]."""
    device, documents = model.device, prompts.documents
    seen: Tensor | None = None
    if sampling.repetition_penalty != 1.0:
        row_of_token = torch.repeat_interleave(documents.cu_seqlens.diff(), output_size=len(prompts.input_ids))
        seen = torch.zeros(rows, model.config.vocab_size, dtype=torch.bool, device=device)
        seen[row_of_token, prompts.input_ids] = True
    eos_ids = torch.tensor(eos, dtype=torch.int64, device=device)
    every_row = torch.arange(rows, device=device)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    new = torch.empty(rows, max_new_tokens, dtype=torch.int64, device=device)

    cache = empty_cache(model, rows, capacity=documents.max_seqlen + max_new_tokens)
    cache.begin_prompt(documents, len(prompts.input_ids))
    outgrowing = _rows_that_outgrow_short_factors(model, documents)
    limit, warned = model.config.longest_document, False
    hidden = model.model(prompts.input_ids, prompts.position_ids, documents, cache)
    hidden = hidden[documents.cu_seqlens[1:].long() - 1]
    for step in range(max_new_tokens):
        if step > 0:
            hidden = model.model(new[:, step - 1], cache.begin_token(), documents, cache)
        if step in outgrowing:
            hidden = _read_again(model, prompts, new[:, :step], outgrowing[step], cache, hidden)
        if cache.longest > limit and not warned:
            warned = True
            _warn_beyond(limit, stacklevel=5)  # the line that called generate: torch.no_grad puts a frame between
        token = choose(model.logits(hidden), sampling, seen, generator)
        token = torch.where(finished, pad, token)
        new[:, step] = token
        if seen is not None:
            seen[every_row, token] = True
        finished = finished | torch.isin(token, eos_ids)
        if should_stop is not None:
            finished = finished | should_stop(new[:, : step + 1]).to(device)
        if finished.all():
            return new[:, : step + 1]
    return new


def _rows_that_outgrow_short_factors(model: Decoder, prompts: Documents) -> dict[int, list[int]]:
    """With longrope: after how many new tokens which rows need the long factors, for their first tokens too."""
    rope, steps = model.config.rope, dict[int, list[int]]()
    if rope.rope_type == "longrope":
        for row, length in enumerate(prompts.cu_seqlens.diff().tolist()):
            step = rope.original_max_position_embeddings + 1 - length
            if step > 0:
                steps.setdefault(step, []).append(row)
    return steps


def _read_again(
    model: Decoder, prompts: PackedInputs, new: Tensor, rows: list[int], cache: KvCache, hidden: Tensor
) -> Tensor:
    """Replace what the cache holds of `rows`, which are equally long by now, and their part of `hidden` [rows, H].

    Their keys were turned by the short factors; transformers' Phi-3 drops its cache at this token too.
    """
    ends = prompts.documents.cu_seqlens.tolist()
    texts = [torch.cat([prompts.input_ids[ends[row] : ends[row + 1]], new[row]]) for row in rows]
    length = len(texts[0])
    starts = torch.arange(0, (len(rows) + 1) * length, length, dtype=torch.int32, device=model.device)
    documents = Documents(starts, length)
    which = torch.tensor(rows, device=model.device)
    cache.begin_prompt(documents, len(rows) * length, which)
    positions = torch.arange(length, device=model.device).repeat(len(rows))
    again = model.model(torch.cat(texts), positions, documents, cache)
    return hidden.index_copy(0, which, again[starts[1:].long() - 1])


def _warn_beyond(limit: int, *, stacklevel: int) -> None:
    warnings.warn(
        f"generation goes beyond the {limit} positions that the model was made for (max_position_embeddings); "
        "the text may degrade",
        stacklevel=stacklevel,
    )


def _check_count(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def _generator(model: Decoder, seed: int | None) -> torch.Generator | None:
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in 0..2**63 - 1, got {seed}")
    return None if seed is None else torch.Generator(model.device).manual_seed(seed)


def empty_cache(model: Decoder, rows: int, capacity: int) -> KvCache:
    """A cache for `rows` sequences of at most `capacity` tokens."""
    return KvCache(
        layers=model.config.num_hidden_layers,
        rows=rows,
        capacity=capacity,
        num_kv_heads=model.config.num_key_value_heads,
        head_dim=model.config.head_dim,
        dtype=model.dtype,
        device=model.device,
    )


def _ending_ids(
    model: Decoder, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None
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
