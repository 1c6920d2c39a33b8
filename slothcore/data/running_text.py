"""Running text of any length: cut where no token can stand across the cut, encoded block by block, and put together.

A text is read in pieces, so that a file larger than memory passes through, and a piece is encoded in blocks, on all
cores at once. The ids are those of the whole text: a cut stands behind a single line feed or before a single space,
where tokenizers split in any case, and each block is encoded behind the end of the one before it, since some tokenizers
mark the beginning of what they are given with a space.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from slothcore.data.chat_rows import TokenizedRow
from slothcore.data.formats import TextExample
from slothcore.data.pieces import BEFORE, cut_place
from slothcore.data.tokenizer import Tokenizer

# Characters that are encoded as one.
BLOCK = 50_000


def running_row(example: TextExample, tokenizer: Tokenizer) -> TokenizedRow:
    """All tokens of a piece of running text; begin and end of the document, where this is its first or last piece."""
    ids = [] if example.part else _begin(tokenizer)
    for block in _encoded(example, tokenizer):
        ids.extend(block)
    if not example.part:
        ids = tokenizer.single_begin(ids)
    if example.last and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return TokenizedRow(ids, list(ids))


@dataclass
class FullRows:
    """Rows of full length out of pieces as they come; what is left of one begins the next.

    Neighbours share a token: the first of a row is no target, so each token is one exactly once.
    """

    max_seq_length: int
    _left: list[int] = field(default_factory=list)
    _next_part: int = 0

    def add(self, row: TokenizedRow, example: TextExample) -> Iterator[TokenizedRow]:
        """The rows that a piece fills; with the last piece all that is left."""
        if example.part != self._next_part:
            # A piece before it was held out, or comes twice.
            yield from self.rest()
        ids = [*self._left, *row.input_ids]
        length, start = self.max_seq_length, 0
        while len(ids) - start >= length:
            yield _learned(ids[start : start + length])
            start += length - 1
        self._left, self._next_part = ids[start:], example.part + 1
        if example.last:
            # Of a row that was filled its last token is left, which was learned there.
            yield from self.rest(shared=start > 0 or example.part > 0)

    def rest(self, *, shared: bool = True) -> Iterator[TokenizedRow]:
        """What is left of the pieces so far."""
        left, self._left, self._next_part = self._left, [], 0
        if len(left) > shared:
            yield _learned(left)


def _learned(ids: list[int]) -> TokenizedRow:
    return TokenizedRow(ids, list(ids))


def _encoded(example: TextExample, tokenizer: Tokenizer) -> Iterable[list[int]]:
    """The ids of each block."""
    text, places = example.completion, [0]
    while len(text) - places[-1] > BLOCK:
        places.append(cut_place(text, places[-1], places[-1] + BLOCK))
    bounds = list(zip(places, [*places[1:], len(text)], strict=True))
    contexts = [text[max(0, start - BEFORE) : start] if start else example.before for start, _ in bounds]
    blocks = [context + text[start:end] for context, (start, end) in zip(contexts, bounds, strict=True)]
    for context, (ids, ends) in zip(contexts, tokenizer.encode_with_ends(blocks), strict=True):
        first = bisect_left(ends, len(context) + 1)
        # A space that a tokenizer leaves out of a token's beginning may end the context.
        yield ids[first:] if context else ids


def _begin(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer adds before a text."""
    with_added, plain = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    places = range(len(with_added) - len(plain) + 1)
    return with_added[: next((at for at in places if with_added[at : at + len(plain)] == plain), 0)]
