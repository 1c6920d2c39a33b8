"""Markup that cannot be forgotten to escape: text is escaped where it enters an element."""

import html
import json
from collections.abc import Sequence
from typing import Any

# Elements without a closing tag. Those of SVG have one.
VOID = frozenset({"meta", "br"})
# What could end a script element, open a comment in it, or break a line for an old parser.
UNSAFE_IN_SCRIPT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """An element with its children, each escaped unless it is `Html`; None and "" are left out.

    Args:
        attributes: `class_` is written as class, and `_` elsewhere as a hyphen; None and False leave one out, True
            writes it without a value.
    """
    head = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        head.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    opened = f"<{' '.join(head)}>"
    return Html(opened if name in VOID else f"{opened}{together(*children)}</{name}>")


def together(*children: object) -> Html:
    """Elements and texts one after the other."""
    return Html("".join(escape(child) for child in children if child is not None))


def escape(value: object) -> Html:
    """`value` as text of a page; `Html` as it is."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def script_json(value: Any) -> Html:
    """`value` as JSON that may stand in a script element, whatever texts are in it. Raises ValueError for NaN."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character, escaped in UNSAFE_IN_SCRIPT.items():
        text = text.replace(character, escaped)
    return Html(text)


def table(head: Sequence[object], rows: Sequence[Sequence[object]], *, class_: str | None = None) -> Html:
    """A table in a box of its own, which scrolls sideways where the page is narrow."""
    top = element("thead", element("tr", *(element("th", cell, scope="col") for cell in head))) if head else None
    body = element("tbody", *(element("tr", *(element("td", cell) for cell in row)) for row in rows))
    return element("div", element("table", top, body, class_=class_), class_="scrolls", tabindex="0")
