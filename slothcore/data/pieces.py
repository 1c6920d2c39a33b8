"""A long text in pieces, cut where no token stands across the cut."""

import re
from collections.abc import Iterable, Iterator

# Characters that are read as one piece, and how many of those before it are told with a piece.
PIECE = 2_000_000
BEFORE = 200
# How far back from the end of a piece a good place to cut is looked for.
LOOK_BACK = 20_000
# In the order of preference. Behind two line feeds, or before two spaces, tokenizers look at what follows; and signs
# that a vocabulary lacks may become one token together.
PLACES = tuple(
    re.compile(place) for place in (r"(?<=\w\n)(?=\w)", r"(?<=\w)(?= \w)", r"(?<=\S\n)(?=\S)", r"(?<=\S)(?= \S)")
)


def pieces_of(blocks: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """The pieces of a text that comes in blocks: each with the text before it, and whether it is the last."""
    text, before = "", ""
    for block in blocks:
        text += block
        while len(text) > PIECE:
            place = cut_place(text, 0, PIECE)
            yield text[:place], before, False
            before, text = text[max(0, place - BEFORE) : place], text[place:]
    if text:
        yield text, before, True


def cut_place(text: str, start: int, end: int) -> int:
    """The last good place to cut between `start` and `end`, which is itself the last resort."""
    earliest = max(start + 1, end - LOOK_BACK)
    for pattern in PLACES:
        place = max((found.start() for found in pattern.finditer(text, earliest, end)), default=None)
        if place is not None:
            return place
    return end
