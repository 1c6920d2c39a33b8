"""Sweep the tiles of the attention kernels on this GPU, and set the best beside torch's.

    python -m benchmarks.ops.sweep_attention [--heads 32 8] [--head-dim 128] [--dtype bfloat16]

For each kernel (forward, dq, dk and dv) and each shape every tile of the list is checked against a reference in
float32 and timed; the table at the end gives TF/s, counting a causal product as half of the full one and five products
for the whole backward pass. A tile that fails to compile, does not fit or gives a wrong result shows why instead.
Processes compile the tiles into Triton's cache side by side before anything is timed.
"""

import argparse
import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from slothcore.kernels import attention, attention_backward
from slothcore.kernels.attention import Tile

SHAPES = {"4x2048": (2048,) * 4, "1x8192": (8192,), "16x512": (512,) * 16, "68x119": (119,) * 68}
# Queries, keys, warps, stages.
TILES = {
    "forward": [
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 8, 4),
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 3), (128, 64, 4, 3),
    ],
    "dq": [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3),
        (64, 32, 4, 3), (64, 128, 8, 2), (64, 64, 8, 3),
    ],
    "dkdv": [
        (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3),
        (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2),
        (64, 128, 16, 2), (128, 128, 16, 2),
    ],
}  # fmt: skip
# Products of scores' size that each kernel really does; the scores and dp are formed in both kernels of the backward
# pass but credited once to the whole.
PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4, "backward": 5}


class Case:
    """Inputs of one shape, and how to launch each kernel on them."""

    def __init__(self, lengths: tuple[int, ...], heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.lengths, self.heads, self.head_dim = lengths, heads, head_dim
        self.tokens, self.longest = sum(lengths), max(lengths)
        qkv = torch.randn(self.tokens, heads[0] + 2 * heads[1], head_dim, device="cuda", dtype=dtype)
        self.q, self.k, self.v = qkv.split((heads[0], heads[1], heads[1]), dim=1)
        self.dout = torch.randn(self.tokens, heads[0], head_dim, device="cuda", dtype=dtype)
        self.cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        self.scale = head_dim**-0.5
        self.problem = (self.cu_seqlens, self.longest, self.scale, None, None)
        self.stats = torch.empty(heads[0], self.tokens, attention_backward.STATS.value, device="cuda")
        self.dqkv = torch.empty_like(qkv)
        self.out, self.lse = self.forward()

    def flops(self, kernel: str) -> float:
        pairs = sum(n * n for n in self.lengths) / 2
        return PRODUCTS[kernel] * 2 * pairs * self.head_dim * self.heads[0]

    def forward(self) -> tuple[Tensor, Tensor]:
        return attention.attention_forward(
            self.q, self.k, self.v, self.cu_seqlens, self.longest, scale=self.scale
        )  # fmt: skip

    def backward(self) -> Tensor:
        return attention_backward.attention_backward(
            self.dout, self.q, self.k, self.v, self.out, self.lse, self.cu_seqlens, self.longest, scale=self.scale
        )

    def launch(self, kernel: str, tile: Tile) -> Tensor:
        if kernel == "forward":
            return attention._launch_forward(tile, self.q, self.k, self.v, *self.problem)[0]
        if kernel == "dq":
            attention_backward._launch_query_gradient(
                tile, self.dout, self.q, self.k, self.v, self.out, self.lse, self.stats, self.dqkv, *self.problem
            )
            return self.dqkv[:, : self.heads[0]]
        attention_backward._launch_key_gradient(
            tile, self.dout, self.q, self.k, self.v, self.stats, self.dqkv, *self.problem
        )
        return self.dqkv[:, self.heads[0] :]

    def references(self) -> dict[str, Tensor]:
        """The results in float32 from torch's plain attention, a key head at a time to stay small."""
        group = self.heads[0] // self.heads[1]
        outs, dqs, dks, dvs = [], [], [], []
        for key_head in range(self.heads[1]):
            mine = slice(key_head * group, (key_head + 1) * group)
            parts = ([], [], [], [])
            start = 0
            for length in self.lengths:
                rows = slice(start, start + length)
                q, k, v = (
                    x[rows, heads].float().transpose(0, 1).requires_grad_()
                    for x, heads in ((self.q, mine), (self.k, [key_head]), (self.v, [key_head]))
                )
                hidden = torch.ones(length, length, device="cuda", dtype=torch.bool).triu(1)
                out = ((q @ k.mT) * self.scale).masked_fill(hidden, float("-inf")).softmax(-1) @ v
                grads = torch.autograd.grad(out, (q, k, v), self.dout[rows, mine].float().transpose(0, 1))
                for part, result in zip(parts, (out.detach(), *grads), strict=True):
                    part.append(result.transpose(0, 1))
                start += length
            for whole, part in zip((outs, dqs, dks, dvs), parts, strict=True):
                whole.append(torch.cat(part))
        out, dq, dk, dv = (torch.cat(x, dim=1) for x in (outs, dqs, dks, dvs))
        return {"forward": out, "dq": dq, "dkdv": torch.cat([dk, dv], dim=1)}


def milliseconds(call: Callable[[], object]) -> float:
    return do_bench(call, warmup=5, rep=30, return_mode="median")


def cell(case: Case, kernel: str, tile: Tile, reference: Tensor) -> str:
    """TF/s of one tile, or in a word why there is none."""
    try:
        result = case.launch(kernel, tile)
        error = ((result.float() - reference).norm() / reference.norm()).item()
        if not error < 2e-2:
            return f"wrong {error:.0e}"
        return f"{case.flops(kernel) / milliseconds(lambda: case.launch(kernel, tile)) / 1e9:.0f}"
    except Exception as failure:  # whatever a tile dies of, the others go on
        return type(failure).__name__.removesuffix("Error")[:10]


def compile_tile(work: tuple[str, tuple[int, ...]], heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    """In a process of its own: put one kernel into Triton's cache on disk."""
    kernel, numbers = work
    with contextlib.suppress(Exception):  # the sweep meets the same failure and reports it
        Case((64, 64), heads, head_dim, dtype).launch(kernel, Tile(*numbers))
        torch.cuda.synchronize()


def torch_rates(case: Case) -> dict[str, str]:
    """Forward and backward TF/s of torch's own attentions on the same inputs."""

    def rates(make: Callable[[], tuple[Callable[..., Tensor], list[Tensor], Tensor]]) -> str:
        try:
            call, inputs, grad = make()
            forward = milliseconds(lambda: call(*inputs))
            out = call(*inputs)
            backward = milliseconds(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))
        except Exception as failure:  # a backend that this build lacks
            return type(failure).__name__
        return f"{case.flops('forward') / forward / 1e9:.0f} / {case.flops('backward') / backward / 1e9:.0f}"

    def varlen() -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
        from torch.nn.attention.varlen import varlen_attn

        inputs = [x.contiguous().requires_grad_() for x in (case.q, case.k, case.v)]
        bounds = case.cu_seqlens
        call = partial(
            varlen_attn, cu_seq_q=bounds, cu_seq_k=bounds, max_q=case.longest, max_k=case.longest, window_size=(-1, 0)
        )
        return call, inputs, case.dout

    def sdpa(backend: SDPBackend) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
        def batched(x: Tensor) -> Tensor:
            return x.unflatten(0, (len(case.lengths), -1)).transpose(1, 2)

        def call(*inputs: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

        return call, [batched(x).contiguous().requires_grad_() for x in (case.q, case.k, case.v)], batched(case.dout)

    return {
        "varlen_attn": rates(varlen),
        "SDPA flash": rates(partial(sdpa, SDPBackend.FLASH_ATTENTION)),
        "SDPA cuDNN": rates(partial(sdpa, SDPBackend.CUDNN_ATTENTION)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("QUERY", "KEY"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1), help="that compile")
    arguments = parser.parse_args()
    setting = (tuple(arguments.heads), arguments.head_dim, getattr(torch, arguments.dtype))

    capability = torch.cuda.get_device_capability()
    started = time.perf_counter()
    work = [(kernel, numbers) for kernel, tiles in TILES.items() for numbers in tiles]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        pool.map(
            partial(compile_tile, heads=setting[0], head_dim=setting[1], dtype=setting[2]), work, chunksize=1
        )  # fmt: skip
    print(f"compiled {len(work)} tiles in {time.perf_counter() - started:.0f} s", flush=True)

    cells: dict[tuple[str, str], dict[str, str]] = {}
    for shape, lengths in SHAPES.items():
        case = Case(lengths, *setting)
        references = case.references()
        # The kernel of dq writes the row statistics that the kernel of dk and dv reads.
        case.launch("dq", attention_backward.query_gradient_tile(setting[1], setting[2], capability))
        for kernel, numbers in work:
            row = cells.setdefault((kernel, "x".join(map(str, numbers))), {})
            row[shape] = cell(case, kernel, Tile(*numbers), references[kernel])
        del references
        forward, backward = milliseconds(case.forward), milliseconds(case.backward)
        cells.setdefault(("forward / backward", "slothcore, as configured"), {})[shape] = (
            f"{case.flops('forward') / forward / 1e9:.0f} / {case.flops('backward') / backward / 1e9:.0f}"
        )
        for name, rates in torch_rates(case).items():
            cells.setdefault(("forward / backward", name), {})[shape] = rates
        print(f"{shape} done at {time.perf_counter() - started:.0f} s", flush=True)

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, heads {setting[0]}, D {setting[1]}, TF/s")
    print(f"{'kernel':20}{'tile q x k x warps x stages':30}" + "".join(f"{shape:>14}" for shape in SHAPES))
    for (kernel, name), row in cells.items():
        print(f"{kernel:20}{name:30}" + "".join(f"{row[shape]:>14}" for shape in SHAPES))


if __name__ == "__main__":
    main()
