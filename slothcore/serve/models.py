"""What a server serves: the model, and the adapters that stand beside it, each under a name."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.conversations import conversation_text
from slothcore.inference.endings import Endings
from slothcore.models.decoder import Decoder
from slothcore.serve.errors import ApiError
from slothcore.serve.requests import Asked, AskedChat, Prompt
from slothcore.serve.token_texts import TokenTexts


@dataclass(frozen=True)
class ServedModel:
    """A name that clients ask for.

    Attributes:
        name: that name.
        adapter: which adapter computes; None: what the model is by itself.
        tokenizer: with the chat template of this one.
        own_endings: what ends its answers in any case.
        parent: the name of the base that it stands on; None for the base itself.
    """

    name: str
    adapter: str | None
    tokenizer: Tokenizer
    own_endings: Endings
    parent: str | None
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(
        cls, model: Decoder, name: str, tokenizer: Tokenizer, *, adapter: str | None = None, parent: str | None = None
    ) -> "ServedModel":
        """The model under `name`, with what ends an answer there."""
        return cls(name, adapter, tokenizer, Endings.of(model, tokenizer, ()), parent)

    @cached_property
    def token_texts(self) -> TokenTexts:
        """What single tokens stand for."""
        return TokenTexts(self.tokenizer)

    def endings(self, asked: Asked) -> Endings:
        """What ends an answer to this request."""
        own = Endings(frozenset(), ()) if asked.ignores_end else self.own_endings
        return own.with_stops(self.tokenizer, asked.stops)

    def conversation_ids(self, asked: AskedChat) -> list[int]:
        """The tokens of a conversation, up to where the answer begins.

        Raises: ValueError as `conversation_text` does.
        """
        text = conversation_text(self.tokenizer, asked.messages, **asked.template_values)
        return self.tokenizer.encode_prompt(text, add_special_tokens=False)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt."""
        return self.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt

    def prompt_text(self, prompt: Prompt) -> str:
        """The text of a prompt."""
        if isinstance(prompt, str):
            return prompt
        # Tokenizers cannot read other numbers; the engine refuses them.
        return self.tokenizer.decode([token for token in prompt if 0 <= token < 2**31])

    def as_json(self, max_model_len: int) -> dict[str, Any]:
        """Its entry in the list of models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "slothcore",
            "parent": self.parent,
            "max_model_len": max_model_len,
        }


def find_model(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    """Raises: ApiError, naming those that there are, if none has this name."""
    if name not in models:
        known = ", ".join(models)
        raise ApiError(
            404, f"there is no model {name!r} here; served are {known}", code="model_not_found", param="model"
        )
    return models[name]
