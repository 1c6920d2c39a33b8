"""What is written: prompts of random tokens, and how many tokens each is to get."""

import random
from dataclasses import dataclass

UNEQUAL = "unequal"
UNEQUAL_ROWS = 128
# Of prompts and of continuations: the shortest and the longest.
UNEQUAL_PROMPTS, UNEQUAL_NEW = (16, 512), (16, 128)


@dataclass(frozen=True)
class WritingCase:
    """Prompts that are continued together.

    Attributes:
        name: ROWSxLENGTH, or "unequal".
        lengths: of the prompts.
        new_tokens: of each.
    """

    name: str
    lengths: tuple[int, ...]
    new_tokens: tuple[int, ...]

    @classmethod
    def parse(cls, name: str, *, new_tokens: int, shrink: int = 1) -> "WritingCase":
        """From ROWSxLENGTH, all with `new_tokens`; or "unequal", whose lengths are drawn, over `shrink`.

        Raises: ValueError for another name.
        """
        if name == UNEQUAL:
            draw = random.Random(0)
            rows = UNEQUAL_ROWS // shrink
            lengths = tuple(max(1, draw.randint(*UNEQUAL_PROMPTS) // shrink) for _ in range(rows))
            return cls(name, lengths, tuple(max(2, draw.randint(*UNEQUAL_NEW) // shrink) for _ in range(rows)))
        rows_text, separator, length = name.partition("x")
        if not (separator and rows_text.isdecimal() and length.isdecimal() and int(rows_text) * int(length)):
            raise ValueError(f"a case is ROWSxLENGTH or {UNEQUAL}, got {name!r}")
        return cls(name, (int(length),) * int(rows_text), (new_tokens,) * int(rows_text))

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Of all texts in the end."""
        return sum(self.lengths) + sum(self.new_tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest text in the end."""
        return max(length + new for length, new in zip(self.lengths, self.new_tokens, strict=True))

    def prompts(self, vocab_size: int, *, first_token: int) -> list[list[int]]:
        """Random tokens from `first_token` on, the same for every system; other ones in every prompt."""
        draw = random.Random(1)
        return [[draw.randrange(first_token, vocab_size) for _ in range(length)] for length in self.lengths]
