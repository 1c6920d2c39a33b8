"""Which texts may become tokens, and which of them look as if they steered; without the tokenizers package."""

import re
from collections.abc import Sequence

# <|im_start|>, <start_of_turn>, [INST], </s>, but not <think>, which is part of an answer that one reads.
_CONTROL_TOKEN = re.compile(r"<\|[^|]+\|>|<(start|end)_of_\w+>|\[/?[A-Z_]+\]|</?(s|pad|unk|mask|bos|eos)>")


def is_control_token(token: str) -> bool:
    """Whether a token looks like one that steers, which a text decoded for people leaves out."""
    return _CONTROL_TOKEN.fullmatch(token) is not None


def check_new_tokens(tokens: Sequence[str]) -> None:
    """Raises: ValueError if one of them is no text that can be a token, or stands twice."""
    for token in tokens:
        if not isinstance(token, str) or not token.strip():
            raise ValueError(f"new_tokens must be texts with at least one visible character, got {token!r}")
        if tokens.count(token) > 1:
            raise ValueError(f"new_tokens names {token!r} twice; name each token once")
