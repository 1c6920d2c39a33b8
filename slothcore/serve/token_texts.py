"""What single tokens stand for: their text, and their bytes, which may be a part of a character."""

from functools import lru_cache

from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.text_pieces import BYTE_TOKEN, INCOMPLETE


class TokenTexts:
    """Texts and bytes of the tokens of a vocabulary, as they stand within a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes_of_letters = byte_letters()
        self.of = lru_cache(maxsize=4096)(self._of)

    def _of(self, token: int) -> tuple[str, bytes]:
        """Text and bytes of a token; where the bytes are no whole characters, the text shows a mark for them."""
        spelled = self._tokenizer.token_text(token)
        if spelled is None:  # a row of the embedding beyond the vocabulary
            return "", b""
        if BYTE_TOKEN.fullmatch(spelled):
            data = bytes([int(spelled[3:5], 16)])
            return data.decode("utf-8", errors="replace"), data
        # Behind itself, for decoders leave out the space that begins a text.
        once, twice = (self._decoded([token] * count) for count in (1, 2))
        text = twice[len(once) :] if twice.startswith(once) else once
        if INCOMPLETE in text and all(letter in self._bytes_of_letters for letter in spelled):
            data = bytes(self._bytes_of_letters[letter] for letter in spelled)
            return data.decode("utf-8", errors="replace"), data
        return text, text.encode()

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def byte_letters() -> dict[str, int]:
    """The letters that byte-level vocabularies write for bytes: printable ones for themselves, others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
