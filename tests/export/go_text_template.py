"""Go's text/template, as far as a Modelfile of ours goes: values, `if`, `else if`, `else`, `range`, `eq`, variables."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

# Strings may hold braces.
ACTION = re.compile(r'\{\{(-?)\s*((?:"(?:\\.|[^"\\])*"|[^"])*?)\s*(-?)\}\}', re.DOTALL)
Scope = dict[str, Any]
Node = Callable[[Scope, Any], str]


def execute(template: str, data: Mapping[str, Any]) -> str:
    """What Go writes. Raises: ValueError for anything else than the above."""
    pieces = _pieces(template)
    node, rest = _block(pieces)
    if rest:
        raise ValueError(f"unexpected {rest[0]}")
    return node({}, data)


def _pieces(template: str) -> list[tuple[bool, str]]:
    """Texts and actions in turn; a dash trims the space beside its action."""
    pieces: list[tuple[bool, str]] = []
    place, trims = 0, False
    for match in ACTION.finditer(template):
        text = template[place : match.start()]
        text = text.lstrip() if trims else text
        pieces += [(False, text.rstrip() if match[1] else text), (True, match[2])]
        place, trims = match.end(), bool(match[3])
    tail = template[place:]
    return [*pieces, (False, tail.lstrip() if trims else tail)]


def _block(pieces: list[tuple[bool, str]]) -> tuple[Node, list[tuple[bool, str]]]:
    """All up to an `end` or `else` that belongs to somebody further out."""
    nodes: list[Node] = []
    while pieces:
        is_action, text = pieces[0]
        if is_action and (text == "end" or text.startswith("else")):
            break
        pieces = pieces[1:]
        if not is_action:
            nodes.append(lambda scope, dot, text=text: text)
        elif text.startswith("if "):
            node, pieces = _if(text.removeprefix("if "), pieces)
            nodes.append(node)
        elif text.startswith("range "):
            body, pieces = _block(pieces)
            pieces = _after("end", pieces)
            of = text.removeprefix("range ")
            nodes.append(lambda scope, dot, of=of, body=body: _range(of, body, scope, dot))
        elif match := re.fullmatch(r"(\$\w+) :?= (.*)", text):
            nodes.append(lambda scope, dot, m=match: scope.update({m[1]: _value(m[2], scope, dot)}) or "")
        else:
            nodes.append(lambda scope, dot, text=text: str(_value(text, scope, dot)))
    return lambda scope, dot: "".join(node(scope, dot) for node in nodes), pieces


def _if(condition: str, pieces: list[tuple[bool, str]]) -> tuple[Node, list[tuple[bool, str]]]:
    then, pieces = _block(pieces)
    otherwise: Node = lambda scope, dot: ""  # noqa: E731
    _, text = pieces[0]
    if text.startswith("else if "):
        otherwise, pieces = _if(text.removeprefix("else if "), pieces[1:])
    elif text == "else":
        otherwise, pieces = _block(pieces[1:])
        pieces = _after("end", pieces)
    else:
        pieces = _after("end", pieces)
    return lambda scope, dot: (then if _value(condition, scope, dot) else otherwise)(scope, dot), pieces


def _after(word: str, pieces: list[tuple[bool, str]]) -> list[tuple[bool, str]]:
    if not pieces or pieces[0] != (True, word):
        raise ValueError(f"expected {word}, got {pieces[:1]}")
    return pieces[1:]


def _range(of: str, body: Node, scope: Scope, dot: Any) -> str:
    return "".join(body(scope, element) for element in _value(of, scope, dot))


def _value(text: str, scope: Scope, dot: Any) -> Any:
    if text.startswith('"'):
        # Beyond JSON's escapes, Go has \U and eight digits for one sign, and no pairs of \u.
        assert not re.search(r"\\u[dD][89a-fA-F]", text)
        return json.loads(re.sub(r"\\U([0-9a-f]{8})", lambda match: chr(int(match[1], 16)), text))
    if text in ("true", "false"):
        return text == "true"
    if text.startswith("$"):
        return scope[text]
    if match := re.fullmatch(r"eq (\S+) (.*)", text):
        return _value(match[1], scope, dot) == _value(match[2], scope, dot)
    if re.fullmatch(r"\.\w+", text):
        return dot[text[1:]]
    raise ValueError(f"{text!r} is not known here")
