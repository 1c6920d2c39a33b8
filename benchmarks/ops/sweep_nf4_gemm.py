"""Find launch configurations for the NF4 kernels on this GPU: python -m benchmarks.ops.sweep_nf4_gemm

For each number of rows and each shape it times nf4_linear (LoRA of rank 16 included) under a list of configurations
beside three yardsticks: nf4_dequantize then F.linear (the other way to do the same), bare bfloat16 F.linear, and the
time that 3.0 TB/s needs to read the 4-bit weight. A wrong or failing configuration is only counted.
The table comes last; what it says belongs in `linear_config` and `DequantizeConfig`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.testing import do_bench

from slothcore.kernels import nf4
from slothcore.kernels.nf4_gemm import LinearConfig, can_permute, linear_config, nf4_linear
from slothcore.kernels.nf4_tensor import Nf4Tensor

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # (out_features, in_features)
ROWS = (1, 4, 16, 32, 64, 128, 256, 512)
RANK = 16
BANDWIDTH = 3.0e12
SECONDS = 140.0
"""All in all; when it is spent, the remaining configurations are skipped and counted."""

DEQUANTIZE_LAUNCHES: dict[nf4.Decode, tuple[tuple[int, int], ...]] = {  # (blocks, warps)
    "gather": ((32, 8), (64, 8), (32, 4), (64, 4), (128, 8), (16, 4), (128, 4)),
    "load": ((32, 8), (64, 8), (32, 4)),
    "select": ((32, 8), (64, 8)),
}
DEQUANTIZE_CONFIGS = [
    nf4.DequantizeConfig(blocks=blocks, num_warps=num_warps, decode=decode)
    for decode, launches in DEQUANTIZE_LAUNCHES.items()
    for blocks, num_warps in launches
]


def registers(tokens: int, rows: int, *, slices: int = 1, warps: int = 4, **options: Any) -> LinearConfig:
    """A tile of the kernel that decodes into registers."""
    return LinearConfig(tokens, rows, 1, num_warps=warps, kernel="registers", slices=slices, **options)


PERMUTE_TILES = (  # with the numbers of parts to cut the columns into
    (registers(16, 64), (1, 2, 4, 8)),
    (registers(16, 64, prefetch=True), (1, 2, 3, 4, 8)),
    (registers(16, 64, prefetch=True, max_registers=96), (2, 4, 8)),
    (registers(8, 32, slices=2), (1, 2, 4)),
    (registers(8, 32, slices=2, prefetch=True), (1, 2, 4)),
    (registers(4, 16, slices=4), (1, 2)),
    (registers(4, 16, slices=4, prefetch=True), (1, 2)),
    (registers(2, 8, slices=8), (1,)),
    (registers(2, 8, slices=8, prefetch=True), (1,)),
    (registers(1, 4, slices=16), (1,)),
    (registers(32, 64), (1, 2, 4, 8)),
    (registers(32, 64, prefetch=True), (1, 2, 4, 8)),
    (registers(32, 128, warps=8, prefetch=True), (1, 2, 4, 8)),
    (registers(64, 64), (1, 2, 4, 8)),
    (registers(64, 64, prefetch=True), (1, 2, 4, 8)),
    (registers(64, 128, warps=8, max_registers=128), (1, 2, 4, 8)),
    (registers(64, 128, warps=8, prefetch=True, max_registers=128), (1, 2, 4, 8)),
    (registers(128, 128, warps=8), (1, 2, 4, 8)),
    (registers(128, 128, warps=8, prefetch=True), (1, 2, 4, 8)),
)


def permute_configs(rows: int) -> list[tuple[LinearConfig, tuple[int, ...]]]:
    """Configurations of the kernel that decodes by permutes, each with the numbers of parts to cut the columns into."""
    tokens = min(max(16, triton.next_power_of_2(rows)), 128)
    return [
        (tile, parts)
        for tile, parts in PERMUTE_TILES
        if tile.block_m * tile.slices == tokens and min(rows, tokens) <= tile.block_m
    ]


def table_configs(rows: int) -> list[tuple[LinearConfig, tuple[int, ...]]]:
    """Configurations of the kernels that decode by a table, each with the numbers of parts to cut the columns into."""
    if rows == 1:
        tiles = [
            (1, 16, 4, 4, 3),
            (1, 8, 4, 4, 3),
            (1, 16, 2, 4, 4),
            (1, 16, 4, 4, 1),
            (1, 32, 2, 4, 3),
            (1, 8, 8, 4, 2),
        ]
        parts: tuple[int, ...] = (1, 2, 4)
    elif rows <= 16:
        tiles = [(16, 64, 1, 4, 4), (16, 64, 2, 4, 3), (16, 128, 1, 4, 4), (16, 128, 2, 8, 3), (16, 64, 4, 4, 2)]
        parts = (1, 2, 4, 8, 16)
    elif rows <= 64:
        tiles = [(64, 64, 1, 4, 4), (64, 128, 1, 4, 4), (64, 64, 2, 4, 3), (64, 128, 2, 8, 3)]
        parts = (1, 2, 4, 8)
    else:
        tiles = [(128, 128, 1, 8, 3), (256, 128, 1, 8, 3), (128, 64, 1, 4, 3), (64, 128, 1, 4, 4)]
        parts = (1, 2, 4)
    configs = [
        LinearConfig(block_m=m, block_n=n, parts=1, step=step, num_warps=warps, num_stages=stages)
        for m, n, step, warps, stages in tiles
    ]
    # A load that feeds a dot product is prefetched like any other, table or not; one stage keeps it out of that.
    others = [replace(configs[0], decode="select"), replace(configs[0], decode="load", num_stages=1)]
    return [(config, parts) for config in (*configs, *others)]


@dataclass
class Tally:
    """What became of the configurations."""

    started: float = field(default_factory=time.monotonic)
    timed: int = 0
    wrong: int = 0
    failed: int = 0
    skipped: int = 0
    first_failure: str = ""

    @property
    def spent(self) -> bool:
        return time.monotonic() - self.started > SECONDS

    def time(self, run: Callable[[], Tensor], correct: Callable[[Tensor], bool]) -> float | None:
        """Median milliseconds of `run`, or None if it fails, errs, or no time is left."""
        if self.spent:
            self.skipped += 1
            return None
        try:
            if not correct(run()):
                self.wrong += 1
                return None
            elapsed = milliseconds(run)
        except Exception as error:  # any kind: compilation, resources, launch
            self.failed += 1
            self.first_failure = self.first_failure or f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return None
        self.timed += 1
        return elapsed


def milliseconds(run: Callable[[], object]) -> float:
    """Median time. The level-2 cache is emptied before each repetition: a layer finds it full of other weights."""
    return do_bench(run, warmup=3, rep=15, return_mode="median")


def describe(config: LinearConfig) -> str:
    if config.kernel == "table":
        options = f"step{config.step} s{config.num_stages} {config.decode}"
    else:
        limit = "" if config.max_registers is None else f" registers{config.max_registers}"
        options = f"slices{config.slices}{' prefetch' * config.prefetch}{limit}"
    return f"{config.kernel} m{config.block_m} n{config.block_n} parts{config.parts} w{config.num_warps} {options}"


def make_weight(out_features: int, in_features: int) -> Nf4Tensor:
    dense = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) * 0.02
    return nf4.nf4_quantize(dense)


def sweep_dequantize(tally: Tally) -> list[str]:
    """GB/s (bytes read and written) of nf4_dequantize to bfloat16, best first for each shape."""
    lines = ["nf4_dequantize to bfloat16, GB/s (blocks x warps decode)"]
    for shape in SHAPES:
        weight = make_weight(*shape)
        out = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        moved = weight.nbytes + out.nbytes
        expected = nf4.nf4_dequantize(weight, dtype=torch.bfloat16)
        results = []
        for config in DEQUANTIZE_CONFIGS:
            run = partial(nf4.nf4_dequantize, weight, dtype=torch.bfloat16, out=out, _config=config)
            elapsed = tally.time(run, partial(torch.equal, expected))
            if elapsed is not None:
                results.append((moved / elapsed / 1e6, f"{config.blocks}x{config.num_warps} {config.decode}"))
        best = ", ".join(f"{speed:.0f} ({name})" for speed, name in sorted(results, reverse=True)[:4])
        lines.append(f"  {shape[0]}x{shape[1]}: {best}; bitsandbytes {bitsandbytes_speed(shape, moved)}")
    return lines


def bitsandbytes_speed(shape: tuple[int, int], moved: int) -> str:
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        return "is not installed"
    dense = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
    packed, state = functional.quantize_4bit(dense, compress_statistics=True, quant_type="nf4", blocksize=64)
    return f"{moved / milliseconds(lambda: functional.dequantize_4bit(packed, state)) / 1e6:.0f}"


def sweep_linear(rows: int, shape: tuple[int, int], tally: Tally) -> str:
    """One line of the table: the best configuration, the default one and the yardsticks, in microseconds."""
    out_features, in_features = shape
    weight = make_weight(*shape)
    x = torch.randn(rows, in_features, device="cuda", dtype=torch.bfloat16)
    lora_x = torch.randn(rows, RANK, device="cuda", dtype=torch.bfloat16)
    lora_B = torch.randn(out_features, RANK, device="cuda", dtype=torch.bfloat16) * 0.02
    dense = nf4.nf4_dequantize(weight, dtype=torch.bfloat16)
    exact = x.double() @ dense.double().T + lora_x.double() @ lora_B.double().T
    allowed = 2 * (F.linear(x, dense).addmm_(lora_x, lora_B.T) - exact).abs().max()

    def run(config: LinearConfig) -> Tensor:
        return nf4_linear(x, weight, lora_x=lora_x, lora_B=lora_B, _config=config)

    def time_config(config: LinearConfig) -> float | None:
        return tally.time(lambda: run(config), lambda result: bool((result - exact).abs().max() <= allowed))

    permute = can_permute(x, weight)
    default = linear_config(rows, out_features, in_features, permute=permute)
    default_time = time_config(default)
    results = [] if default_time is None else [(default_time, describe(default))]
    for config, part_counts in permute_configs(rows) if permute else table_configs(rows):
        for parts in part_counts:
            candidate = replace(config, parts=parts)
            elapsed = time_config(candidate)
            if elapsed is not None:
                results.append((elapsed, describe(candidate)))
    best_time, best = min(results, default=(float("nan"), "none"))
    separately = milliseconds(
        lambda: F.linear(x, nf4.nf4_dequantize(weight, dtype=torch.bfloat16)).addmm_(lora_x, lora_B.T)
    )
    bare = milliseconds(lambda: F.linear(x, dense))
    floor = weight.nbytes / BANDWIDTH * 1e3
    shown_default = float("nan") if default_time is None else default_time
    times = "".join(f"{value * 1e3:9.1f}" for value in (best_time, shown_default, separately, bare, floor))
    return f"{rows:5d}  {out_features:5d}x{in_features:<5d}{times}   {best}"


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this sweep needs a CUDA GPU; there is none here")
    torch.manual_seed(0)
    tally = Tally()
    lines = sweep_dequantize(tally)
    lines += ["nf4_linear with LoRA of rank 16, bfloat16, microseconds"]
    lines += [" rows  shape           best  default  deq+mm   linear    floor   best configuration"]
    # One shape after the other within a number of rows, so that a compiled kernel serves all three.
    for rows in ROWS:
        for shape in SHAPES:
            lines.append(sweep_linear(rows, shape, tally))
            print(f"{time.monotonic() - tally.started:6.1f} s  {lines[-1]}", flush=True)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("\n".join(lines))
    print(f"{tally.timed} timed, {tally.wrong} wrong, {tally.failed} failed, {tally.skipped} skipped for lack of time")
    if tally.first_failure:
        print(f"first failure: {tally.first_failure}")


if __name__ == "__main__":
    main()
