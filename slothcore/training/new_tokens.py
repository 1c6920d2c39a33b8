"""Adding tokens to a model and its tokenizer, and saying what of the vocabulary will be learned."""

from collections.abc import Sequence

from slothcore.data.tokenizer import Tokenizer
from slothcore.data.values import counted
from slothcore.models.decoder import Decoder
from slothcore.models.vocabulary import start_rows
from slothcore.training.progress import say

# A vocabulary of thousands would bury the log.
MOST_NAMED = 12


def add_tokens(
    model: Decoder, tokenizer: Tokenizer, tokens: Sequence[str], *, special: bool | None = None
) -> dict[str, int]:
    """Make each of these texts one token of the tokenizer, with rows of its own in the embedding and the head.

    New rows start at the mean of the old ones. They learn only if both tables train: call `add_lora` with
    modules_to_save=["embed_tokens", "lm_head"] afterwards, or train all weights. Both the tokenizer and the rows are
    saved with the adapter, or with the model, and `slothcore.load` brings them back.

    Args:
        model, tokenizer: changed in place.
        tokens: as they stand in the text; one that exists already keeps its id and its row.
        special: whether `Tokenizer.decode` leaves them out; None: those that look like control tokens, such as
            <|im_start|> or [INST].
    Returns: token -> id, of those that are new.
    Raises: ValueError for an empty text, one that stands twice, or a head with a LoRA term, which has no room.
    """
    texts = [tokens] if isinstance(tokens, str) else list(tokens)
    if model.lm_head.lora_A is not None:
        raise ValueError(
            "new tokens have no room in a head that has a LoRA term; add them before add_lora, or leave lm_head out "
            "of target_modules and name it in modules_to_save"
        )
    added = tokenizer.add_tokens(texts, special=special)
    ids = {text: tokenizer.token_id(text) for text in texts}
    known = {text: token_id for text, token_id in ids.items() if text not in added}
    if known:
        shown = _listed([f"{text!r} ({token_id})" for text, token_id in known.items()])
        say(f"note: {shown} of new_tokens {_are(known)} in the vocabulary already, and {_keep(known)}")
    # A tokenizer may have been given tokens by other means, and the model no rows for them.
    without_rows = [token_id for token_id in known.values() if token_id is not None]
    without_rows = [token_id for token_id in without_rows if token_id >= model.config.vocab_size]
    rows = sorted({*added.values(), *without_rows})
    if not rows:
        return added
    before = model.config.vocab_size
    grown = start_rows(model, rows)
    size = (
        f"the vocabulary grows from {before:,} to {model.config.vocab_size:,} rows"
        if grown
        else f"the vocabulary of {before:,} rows has room for them"
    )
    shown = _listed([repr(text) for text, token_id in ids.items() if token_id in rows])
    say(f"added {counted(len(rows), 'token')}: {shown}; {size}, and theirs start at the mean of the others")
    return added


def say_what_tables_learn(model: Decoder) -> None:
    """Say where tokens were added that will not be learned, and what becomes of a weight that two tables shared."""
    embedding, head = (weight.requires_grad for weight in (model.model.embed_tokens.weight, model.lm_head.weight))
    if model.new_token_ids and not (embedding and head):
        missing = [name for name, trains in (("embed_tokens", embedding), ("lm_head", head)) if not trains]
        use = {"embed_tokens": "read", "lm_head": "write"}
        say(
            f"note: the model will not learn to {' or '.join(use[name] for name in missing)} the new tokens, whose "
            f"rows in {' and '.join(missing)} stay at the mean; name {' and '.join(missing)} in modules_to_save"
        )
    if model.config.tie_word_embeddings and not model.has_tied_head and (embedding or head):
        say(_untied(embedding=embedding, head=head))


def _untied(*, embedding: bool, head: bool) -> str:
    if embedding and head:
        return "embed_tokens and lm_head shared one weight; each trains a copy of its own, and the merged model has two"
    trained, left = ("embed_tokens", "lm_head") if embedding else ("lm_head", "embed_tokens")
    return (
        f"note: {trained} and {left} shared one weight; {trained} trains a copy of its own, and {left} stays as it "
        f"was: name {left} in modules_to_save, too, to train both"
    )


def _listed(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _are(tokens: dict[str, int | None]) -> str:
    return "is" if len(tokens) == 1 else "are"


def _keep(tokens: dict[str, int | None]) -> str:
    return "stays as it is" if len(tokens) == 1 else "stay as they are"
