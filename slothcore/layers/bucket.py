"""A packed pass padded to one of a few sizes, so that what is made for a size serves every pass of it.

The padded pass has exactly the loss and the gradients of the unpadded one, up to the order of sums:

    tokens     The rest is one more document, of token 0, without a target. No token of another document sees it, and
               the gradient that enters it is zero, so every sum over tokens (dA, dB, db) gains zeros. It must be a
               document: attention writes no row that belongs to none.
    documents  Empty ones at the end, cu_seqlens = T, T, ...: a kernel's tile of an empty document returns at once.
    positions  Counted from 0 in the padding, so that angles which depend on a document's length come from it alone.
    max_seqlen A bound, T.

Targets are not padded. What averages over tokens instead of targets would see the padding: a load-balancing loss.

    T  tokens of the bucket    D  its documents    t  tokens of the pass
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from slothcore.layers.packed import Documents, PackedInputs

PADDING_TOKEN = 0
FINEST_STEP = 128
STEPS_AN_OCTAVE = 8
FEWEST_SLOTS = 16
TOKENS_A_SLOT = 32


@dataclass(frozen=True)
class Bucket:
    """The shapes that passes are padded to.

    Attributes:
        tokens: of the padded stream.
        documents: slots for documents, one of which is the padding's.
    """

    tokens: int
    documents: int

    def holds(self, inputs: PackedInputs) -> bool:
        """Whether the pass fits, with a slot for the padding if there is any."""
        tokens = len(inputs.input_ids)
        return tokens <= self.tokens and len(inputs.documents) + (tokens < self.tokens) <= self.documents


def bucket_for(tokens: int, documents: int) -> Bucket:
    """The smallest rung of the ladder that holds a pass of so many tokens and documents.

    Tokens go up in steps of 128 to 1024, of 256 to 2048, of 512 to 4096 and so on; documents are at least one in 32
    tokens, and double where that is too few.
    """
    step = FINEST_STEP
    while tokens > STEPS_AN_OCTAVE * step:
        step *= 2
    total = -(-tokens // step) * step
    slots = max(FEWEST_SLOTS, total // TOKENS_A_SLOT)
    while slots <= documents:
        slots *= 2
    return Bucket(total, slots)


def pad_to(inputs: PackedInputs, bucket: Bucket) -> PackedInputs:
    """The pass in the shapes of the bucket; targets and their rows stay as they are.

    Args:
        inputs: with tensors on the host.
    Raises: ValueError if it does not fit.
    """
    tokens, documents = len(inputs.input_ids), len(inputs.documents)
    if not bucket.holds(inputs):
        raise ValueError(
            f"{tokens} tokens in {documents} documents do not fit {bucket.tokens} in {bucket.documents}, one of which "
            "is the padding"
        )
    positions = torch.arange(bucket.tokens - tokens, dtype=torch.int64)
    return replace(
        inputs,
        input_ids=_extended(inputs.input_ids, bucket.tokens, PADDING_TOKEN),
        position_ids=torch.cat([inputs.position_ids, positions]),
        documents=Documents(
            _extended(inputs.documents.cu_seqlens, bucket.documents + 1, bucket.tokens), max_seqlen=bucket.tokens
        ),
    )


def _extended(values: Tensor, length: int, fill: int) -> Tensor:
    return F.pad(values, (0, length - len(values)), value=fill)
