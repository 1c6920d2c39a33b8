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
from slothcore.training.memory_plan import Branch, Cost, LayerMemory

FLOAT = 4  # bytes of float32: reciprocal deviations, log-sum-exps, sums of gradients
INDEX = 8  # bytes of int64


def layer_memory(
    layer: DecoderLayer, dtype: torch.dtype, *, bits: int, after_trained: bool, keep_gate_up: bool = True
) -> LayerMemory:
    """What `layer` needs.

    Args:
        layer: with its adapter; on the meta device its frozen maps count as NF4 if `bits` is 4.
        after_trained: whether something before this layer trains, so that a gradient has to pass through all of it.
        keep_gate_up: whether a fused MLP keeps the outputs of gate and up; else its backward pass makes them again.
    """
    sizes = _Sizes(dtype.itemsize, dtype == torch.float16, bits, layer.input_layernorm.weight.numel())
    branch = layer.feed_forward
    passed = after_trained or trains(layer.input_layernorm) or trains(layer.self_attn)
    attention = _attention(layer, sizes, after_trained) if passed else Branch((), ())
    feed_forward = Branch((), ())
    if passed or any(p.requires_grad for p in layer.parameters()):
        feed_forward = _with_norms(layer, _feed_forward(branch, sizes, keep_gate_up=keep_gate_up), sizes)
    streams = 2 if after_trained else 1  # the first layer gets the embedding alone
    return LayerMemory(
        attention,
        feed_forward,
        inputs=Cost(streams * sizes.stream),
        gradients=sum(p.nbytes for p in layer.parameters() if p.requires_grad),
        decoded=sum(
            sizes.element * _size(linear) for group in maps_of(layer) for linear in group if counts_as_nf4(linear, bits)
        ),
    )


def maps_of(layer: nn.Module) -> list[list[Linear]]:
    """The linear maps of attention and of the gated MLP, those over one input together, as their outputs lie."""
    groups = []
    for module in layer.children():
        if isinstance(module, SelfAttention | GatedMlp):
            linears = [child for child in module.children() if isinstance(child, Linear)]
            # What leads back to the residual stream comes last: o_proj and down_proj.
            groups += [linears[:-1], linears[-1:]]
    return groups


def trains(module: nn.Module) -> bool:
    """Whether anything in it gets a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())


def counts_as_nf4(linear: Linear | ExpertLinear, bits: int) -> bool:
    """Whether the weight is NF4, or would be if the model were not on the meta device, which quantises nothing."""
    return linear.is_nf4 or (bits == 4 and linear.weight.is_meta and not linear.weight.requires_grad)


@dataclass(frozen=True)
class _Sizes:
    """e, whether that is float16, bits and H."""

    element: int
    is_half: bool
    bits: int
    hidden: int

    @property
    def stream(self) -> int:
        """Bytes of a token in the residual stream."""
        return self.hidden * self.element

    @property
    def norm(self) -> tuple[Cost, ...]:
        """What a norm keeps: its input, and a reciprocal deviation."""
        return Cost(self.stream), Cost(FLOAT)


@dataclass(frozen=True)
class _Maps:
    """Several linear maps over one input, forward and backward: `autograd/lora_projection.py`.

    Attributes:
        input: x, if it is kept.
        kept: u, and the joined factors.
        lora: v of a token, and the factors' gradients as they are summed.
        scratch: NF4 weights, decoded.
        drops: whether a LoRA term has dropout.
        unscaled: the outputs before DoRA scales them, which are kept for its magnitudes; with dropout they are made
            again. Nothing without DoRA.
        rescaled: what backward has beside dy for DoRA: dz, and with dropout z and an input under its mask.
    """

    input: tuple[Cost, ...]
    kept: tuple[Cost, ...]
    lora: Cost
    scratch: Cost
    drops: bool
    unscaled: tuple[Cost, ...]
    rescaled: Cost


def _maps(
    linears: Sequence[Linear],
    sizes: _Sizes,
    *,
    passes_gradient: bool = True,
    normed: bool = False,
    beside: Sequence[Linear] = (),
) -> _Maps:
    """
    Args:
        passes_gradient: whether the input of these maps needs a gradient.
        normed: whether it is the output of a norm, which fused maps make again of what the norm keeps.
        beside: further maps of the same Function; where one has DoRA, all have scales.
    """
    e, width = sizes.element, linears[0].in_features
    fused = all(linear.is_frozen for linear in linears)
    lora, kept = Cost(), []
    for group in [linears] if fused else [[linear] for linear in linears]:
        ranks = [padded_rank(p.lora_A.shape[0]) for p in group if p.lora_A is not None]
        if not ranks:
            continue
        outputs = sum(linear.out_features for linear in group)
        size_A, size_B = sum(ranks) * width, outputs * sum(ranks)
        first = group[0].lora_A
        # One pair of factors that need neither padding nor a cast is used as it is: see `single_pair`.
        alone = len(group) == 1 and first is not None and first.itemsize == e and first.shape[0] == ranks[0]
        kept.append(Cost(sum(ranks) * e))
        if passes_gradient and not alone:
            kept.append(Cost(0, size_A * e))
        if not (alone and group[0].lora_scaling == 1.0):
            kept.append(Cost(0, size_B * e))
        lora += Cost(sum(ranks) * e, (size_A + size_B) * FLOAT)
    scratch = e * sum(_size(linear) for linear in linears if counts_as_nf4(linear, sizes.bits))
    drops, outputs = any(linear.lora_dropout > 0 for linear in linears), sum(p.out_features for p in linears)
    unscaled: tuple[Cost, ...] = ()
    rescaled = Cost()
    if fused and any(linear.lora_magnitude_vector is not None for linear in (*linears, *beside)):
        kept.append(Cost(0, 2 * outputs * FLOAT))  # norms and scales
        rescaled = Cost(outputs * e + (outputs + 2 * width) * e * drops)
    if fused and not drops and any(linear.lora_magnitude_vector is not None for linear in linears):
        unscaled = (Cost(outputs * e),)
    return _Maps(
        input=(Cost(width * e),) if any(trains(linear) for linear in linears) and not (normed and fused) else (),
        kept=tuple(kept),
        lora=lora,
        scratch=Cost(0, scratch, scratch),
        drops=drops,
        unscaled=unscaled,
        rescaled=rescaled,
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
    projections = _maps(linears, sizes, passes_gradient=passes_gradient, normed=True)
    output = _maps([attention.o_proj], sizes)
    kept = [*projections.input, *projections.kept, *projections.unscaled, *output.kept, *output.unscaled]
    kept += [Cost(heads), Cost(mixed), Cost(q_heads * FLOAT)]
    if passes_gradient or (not projections.input and any(trains(linear) for linear in linears)):
        kept += sizes.norm
    if attention.q_norm is not None:
        # The heads before their norm, and one deviation each; those after it are what attention keeps.
        kept += [Cost(heads), Cost(q_and_k * FLOAT)]
    parts = key_gradient_parts(q_heads, attention.num_kv_heads)
    sums = parts * 2 * attention.num_kv_heads * attention.head_dim * FLOAT if parts > 1 else 0
    stream = Cost(sizes.stream)
    moments: tuple[Cost, ...] = (
        stream + Cost(mixed + heads + q_heads * STATS.value * FLOAT + sums) + output.lora,
        stream + Cost(mixed) + output.rescaled + output.scratch,
        stream + Cost(heads + sizes.stream) + projections.rescaled + projections.lora + projections.scratch,
    )
    if projections.drops or sizes.is_half:
        # dA reads the norm's output, made again beside dx, and with dropout a mask and that output under it.
        again = (3 if projections.drops else 1) * sizes.stream
        moments += (stream + Cost(heads + sizes.stream + again) + projections.rescaled + projections.lora,)
    return Branch(tuple(kept), moments)


def _with_norms(layer: DecoderLayer, branch: Branch, sizes: _Sizes) -> Branch:
    """The feed-forward branch with the norms around it, and the gradient of the residual stream, which waits."""
    # A sandwich norms the branch of attention, the sum, and the branch of the feed-forward: it keeps all three.
    norms = 3 * sizes.norm if layer.has_sandwich_norms else sizes.norm
    waiting = Cost((2 if layer.has_sandwich_norms else 1) * sizes.stream)
    return Branch(branch.tensors + norms, tuple(waiting + moment for moment in branch.moments))


def _feed_forward(module: nn.Module, sizes: _Sizes, *, keep_gate_up: bool) -> Branch:
    if isinstance(module, SparseMoe):
        return _experts(module, sizes)
    assert isinstance(module, GatedMlp)
    e, down = sizes.element, module.down_proj
    gate_up = [child for name, child in module.named_children() if isinstance(child, Linear) and name != "down_proj"]
    first, last = _maps(gate_up, sizes, normed=True, beside=[down]), _maps([down], sizes, beside=gate_up)
    inner = down.in_features * e
    kept = [*first.input, *first.kept, *last.kept, *last.unscaled]
    fused = down.is_frozen and all(linear.is_frozen for linear in gate_up)
    # Fused, h is computed again, and [g | u] is overwritten by its gradient.
    middle = Cost(2 * inner) if fused else Cost(4 * inner)
    if not fused:
        kept += last.input
    # Where the activation does not scale, its gradient is scaled after it.
    rescaled = first.rescaled if first.drops else Cost()
    if last.drops:
        middle += Cost(2 * inner)  # a mask, and h under it
    moments = (
        Cost(inner) + last.rescaled + last.scratch + last.lora,
        middle + last.rescaled + last.lora,
        Cost(sizes.stream if fused else sizes.stream + 2 * inner) + rescaled + first.scratch + first.lora,
    )
    outputs = Cost(2 * inner)
    # DoRA's activation adds the biases, and gives up [g | u] for z.
    scaled = first.rescaled.per_token > 0 and not first.drops
    if (scaled or not keep_gate_up) and fused and any(linear.bias is not None for linear in gate_up):
        kept.append(Cost(0, sum(linear.out_features for linear in gate_up) * e))
    if keep_gate_up or not fused:
        return Branch((*kept, outputs), moments)
    # They are made again once dh is there, from the normed input, which is made again for it, and the joined biases.
    again = outputs + Cost(inner + sizes.stream) + first.scratch + last.lora
    return Branch(tuple(kept), (moments[0], again, outputs + moments[1], outputs + moments[2]))


def _experts(module: SparseMoe, sizes: _Sizes) -> Branch:
    """The router and the experts: `autograd/experts.py`."""
    e, k = sizes.element, module.experts_per_token
    gate, *_ = stacks = module.experts.projections()
    inner, row = gate.out_features * e, sizes.stream
    any_trains = any(trains(stack) for stack in stacks)
    # Probabilities, and the choice and its weights, before and after they are scaled to a sum of one.
    kept = [Cost(gate.num_experts * FLOAT)] * (2 if module.keeps_router_logits else 1) + [Cost(k * INDEX), Cost(k * e)]
    if module.normalize_weights:
        kept += [Cost(k * FLOAT), Cost(FLOAT)]
    kept += [Cost(k * INDEX)] * 2  # the order of the rows and its inverse
    if trains(module.gate) or any_trains:
        kept.append(Cost(row))
    kept += [Cost(2 * k * inner), Cost(0, (gate.num_experts + 1) * FLOAT)]
    ranks = 0
    for stack in stacks:
        if stack.lora_A is None or stack.lora_B is None:
            continue
        rank = stack.lora_A.shape[1]
        ranks += rank
        if stack.lora_A.itemsize != e:
            kept.append(Cost(0, stack.lora_A.numel() * e))
        if stack.lora_B.itemsize != e or stack.lora_scaling != 1.0:
            kept.append(Cost(0, stack.lora_B.numel() * e))
        kept.append(Cost(k * rank * e))
    lora = Cost(k * ranks * e)
    decoded = Cost(0, e * gate.num_experts * _size_of_expert(gate) if counts_as_nf4(gate, sizes.bits) else 0)
    return Branch(
        tuple(kept),
        (
            lora + Cost(k * (row + inner)) + decoded,
            lora + Cost(k * (row + 2 * inner)),
            lora + Cost(k * row) + decoded,
            lora + Cost(k * row + row),
        ),
    )


def _size_of_expert(stack: ExpertLinear) -> int:
    return stack.in_features * stack.out_features
