"""The fields of a request, each read with the type that it must have; what is left over at the end is refused."""

from typing import Any

from slothcore.serve.errors import wrong

# About the account or the caller's own book-keeping; no answer depends on them.
IGNORED = frozenset(
    (
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    )
)
# Of the protocol and not served, with the values under which they ask for nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


class Fields:
    """Takes fields out of a request; null counts as absent."""

    def __init__(self, values: dict[str, Any]) -> None:
        """Raises: ApiError for a field of the protocol that asks for what is not served."""
        self._left = {name: value for name, value in values.items() if value is not None and name not in IGNORED}
        for name, harmless in UNSERVED.items():
            value = self._left.pop(name, None)
            if value is not None and value not in harmless:
                raise wrong(f"{name} is not served here; leave it out", param=name)

    def take(self, name: str) -> Any:
        """Whatever the field holds; None if it is absent."""
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        return self._typed(name, (str,), "a text")

    def flag(self, name: str) -> bool:
        return bool(self._typed(name, (bool,), "true or false"))

    def whole(self, name: str) -> int | None:
        value = self._typed(name, (int, float), "a whole number")
        if isinstance(value, float) and not value.is_integer():
            raise wrong(f"{name} must be a whole number, got {value!r}", param=name)
        return None if value is None else int(value)

    def number(self, name: str) -> float | None:
        value = self._typed(name, (int, float), "a number")
        try:
            return None if value is None else float(value)
        except OverflowError as error:
            raise wrong(f"{name} must be a number that a float64 can hold", param=name) from error

    def finish(self) -> None:
        """Raises: ApiError if a field is left: what nobody has read, nobody would notice to be spelled wrong."""
        if self._left:
            name = min(self._left)
            raise wrong(f"unrecognized field {name!r}; leave it out", param=name)

    def _typed(self, name: str, types: tuple[type, ...], what: str) -> Any:
        value = self.take(name)
        if value is None or (isinstance(value, types) and (bool in types or not isinstance(value, bool))):
            return value
        raise wrong(f"{name} must be {what}, got {value!r}"[:200], param=name)
