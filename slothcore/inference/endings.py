"""What ends an answer: tokens, and strings."""

from collections.abc import Sequence
from dataclasses import dataclass

from slothcore.data.chat_rows import turn_end
from slothcore.data.tokenizer import Tokenizer
from slothcore.models.decoder import Decoder


@dataclass(frozen=True)
class Endings:
    """An answer ends with one of the tokens `eos_ids`, or before the first of the strings `stops`."""

    eos_ids: frozenset[int]
    stops: tuple[str, ...]

    @classmethod
    def of(cls, model: Decoder, tokenizer: Tokenizer, stop_strings: str | Sequence[str]) -> "Endings":
        """The end-of-sequence tokens of model and tokenizer, what the chat template ends a turn with, and the strings.

        Raises: ValueError for an empty string, which every text contains.
        """
        stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if "" in stops:
            raise ValueError("stop_strings must not hold an empty string")
        eos_ids = {*model.eos_token_ids, *control_tokens(tokenizer, stops)}
        if tokenizer.eos_token_id is not None:
            eos_ids.add(tokenizer.eos_token_id)
        # A chat template may end answers with a token that the model's own files do not call an end.
        end = turn_end(tokenizer)
        if isinstance(end, int):
            eos_ids.add(end)
        elif end is not None:
            stops.append(end)
        # Files may name tokens that the embedding no longer has; no text ends with them.
        return cls(frozenset(token for token in eos_ids if 0 <= token < model.config.vocab_size), tuple(stops))

    def with_stops(self, tokenizer: Tokenizer, stops: Sequence[str]) -> "Endings":
        """These, and more strings."""
        return Endings(self.eos_ids.union(control_tokens(tokenizer, stops)), (*self.stops, *stops))

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        return text[: min((text.index(stop) for stop in self.stops if stop in text), default=len(text))]

    def begun(self, text: str) -> int:
        """How many characters at the end of `text` may turn out to begin a stop string."""
        longest = min(max(map(len, self.stops), default=1) - 1, len(text))
        sizes = range(longest, 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self.stops)), 0)


def control_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """The tokens that some of these texts spell and that decoding leaves out, so that no text ever holds them."""
    ids = map(tokenizer.token_id, texts)
    return [token for token in ids if token is not None and token in tokenizer.special_token_ids]
