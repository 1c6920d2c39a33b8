"""From what a caller has (a padded batch, or packed documents) to the packed token stream, and back.

Everything here is arithmetic on token ids. On CPU tensors it runs on the host, and `PackedInputs.to` sends the result
to the accelerator in one copy that does not wait for it; tensors already on the accelerator work too, but wait a few
times.

    T  tokens of all documents together    N  tokens that have a target    S  sequence length    B  batch size
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

IGNORED = -100  # the label that Hugging Face and torch leave out of the loss
# Vectors that cross together begin at multiples of 128 bytes: Triton compiles a kernel anew for unaligned pointers.
ALIGNMENT = 16


@dataclass(frozen=True)
class Documents:
    """Where documents lie in the packed stream: document i is tokens cu_seqlens[i] to cu_seqlens[i + 1]."""

    cu_seqlens: Tensor  # [documents + 1] int32, where the tokens are
    max_seqlen: int

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1


@dataclass(frozen=True)
class PackedInputs:
    """The tokens of one forward pass, without padding unless `layers.bucket` put some at the end."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    documents: Documents
    targets: Tensor | None  # [N] int64: the token to predict ...
    rows: Tensor | None  # [N] int64: ... from the hidden state of this row; None without labels
    places: Tensor | None  # [T] int64: where each token stood in the flattened input; None if nothing was padding
    shape: torch.Size  # of the caller's input_ids

    def to(self, device: torch.device) -> "PackedInputs":
        """The same on `device`: one transfer, for which the host does not wait."""
        if self.input_ids.device == device:
            return self
        boundaries = self.documents.cu_seqlens.to(torch.int64)
        parts = [self.input_ids, self.position_ids, boundaries, self.targets, self.rows, self.places]
        moved = iter(_move_together([part for part in parts if part is not None], device))
        input_ids, position_ids, boundaries = next(moved), next(moved), next(moved)
        targets, rows, places = (None if part is None else next(moved) for part in parts[3:])
        documents = Documents(boundaries.to(torch.int32), self.documents.max_seqlen)
        return PackedInputs(input_ids, position_ids, documents, targets, rows, places, self.shape)

    def restore(self, values: Tensor) -> Tensor:
        """[T, V] back to the caller's shape, [B, S, V] or [T, V]; zeros at padding."""
        if self.places is not None:
            values = values.new_zeros(self.shape.numel(), values.shape[-1]).index_copy(0, self.places, values)
        return values.view(*self.shape, values.shape[-1])


def pack_inputs(
    input_ids: Tensor,
    *,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    vocab_size: int,
    device: torch.device | None = None,
) -> PackedInputs:
    """Drop padding, find document boundaries, shift labels inside each document, and move all of it to `device`.

    Args:
        input_ids: [B, S], or [T] already packed.
        labels: the same shape; the label of a token is that token's own id, and -100 leaves it out of the loss.
            The first token of a document is no target, because nothing in its document comes before it.
        attention_mask: [B, S], nonzero at tokens; padding may stand on the left or the right of a row.
        position_ids: the same shape as input_ids; default: counted from 0 in each document.
        cu_seqlens: [documents + 1], boundaries in a packed [T]; default: one document.
        device: default: where `input_ids` is.
    Raises: ValueError, naming the argument, for wrong shapes, ids outside the vocabulary (checked on CPU tensors
        only) or a mask with a hole.
    """
    _check_shapes(input_ids, labels, attention_mask, position_ids, cu_seqlens)
    home = input_ids.device
    places, lengths = None, [input_ids.numel()]
    if input_ids.dim() == 2:
        rows, width = input_ids.shape
        lengths = [width] * rows
        if attention_mask is not None:
            mask = attention_mask.to(home) != 0
            lengths = _unpadded_lengths(mask)
            if sum(lengths) < mask.numel():
                places = mask.flatten().nonzero().squeeze(1)
    elif cu_seqlens is not None:
        lengths = _document_lengths(cu_seqlens, input_ids.numel())

    def flat(values: Tensor) -> Tensor:
        values = values.to(home, torch.int64).reshape(-1)
        return values if places is None else values[places]

    tokens = flat(input_ids)
    _check_range(tokens, vocab_size, what="input_ids")
    ends = torch.tensor(lengths, device=home).cumsum(0)
    boundaries = torch.cat([ends.new_zeros(1), ends])
    if position_ids is None:
        # Not repeat_interleave, which wakes all threads for a few thousand numbers: 2 ms a step were measured.
        positions = torch.cat([torch.arange(length, device=home) for length in lengths])
    else:
        positions = flat(position_ids.expand_as(input_ids))

    targets = target_rows = None
    if labels is not None:
        targets = torch.cat([flat(labels)[1:], tokens.new_full((1,), IGNORED)])
        targets[ends - 1] = IGNORED
        target_rows = (targets != IGNORED).nonzero().squeeze(1)
        targets = targets[target_rows]
        _check_range(targets, vocab_size, what="labels")
    documents = Documents(boundaries.to(torch.int32), max(lengths))
    packed = PackedInputs(tokens, positions, documents, targets, target_rows, places, input_ids.shape)
    return packed if device is None else packed.to(device)


def _check_shapes(
    input_ids: Tensor,
    labels: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    shape = tuple(input_ids.shape)
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be integers (int64 or int32), got {input_ids.dtype}")
    if len(shape) not in (1, 2) or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be [batch, sequence] or packed [tokens] and not empty, got shape {shape}")
    if labels is not None and labels.shape != input_ids.shape:
        raise ValueError(f"labels must have the shape of input_ids, {shape}, got {tuple(labels.shape)}")
    if attention_mask is not None and (len(shape) != 2 or attention_mask.shape != input_ids.shape):
        raise ValueError(
            f"attention_mask must have the shape of a [batch, sequence] input_ids, "
            f"got {tuple(attention_mask.shape)} beside {shape}"
        )
    one_row = (1, shape[1]) if len(shape) == 2 else shape
    if position_ids is not None and tuple(position_ids.shape) not in (shape, one_row):
        raise ValueError(f"position_ids must have the shape of input_ids, {shape}, got {tuple(position_ids.shape)}")
    if cu_seqlens is not None and (len(shape) != 1 or cu_seqlens.dim() != 1):
        raise ValueError(f"cu_seqlens must be one row of boundaries for a packed [tokens] input_ids, got {shape}")


def _unpadded_lengths(mask: Tensor) -> list[int]:
    """Tokens of each row of a mask [B, S] bool whose tokens stand in one run."""
    runs = mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    for row, count in enumerate(runs.tolist()):
        if count != 1:
            problem = "has no token" if count == 0 else "has padding between tokens"
            raise ValueError(f"attention_mask row {row} {problem}; padding must stand on the left or on the right")
    return mask.sum(1).tolist()


def _document_lengths(cu_seqlens: Tensor, tokens: int) -> list[int]:
    boundaries = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(boundaries)]
    if not lengths or boundaries[0] != 0 or boundaries[-1] != tokens or min(lengths) <= 0:
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}, got {boundaries}")
    return lengths


def _check_range(ids: Tensor, vocab_size: int, *, what: str) -> None:
    """On an accelerator the check would stall the stream, and the lookup itself asserts there."""
    if ids.device.type == "cpu" and ids.numel() > 0:
        low, high = (int(value) for value in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{what} must lie in 0..{vocab_size - 1} (the vocabulary), got {low if low < 0 else high}")


def _move_together(parts: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copy int64 vectors to `device` in one transfer, from pinned memory so that the host need not wait."""
    starts = list(accumulate((-(-len(part) // ALIGNMENT) * ALIGNMENT for part in parts), initial=0))
    crosses = device.type == "cuda" and parts[0].device.type == "cpu"
    joined = torch.empty(starts[-1], dtype=torch.int64, device=parts[0].device, pin_memory=crosses)
    for part, start in zip(parts, starts, strict=False):
        joined[start : start + len(part)] = part
    moved = joined.to(device, non_blocking=True)
    return [moved[start : start + len(part)] for part, start in zip(parts, starts, strict=False)]
