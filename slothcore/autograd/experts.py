"""The routed feed-forward of a mixture of experts: every token through its k experts, in one Function.

Pairs (t, j) of a token and one of its choices are sorted by expert; row i of what follows is one pair, of token t(i)
and router weight w_i. All products are grouped: each row meets its own expert's weights (and LoRA terms, whose
equations stand in `expert_projection.py`).

Forward   x_i = x[t(i)]       [g | u] = [x_i W_gate^T | x_i W_up^T] + LoRA
          s_i = w_i h_i,  h = act(g) * u        z_i = s_i W_down^T + LoRA        y[t] = sum of z_i over the rows of t
          The router weight scales the input of the down projection, not its output: both are linear in it, and
          the gradient of w then needs h, which is at hand, and not z, which is neither kept nor computed again.
Backward  dz_i = dy[t(i)]     ds = dz W_down + LoRA
          dw_i = ds_i . h_i   dh_i = w_i ds_i      [dg | du] from dh as in `kernels/glu.py`
          dx_i = dg W_gate + du W_up + LoRA        dx[t] = sum of dx_i over the rows of t
          weights' and factors' gradients from (dz, s), (dg, x_i) and (du, x_i)

Kept for backward: x and [g | u], the routing (20 bytes a row), the factors in the compute dtype, and of every
projection u = x A^T [M, r]. Never kept: sorted copies of x, s, z, a dropout mask, a decoded NF4 weight. What only a
frozen weight, factor or input would need is neither kept nor computed. Nothing waits for the device, and no sum depends
on the order in which programs run.

Shapes    x, y [T, H]; g, u, h, s [M, I]; z, x_i [M, H]; w [T, k]; M = T k.
          T = tokens, H = hidden_size, k = experts of a token, I = intermediate_size of an expert, M = rows.
Source    Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024 (Mixtral), arXiv:2401.04088;
          Gale et al. 2022 (MegaBlocks), arXiv:2211.15841.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slothcore.autograd.autocast import check_autocast
from slothcore.autograd.expert_projection import (
    ExpertProjection,
    Operands,
    Wanted,
    input_grad,
    lora_inputs,
    ops_for,
    output_grad_times_B,
    parameter_grads,
    scaled_factor,
)
from slothcore.autograd.first_order import once_differentiable
from slothcore.kernels import expert_glu, expert_glu_eager, expert_routing, expert_routing_eager
from slothcore.kernels.glu_eager import Activation
from slothcore.kernels.nf4_experts import Nf4Experts

__all__ = ["ExpertProjection", "expert_mlp"]


def expert_mlp(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate: ExpertProjection,
    up: ExpertProjection,
    down: ExpertProjection,
    *,
    activation: Activation,
    inplace: bool = True,
) -> Tensor:
    """y[t] = sum over the choices j of w[t, j] * down_e(act(gate_e(x[t])) * up_e(x[t])), e = expert_ids[t, j].

    Args:
        x: [T, H], in the compute dtype.
        expert_ids: [T, k] integers, each at least 0 and below the number of experts.
        expert_weights: [T, k] of x's dtype, the router's weights; differentiable.
        gate, up: weights [E, I, H].
        down: weights [E, H, I].
        activation: of the gate.
        inplace: let backward overwrite the kept gate and up with their gradient, which saves [T * k, 2I]; a second
            backward through the same graph then raises.
    Returns: [T, H] in x's dtype.
    Raises: ValueError if shapes or dtypes do not fit.
    """
    projections = (gate, up, down)
    _check(x, expert_ids, expert_weights, projections)
    tensors = [t for p in projections for t in (_dense(p.weight), p.lora_A, p.lora_B)]
    # The CPU generator costs no device synchronisation, and gradient checkpointing restores it.
    dropout = any(p.dropout and p.lora_A is not None for p in projections)
    seed = int(torch.randint(2**62, (), device="cpu")) if dropout else 0
    return _ExpertMlp.apply(x, expert_weights, *tensors, _Plan(expert_ids, projections, activation, inplace, seed))


@dataclass(frozen=True)
class _Plan:
    """What of an expert_mlp has no gradient.

    Whatever may have one reaches the Function as an input of its own; of the projections it reads dtypes, scalings and
    frozen weights.
    """

    expert_ids: Tensor
    projections: tuple[ExpertProjection, ExpertProjection, ExpertProjection]
    activation: Activation
    inplace: bool
    seed: int

    def operands(self, weight: Tensor | None, A: Tensor | None, B: Tensor | None, index: int) -> Operands:
        """Projection `index` (gate, up, down) with these tensors; without a weight, with its own."""
        projection = self.projections[index]
        dropout = 0.0 if projection.lora_A is None else projection.dropout
        scaling = projection.scaling / (1.0 - dropout)
        return Operands(projection.weight if weight is None else weight, A, B, scaling, dropout, seed=self.seed + index)

    def cast_operands(self, tensors: Sequence[Any], dtype: torch.dtype) -> tuple[Operands, Operands, Operands]:
        """(gate, up, down) from the inputs of the Function, the factors in the compute dtype."""

        def cast(index: int) -> Operands:
            weight, lora_A, lora_B = tensors[3 * index : 3 * index + 3]
            operands = self.operands(weight, lora_A, lora_B, index)
            if lora_A is None:
                return operands
            return operands._replace(A=lora_A.to(dtype), B=scaled_factor(lora_B, operands.scaling, dtype))

        return cast(0), cast(1), cast(2)


class _ExpertMlp(torch.autograd.Function):
    """The routed feed-forward; the equations stand at the top of this file.

    Inputs: x, the router's weights; weight, lora_A and lora_B of gate, of up and of down; then what has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_weights: Tensor, *inputs: Any) -> Tensor:
        *tensors, plan = inputs
        gemm, glu, routing = ops_for(x), *_row_ops(x)
        gate, up, down = operands = plan.cast_operands(tensors, x.dtype)
        order, offsets, position = routing.sort_by_expert(plan.expert_ids, gate.weight.shape[0])

        rows = routing.gather_rows(x, order)
        u = lora_inputs(rows, offsets, (gate, up))
        gate_up = x.new_empty(rows.shape[0], 2 * gate.weight.shape[1])
        for p, u_p, half in zip((gate, up), u, gate_up.chunk(2, dim=1), strict=True):
            gemm.grouped_linear(rows, p.weight, offsets, lora_x=u_p, lora_B=p.B, out=half)
        del rows
        s = glu.expert_glu_forward(gate_up, expert_weights.flatten(), order, activation=plan.activation)
        u += lora_inputs(s, offsets, (down,))
        z = gemm.grouped_linear(s, down.weight, offsets, lora_x=u[2], lora_B=down.B)
        y = routing.combine_rows(z, position, x.shape[0])

        needs = ctx.needs_input_grad
        wanted = _wanted(needs)
        # Whether the gradient of each projection's input is needed: down's, by all that comes before it.
        passes_on = (needs[0], needs[0], needs[0] or needs[1] or any(needs[2:8]))
        saved: list[Tensor | None] = []
        for p, u_p, want, on in zip(operands, u, wanted, passes_on, strict=True):
            saved += [
                _dense(p.weight) if on else None,
                p.A if on else None,
                p.B if on or want.lora_A else None,
                u_p if want.lora_B else None,
            ]
        ctx.plan, ctx.passes_on = plan, passes_on
        needs_rows = any(want.weight or want.lora_A for want in wanted[:2])
        ctx.num_tokens = x.shape[0]
        ctx.save_for_backward(x if needs_rows else None, expert_weights, order, offsets, position, gate_up, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, expert_weights, order, offsets, position, gate_up, *saved = ctx.saved_tensors
        plan, wanted = ctx.plan, _wanted(ctx.needs_input_grad)
        _, glu, routing = ops_for(dy), *_row_ops(dy)
        gate, up, down = (plan.operands(*saved[4 * i : 4 * i + 3], i) for i in range(3))
        u_gate, u_up, u_down = saved[3::4]

        dz = routing.gather_rows(dy, order)
        v = output_grad_times_B(dz, down, offsets)
        flat_weights = expert_weights.flatten()
        d_weights = None
        if ctx.passes_on[2]:
            ds = input_grad((dz,), (v,), (down,), offsets)
            d_gate_up, d_weights, s = glu.expert_glu_backward(
                ds, gate_up, flat_weights, order, activation=plan.activation, inplace=plan.inplace
            )
            del ds
            if plan.inplace:
                # A kernel's writes are invisible to autograd; this makes a second backward raise instead of lie.
                torch.autograd.graph.increment_version(gate_up)
        else:
            s = glu.expert_glu_forward(gate_up, flat_weights, order, activation=plan.activation)
        down_grads = parameter_grads(dz, s, u_down, v, plan.projections[2], down, offsets, wanted[2])
        del dz, s, v
        d_router = d_weights.view_as(expert_weights) if d_weights is not None and ctx.needs_input_grad[1] else None
        if not (ctx.passes_on[0] or any(any(want) for want in wanted[:2])):
            return None, d_router, *(None,) * 6, *down_grads, None

        first, halves = (gate, up), d_gate_up.chunk(2, dim=1)
        vs = [output_grad_times_B(half, p, offsets) for half, p in zip(halves, first, strict=True)]
        rows = None if x is None else routing.gather_rows(x, order)
        operands = zip(halves, (u_gate, u_up), vs, plan.projections[:2], first, wanted[:2], strict=True)
        first_grads = [
            gradient
            for half, u, v, projection, p, want in operands
            for gradient in parameter_grads(half, rows, u, v, projection, p, offsets, want)
        ]
        del rows
        dx = None
        if ctx.passes_on[0]:
            dx = routing.combine_rows(input_grad(halves, vs, first, offsets), position, ctx.num_tokens)
        return dx, d_router, *first_grads, *down_grads, None


def _row_ops(x: Tensor) -> tuple[Any, Any]:
    """The modules that work on rows: (expert_glu, expert_routing)."""
    return (expert_glu, expert_routing) if x.is_cuda else (expert_glu_eager, expert_routing_eager)


def _wanted(needs: Sequence[bool]) -> list[Wanted]:
    """Of gate, up and down, from the Function's needs_input_grad."""
    return [Wanted(*needs[first : first + 3]) for first in (2, 5, 8)]


def _dense(weight: Tensor | Nf4Experts) -> Tensor | None:
    return weight if isinstance(weight, Tensor) else None


def _check(x: Tensor, expert_ids: Tensor, expert_weights: Tensor, projections: Sequence[ExpertProjection]) -> None:
    """Raise ValueError unless all operands fit, and autocast does not object."""
    check_autocast(x)
    if x.dim() != 2 or expert_ids.dim() != 2 or expert_ids.shape[0] != x.shape[0]:
        shapes = tuple(x.shape), tuple(expert_ids.shape)
        raise ValueError(f"x and expert_ids must be [tokens, features] and [tokens, choices], got {shapes}")
    if expert_ids.is_floating_point() or expert_ids.shape[1] == 0:
        raise ValueError(
            f"expert_ids must be integers, at least one a token, got {expert_ids.dtype} {expert_ids.shape}"
        )
    if expert_weights.shape != expert_ids.shape or expert_weights.dtype != x.dtype:
        raise ValueError(
            f"expert_weights must be {x.dtype} of shape {tuple(expert_ids.shape)}, "
            f"got {expert_weights.dtype} of shape {tuple(expert_weights.shape)}"
        )
    gate, up, down = (tuple(p.weight.shape) for p in projections)
    if not gate == up == (gate[0], down[2], x.shape[1]) or down[:2] != (gate[0], x.shape[1]):
        raise ValueError(
            f"over {x.shape[1]} features gate and up must be [E, I, H] and down [E, H, I]; "
            f"got weights {gate}, {up} and {down}"
        )
    for p in projections:
        if isinstance(p.weight, Tensor) and p.weight.dtype != x.dtype:
            raise ValueError(f"x is {x.dtype} but a weight is {p.weight.dtype}; cast x to the model's dtype")
