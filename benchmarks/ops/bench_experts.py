"""Time routed experts, forward and backward, beside a loop over the experts. Needs a CUDA GPU.

    python benchmarks/ops/bench_experts.py [--tokens 8192 64] [--only mixtral] [--out DIR]

Both sides compute one mixture-of-experts feed-forward with LoRA on every projection and gradients of x, the router's
weights and the factors. The loop is torch's: per expert it picks its tokens, multiplies by cuBLAS (an NF4 weight is
expanded by our kernel, again in backward) and adds its output to theirs. Results are compared first; the figures of a
case whose result is wrong are refused, and the exit status is 1. The floor of a case is the time of its arithmetic at
the speed of a large product, or of reading its weights at that of a copy, whichever is longer.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.ops.bench_ops import measure, measure_machine, wrong_result
from benchmarks.ops.case import OpCase
from slothcore.autograd.experts import ExpertProjection, expert_mlp
from slothcore.kernels import nf4, nf4_eager
from slothcore.kernels.nf4_experts import Nf4Experts

LORA_RANK = 16


@dataclass(frozen=True)
class ExpertShape:
    """One model's routed feed-forward."""

    experts: int
    experts_per_token: int
    hidden_size: int
    intermediate_size: int


SHAPES = {
    "mixtral-8x7b": ExpertShape(8, 2, 4096, 14336),
    "qwen3-30b-a3b": ExpertShape(128, 8, 2048, 768),
}


class FrozenLinear(torch.autograd.Function):
    """x W^T for one expert's frozen weight; NF4 is expanded here and once more in backward, never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | Nf4Experts, expert: int) -> Tensor:
        ctx.weight, ctx.expert = weight, expert
        return F.linear(x, dense(weight, expert, x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy @ dense(ctx.weight, ctx.expert, dy.dtype), None, None


def dense(weight: Tensor | Nf4Experts, expert: int, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Tensor):
        return weight[expert]
    ops = nf4 if weight.device.type == "cuda" else nf4_eager
    return ops.nf4_dequantize(weight.expert(expert), dtype=dtype)


def loop_linear(x: Tensor, projection: ExpertProjection, expert: int) -> Tensor:
    A, B = projection.lora_A[expert].to(x.dtype), projection.lora_B[expert].to(x.dtype)
    y = FrozenLinear.apply(x, projection.weight, expert)
    return y + projection.scaling * F.linear(F.linear(x, A), B)


def loop(x: Tensor, ids: Tensor, weights: Tensor, projections: list[ExpertProjection]) -> Tensor:
    """The feed-forward, one expert after the other."""
    gate, up, down = projections
    y = torch.zeros_like(x)
    for expert in range(gate.weight.shape[0]):
        token, choice = torch.where(ids == expert)
        if token.numel() == 0:
            continue
        chosen = x[token]
        hidden = F.silu(loop_linear(chosen, gate, expert)) * loop_linear(chosen, up, expert)
        y = y.index_add(0, token, loop_linear(hidden, down, expert) * weights[token, choice, None])
    return y


def random_projection(
    experts: int, out_features: int, in_features: int, *, is_nf4: bool, dtype: torch.dtype, device: str
) -> ExpertProjection:
    def expert() -> Tensor:
        return torch.randn(out_features, in_features, device=device, dtype=dtype).mul_(in_features**-0.5)

    weight: Tensor | Nf4Experts
    if is_nf4:
        quantize = (nf4 if device == "cuda" else nf4_eager).nf4_quantize
        weight = Nf4Experts.stack([quantize(expert()) for _ in range(experts)])
    else:
        weight = torch.empty(experts, out_features, in_features, device=device, dtype=dtype)
        for place in weight:
            place.copy_(expert())
    lora_A = torch.randn(experts, LORA_RANK, in_features, device=device) * in_features**-0.5
    lora_B = torch.randn(experts, out_features, LORA_RANK, device=device) * 0.1
    return ExpertProjection(weight, lora_A.requires_grad_(), lora_B.requires_grad_())


def cases(
    name: str, shape: ExpertShape, tokens: list[int], *, is_nf4: bool, dtype: torch.dtype, device: str
) -> Iterator[OpCase]:
    """Forward and backward at each number of tokens, over the same random experts."""
    experts, k, hidden, width = shape.experts, shape.experts_per_token, shape.hidden_size, shape.intermediate_size
    sizes = ((width, hidden), (width, hidden), (hidden, width))
    projections = [random_projection(experts, *size, is_nf4=is_nf4, dtype=dtype, device=device) for size in sizes]
    for count in tokens:
        label = f"{name} {count} {'nf4' if is_nf4 else str(dtype).removeprefix('torch.')}"
        yield from cases_of(label, projections, count, k, dtype=dtype, device=device)


def cases_of(
    label: str, projections: list[ExpertProjection], tokens: int, k: int, *, dtype: torch.dtype, device: str
) -> Iterator[OpCase]:
    experts, width, hidden = projections[0].weight.shape
    # A router that has learnt nothing: every expert equally likely, the counts as uneven as chance makes them.
    weights, ids = torch.rand(tokens, experts, device=device).topk(k)
    weights = (weights / weights.sum(-1, keepdim=True)).to(dtype).requires_grad_()
    x = torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_()
    dy = torch.randn(tokens, hidden, device=device).to(dtype)
    leaves = (x, weights, *(t for p in projections for t in (p.lora_A, p.lora_B)))

    def ours() -> Tensor:
        # Backward is timed again and again over one forward pass, so it must not overwrite what that kept.
        return expert_mlp(x, ids, weights, *projections, activation="silu", inplace=False)

    def peer() -> Tensor:
        return loop(x, ids, weights, projections)

    def backward(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, leaves, dy, retain_graph=True)

    flops = 2 * tokens * k * 3 * hidden * width
    used = len(torch.unique(ids)) / experts
    weight_bytes = int(used * sum(p.weight.nbytes for p in projections))
    common = {"peer_name": "loop over experts", "bytes": weight_bytes, "flops": flops}
    yield OpCase("experts forward", label, ours, lambda: [(ours(), peer())], peer=peer, **common)
    # The graphs are made when first asked for, and freed with this generator.
    our_output, peer_output = cache(ours), cache(peer)
    yield OpCase(
        "experts backward",
        label,
        lambda: backward(our_output()),
        lambda: list(zip(backward(our_output()), backward(peer_output()), strict=True)),
        peer=lambda: backward(peer_output()),
        **common,
    )


def main(argv: list[str] | None = None) -> int:
    """Check, time, print, record. Returns: the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 64], metavar="N")
    parser.add_argument("--only", default="", metavar="TEXT", help="only models whose name contains it")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, metavar="DIR", help="folder of the CSV")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")

    torch.manual_seed(0)
    machine = measure_machine()
    lines, records, refusals = [], [], []
    for name, shape in SHAPES.items():
        for is_nf4 in (True, False):
            if args.only not in name:
                continue
            for case in cases(name, shape, args.tokens, is_nf4=is_nf4, dtype=torch.bfloat16, device="cuda"):
                if problem := wrong_result(case):
                    refusals.append(f"{case.op} {case.shape}: {problem}")
                    lines.append([case.op, case.shape, *["-"] * 4, case.peer_name, "-", "refused"])
                    continue
                torch.cuda.reset_peak_memory_stats()
                case.run()
                peak = {"peak_gib": f"{torch.cuda.max_memory_allocated() / 2**30:.4g}"}
                line, (ours, peer) = measure(case, machine)
                lines.append(line)
                records += [ours | peak, peer]
                print(" ".join(line), flush=True)

    about = harness.environment()
    where = "" if refusals else f"appended to {harness.append_csv(args.out, records)}"
    print(
        f"\n{about['gpu']}, torch {about['torch']}, triton {about['triton']}, {about['date']}, "
        f"commit {about['commit']}; copy {machine.bytes_per_ms / 1e6:,.0f} GB/s, "
        f"product {machine.flops_per_ms / 1e9:,.0f} TF/s; LoRA rank {LORA_RANK}; {where}\n"
    )
    header = ["operation", "model, tokens, weights", "ms", "GB/s", "TF/s", "of floor", "peer", "peer ms", "x faster"]
    print(harness.format_table(header, lines))
    print("\n".join(["", *refusals]) if refusals else "")
    return int(bool(refusals))


if __name__ == "__main__":
    sys.exit(main())
