"""Contests of what a model has once: the loss with its head, and attention over packed documents."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.floor import attentions
from benchmarks.ops.contest import OWN, Contest, Entry, Score, faster_than, times_of
from benchmarks.shapes import OpShape
from slothcore.autograd.cross_entropy import linear_cross_entropy

PRODUCTS = "its two products"
CUDNN = "SDPA cudnn_attention"
VARLEN = "varlen_attn"
# Documents and their length, all of one length so that a batch can hold them too.
ATTENTION_CASES = ((4, 2048), (1, 8192), (16, 512), (68, 119))
# Documents so short that packing is what matters.
SHORT = 512
# Checked exactly, on the rows of a smaller input.
CHECKED_ROWS = 256


def head(shape: OpShape, dtype: torch.dtype, device: str) -> Contest:
    """The mean loss of all tokens and the gradient of the hidden states; the head is frozen."""
    tokens, hidden_size, vocabulary = shape.tokens, shape.hidden_size, shape.vocab_size
    hidden = torch.randn(tokens, hidden_size, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, device=device) * hidden_size**-0.5).to(dtype)
    wanted = torch.randint(vocabulary, (tokens,), device=device)
    checked = min(tokens, CHECKED_ROWS)

    def entry(loss: Callable[[Tensor, Tensor], Tensor]) -> Entry:
        def both(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            value = loss(hidden, targets)
            return value, torch.autograd.grad(value, hidden)[0]

        def result() -> Sequence[Tensor]:
            return both(hidden.detach()[:checked].requires_grad_(), wanted[:checked])

        return Entry(lambda: both(hidden, wanted), result)

    def own(hidden: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, None, num_items=len(targets))

    def exact() -> list[Tensor]:
        leaf = hidden.detach()[:checked].float().requires_grad_()
        value = F.cross_entropy(leaf @ weight.float().T, wanted[:checked])
        return [value, torch.autograd.grad(value, leaf)[0]]

    def products() -> Tensor:
        with torch.no_grad():
            return (hidden @ weight.T) @ weight

    entries = {OWN: entry(own), PRODUCTS: Entry(products, exact)}
    if device == "cuda" and find_spec("liger_kernel"):

        def liger(hidden: Tensor, targets: Tensor) -> Tensor:
            from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

            return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)[0]

        entries["liger"] = entry(liger)
    if device == "cuda" and find_spec("cut_cross_entropy"):

        def cut(hidden: Tensor, targets: Tensor) -> Tensor:
            from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

            return cut_cross_entropy(hidden, weight, targets)

        entries["cut-cross-entropy"] = entry(cut)
    return Contest(
        "linear + cross-entropy",
        f"{tokens}x{hidden_size}x{vocabulary}",
        entries,
        exact,
        flops=4 * tokens * hidden_size * vocabulary,
        scores=(times_of("head", PRODUCTS),),
        weigh_memory=True,
    )


def attention_contests(
    config: dict[str, Any], cases: Sequence[tuple[int, int]], dtype: torch.dtype, device: str
) -> Iterator[Callable[[], Contest]]:
    """Packed attention over documents of equal lengths: forward, backward, and both, which the targets are for."""
    for documents, length in cases:
        for way in ("forward", "backward", "both"):
            yield partial(attention, config, documents, length, way, dtype, device)


def attention(
    config: dict[str, Any], documents: int, length: int, way: str, dtype: torch.dtype, device: str
) -> Contest:
    heads, kv_heads, dim = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    entries: dict[str, Entry] = {}
    qkv = torch.empty(0)
    generator = torch.Generator(device).manual_seed(1)
    dout = torch.randn(documents * length, heads, dim, generator=generator, device=device).to(dtype)
    for name, leaves, attend in attentions(config, [length] * documents, dtype, device):
        if name == OWN:
            qkv = leaves[0].detach()
        try:
            entries[name] = attention_entry(leaves, attend, laid_out(dout, name, length), dim, way)
        except (ImportError, RuntimeError):
            # This one is not for this torch, GPU or head_dim.
            continue
    # Two products of 2 D operations for each score; those above the diagonal, half of them, are not needed. Backward
    # needs five.
    flops = 2 * documents * heads * dim * length**2
    scores: list[Score] = []
    if way == "both":
        scores.append(times_of("attention, cuDNN", CUDNN))
        if length <= SHORT:
            scores.append(faster_than("attention, varlen_attn", VARLEN))
    return Contest(
        f"attention {way}",
        f"{documents}x{length}, {heads}/{kv_heads} heads of {dim}",
        entries,
        partial(exact_attention, qkv, dout, documents, heads, kv_heads, way),
        flops={"forward": flops, "backward": 5 * flops // 2, "both": 7 * flops // 2}[way],
        scores=tuple(scores),
    )


def attention_entry(leaves: list[Tensor], attend: Callable[..., Tensor], dout: Tensor, dim: int, way: str) -> Entry:
    """One implementation with its own layout; its results as the packed stream has them."""
    plain = [leaf.detach() for leaf in leaves]
    kept = attend(*leaves)

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(*plain)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(kept, leaves, dout, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout)

    def result() -> list[Tensor]:
        outs = [] if way == "backward" else [packed(forward(), dim)]
        gradients = [] if way == "forward" else [torch.cat([packed(part, dim) for part in backward()], dim=1)]
        return outs + gradients

    run = {"forward": forward, "backward": backward, "both": both}[way]
    # Whatever it cannot do, it says here and not while it is timed.
    run()
    return Entry(run, result)


def laid_out(dout: Tensor, name: str, length: int) -> Tensor:
    """The output's gradient [T, heads, D] as an implementation of `attentions` has its output."""
    if name == OWN:
        return dout.flatten(1)
    return dout if name == VARLEN else dout.unflatten(0, (-1, length)).transpose(1, 2).contiguous()


def packed(found: Tensor, dim: int) -> Tensor:
    """[T, heads, D] from [documents, heads, length, D], or from [T, heads * D]."""
    if found.dim() == 4:
        return found.transpose(1, 2).flatten(0, 1)
    return found.view(len(found), -1, dim)


def exact_attention(qkv: Tensor, dout: Tensor, documents: int, heads: int, kv_heads: int, way: str) -> list[Tensor]:
    """The output and the gradient of qkv in float32, a key head and a document at a time."""
    group, out, grad = heads // kv_heads, torch.zeros_like(dout), torch.zeros_like(qkv)
    for tokens in torch.arange(qkv.shape[0], device=qkv.device).chunk(documents):
        rows = slice(int(tokens[0]), int(tokens[-1]) + 1)
        hidden = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=qkv.device).triu(1)
        for key in range(kv_heads):
            queries, keys, values = slice(key * group, (key + 1) * group), heads + key, heads + kv_heads + key
            parts: tuple[Any, ...] = (queries, keys, values)
            q, k, v = (qkv[rows, part].float().requires_grad_() for part in parts)
            scores = torch.einsum("qhd,kd->hqk", q, k) * qkv.shape[-1] ** -0.5
            result = torch.einsum("hqk,kd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
            out[rows, queries] = result.detach().to(out.dtype)
            if way != "forward":
                upstream = dout[rows, queries].float()
                found = torch.autograd.grad(result, (q, k, v), upstream)
                for part, gradient in zip(parts, found, strict=True):
                    grad[rows, part] = gradient.to(grad.dtype)
    return [*([] if way == "backward" else [out]), *([] if way == "forward" else [grad])]
