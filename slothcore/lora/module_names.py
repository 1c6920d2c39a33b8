"""How names, patterns and regular expressions of an adapter's configuration stand for modules, as in PEFT."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

ALL_LINEAR = "all-linear"
EMBEDDING = "embed_tokens"


def ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def unmatched_names(names: Iterable[str], linears: Iterable[str]) -> str:
    """What to say of names in `target_modules` that no linear layer has."""
    names = list(names)
    known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in linears))
    message = (
        f"target_modules {', '.join(map(repr, names))} match no linear layer; known are {known}, "
        f"and {ALL_LINEAR!r} takes all but the head"
    )
    if EMBEDDING in names:
        message += f"; {EMBEDDING} has no LoRA, and trains as a whole in modules_to_save"
    return message


def matches(names: tuple[str, ...] | str, path: str) -> bool:
    """By names, or by a regular expression for the whole path."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(ends_with(path, name) for name in names)


def by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that the end of the path matches."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def by_new_names(patterns: Mapping[str, Any], default: Any, renamed: Mapping[str, str]) -> dict[str, Any]:
    """The patterns, and before them one for each new name that they would give another value than its old one."""
    values = {new: by_pattern(patterns, old, default) for old, new in renamed.items()}
    own = {re.escape(new): value for new, value in values.items() if by_pattern(patterns, new, default) != value}
    return {**own, **patterns}
