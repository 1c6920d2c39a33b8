"""Text in, text out."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.endings import Endings
from slothcore.inference.text_pieces import TextPieces
from slothcore.models.decoder import Decoder


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_strings: str | Sequence[str] = (),
    seed: int | None = None,
    batch_size: int = 8,
    add_special_tokens: bool = True,
) -> list[str]:
    """Continue each prompt and return what was added.

    Args:
        prompts: one text or several, each encoded as in training: with one begin token and no end token. For a chat,
            the text from `tokenizer.apply_chat_template` with add_generation_prompt=True, and
            add_special_tokens=False.
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty: see `Decoder.generate`; temperature 0 is
            greedy.
        stop_strings: a text ends before the first of these strings; an end-of-sequence token, and what the chat
            template ends an answer with, end it in any case.
        seed: of the random draws.
        batch_size: how many prompts are continued together; greedy results do not depend on it.
        add_special_tokens: let the tokenizer add its begin-of-text token.
    Returns: one text a prompt, without the prompt and without special tokens.
    Raises: ValueError for an option that does not fit or a prompt without any token.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    endings = Endings.of(model, tokenizer, stop_strings)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    encoded = [_prompt_ids(tokenizer, text, add_special_tokens) for text in texts]
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "eos_token_id": sorted(endings.eos_ids),
        "should_stop": _finds(endings.stops, tokenizer) if endings.stops else None,
    }
    results: list[str] = []
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        input_ids, attention_mask = _left_padded(batch)
        # Each batch draws numbers of its own, or equal prompts in different batches would get equal answers.
        batch_seed = None if seed is None else seed + start
        continued = model.generate(input_ids, attention_mask, seed=batch_seed, **options)
        for row in continued[:, input_ids.shape[1] :].tolist():
            length = next((i for i, token in enumerate(row) if token in endings.eos_ids), len(row))
            results.append(endings.cut(tokenizer.decode(row[:length])))
    return results


def stream(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    stop_strings: str | Sequence[str] = (),
    add_special_tokens: bool = True,
    **sampling: Any,
) -> Iterator[str]:
    """Continue one prompt and give the text out as it is made; joined, the pieces are what `generate` returns.

    No piece ends within a character, and none is of what may yet turn out to be a stop string.

    Args:
        prompt, max_new_tokens, stop_strings, add_special_tokens: see `generate`.
        sampling: temperature, top_k, top_p, min_p, repetition_penalty, seed and cache, see `Decoder.stream`.
    Raises: ValueError for an option that does not fit or a prompt without any token, at once.
    """
    endings = Endings.of(model, tokenizer, stop_strings)
    ids = _prompt_ids(tokenizer, prompt, add_special_tokens)
    tokens = model.stream(ids, max_new_tokens=max_new_tokens, eos_token_id=sorted(endings.eos_ids), **sampling)
    return TextPieces(tokenizer, endings).take(tokens)


def _prompt_ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    ids = tokenizer.encode_prompt(text, add_special_tokens=add_special_tokens)
    if not ids:
        raise ValueError(f"the prompt {text!r} has no token; give it some text")
    return ids


def _left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [B, S], zeros on the left of shorter rows, and the mask that says so."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _finds(stops: Sequence[str], tokenizer: Tokenizer) -> Callable[[Tensor], Tensor]:
    """A test for `Decoder.generate`: which rows of new ids [B, n] contain one of the strings."""

    def should_stop(new_ids: Tensor) -> Tensor:
        texts = [tokenizer.decode(row) for row in new_ids.tolist()]
        return torch.tensor([any(stop in text for stop in stops) for text in texts])

    return should_stop
