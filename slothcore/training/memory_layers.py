"""What one layer keeps for its backward pass, and what that pass needs beside it, in bytes.

Every figure is read off a Function in `slothcore.autograd`: what it gives to `save_for_backward` is kept, what it
allocates on the way is a moment. A tensor that two Functions save is counted once, for the one that made it.

    T  tokens of a pass              H  hidden_size      I  width of the MLP or of an expert
    K, N  inputs, outputs of a map   R  ranks of a group of maps, each padded to a multiple of 8
    k  experts of a token            e  bytes of an element in the compute dtype
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from slothcore.kernels.attention_backward import STATS
from slothcore.kernels.attention_tiles import key_gradient_parts
from slothcore.kernels.lora_factors_eager import padded_rank
from slothcore.layers.attention import SelfAttention
from slothcore.layers.experts import ExpertLinear
from slothcore.layers.linear import Linear
from slothcore.layers.mlp import GatedMlp
from slothcore.layers.moe import SparseMoe
from slothcore.models.decoder_layer import DecoderLayer

FLOAT = 4  # bytes of float32: reciprocal deviations, log-sum-exps, sums of gradients
INDEX = 8  # bytes of int64


@dataclass(frozen=True)
class Cost:
    """Bytes as a function of the tokens of a pass."""

    per_token: float = 0.0
    fixed: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.per_token + other.per_token, self.fixed + other.fixed)

    def at(self, tokens: int) -> float:
        return self.per_token * tokens + self.fixed


@dataclass(frozen=True)
class Branch:
    """Attention or the feed-forward branch, with the norm before it.

    Attributes:
        kept: from the forward pass until the backward pass of this branch is over.
        moments: what that pass has allocated beside `kept` where it has most; which is most depends on the tokens.
    """

    kept: Cost
    moments: tuple[Cost, ...]


@dataclass(frozen=True)
class LayerMemory:
    """One layer.

    Attributes:
        inputs: what is kept of it with recomputation, in place of the rest.
        gradients: bytes that its backward pass leaves.
    """

    attention: Branch
    feed_forward: Branch
    inputs: Cost
    gradients: int

    @property
    def kept(self) -> Cost:
        return self.attention.kept + self.feed_forward.kept


def layer_memory(layer: DecoderLayer, dtype: torch.dtype, *, bits: int, after_trained: bool) -> LayerMemory:
    """What `layer` needs.

    Args:
        layer: with its adapter; on the meta device its frozen maps count as NF4 if `bits` is 4.
        after_trained: whether something before this layer trains, so that a gradient has to pass through all of it.
    """
    sizes = _Sizes(dtype.itemsize, bits, layer.input_layernorm.weight.numel())
    branch = layer.feed_forward
    passed = after_trained or trains(layer.input_layernorm) or trains(layer.self_attn)
    attention = _attention(layer, sizes, after_trained) if passed else Branch(Cost(), ())
    feed_forward = Branch(Cost(), ())
    if passed or any(p.requires_grad for p in layer.parameters()):
        feed_forward = _with_norms(layer, _feed_forward(branch, sizes), sizes)
    streams = 2 if after_trained else 1  # the first layer gets the embedding alone
    return LayerMemory(
        attention,
        feed_forward,
        inputs=Cost(streams * sizes.stream),
        gradients=sum(p.nbytes for p in layer.parameters() if p.requires_grad),
    )


def trains(module: nn.Module) -> bool:
    """Whether anything in it gets a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())


def counts_as_nf4(linear: Linear | ExpertLinear, bits: int) -> bool:
    """Whether the weight is NF4, or would be if the model were not on the meta device, which quantises nothing."""
    return linear.is_nf4 or (bits == 4 and linear.weight.is_meta and not linear.weight.requires_grad)


@dataclass(frozen=True)
class _Sizes:
    """e, bits and H."""

    element: int
    bits: int
    hidden: int

    @property
    def stream(self) -> int:
        """Bytes of a token in the residual stream."""
        return self.hidden * self.element


@dataclass(frozen=True)
class _Maps:
    """Several linear maps over one input, forward and backward: `autograd/lora_projection.py`.

    Attributes:
        input: bytes of a token of x if it is kept.
        kept: u of a token, and the joined factors.
        lora: v of a token, and the factors' gradients as they are summed.
        scratch: NF4 weights, decoded.
        drops: whether a LoRA term has dropout.
    """

    input: float
    kept: Cost
    lora: Cost
    scratch: Cost
    drops: bool


def _maps(linears: Sequence[Linear], sizes: _Sizes, *, passes_gradient: bool = True) -> _Maps:
    """`passes_gradient`: whether the input of these maps needs a gradient."""
    e, width = sizes.element, linears[0].in_features
    fused = all(linear.is_frozen for linear in linears)
    kept = lora = Cost()
    for group in [linears] if fused else [[linear] for linear in linears]:
        ranks = [padded_rank(p.lora_A.shape[0]) for p in group if p.lora_A is not None]
        if not ranks:
            continue
        outputs = sum(linear.out_features for linear in group)
        size_A, size_B = sum(ranks) * width, outputs * sum(ranks)
        first = group[0].lora_A
        # One pair of factors that need neither padding nor a cast is used as it is: see `single_pair`.
        alone = len(group) == 1 and first is not None and first.itemsize == e and first.shape[0] == ranks[0]
        copies = 0 if alone else size_A * passes_gradient
        copies += 0 if alone and group[0].lora_scaling == 1.0 else size_B
        kept += Cost(sum(ranks) * e, copies * e)
        lora += Cost(sum(ranks) * e, (size_A + size_B) * FLOAT)
    return _Maps(
        input=width * e if any(trains(linear) for linear in linears) else 0.0,
        kept=kept,
        lora=lora,
        scratch=Cost(0, e * sum(_size(linear) for linear in linears if counts_as_nf4(linear, sizes.bits))),
        drops=any(linear.lora_dropout > 0 for linear in linears),
    )


def _size(linear: Linear) -> int:
    return linear.in_features * linear.out_features


def _attention(layer: DecoderLayer, sizes: _Sizes, after_trained: bool) -> Branch:
    """The first norm, the projections, RoPE (with the norm of the heads), attention and the map out."""
    attention: SelfAttention = layer.self_attn
    e, q_heads = sizes.element, attention.num_heads
    q_and_k = q_heads + attention.num_kv_heads
    heads = (q_and_k + attention.num_kv_heads) * attention.head_dim * e
    mixed = q_heads * attention.head_dim * e
    linears = [module for name, module in attention.named_children() if isinstance(module, Linear) and name != "o_proj"]
    passes_gradient = after_trained or trains(layer.input_layernorm)
    projections = _maps(linears, sizes, passes_gradient=passes_gradient)
    output = _maps([attention.o_proj], sizes)
    kept = projections.kept + output.kept
    kept += Cost(projections.input + heads + mixed + q_heads * FLOAT)
    if passes_gradient:
        kept += Cost(sizes.stream + FLOAT)
    if attention.q_norm is not None:
        # The heads before their norm, and one deviation each; those after it are what attention keeps.
        kept += Cost(heads + q_and_k * FLOAT)
    parts = key_gradient_parts(q_heads, attention.num_kv_heads)
    sums = parts * 2 * attention.num_kv_heads * attention.head_dim * FLOAT if parts > 1 else 0
    stream = Cost(sizes.stream)
    moments = (
        stream + Cost(mixed + heads + q_heads * STATS.value * FLOAT + sums) + output.lora,
        stream + Cost(mixed) + output.scratch,
        stream + Cost(heads + sizes.stream) + projections.lora + projections.scratch,
    )
    return Branch(kept, moments)


def _with_norms(layer: DecoderLayer, branch: Branch, sizes: _Sizes) -> Branch:
    """The feed-forward branch with the norms around it, and the gradient of the residual stream, which waits."""
    norm = Cost(sizes.stream + FLOAT)
    # A sandwich norms the branch of attention, the sum, and the branch of the feed-forward: it keeps all three.
    norms = norm + norm + norm if layer.has_sandwich_norms else norm
    waiting = Cost((2 if layer.has_sandwich_norms else 1) * sizes.stream)
    return Branch(branch.kept + norms, tuple(waiting + moment for moment in branch.moments))


def _feed_forward(module: nn.Module, sizes: _Sizes) -> Branch:
    if isinstance(module, SparseMoe):
        return _experts(module, sizes)
    assert isinstance(module, GatedMlp)
    e, down = sizes.element, module.down_proj
    gate_up = [child for name, child in module.named_children() if isinstance(child, Linear) and name != "down_proj"]
    first, last = _maps(gate_up, sizes), _maps([down], sizes)
    inner = down.in_features * e
    kept = first.kept + last.kept + Cost(first.input + 2 * inner)
    fused = down.is_frozen and all(linear.is_frozen for linear in gate_up)
    # Fused, h is computed again, and [g | u] is overwritten by its gradient.
    middle = Cost(2 * inner) if fused else Cost(4 * inner)
    if not fused:
        kept += Cost(last.input)
    if last.drops:
        middle += Cost(2 * inner)  # a mask, and h under it
    moments = (
        Cost(inner) + last.scratch + last.lora,
        middle + last.lora,
        Cost(sizes.stream if fused else sizes.stream + 2 * inner) + first.scratch + first.lora,
    )
    return Branch(kept, moments)


def _experts(module: SparseMoe, sizes: _Sizes) -> Branch:
    """The router and the experts: `autograd/experts.py`."""
    e, k = sizes.element, module.experts_per_token
    gate, *_ = stacks = module.experts.projections()
    inner, row = gate.out_features * e, sizes.stream
    any_trains = any(trains(stack) for stack in stacks)
    # Probabilities; the choice and its weights, before and after they are scaled to a sum of one.
    routing = gate.num_experts * FLOAT * (2 if module.keeps_router_logits else 1) + k * (INDEX + e)
    if module.normalize_weights:
        routing += (k + 1) * FLOAT
    routing += 2 * k * INDEX  # the order of the rows and its inverse
    if trains(module.gate) or any_trains:
        routing += row
    kept = Cost(routing + 2 * k * inner, (gate.num_experts + 1) * FLOAT)
    ranks = 0
    for stack in stacks:
        if stack.lora_A is None or stack.lora_B is None:
            continue
        rank = stack.lora_A.shape[1]
        ranks += rank
        if stack.lora_A.itemsize != e:
            kept += Cost(0, stack.lora_A.numel() * e)
        if stack.lora_B.itemsize != e or stack.lora_scaling != 1.0:
            kept += Cost(0, stack.lora_B.numel() * e)
        kept += Cost(k * rank * e)
    lora = Cost(k * ranks * e)
    decoded = Cost(0, e * gate.num_experts * _size_of_expert(gate) if counts_as_nf4(gate, sizes.bits) else 0)
    return Branch(
        kept,
        (
            lora + Cost(k * (row + inner)) + decoded,
            lora + Cost(k * (row + 2 * inner)),
            lora + Cost(k * row) + decoded,
            lora + Cost(k * row + row),
        ),
    )


def _size_of_expert(stack: ExpertLinear) -> int:
    return stack.in_features * stack.out_features
