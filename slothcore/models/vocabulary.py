"""A larger vocabulary: rows for new tokens in the embedding and in the head.

New rows start at the mean of those that tokens had before: the model then reads a new token as an average one, and its
probability, exp of an average score, takes little from the others. So does transformers, which adds noise of a
thirty-thousandth of the old rows' spread. Left out here, rows depend on the base model alone and not on a draw; what
tells new tokens apart is the text around them, from the first step on.

    V  tokens of the vocabulary    H  hidden_size
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from slothcore.models.decoder import Decoder

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLES = (EMBEDDING, HEAD)
"""Paths of the weights that have a row for each token."""
# Rows that are summed in float64 at once; all rows of a large model would be 4 GiB.
ROWS_AT_ONCE = 4096


def vocabulary_tables(model: Decoder) -> tuple[str, ...]:
    """Which of `TABLES` the model has as weights of their own: both, or the embedding that is the head as well."""
    return (EMBEDDING,) if model.has_tied_head else TABLES


@torch.no_grad()
def start_rows(model: Decoder, token_ids: Collection[int]) -> int:
    """Give new tokens their rows, at the mean of the rows before the first of them; the tables grow where they must.

    A vocabulary is often padded, and then has rows for new tokens already, which no token has trained: they are started
    in the same way.

    Args:
        token_ids: at least one.
    Returns: by how many rows the tables have grown.
    Raises: ValueError if the head has a LoRA term.
    """
    before = model.config.vocab_size
    used = min(*token_ids, before)
    means = {name: mean_row(_table(model, name)[:used]) for name in vocabulary_tables(model)}
    resize_vocabulary(model, max(before, *(token_id + 1 for token_id in token_ids)))
    rows = torch.tensor(sorted({*token_ids, *range(before, model.config.vocab_size)}), device=model.device)
    for name, mean in means.items():
        table = _table(model, name)
        table[rows] = mean.to(table.dtype)
    model.vocabulary_changed = True
    model.new_token_ids = tuple(sorted({*model.new_token_ids, *token_ids}))
    return model.config.vocab_size - before


@torch.no_grad()
def resize_vocabulary(model: Decoder, vocab_size: int) -> None:
    """Make room for `vocab_size` tokens; the added rows are zero, and what has trained will train.

    The configuration says the new size from now on, also the exported one. A head that was in NF4 becomes dense.

    Raises: ValueError if rows would be lost, or the head has a LoRA term, whose factors are not resized.
    """
    before = model.config.vocab_size
    if vocab_size < before:
        raise ValueError(f"the vocabulary has {before} rows and cannot shrink to {vocab_size}")
    if vocab_size == before:
        return
    if model.lm_head.lora_A is not None:
        raise ValueError("the head has a LoRA term of the old size; add tokens before add_lora, or merge the adapter")
    embedding, head, tied = model.model.embed_tokens, model.lm_head, model.has_tied_head
    embedding.weight = _longer(embedding.weight, vocab_size, trains=embedding.weight.requires_grad)
    embedding.num_embeddings = vocab_size
    head.out_features, head.weight_shape = vocab_size, (vocab_size, head.in_features)
    if tied:
        head.set_dense(embedding.weight)
    else:
        dense = head.dequantized(model.dtype) if head.is_nf4 else head.weight
        head.set_dense(_longer(dense, vocab_size, trains=not head.is_frozen))
    model.config = replace(model.config, vocab_size=vocab_size)
    model.hf_config = {**model.hf_config, "vocab_size": vocab_size}


def round_tables(model: Decoder) -> None:
    """Keep tables that have trained in float32 in the dtype of the model, for one that will train no more.

    It computes with what they round to in any case: results stay the same, and no token rounds them again.
    """
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        if weight.is_floating_point():
            weight.data = weight.data.to(model.dtype)


def mean_row(rows: Tensor) -> Tensor:
    """The mean of `rows` [V, H] over V, summed in float64: [H] float64. Of none, zeros."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for some in rows.detach().split(ROWS_AT_ONCE):
        total += some.to(torch.float64).sum(0)
    return total / max(1, len(rows))


def _table(model: Decoder, name: str) -> Tensor:
    """One of `TABLES`, as numbers."""
    if name == EMBEDDING:
        return model.model.embed_tokens.weight
    return model.lm_head.dequantized(model.dtype) if model.lm_head.is_nf4 else model.lm_head.weight


def _longer(table: Tensor, vocab_size: int, *, trains: bool) -> nn.Parameter:
    longer = table.new_zeros(vocab_size, table.shape[1])
    longer[: len(table)] = table
    return nn.Parameter(longer, requires_grad=trains)
