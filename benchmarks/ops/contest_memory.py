"""Contests that the memory bounds: norm, rotary positions, gated unit and decoding, beside Liger and torch.compile."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.case import nf4_tensor, quantize_by_bitsandbytes
from benchmarks.ops.contest import (
    OWN,
    Contest,
    Entry,
    copies_beyond_cache,
    faster_than_all,
    plain,
    rotating,
    share_of_floor,
)
from benchmarks.shapes import OpShape
from slothcore.kernels import glu, nf4, rms_norm, rope
from slothcore.kernels.nf4_tensor import BLOCK, NESTED_BLOCK, Nf4Tensor, nf4_code

EPS = 1e-5
SCORES = (share_of_floor("memory"), faster_than_all("memory, peers"))


def memory_contests(shape: OpShape, dtype: torch.dtype, device: str) -> Iterator[Callable[[], Contest]]:
    """What makes each contest, so that the operands of one are free before the next."""
    for with_residual in (False, True):
        for backward in (False, True):
            yield partial(norm, shape, dtype, device, with_residual=with_residual, backward=backward)
    for backward in (False, True):
        yield partial(rotary, shape, dtype, device, backward=backward)
    for backward in (False, True):
        yield partial(gate, shape, dtype, device, backward=backward)
    for rows, columns in (
        (shape.intermediate_size, shape.hidden_size),
        (shape.hidden_size, shape.intermediate_size),
        (shape.hidden_size, shape.hidden_size),
    ):
        yield partial(decode, rows, columns, dtype, device)


def compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """By torch.compile on a GPU; as it is on a CPU, where only the machinery is tried."""
    if device == "cpu":
        return function
    # The backward pass that is timed runs again and again on what one forward pass has kept.
    functorch_config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def liger(device: str) -> bool:
    """Whether Liger's kernels can take part."""
    return device == "cuda" and find_spec("liger_kernel") is not None


def norm(shape: OpShape, dtype: torch.dtype, device: str, *, with_residual: bool, backward: bool) -> Contest:
    """RMSNorm, with the residual add before it or without."""
    tokens, hidden = shape.tokens, shape.hidden_size
    x, residual, dy, dh = (torch.randn(tokens, hidden, device=device).to(dtype) for _ in range(4))
    weight = torch.rand(hidden, device=device).to(dtype)
    more: dict[str, Any] = {"residual": residual} if with_residual else {}

    def reference(*inputs: Tensor) -> tuple[Tensor, ...]:
        h = inputs[0] + inputs[1] if with_residual else inputs[0]
        y = F.rms_norm(h, (hidden,), weight, EPS)
        return (y, h) if with_residual else (y,)

    def by_liger(*inputs: Tensor) -> tuple[Tensor, ...]:
        from liger_kernel.ops import LigerFusedAddRMSNormFunction, LigerRMSNormFunction

        if with_residual:
            return LigerFusedAddRMSNormFunction.apply(*inputs, weight, EPS, 0.0, "llama", False)
        return (LigerRMSNormFunction.apply(*inputs, weight, EPS, 0.0, "llama", False),)

    inputs = (x, residual) if with_residual else (x,)
    upstream = (dy, dh) if with_residual else (dy,)
    peers = {"torch.compile": compiled(reference, device)} | ({"liger": by_liger} if liger(device) else {})
    name = f"{'add + ' if with_residual else ''}RMSNorm"
    # x, y, and with a residual that and h; backwards one more is read without, and dh with a residual.
    passes = (4 if with_residual else 3) if backward else (4 if with_residual else 2)
    moved = passes * tokens * hidden * dtype.itemsize
    if not backward:
        results = slice(0, 3, 2) if with_residual else slice(0, 1)
        own = plain(lambda: rms_norm.rms_norm_forward(x, weight, eps=EPS, **more)[results])
        entries = {OWN: own} | {name: plain(partial(peer, *inputs)) for name, peer in peers.items()}
        return contest(f"{name} forward", f"{tokens}x{hidden}", entries, lambda: reference(*inputs), moved)

    _, rstd, h = rms_norm.rms_norm_forward(x, weight, eps=EPS, **more)
    through: dict[str, Any] = {"dh": dh} if with_residual else {}

    def gradient(function: Callable[..., tuple[Tensor, ...]]) -> Callable[[], Tensor]:
        leaves = [part.clone().requires_grad_() for part in inputs]
        # Once, when first asked for: a peer that cannot do it then only fails itself.
        outputs = cache(lambda: function(*leaves))
        return lambda: torch.autograd.grad(outputs(), leaves, upstream, retain_graph=True)[0]

    own = plain(lambda: rms_norm.rms_norm_backward(dy, h, weight, rstd, **through)[0])
    entries = {OWN: own} | {name: plain(gradient(peer)) for name, peer in peers.items()}
    expected = gradient(reference)
    return contest(f"{name} backward", f"{tokens}x{hidden}", entries, lambda: (expected(),), moved)


def rotary(shape: OpShape, dtype: torch.dtype, device: str, *, backward: bool) -> Contest:
    """Query and key heads turned; backwards the other way."""
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    turned, half = heads + kv_heads, dim // 2
    qkv = torch.randn(shape.tokens, turned + kv_heads, dim, device=device).to(dtype)
    angles = torch.rand(shape.tokens, half, device=device) * 6
    cos, sin = angles.cos(), angles.sin()

    def own(x: Tensor) -> Tensor:
        return rope.rope_rotate_(x, cos, sin, num_heads=turned, inverse=backward)

    def reference(x: Tensor) -> Tensor:
        first, second = x[:, :turned, :half].float(), x[:, :turned, half:].float()
        c, s = cos[:, None], -sin[:, None] if backward else sin[:, None]
        return torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)

    entries = {
        OWN: Entry(lambda: own(qkv), lambda: [own(qkv.clone())[:, :turned]]),
        "torch.compile": plain(partial(compiled(reference, device), qkv.clone())),
    }
    if liger(device):
        from liger_kernel.ops.rope import rope_backward, rope_forward

        function = rope_backward if backward else rope_forward
        # As transformers hands them: both halves, in the dtype of the model.
        wide_cos, wide_sin = (torch.cat([part, part], dim=-1)[None].to(dtype) for part in (cos, sin))

        def parts() -> list[Tensor]:
            q, k, _ = qkv.split([heads, kv_heads, kv_heads], dim=1)
            return [part.clone()[None].transpose(1, 2) for part in (q, k)]

        def result() -> list[Tensor]:
            q, k = function(*parts(), wide_cos, wide_sin)[:2]
            return [torch.cat([part.transpose(1, 2)[0] for part in (q, k)], dim=1)]

        separate = parts()
        entries["liger"] = Entry(lambda: function(*separate, wide_cos, wide_sin), result)
    moved = 2 * shape.tokens * turned * dim * dtype.itemsize + cos.nbytes + sin.nbytes
    # Computed before the own entry, which works in place, has been timed.
    expected = reference(qkv)
    way = "backward" if backward else "forward"
    return contest(f"RoPE {way}", f"{shape.tokens}x{turned}x{dim}", entries, lambda: [expected], moved)


def gate(shape: OpShape, dtype: torch.dtype, device: str, *, backward: bool) -> Contest:
    """silu(gate) * up; backwards with the product again, which the layer's own backward pass needs."""
    tokens, inner = shape.tokens, shape.intermediate_size
    gate_up = torch.randn(tokens, 2 * inner, device=device).to(dtype)
    dy = torch.randn(tokens, inner, device=device).to(dtype)

    def forward(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def both(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (part.float() for part in gate_up.chunk(2, dim=-1))
        share = torch.sigmoid(gate)
        silu, upstream = gate * share, dy.float()
        d_gate = upstream * up * (share + silu * (1 - share))
        return torch.cat([d_gate, upstream * silu], dim=-1).to(dy.dtype), (silu * up).to(dy.dtype)

    size, item = f"{tokens}x{inner}", tokens * inner * dtype.itemsize
    if not backward:
        entries = {
            OWN: plain(lambda: glu.glu_forward(gate_up, activation="silu")),
            "torch.compile": plain(partial(compiled(forward, device), gate_up)),
        }
        if liger(device):
            from liger_kernel.ops.swiglu import swiglu_forward

            halves = [part.contiguous() for part in gate_up.chunk(2, dim=-1)]
            entries["liger"] = plain(lambda: swiglu_forward(*halves)[2])
        return contest("gate forward", size, entries, lambda: [forward(gate_up)], 3 * item)

    entries = {
        OWN: plain(lambda: glu.glu_backward(dy, gate_up, activation="silu")),
        "torch.compile": plain(partial(compiled(both, device), dy, gate_up)),
    }
    if liger(device):
        from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

        def by_liger(halves: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            y = swiglu_forward(*halves)[2]
            d_gate, d_up = swiglu_backward(*halves, dy)
            return d_gate, d_up, y

        def result() -> list[Tensor]:
            d_gate, d_up, y = by_liger([part.contiguous() for part in gate_up.chunk(2, dim=-1)])
            return [torch.cat([d_gate, d_up], dim=-1), y]

        # It overwrites them; what they hold does not change its time.
        overwritten = [part.contiguous() for part in gate_up.chunk(2, dim=-1)]
        entries["liger"] = Entry(lambda: by_liger(overwritten), result)
    return contest("gate backward, y again", size, entries, lambda: both(dy, gate_up), 6 * item)


def decode(rows: int, columns: int, dtype: torch.dtype, device: str) -> Contest:
    """An NF4 weight expanded: the values are bitsandbytes' to the last bit."""
    packed, state = quantize_by_bitsandbytes(torch.randn(rows, columns, device=device).to(dtype))
    weight = nf4_tensor(packed, state)
    count = copies_beyond_cache(weight.nbytes + rows * columns * dtype.itemsize)
    weights = [weight, *(replace(weight, packed=weight.packed.clone()) for _ in range(count - 1))]
    outs = [torch.empty(rows, columns, dtype=dtype, device=device) for _ in range(count)]
    table = nf4_code(torch.device(device))

    def reference(weight: Nf4Tensor) -> Tensor:
        parts = (weight.nested_absmax, weight.nested_offset, weight.nested_code)
        return by_torch(weight.packed, weight.absmax, *parts)

    def decode_by_torch(
        packed: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, nested_code: Tensor
    ) -> Tensor:
        scales = nested_absmax.repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
        scales = nested_code[absmax.int()] * scales + offset
        codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1, BLOCK)
        return (table[codes.int()] * scales[:, None]).to(dtype).view(rows, columns)

    by_torch = compiled(decode_by_torch, device)
    pairs = list(zip(weights, outs, strict=True))

    def by_bitsandbytes(pair: tuple[Nf4Tensor, Tensor]) -> Tensor:
        # On a CPU it has no `out`.
        out: Any = {"out": pair[1]} if device == "cuda" else {}
        return bnb.dequantize_4bit(pair[0].packed.view(packed.shape), state, **out)

    entries = {
        OWN: plain(rotating(lambda pair: nf4.nf4_dequantize(pair[0], dtype=dtype, out=pair[1]), pairs), tolerance=0.0),
        "bitsandbytes": plain(rotating(by_bitsandbytes, pairs)),
        "torch.compile": plain(rotating(reference, weights)),
    }
    expected = bnb.dequantize_4bit(packed, state)
    return contest("NF4 decode", f"{rows}x{columns}", entries, lambda: [expected], weight.nbytes + expected.nbytes)


def contest(op: str, size: str, entries: dict[str, Entry], expected: Callable[[], Any], moved: int) -> Contest:
    return Contest(op, size, entries, expected, bytes=moved, scores=SCORES)
