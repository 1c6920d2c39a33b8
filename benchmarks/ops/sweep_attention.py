"""Sweep the tiles of the attention kernels on this GPU over the heads of the models, and set the best beside torch's.

    python -m benchmarks.ops.sweep_attention [--cases TEXT ...] [--dtype bfloat16] [--processes 12]

For each case and each kernel (forward, dq, dk and dv) every candidate is checked against the eager twin in float32 and
timed. First come all rates in TF/s of the products that a kernel does on the visible pairs; a candidate that fails to
compile, does not fit or gives a wrong result shows why instead. Then a table: the candidate in use, the best one, and
how much faster it is; the tables to edit are in `slothcore/kernels/attention_tiles.py`. "copied" marks blocks that the
copy engine fetches. Last come whole passes beside torch's, crediting the backward pass with five products; ours take
cuDNN's forward pass where the rule says so. Processes compile all candidates into Triton's cache side by side before
anything is timed.
"""

import argparse
import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from benchmarks.harness import format_table
from slothcore.kernels import (
    attention,
    attention_backward,
    attention_backward_eager,
    attention_eager,
    attention_tiles,
)
from slothcore.kernels.attention_tiles import Tile

KERNELS = ("forward", "dq", "dkdv")
# Products of scores' size that each kernel really does; the scores and dp are formed in both kernels of the backward
# pass but credited once to the whole.
PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4, "backward": 5}


class Setting(NamedTuple):
    """Heads of a model, and lengths of documents that fill 8192 tokens."""

    num_heads: int
    num_key_heads: int
    head_dim: int
    lengths: tuple[int, ...] = (2048,) * 4
    window: int | None = None
    softcap: float | None = None

    @property
    def group(self) -> int:
        return self.num_heads // self.num_key_heads

    @property
    def pairs(self) -> float:
        """Visible pairs of a query and a key."""
        return sum(n * (n + 1) / 2 - max(0, n - (self.window or n)) ** 2 / 2 for n in self.lengths)

    def flops(self, kernel: str) -> float:
        return PRODUCTS[kernel] * 2 * self.pairs * self.head_dim * self.num_heads


SETTINGS = {
    "D64 32/8": Setting(32, 8, 64),
    "D96 32/32": Setting(32, 32, 96),
    "D128 32/8": Setting(32, 8, 128),
    "D128 32/8 1x8192": Setting(32, 8, 128, (8192,)),
    "D128 32/8 16x512": Setting(32, 8, 128, (512,) * 16),
    "D128 32/8 32x256": Setting(32, 8, 128, (256,) * 32),
    "D128 32/8 68x119": Setting(32, 8, 128, (119,) * 68),
    "D128 32/8 w2048 1x8192": Setting(32, 8, 128, (8192,), 2048),
    "D256 16/8 cap": Setting(16, 8, 256, softcap=50.0),
    "D256 16/8 cap w4096 1x8192": Setting(16, 8, 256, (8192,), 4096, 50.0),
    "D256 8/1": Setting(8, 1, 256),
    "D256 4/1 w512": Setting(4, 1, 256, window=512),
    "D256 4/1 w512 1x8192": Setting(4, 1, 256, (8192,), 512),
}
# Queries, keys, warps, stages.
NARROW_TILES = {
    "forward": [(64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)],
    "dq": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2)],
    "dkdv": [(32, 64, 4, 3), (32, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2)],
}
WIDE_TILES = {
    "forward": [(128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 1)],
    "dq": [(64, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 8, 2), (64, 32, 8, 3), (64, 32, 4, 2)],
    "dkdv": [(32, 64, 8, 2), (32, 64, 8, 1), (64, 64, 8, 2), (64, 64, 8, 1), (16, 64, 8, 2), (64, 32, 8, 2)],
}
# Tiles of dk and of dv in a launch each: those that spill the fewest registers, offline, of all that fit a Hopper.
WIDE_PAIRS = [
    ((32, 128, 8, 2), (32, 128, 8, 2)),
    ((32, 128, 8, 3), (64, 128, 8, 2)),
    ((16, 128, 8, 3), (32, 128, 8, 3)),
    ((32, 128, 8, 2), (64, 128, 8, 2)),
    ((32, 128, 8, 2), (16, 128, 8, 3)),
]


class Candidate(NamedTuple):
    """A tile; for dk and dv also the tile of dv if it has its own launch, and how many programs share a key head.

    copied: the copy engine fetches the blocks.
    """

    tile: Tile
    value_tile: Tile | None = None
    parts: int = 1
    copied: bool = False

    def __str__(self) -> str:
        text = " + ".join("x".join(map(str, tile[:4])) for tile in (self.tile, self.value_tile) if tile)
        text += (" padded" if self.tile.pad else "") + (f" /{self.parts}" if self.parts > 1 else "")
        return text + (" copied" if self.copied else "")


class Job(NamedTuple):
    case: str
    kernel: str
    candidate: Candidate


def in_use(setting: Setting, kernel: str, dtype: torch.dtype) -> Candidate:
    capability = torch.cuda.get_device_capability()
    tiles = attention_tiles.attention_tiles(
        setting.head_dim, dtype, capability, capped=setting.softcap is not None
    )  # fmt: skip
    copied = attention_tiles.copy_engine_from(setting.head_dim, dtype, capability)
    if kernel == "forward":
        return Candidate(tiles.forward, copied=copied is not None and max(setting.lengths) >= copied.forward)
    if kernel == "dq":
        return Candidate(
            tiles.query_gradient, copied=copied is not None and max(setting.lengths) >= copied.query_gradient
        )
    parts = attention_tiles.key_gradient_parts(setting.num_heads, setting.num_key_heads)
    by_engine = copied is not None and max(setting.lengths) >= copied.key_gradient
    return Candidate(tiles.key_gradient, tiles.value_gradient, parts, by_engine)


def candidates(setting: Setting, kernel: str, dtype: torch.dtype) -> list[Candidate]:
    """The candidate in use first."""
    first = in_use(setting, kernel, dtype)
    table = WIDE_TILES if setting.head_dim > 128 else NARROW_TILES
    tiles = [Tile(*numbers) for numbers in table[kernel]]
    if attention_tiles.head_columns(setting.head_dim)[1]:
        tiles += [tile._replace(pad=True) for tile in tiles[:2]]
    parts = [1]
    if kernel == "dkdv":
        parts = [n for n in (1, 2, 4, 8) if n == first.parts or (setting.num_key_heads < 4 and n <= setting.group)]
    pairs: list[tuple[Tile, Tile | None]] = [(tile, None) for tile in tiles]
    if kernel == "dkdv" and table is WIDE_TILES:
        pairs += [(Tile(*dk), Tile(*dv)) for dk, dv in WIDE_PAIRS]
    engine = torch.cuda.get_device_capability() >= (9, 0) and not attention_tiles.head_columns(setting.head_dim)[1]
    ways = (False, True) if engine else (False,)
    rest = [Candidate(*pair, n, copied) for pair in pairs for n in parts for copied in ways]
    return list(dict.fromkeys([first, *rest]))


class Case:
    """Inputs of one setting, and how to launch each kernel on them."""

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.setting = setting
        heads = (setting.num_heads, setting.num_key_heads, setting.num_key_heads)
        tokens, self.longest = sum(setting.lengths), max(setting.lengths)
        qkv = torch.randn(tokens, sum(heads), setting.head_dim, device="cuda", dtype=dtype)
        self.q, self.k, self.v = qkv.split(heads, dim=1)
        self.dout = torch.randn(tokens, setting.num_heads, setting.head_dim, device="cuda", dtype=dtype)
        self.cu_seqlens = torch.tensor([0, *setting.lengths], device="cuda").cumsum(0).int()
        self.scale = setting.head_dim**-0.5
        self.options = {"scale": self.scale, "window": setting.window, "softcap": setting.softcap}
        self.problem = (self.cu_seqlens, self.longest, self.scale, setting.window, setting.softcap)
        self.stats = torch.empty(setting.num_heads, tokens, attention_backward.STATS.value, device="cuda")
        self.dqkv = torch.empty_like(qkv)
        self.out, self.lse = torch.empty_like(self.dout), self.stats.new_zeros(setting.num_heads, tokens)

    def forward(self) -> tuple[Tensor, Tensor]:
        return attention.attention_forward(self.q, self.k, self.v, self.cu_seqlens, self.longest, **self.options)

    def backward(self) -> Tensor:
        return attention_backward.attention_backward(
            self.dout, self.q, self.k, self.v, self.out, self.lse, self.cu_seqlens, self.longest, **self.options
        )

    def launch(self, kernel: str, candidate: Candidate) -> Tensor:
        if kernel == "forward":
            return attention._launch_forward(
                candidate.tile, self.q, self.k, self.v, *self.problem, copied=candidate.copied
            )[0]
        if kernel == "dq":
            attention_backward._launch_query_gradient(
                candidate.tile, self.dout, self.q, self.k, self.v, self.out, self.lse, self.stats, self.dqkv,
                *self.problem, copied=candidate.copied,
            )  # fmt: skip
            return self.dqkv[:, : self.setting.num_heads]
        attention_backward._launch_key_gradient(
            candidate.tile, candidate.value_tile, candidate.parts, self.dout, self.q, self.k, self.v, self.stats,
            self.dqkv, *self.problem, copied=candidate.copied,
        )  # fmt: skip
        return self.dqkv[:, self.setting.num_heads :]

    def references(self) -> dict[str, Tensor]:
        """What each kernel should give, from the eager twin in float32; its out and lse are the backward's inputs."""
        inputs = (self.q.float(), self.k.float(), self.v.float())
        out, lse = attention_eager.attention_forward(*inputs, self.cu_seqlens, self.longest, **self.options)
        dqkv = attention_backward_eager.attention_backward(
            self.dout.float(), *inputs, out, lse, self.cu_seqlens, self.longest, **self.options
        )
        self.out, self.lse = out.to(self.q.dtype), lse
        return {
            "forward": out,
            "dq": dqkv[:, : self.setting.num_heads],
            "dkdv": dqkv[:, self.setting.num_heads :],
        }


def milliseconds(call: Callable[[], object]) -> float:
    return do_bench(call, warmup=5, rep=30, return_mode="median")


def measure(case: Case, kernel: str, candidate: Candidate, reference: Tensor) -> float | str:
    """Milliseconds of one candidate, or in a word why there are none."""
    try:
        result = case.launch(kernel, candidate)
        error = ((result.float() - reference).norm() / reference.norm()).item()
        if not error < 2e-2:
            return f"wrong {error:.0e}"
        return milliseconds(lambda: case.launch(kernel, candidate))
    except Exception as failure:  # whatever a candidate dies of, the others go on
        return type(failure).__name__.removesuffix("Error")


def compile_job(job: Job, dtype: torch.dtype) -> None:
    """In a process of its own: put one kernel into Triton's cache on disk."""
    with contextlib.suppress(Exception):  # the sweep meets the same failure and reports it
        Case(SETTINGS[job.case], dtype).launch(job.kernel, job.candidate)
        torch.cuda.synchronize()


def rates(setting: Setting, forward: float, backward: float) -> str:
    return f"{setting.flops('forward') / forward / 1e9:.0f} / {setting.flops('backward') / backward / 1e9:.0f}"


def torch_rates(case: Case) -> dict[str, str]:
    """Forward and backward TF/s of torch's own attentions on the same inputs, where they can do the same."""
    setting = case.setting

    def measured(make: Callable[[], tuple[Callable[..., Tensor], list[Tensor], Tensor]]) -> str:
        try:
            call, inputs, grad = make()
            forward = milliseconds(lambda: call(*inputs))
            out = call(*inputs)
            backward = milliseconds(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))
        except Exception as failure:  # a backend that this build lacks
            return type(failure).__name__
        return rates(setting, forward, backward)

    def varlen() -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
        from torch.nn.attention.varlen import varlen_attn

        inputs = [x.contiguous().requires_grad_() for x in (case.q, case.k, case.v)]
        bounds = case.cu_seqlens
        call = partial(
            varlen_attn, cu_seq_q=bounds, cu_seq_k=bounds, max_q=case.longest, max_k=case.longest,
            window_size=(-1 if setting.window is None else setting.window - 1, 0),
        )  # fmt: skip
        return call, inputs, case.dout

    def sdpa(backend: SDPBackend) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
        def batched(x: Tensor) -> Tensor:
            return x.unflatten(0, (len(setting.lengths), -1)).transpose(1, 2)

        def call(*inputs: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

        return call, [batched(x).contiguous().requires_grad_() for x in (case.q, case.k, case.v)], batched(case.dout)

    capped, windowed = setting.softcap is not None, setting.window is not None
    return {
        "varlen_attn": "-" if capped else measured(varlen),
        "SDPA flash": "-" if capped or windowed else measured(partial(sdpa, SDPBackend.FLASH_ATTENTION)),
        "SDPA cuDNN": "-" if capped or windowed else measured(partial(sdpa, SDPBackend.CUDNN_ATTENTION)),
    }


def sweep(name: str, dtype: torch.dtype) -> tuple[list[list[str]], list[str]]:
    """Print the rates of every candidate of a case. Returns: rows of the table of tiles, row beside torch."""
    setting = SETTINGS[name]
    case = Case(setting, dtype)
    references = case.references()
    rows = []
    for kernel in KERNELS:
        mine = in_use(setting, kernel, dtype)
        if kernel == "dkdv":
            # It reads the row statistics that the kernel of dq writes; the last candidate's may be wrong.
            case.launch("dq", in_use(setting, "dq", dtype))
        times = {c: measure(case, kernel, c, references[kernel]) for c in candidates(setting, kernel, dtype)}
        measured = {c: t for c, t in times.items() if not isinstance(t, str)}
        cells = [
            f"{c} {f'{setting.flops(kernel) / t / 1e9:.0f}' if not isinstance(t, str) else t}"
            for c, t in sorted(times.items(), key=lambda item: item[1] if not isinstance(item[1], str) else 1e9)
        ]
        print(f"{name}, {kernel}: {', '.join(cells)}", flush=True)
        if mine not in measured:
            rows.append([name, kernel, f"{mine}: {times[mine]}", "-", "-", "-", "-"])
            continue
        best = min(measured, key=measured.__getitem__)
        gain = measured[mine] / measured[best]
        milliseconds_of = [f"{measured[c]:.3f}" for c in (mine, best)]
        rows.append([name, kernel, str(mine), milliseconds_of[0], str(best), milliseconds_of[1], f"{gain:.2f}"])
    del references
    ours = rates(setting, milliseconds(case.forward), milliseconds(case.backward))
    return rows, [name, ours, *torch_rates(case).values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=[""], metavar="TEXT", help="those whose name holds one of these")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1), help="that compile")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    names = [name for name in SETTINGS if any(text in name for text in arguments.cases)]
    if not names:
        parser.error(f"no case holds {arguments.cases}; there are {list(SETTINGS)}")

    started = time.perf_counter()
    jobs = [Job(n, kernel, c) for n in names for kernel in KERNELS for c in candidates(SETTINGS[n], kernel, dtype)]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        pool.map(partial(compile_job, dtype=dtype), jobs, chunksize=1)
    print(f"compiled {len(jobs)} candidates in {time.perf_counter() - started:.0f} s", flush=True)

    tile_rows, pass_rows = [], []
    for name in names:
        rows, pass_row = sweep(name, dtype)
        tile_rows += rows
        pass_rows.append(pass_row)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.perf_counter() - started:.0f} s in all")
    print(f"\n{format_table(['case', 'kernel', 'in use', 'ms', 'best', 'ms', 'times faster'], tile_rows)}")
    header = ["forward / backward TF/s", "slothcore", "varlen_attn", "SDPA flash", "SDPA cuDNN"]
    print(f"\n{format_table(header, pass_rows)}")


if __name__ == "__main__":
    main()
