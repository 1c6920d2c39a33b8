"""Projections that share one input, laid side by side: the joined factors, the decoded weights and the dropout masks.

With projections i = 1, 2, .. of ranks r_i (each rounded up to a multiple of 8 by zeros) and c_i = scaling_i / (1 - p_i)

    A = [A_1; A_2; ..]  [sum r, K]     B = diag(c_1 B_1, c_2 B_2, ..)  [sum N, sum r]     b = [b_1 | b_2 | ..]  [sum N]

so that one matrix product with A or B serves all of them. A and B are made once, in forward, and kept for backward: at
few tokens a step is bound by the number of launches, at many they are about 1% of what is kept.

Shapes    A_i [r_i, K]; B_i [N_i, r_i]; b_i [N_i].
          K = in_features, N_i = out_features, r_i = rank, p_i = dropout probability.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slothcore.autograd.known_factors import known_factors
from slothcore.kernels import lora_factors, lora_factors_eager, nf4, nf4_eager
from slothcore.kernels.glu_eager import Activation
from slothcore.kernels.lora_factors_eager import Factors, padded_rank
from slothcore.kernels.nf4_tensor import Nf4Tensor, decoded_together

Dtypes = tuple[torch.dtype | None, ...]


@dataclass(frozen=True)
class Projection:
    """One frozen linear map with an optional LoRA term: y = x W^T + scaling * dropout(x) A^T B^T + bias.

    With a magnitude it is DoRA's: see `dora.py`.

    Attributes:
        weight: [out, in], dense in the compute dtype or NF4; never gets a gradient.
        lora_A: [r, in], float32 or the compute dtype; None for no LoRA term.
        lora_B: [out, r]; None exactly if `lora_A` is.
        scaling: lora_alpha / r, or what the user chose.
        dropout: probability that an element of x is hidden from the LoRA term; 0 in evaluation.
        bias: [out]; may be trainable.
        magnitude: [out] float32, what DoRA gives the rows of W + scaling * B A for lengths; may be trainable; None: the
            rows keep those that they have.
        norms: [out] float32, those lengths, if they are known already; None: they are computed in every pass.
    """

    weight: Tensor | Nf4Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    norms: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.lora_A is None) != (self.lora_B is None):
            raise ValueError("a LoRA term needs both lora_A and lora_B; one of them is None")
        if self.magnitude is not None:
            self._check_magnitude(self.magnitude)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA dropout must be at least 0 and below 1, got {self.dropout}")
        if self.lora_A is None or self.lora_B is None:
            return
        # Kernels would read beyond a factor that is too small.
        out_features, in_features = self.weight.shape
        shapes, rank = (self.lora_A.shape, self.lora_B.shape), self.lora_A.shape[0]
        if shapes != ((rank, in_features), (out_features, rank)):
            raise ValueError(
                f"LoRA factors of a weight {(out_features, in_features)} must be [r, in] and [out, r], "
                f"got {tuple(shapes[0])} and {tuple(shapes[1])}"
            )

    def _check_magnitude(self, magnitude: Tensor) -> None:
        if self.lora_A is None:
            raise ValueError("DoRA's magnitude goes with lora_A and lora_B; both are None")
        for name, vector in (("magnitude", magnitude), ("norms", self.norms)):
            if vector is not None and tuple(vector.shape) != (self.weight.shape[0],):
                raise ValueError(f"the {name} of DoRA must be [{self.weight.shape[0]}], got {tuple(vector.shape)}")


LORA_KINDS = ("lora_A", "lora_B", "bias")
DORA_KINDS = (*LORA_KINDS, "magnitude")
"""The tensors of a projection that may get a gradient, in the order in which the Functions take them."""


def in_kinds(projections: Sequence[Projection], kinds: tuple[str, ...]) -> list[Tensor | None]:
    """Every tensor of the first kind, then every one of the second and so on; None where a projection has none."""
    return [getattr(p, kind) for kind in kinds for p in projections]


def by_kind(inputs: Sequence[Any], kinds: tuple[str, ...]) -> list[Sequence[Any]]:
    """Undo `in_kinds`: for each kind a sequence with one entry for each projection."""
    n = len(inputs) // len(kinds)
    return [inputs[i * n : (i + 1) * n] for i in range(len(kinds))]


class MlpChoices(NamedTuple):
    """The choices of `lora.lora_mlp`."""

    activation: Activation
    inplace: bool
    keep_gate_up: bool


class Layout(NamedTuple):
    """Where each projection lies among the others of its group.

    Attributes:
        out_features: of each.
        rows: the outputs of each in the concatenation of all.
        ranks: of each, without padding; 0 for those without LoRA.
        columns: the ranks of each in the concatenation of all, without their padding.
        total_rank: number of all ranks, each projection's padded to a multiple of 8; 0 if there is no LoRA term at all.
    """

    out_features: tuple[int, ...]
    rows: tuple[slice, ...]
    ranks: tuple[int, ...]
    columns: tuple[slice, ...]
    total_rank: int

    @property
    def outputs(self) -> slice:
        """The outputs of all."""
        return slice(0, self.rows[-1].stop)


@lru_cache(maxsize=256)
def layout_of(out_features: tuple[int, ...], ranks: tuple[int, ...]) -> Layout:
    """Lay projections side by side; `ranks` is 0 for those without LoRA. A model has few layouts, so they are kept."""
    row_edges = accumulate(out_features, initial=0)
    column_edges = accumulate(map(padded_rank, ranks), initial=0)
    starts = list(column_edges)
    return Layout(
        out_features,
        rows=tuple(slice(start, end) for start, end in pairwise(row_edges)),
        ranks=ranks,
        columns=tuple(slice(start, start + rank) for start, rank in zip(starts, ranks, strict=False)),
        total_rank=starts[-1],
    )


class Group(NamedTuple):
    """What gets no gradient in a set of projections over one input.

    Attributes:
        weights: the base weights.
        layout: where each projection lies among the others.
        scalings: scaling / (1 - dropout) of each, so that masks hold only 0 and 1.
        dropouts: probability of each; a projection without LoRA has 0.
        A_dtypes, B_dtypes, bias_dtypes: what each gradient is wanted in; None where there is no such factor.
        seed: of the dropout masks; None without dropout.
    """

    weights: tuple[Tensor | Nf4Tensor, ...]
    layout: Layout
    scalings: tuple[float, ...]
    dropouts: tuple[float, ...]
    A_dtypes: Dtypes
    B_dtypes: Dtypes
    bias_dtypes: Dtypes
    seed: int | None

    @staticmethod
    def of(projections: Sequence[Projection]) -> "Group":
        """Lay the projections side by side; draws the dropout seed from torch's default CPU generator."""
        weights = tuple([p.weight for p in projections])
        ranks = tuple([0 if p.lora_A is None else p.lora_A.shape[0] for p in projections])
        dropouts = tuple([0.0 if p.lora_A is None else p.dropout for p in projections])
        return Group(
            weights,
            layout_of(tuple([w.shape[0] for w in weights]), ranks),
            scalings=tuple([p.scaling / (1.0 - p.dropout) for p in projections]),
            dropouts=dropouts,
            A_dtypes=tuple([_dtype(p.lora_A) for p in projections]),
            B_dtypes=tuple([_dtype(p.lora_B) for p in projections]),
            bias_dtypes=tuple([_dtype(p.bias) for p in projections]),
            # The CPU generator costs no device synchronisation, and gradient checkpointing restores it.
            seed=int(torch.randint(2**63 - 1, (), device="cpu")) if any(dropouts) else None,
        )


def joined_factors(
    group: Group, lora_A: Factors, lora_B: Factors, like: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """A = [A_1; A_2; ..] and B = diag(c_1 B_1, c_2 B_2, ..) in the dtype of `like`; None without LoRA."""
    if group.layout.total_rank == 0:
        return None, None
    ops = lora_factors if like.is_cuda else lora_factors_eager
    join = partial(
        ops.pack_factors,
        lora_A,
        lora_B,
        scalings=group.scalings,
        out_features=group.layout.out_features,
        dtype=like.dtype,
    )
    known = known_factors()
    return join() if known is None else known.joined(lora_A, lora_B, (like.dtype, group.scalings), join)


def joined_bias(bias: Factors, group: Group, like: Tensor) -> Tensor | None:
    """All biases, zero where a projection has none, in the dtype of `like`; None if none has any."""
    if all(b is None for b in bias):
        return None
    parts = [like.new_zeros(n) if b is None else b for b, n in zip(bias, group.layout.out_features, strict=True)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(like.dtype)


def dropout_masks(group: Group, like: Tensor) -> Iterator[Tensor | None]:
    """One mask of 0 and 1 for each projection, shaped as `like`; None for a projection without dropout.

    The same group gives the same masks at every call, so no mask outlives the line that uses it.
    """
    assert group.seed is not None
    generator = torch.Generator(like.device).manual_seed(group.seed)
    for probability in group.dropouts:
        if probability == 0.0:
            yield None
        else:
            # Random numbers fill memory in order: a transposed x, say, and its gradient must not differ in theirs.
            mask = torch.empty_like(like, memory_format=torch.contiguous_format)
            yield mask.bernoulli_(1.0 - probability, generator=generator)


def dense_blocks(group: Group, like: Tensor) -> Sequence[tuple[Tensor, slice]]:
    """The base weights as dense matrices in the dtype of `like`, each with the outputs that it makes.

    Kept copies of NF4 weights are used where they are, as one matrix if they lie so. Without copies the weights are
    decoded into one scratch, so that one matrix product serves all. Dense weights stay where they are, one product
    each: joining them would copy every weight, which at few tokens costs more than the products.
    """
    nf4_weights = [w for w in group.weights if isinstance(w, Nf4Tensor)]
    if len(nf4_weights) == len(group.weights):
        kept = decoded_together(nf4_weights, like.dtype)
        if kept is not None:
            return [(kept, group.layout.outputs)]
        if len(nf4_weights) > 1 and not has_copies(group, like.dtype):
            ops = nf4 if like.is_cuda else nf4_eager
            return [(ops.nf4_dequantize_group(nf4_weights, dtype=like.dtype), group.layout.outputs)]
    return [(_dense(w, like), rows) for w, rows in zip(group.weights, group.layout.rows, strict=True)]


def has_copies(group: Group, dtype: torch.dtype) -> bool:
    """Whether decoded copies of some NF4 weights are kept in `dtype`."""
    copies = (w.decoded for w in group.weights if isinstance(w, Nf4Tensor))
    return any(copy is not None and copy.dtype == dtype for copy in copies)


def _dense(weight: Tensor | Nf4Tensor, like: Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    if weight.decoded is not None and weight.decoded.dtype == like.dtype:
        return weight.decoded
    ops = nf4 if like.is_cuda else nf4_eager
    return ops.nf4_dequantize(weight, dtype=like.dtype)


def _dtype(factor: Tensor | None) -> torch.dtype | None:
    return None if factor is None else factor.dtype
