"""Text in, text out."""

from collections.abc import Iterator, Sequence
from typing import Any

from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.answers import answers
from slothcore.inference.endings import Endings
from slothcore.inference.text_pieces import TextPieces
from slothcore.models.decoder import Decoder
from slothcore.models.sampling import Sampling


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
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    stop_strings: str | Sequence[str] = (),
    seed: int | None = None,
    batch_size: int = 128,
    add_special_tokens: bool = True,
) -> list[str]:
    """Continue each prompt and return what was added.

    Args:
        prompts: one text or several, each encoded as in training: with one begin token and no end token. For a chat,
            the text from `tokenizer.apply_chat_template` with add_generation_prompt=True, and
            add_special_tokens=False.
        max_new_tokens: most tokens to add to a prompt.
        temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty: see `Sampling`;
            temperature 0 is greedy.
        stop_strings: a text ends before the first of these strings; an end-of-sequence token, and what the chat
            template ends an answer with, end it in any case.
        seed: of the random draws: prompt i draws what it would alone with the seed `seed + i`. None: another one each
            time.
        batch_size: how many prompts are continued together at most; others follow as these end. Results do not depend
            on it.
        add_special_tokens: let the tokenizer add its begin-of-text token. Without, as behind a chat template, what is
            added counts as a text of its own: with tokenizers that put a space before words it begins without one.
    Returns: one text a prompt, without the prompt and without special tokens.
    Raises: ValueError for an option that does not fit or a prompt without any token.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    endings = Endings.of(model, tokenizer, stop_strings)
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
    )
    results = [""] * len(texts)
    for answer in answers(
        model,
        tokenizer,
        [_prompt_ids(tokenizer, text, add_special_tokens) for text in texts],
        goes_on=[add_special_tokens] * len(texts),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        endings=endings,
        seed=seed,
        batch_size=batch_size,
        stacklevel=3,  # the line that called this
    ):
        results[answer.index] = answer.text
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
    return TextPieces(tokenizer, endings, behind=ids if add_special_tokens else ()).take(tokens)


def _prompt_ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    if not isinstance(text, str):
        raise ValueError(
            f"a prompt is a text, got {type(text).__name__}; tokenizer.apply_chat_template makes one of a conversation"
        )
    ids = tokenizer.encode_prompt(text, add_special_tokens=add_special_tokens)
    if not ids:
        raise ValueError(f"the prompt {text!r} has no token; give it some text")
    return ids
