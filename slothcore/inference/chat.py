"""A conversation: what was said, what is asked next, and the keys and values of all of it."""

from collections.abc import Iterator, Sequence
from typing import Any

from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.conversations import conversation_text
from slothcore.inference.endings import Endings
from slothcore.inference.text_pieces import TextPieces
from slothcore.models.decoder import Decoder
from slothcore.models.streaming import TextCache

# Tokens of an answer that nobody bounds.
LONGEST_ANSWER = 512


class Chat:
    """Talks with a model, turn by turn, and keeps what was said.

    Each question is written behind the conversation by the tokenizer's chat template; a model without one continues
    the text so far, turns being lines of it. Keys and values are kept from turn to turn: of the conversation as the
    template now writes it, only what is new goes through the model, and all of it where its beginning has changed.

        chat = slothcore.Chat(model, tokenizer, system="Be brief.", temperature=0.7, seed=1)
        for piece in chat.ask("Who are you?"):
            print(piece, end="", flush=True)

    Args:
        system: what the conversation begins with.
        max_new_tokens: most tokens of an answer; None: 512, or half of the model's positions if that is less, so that
            an answer leaves room for the next question.
        stop_strings: an answer ends before the first of them, besides where the model and the template end it.
        seed: of the random draws; each answer draws numbers of its own.
        sampling: temperature, top_k, top_p, min_p and repetition_penalty, see `Sampling`.
    Attributes:
        messages: the conversation, as dicts with role and content; may be changed between turns.
        cut_short: whether the last answer had to end before its end, at max_new_tokens or the model's last position.
        is_full: whether it was at that position: nothing can be asked any more.
    Raises: ValueError for a system message that the template does not take, or where there is no template.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        stop_strings: str | Sequence[str] = (),
        seed: int | None = None,
        **sampling: Any,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        if max_new_tokens is None:
            max_new_tokens = min(LONGEST_ANSWER, max(1, model.config.longest_document // 2))
        self.max_new_tokens, self.seed, self.sampling = max_new_tokens, seed, sampling
        self.endings = Endings.of(model, tokenizer, stop_strings)
        self.cache = TextCache(model)
        self.cut_short = self.is_full = False
        self.messages: list[dict[str, Any]] = []
        self.reset(system)

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer says how a conversation is written."""
        return self.tokenizer.chat_template is not None

    @property
    def system(self) -> str | None:
        """The system message, if there is one."""
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    def reset(self, system: str | None = None) -> None:
        """Begin anew. Raises: ValueError, and all stays as it was, for a system message that cannot be."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        if messages:
            if not self.has_template:
                raise ValueError(
                    "the model has no chat template, which would say where a system message stands; choose a template, "
                    "such as alpaca or chatml, or leave the system message out"
                )
            self._encode([*messages, {"role": "user", "content": "Hello"}])
        self.messages, self.cut_short, self.is_full = messages, False, False

    def ask(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece; see `slothcore.stream`.

        What was said counts as the answer if the iterator is closed or Ctrl-C ends it before its end; where that is
        nothing, or anything else goes wrong, the conversation stays as it was.

        Raises: ValueError, at once, if the template rejects the conversation, there is nothing to ask, or the
            conversation is longer than the model's positions.
        """
        question = {"role": "user", "content": text}
        ids = self._encode([*self.messages, question])
        limit = self.model.config.longest_document
        if not ids:
            raise ValueError("there is nothing to continue yet; write some text")
        if len(ids) >= limit:
            raise ValueError(
                f"the conversation has {len(ids)} tokens now, and the model was made for {limit} with its answer; "
                "begin a new one, or ask something shorter"
            )
        turn = sum(message["role"] == "user" for message in self.messages)
        room = limit - len(ids)
        tokens = self.model.stream(
            ids,
            max_new_tokens=min(self.max_new_tokens, room),
            eos_token_id=sorted(self.endings.eos_ids),
            seed=None if self.seed is None else self.seed + turn,
            cache=self.cache,
            **self.sampling,
        )
        pieces = TextPieces(self.tokenizer, self.endings, behind=() if self.has_template else ids)
        return self._answer(question, tokens, pieces, fills=room <= self.max_new_tokens)

    def _answer(
        self, question: dict[str, Any], tokens: Iterator[int], pieces: TextPieces, *, fills: bool
    ) -> Iterator[str]:
        try:
            yield from pieces.take(tokens)
            self.cut_short = not pieces.ended
            self.is_full = self.cut_short and fills
        except (GeneratorExit, KeyboardInterrupt):
            if pieces.text:
                self._note(question, pieces.text)
            raise
        self._note(question, pieces.text)

    def _note(self, question: dict[str, Any], answer: str) -> None:
        self.messages += [question, {"role": "assistant", "content": answer}]

    def _encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The conversation up to where the answer begins."""
        if self.has_template:
            text = conversation_text(self.tokenizer, messages)
            return self.tokenizer.encode_prompt(text, add_special_tokens=False)
        text = ""
        for message in messages:
            begins_line = not text or message["role"] == "assistant" or text[-1].isspace()
            text += ("" if begins_line else "\n") + message["content"]
        return self.tokenizer.encode_prompt(text)
