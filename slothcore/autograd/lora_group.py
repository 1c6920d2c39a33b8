"""Projections that share one input, laid side by side: the joined factors, the decoded weights and the dropout masks.

With projections i = 1, 2, .. of ranks r_i (each rounded up to a multiple of 8 by zeros) and c_i = scaling_i / (1 - p_i)

    A = [A_1; A_2; ..]  [sum r, K]     B = diag(c_1 B_1, c_2 B_2, ..)  [sum N, sum r]     b = [b_1 | b_2 | ..]  [sum N]

so that one matrix product with A or B serves all of them. What is joined here lives only as long as the caller's use.

Shapes    A_i [r_i, K]; B_i [N_i, r_i]; b_i [N_i].
          K = in_features, N_i = out_features, r_i = rank, p_i = dropout probability.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from slothcore.kernels import nf4, nf4_eager
from slothcore.kernels.nf4_tensor import Nf4Tensor

# 16-byte rows for 16-bit factors: what tensor cores and TMA descriptors need.
RANK_MULTIPLE = 8

Factors = Sequence[Tensor | None]


@dataclass(frozen=True)
class Projection:
    """One frozen linear map with an optional LoRA term: y = x W^T + scaling * dropout(x) A^T B^T + bias.

    Attributes:
        weight: [out, in], dense in the compute dtype or NF4; never gets a gradient.
        lora_A: [r, in], float32 or the compute dtype; None for no LoRA term.
        lora_B: [out, r]; None exactly if `lora_A` is.
        scaling: lora_alpha / r, or what the user chose.
        dropout: probability that an element of x is hidden from the LoRA term; 0 in evaluation.
        bias: [out]; may be trainable.
    """

    weight: Tensor | Nf4Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.lora_A is None) != (self.lora_B is None):
            raise ValueError("a LoRA term needs both lora_A and lora_B; one of them is None")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA dropout must be at least 0 and below 1, got {self.dropout}")


@dataclass(frozen=True)
class Group:
    """What gets no gradient in a set of projections over one input, and where each lies among the others.

    Attributes:
        weights: the base weights.
        scalings: scaling / (1 - dropout) of each, so that masks hold only 0 and 1.
        dropouts: probability of each; a projection without LoRA has 0.
        rows: the outputs of each projection in the concatenation of all.
        columns: the ranks of each in the concatenation of all, without their padding.
        ranks: number of all ranks, each projection's padded to `RANK_MULTIPLE`; 0 if there is no LoRA term at all.
        seed: of the dropout masks; None without dropout.
    """

    weights: tuple[Tensor | Nf4Tensor, ...]
    scalings: tuple[float, ...]
    dropouts: tuple[float, ...]
    rows: tuple[slice, ...]
    columns: tuple[slice, ...]
    ranks: int
    seed: int | None

    @staticmethod
    def of(projections: Sequence[Projection]) -> "Group":
        """Lay the projections side by side; draws the dropout seed from torch's default CPU generator."""
        dropouts = tuple(0.0 if p.lora_A is None else p.dropout for p in projections)
        ranks = [0 if p.lora_A is None else p.lora_A.shape[0] for p in projections]
        padded = [-(-rank // RANK_MULTIPLE) * RANK_MULTIPLE for rank in ranks]
        row_edges = accumulate((p.weight.shape[0] for p in projections), initial=0)
        column_starts = accumulate(padded[:-1], initial=0)
        return Group(
            weights=tuple(p.weight for p in projections),
            scalings=tuple(p.scaling / (1.0 - p.dropout) for p in projections),
            dropouts=dropouts,
            rows=tuple(slice(start, end) for start, end in pairwise(row_edges)),
            columns=tuple(slice(start, start + rank) for start, rank in zip(column_starts, ranks, strict=True)),
            ranks=sum(padded),
            # The CPU generator costs no device synchronisation, and gradient checkpointing restores it.
            seed=int(torch.randint(2**63 - 1, ())) if any(dropouts) else None,
        )

    @property
    def out_features(self) -> int:
        return self.rows[-1].stop


def stacked_A(group: Group, lora_A: Factors, like: Tensor) -> Tensor | None:
    """[A_1; A_2; ..] in the dtype of `like`, each padded with zero rows to a multiple of `RANK_MULTIPLE`."""
    if group.ranks == 0:
        return None
    parts = []
    for A in present(lora_A):
        missing = -A.shape[0] % RANK_MULTIPLE
        parts.append(pad(A, (0, 0, 0, missing)) if missing else A)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(like.dtype)


def block_diagonal_B(group: Group, lora_B: Factors, like: Tensor) -> Tensor | None:
    """diag(c_1 B_1, c_2 B_2, ..) in the dtype of `like`, [sum N, sum r] with zero columns for the padding."""
    if group.ranks == 0:
        return None
    B = lora_B[0]
    if len(lora_B) == 1 and B is not None and B.shape[1] == group.ranks:
        scaling = group.scalings[0]
        return (B if scaling == 1.0 else B * scaling).to(like.dtype)
    joined = like.new_zeros(group.out_features, group.ranks)
    for B, scaling, rows, columns in zip(lora_B, group.scalings, group.rows, group.columns, strict=True):
        if B is not None:
            torch.mul(B, scaling, out=joined[rows, columns])
    return joined


def joined_bias(bias: Factors, group: Group, like: Tensor) -> Tensor | None:
    """All biases, zero where a projection has none, in the dtype of `like`; None if none has any."""
    if not present(bias):
        return None
    parts = [
        like.new_zeros(rows.stop - rows.start) if b is None else b for b, rows in zip(bias, group.rows, strict=True)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(like.dtype)


def dropout_masks(group: Group, like: Tensor) -> Iterator[Tensor | None]:
    """One mask of 0 and 1 for each projection, shaped as `like`; None for a projection without dropout.

    The same group gives the same masks at every call, so no mask outlives the line that uses it.
    """
    assert group.seed is not None
    generator = torch.Generator(like.device).manual_seed(group.seed)
    for probability in group.dropouts:
        yield torch.empty_like(like).bernoulli_(1.0 - probability, generator=generator) if probability else None


def dense_blocks(group: Group, like: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """The base weights as dense matrices in the dtype of `like`, each with the outputs that it makes.

    NF4 weights are decoded into one scratch, so that one matrix product serves all. Dense weights stay where they are,
    one product each: joining them would copy every weight, which at few tokens costs more than the products.
    """
    if len(group.weights) > 1 and all(isinstance(w, Nf4Tensor) for w in group.weights):
        scratch = like.new_empty(group.out_features, group.weights[0].shape[1])
        for weight, rows in zip(group.weights, group.rows, strict=True):
            dense(weight, like, out=scratch[rows])
        yield scratch, slice(0, group.out_features)
        return
    for weight, rows in zip(group.weights, group.rows, strict=True):
        yield dense(weight, like), rows


def dense(weight: Tensor | Nf4Tensor, like: Tensor, out: Tensor | None = None) -> Tensor:
    """The weight itself, or NF4 decoded in the dtype of `like`."""
    if isinstance(weight, Tensor):
        return weight
    ops = nf4 if like.is_cuda else nf4_eager
    return ops.nf4_dequantize(weight, dtype=like.dtype, out=out)


def present(factors: Factors) -> list[Tensor]:
    return [f for f in factors if f is not None]
