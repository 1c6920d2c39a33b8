"""Where the tokens of an encoded text end, asked for one by one."""

from collections.abc import Sequence
from typing import overload

from tokenizers import Encoding


class TokenEnds(Sequence[int]):
    """For each token of an encoding the character behind its last one.

    A search looks at a few of them; a list of all takes longer than to encode a long text.
    """

    def __init__(self, encoding: Encoding) -> None:
        self._characters_of = encoding.token_to_chars
        self._length = len(encoding)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._length))]
        characters = self._characters_of(index)
        assert characters is not None, "only a token that was added around the text has none"
        return characters[1]
