"""What the first client would wait for: kernels are compiled and loaded when a pass first needs them."""

from collections.abc import Sequence

from slothcore.inference.engine import Engine, Request
from slothcore.models.sampling import Sampling

# Of the smallest pass over prompts. With a second decode step the graph of such a step is there, too.
PROMPT_TOKENS, NEW_TOKENS = 16, 3


def warm_up(engine: Engine, adapters: Sequence[str | None], sampling: Sampling) -> None:
    """Answer a short prompt for nobody, with each of the adapters, so that the kernels of such answers are ready.

    Later answers are what they would be without; torch's default generator is not asked.

    Raises: what a pass raises.
    """
    prompt = [0] * max(1, min(PROMPT_TOKENS, engine.capacity - NEW_TOKENS))
    added = min(NEW_TOKENS, engine.capacity - len(prompt))
    if added < 1:
        return
    for adapter in adapters:
        engine.add(Request(prompt_ids=prompt, max_new_tokens=added, sampling=sampling, seed=0, adapter=adapter))
    while engine.has_work:
        engine.step()
