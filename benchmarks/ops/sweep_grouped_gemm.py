"""Find tiles for the grouped products on this GPU: python -m benchmarks.ops.sweep_grouped_gemm [--only "qwen3 up nf4"]

For Mixtral 8x7B's and Qwen3-30B-A3B's projections, dense and NF4, both directions and several numbers of rows for each
expert, it times a list of tiles (bfloat16, LoRA of rank 16 included) beside `product_tile`'s own and, for NF4, beside
expanding all experts first. A failing tile is only counted. The table comes last; what it says belongs in
`product_tile` and `NF4_IN_LOOP_ROWS`.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from triton.testing import do_bench

from slothcore.kernels import nf4
from slothcore.kernels.gpu import device_capability
from slothcore.kernels.grouped_gemm import ProductTile, grouped_input_grad, grouped_linear, product_tile
from slothcore.kernels.nf4_experts import Nf4Experts, nf4_experts_dequantize

SHAPES = {"mixtral up": (8, 14336, 4096), "mixtral down": (8, 4096, 14336), "qwen3 up": (128, 768, 2048)}
ROWS_PER_EXPERT = (4, 64, 512)
RANK = 16
SECONDS = 200.0
"""All in all; when it is spent, the remaining tiles are skipped and counted."""


def tiles(rows: int) -> list[ProductTile]:
    """Tiles worth a try for so many rows of each expert."""
    heights = [h for h in (16, 32, 64, 128, 256) if h <= max(16, 2 * rows)][-2:]
    inner = (64, 128) if rows <= 16 else (64,)
    choices = itertools.product(heights, (64, 128, 256), inner, (4, 8), (3, 4))
    return [
        ProductTile(*choice)
        for choice in choices
        if choice[0] * choice[1] <= 32768  # float32 sums in registers
        and (choice[0] + choice[1]) * choice[2] * 2 * choice[4] <= 220 * 1024
        and (choice[3] == 8) == (choice[0] * choice[1] >= 128 * 128)
    ]


def milliseconds(run: Callable[[], object]) -> float:
    """Median time; the level-2 cache is emptied before each repetition."""
    return do_bench(run, warmup=3, rep=12, return_mode="median")


def operands(shape: tuple[int, int, int], *, is_nf4: bool) -> tuple[Tensor | Nf4Experts, Tensor, Tensor]:
    """The weight with its LoRA factors B and A."""
    experts, n, k = shape
    parts = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(experts)]
    weight = Nf4Experts.stack([nf4.nf4_quantize(part) for part in parts]) if is_nf4 else torch.stack(parts)
    B, A = (torch.randn(experts, *size, device="cuda", dtype=torch.bfloat16) for size in ((n, RANK), (RANK, k)))
    return weight, B, A


class Sweep:
    """Times tiles until the time is spent."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.timed = self.failed = self.skipped = 0
        self.first_failure = ""

    def best(self, run: Callable[[ProductTile], object], candidates: list[ProductTile]) -> tuple[float, str]:
        """The shortest time and its tile."""
        found = (float("inf"), "none")
        for tile in candidates:
            if time.monotonic() - self.started > SECONDS:
                self.skipped += 1
                continue
            try:
                found = min(found, (milliseconds(lambda tile=tile: run(tile)), str(tuple(tile))))
                self.timed += 1
            except Exception as error:  # any kind: compilation, resources, launch
                self.failed += 1
                self.first_failure = self.first_failure or f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return found


def line(
    label: str, weight: Tensor | Nf4Experts, B: Tensor, A: Tensor, rows_per_expert: int, sweep: Sweep, *, backward: bool
) -> str:
    """One line of the table."""
    experts, n, k = weight.shape
    rows, inner, columns = rows_per_expert * experts, n if backward else k, k if backward else n
    left = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    lora = torch.randn(rows, RANK, device="cuda", dtype=torch.bfloat16)
    offsets = torch.arange(experts + 1, dtype=torch.int32, device="cuda") * rows_per_expert

    def run(weight: Tensor | Nf4Experts, tile: ProductTile | None) -> Tensor:
        if backward:
            return grouped_input_grad(left, weight, offsets, lora_dy=lora, lora_A=A, _tile=tile)
        return grouped_linear(left, weight, offsets, lora_x=lora, lora_B=B, _tile=tile)

    is_nf4 = isinstance(weight, Nf4Experts)
    own = product_tile(min(256, max(16, rows_per_expert)), columns, 2, is_nf4, device_capability(left.device))
    default = milliseconds(lambda: run(weight, own))
    expanded = "-"
    if isinstance(weight, Nf4Experts):
        dense = milliseconds(lambda: run(nf4_experts_dequantize(weight, dtype=torch.bfloat16), None))
        expanded = f"{dense:.3f}"
    time_ms, tile = sweep.best(lambda tile: run(weight, tile), tiles(rows_per_expert))
    rate = 2 * rows * n * k / min(time_ms, default) / 1e9
    return (
        f"{label:32} {rows_per_expert:5} {time_ms:8.3f} {default:8.3f} {expanded:>8} {rate:7.0f}  {tile}, {tuple(own)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="only projections whose label contains it")
    only = parser.parse_args().only
    sweep, lines = Sweep(), []
    for is_nf4, (name, shape) in itertools.product((False, True), SHAPES.items()):
        labels = {b: f"{name} {'nf4' if is_nf4 else 'dense'} {'backward' if b else 'forward'}" for b in (False, True)}
        wanted = {backward: label for backward, label in labels.items() if only in label}
        if not wanted:
            continue
        weight, B, A = operands(shape, is_nf4=is_nf4)
        for (backward, label), rows in itertools.product(wanted.items(), ROWS_PER_EXPERT):
            lines.append(line(label, weight, B, A, rows, sweep, backward=backward))
            print(f"{time.monotonic() - sweep.started:6.1f} s  {lines[-1]}", flush=True)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}; milliseconds, rows of each expert")
    print(
        f"{'projection':32} {'rows':>5} {'best':>8} {'default':>8} {'expanded':>8} {'TF/s':>7}  best tile, default tile"
    )
    print("\n".join(lines))
    print(
        f"{sweep.timed} timed, {sweep.failed} failed, {sweep.skipped} skipped for lack of time; {sweep.first_failure}"
    )


if __name__ == "__main__":
    main()
