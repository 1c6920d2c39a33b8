"""What the engine is asked for, and what it tells: token ids in, token ids out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Literal, Protocol, SupportsIndex

import torch

from slothcore.models.sampling import Sampling, random_key

LARGEST_SEED = 2**63 - 1
MOST_LOGPROBS = 20
"""So many alternatives are reported for a token at most; each one more is work in every step."""

Finished = Literal["stop", "length"]
"""Why a request ended: a token or `should_stop` ended it, or it had `max_new_tokens`."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to be continued.

    Attributes:
        prompt_ids: its tokens, at least one.
        max_new_tokens: most tokens to add.
        sampling: how they are chosen.
        eos_ids: tokens that end it; such a token is the last that is reported.
        seed: of the random draws; None: a seed of torch's default generator. Which tokens are drawn depends on the
            prompt, the options and the seed, not on what is decoded beside them.
        logprobs: report the log-probability of each token, and of this many of the likeliest ones; None: neither.
        adapter: the name of a set of factors, as the engine's `adapters` know it; None: those that the model has.
        should_stop: called on the host after each token with all new ones; the request ends when it returns true.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    eos_ids: frozenset[int] = frozenset()
    seed: int | None = None
    logprobs: int | None = None
    adapter: str | None = None
    should_stop: Callable[[list[int]], bool] | None = None

    def __post_init__(self) -> None:
        if len(self.prompt_ids) == 0:
            raise ValueError("a prompt must have at least one token, and this one is empty; give it some text")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.seed is not None:
            check_seed(self.seed)
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise ValueError(f"logprobs must lie in 0..{MOST_LOGPROBS}, got {self.logprobs}; ask for fewer, or None")

    def random_key(self) -> int:
        """What its draws come from; without a seed, and where it draws, another one at each call."""
        if self.seed is None and self.sampling.draws:
            return random_key(int(torch.randint(LARGEST_SEED, (), device="cpu")))
        return random_key(0 if self.seed is None else check_seed(self.seed))


@dataclass(frozen=True)
class Event:
    """A new token of a request.

    Attributes:
        id: of the request, as `Engine.add` gave it.
        token: the token. One that ends the text is reported too.
        logprob: log-probability of the token as the model has it, before temperature, penalties and cuts; None where
            it was not asked for.
        top_logprobs: (token, log-probability) of the likeliest ones, falling; as many as were asked for.
        finished: why it is the request's last token; None: more will come.
    """

    id: int
    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finished: Finished | None = None


class Adapters(Protocol):
    """Several sets of factors over one base."""

    def __contains__(self, name: object) -> bool:
        """Whether there is such a set; None, the base, always is one."""

    def use(self, name: str | None) -> None:
        """Put this set into the live parameters of the model, in place and in stream order."""


def check_seed(seed: SupportsIndex) -> int:
    """The seed, of whatever library, as Python's own integer. Raises: ValueError if it is none."""
    if not hasattr(seed, "__index__"):
        raise ValueError(f"seed must be a whole number, got {seed!r}")
    if not 0 <= index(seed) <= LARGEST_SEED:
        raise ValueError(f"seed must lie in 0..2**63 - 1, got {seed}")
    return index(seed)
