"""A Modelfile as Ollama reads it, sign by sign: commands with a name and a value."""

NEWLINES, SPACES = "\r\n", " \t"


def read(text: str) -> list[tuple[str, str]]:
    """Name and value of each command; of a PARAMETER the name is that of the parameter.

    A value goes to the first space or newline that stands outside quotes: one double quote or three at its beginning,
    and the same at what has been read so far. Nothing is an escape. Other signs that cannot be seen are passed over.
    """
    commands: list[tuple[str, str]] = []
    state, name, value = "nothing", "", ""
    for sign in f"{text}\n":
        if state == "nothing":
            if sign not in NEWLINES + SPACES:
                state, name = "name", sign
        elif state == "name":
            if sign in SPACES:
                state, name = ("name", "") if name == "PARAMETER" else ("value", name)
            else:
                name += sign
        elif sign in NEWLINES + SPACES:
            found = _unquoted(value.strip())
            if found is None or sign in SPACES:
                value += sign
            else:
                commands.append((name, found))
                state, value = "nothing", ""
        elif sign.isprintable():
            value += sign
    if state != "nothing":
        raise ValueError(f"{name} has no end: {value!r}")
    return commands


def _unquoted(value: str) -> str | None:
    """None if its quotes are open."""
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            is_closed = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if is_closed else None
    return value
