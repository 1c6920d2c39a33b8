"""Encoded prompts in, texts out, each as soon as it is complete."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.endings import Endings
from slothcore.inference.text_pieces import joint_of, text_behind
from slothcore.models.decoder import Decoder
from slothcore.models.engine import PREFILL_TOKENS, Engine
from slothcore.models.generation import warn_beyond
from slothcore.models.requests import LARGEST_SEED, Finished, Request, check_seed
from slothcore.models.sampling import Sampling

# A character is four tokens at most, of one byte each; a few more for tokens without a text, and for what the first
# token of a text looks like.
TOKENS_A_CHARACTER, MORE_TOKENS = 4, 16


@dataclass(frozen=True)
class Answer:
    """What was added to a prompt.

    Attributes:
        index: of the prompt.
        text: without special tokens, and cut before what ends it.
        tokens: how many were generated, an end token among them.
        finish_reason: "stop" if a token or a string ended it, "length" if it had as many tokens as it may.
    """

    index: int
    text: str
    tokens: int
    finish_reason: Finished


def answers(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    goes_on: Sequence[bool],
    max_new_tokens: int,
    sampling: Sampling,
    endings: Endings,
    seed: int | None,
    batch_size: int,
    first: int = 0,
    stacklevel: int = 2,
) -> Iterator[Answer]:
    """Continue prompts together; answers come in the order in which they are complete.

    Args:
        prompts: token ids of each.
        goes_on: whether what is added goes on with the words of the prompt, or, as behind a chat template, is a text of
            its own: that of a tokenizer that puts a space before words begins without one.
        seed: prompt i draws what it would alone with the seed `seed + i`.
        batch_size: most prompts that are continued together.
        first: the index of the first prompt, where others went before.
        stacklevel: of the warning that a text goes beyond the model's positions, counted from here.
    Raises: ValueError for numbers that do not fit.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not prompts:
        return
    if seed is not None:
        seed = check_seed(seed)
    joints = [joint_of(tokenizer, ids if goes else ()) for ids, goes in zip(prompts, goes_on, strict=True)]
    requests = [
        Request(
            prompt_ids=ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_ids=endings.eos_ids,
            seed=None if seed is None else (seed + index) % (LARGEST_SEED + 1),
            should_stop=_finder(endings, tokenizer, joint) if endings.stops else None,
        )
        for index, (ids, joint) in enumerate(zip(prompts, joints, strict=True), start=first)
    ]
    engine = Engine(
        model,
        max_rows=min(batch_size, len(prompts)),
        capacity=max(map(len, prompts)) + max_new_tokens,
        prefill_tokens=min(PREFILL_TOKENS, sum(map(len, prompts))),
    )
    place_of = {engine.add(request): place for place, request in enumerate(requests)}
    tokens: list[list[int]] = [[] for _ in prompts]
    limit, warned = model.config.longest_document, False
    try:
        while engine.has_work:
            for event in engine.step():
                place = place_of[event.id]
                own = tokens[place]
                own.append(event.token)
                if len(prompts[place]) + len(own) - 1 > limit and not warned:
                    warned = True
                    warn_beyond(limit, stacklevel=stacklevel + 1)
                if event.finished is not None:
                    ids = own[:-1] if own[-1] in endings.eos_ids else own
                    text = endings.cut(text_behind(tokenizer, joints[place], ids))
                    yield Answer(first + place, text, len(own), event.finished)
                    tokens[place] = []
    finally:
        engine.close()


def _finder(endings: Endings, tokenizer: Tokenizer, joint: Sequence[int]) -> Callable[[list[int]], bool]:
    """A test for requests: whether their new tokens contain a stop string, which is looked for at their end only."""
    window = TOKENS_A_CHARACTER * max(map(len, endings.stops)) + MORE_TOKENS

    def should_stop(new_ids: list[int]) -> bool:
        text = text_behind(tokenizer, joint if len(new_ids) <= window else (), new_ids[-window:])
        return any(stop in text for stop in endings.stops)

    return should_stop
