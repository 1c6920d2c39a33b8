"""Tokens that stand for themselves beside the pieces of words: which begin, end and pad a text, and which are added."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as TokenizerCore

from slothcore.data.new_tokens import is_control_token

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
DEDICATED_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|padding|>")
UNUSED_TOKEN_MARKS = ("reserved_special_token", "placeholder", "unused")


def new_token(text: str, *, special: bool | None) -> AddedToken:
    """A token that is found in a text as it stands there, before any normalising; None: special if it looks so."""
    return AddedToken(text, special=is_control_token(text) if special is None else special, normalized=False)


def add_tokens(core: TokenizerCore, tokens: Iterable[AddedToken]) -> None:
    """Add tokens in their order, each behind the last id."""
    for token in tokens:
        # Each by itself: one call takes tokens of one kind, and the order decides about the ids.
        if token.special:
            core.add_special_tokens([token])
        else:
            core.add_tokens([token])


def id_of(core: TokenizerCore, special_tokens: Mapping[str, str], name: str, folder: Path) -> int | None:
    """The id of the special token called `name`, or None. Raises: ValueError if the vocabulary lacks it."""
    token = special_tokens.get(name)
    if token is None:
        return None
    token_id = core.token_to_id(token)
    if token_id is None:
        raise ValueError(f"{folder}: {name} is {token!r}, which tokenizer.json does not hold")
    return token_id


def unk_token_id(core: TokenizerCore, configured: str | None, eos_token_id: int | None) -> int | None:
    """What stands for characters that the vocabulary lacks: None if nothing does, or what ends a text (GPT-2)."""
    # A byte-level vocabulary lacks none, whatever is configured; of a Unigram model only the configuration tells.
    token = getattr(core.model, "unk_token", configured)
    token_id = core.token_to_id(token) if token else None
    return None if token_id == eos_token_id else token_id


def pad_token_id(core: TokenizerCore, configured: str | None, eos_token_id: int | None) -> int | None:
    """By the order in the docstring of `Tokenizer`."""
    for token in (configured, *DEDICATED_PAD_TOKENS):
        if token is not None and (token_id := core.token_to_id(token)) is not None:
            return token_id
    for token_id, added in sorted(core.get_added_tokens_decoder().items()):
        if added.special and any(mark in added.content for mark in UNUSED_TOKEN_MARKS):
            return token_id
    return eos_token_id
