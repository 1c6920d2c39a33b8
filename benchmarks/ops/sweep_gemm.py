"""Where does the LoRA matrix product belong? Times every way to compute it on one GPU, and checks each result.

    python -m benchmarks.ops.sweep_gemm

For the linear shapes of Llama-3.1-8B, forward (x W^T + u B^T) and input gradient (dy W + v A), in bfloat16:
    matmul   the product without LoRA, the yardstick: 1.00
    +addmm   torch.matmul and a separate addmm_ for the LoRA term
    wide     cuBLAS with the LoRA factors as extra columns of K, operands joined beforehand (not counted)
    tiles    `lora_gemm` with each tile shape, rows x columns x inner / warps / stages
The last table holds microseconds of the yardstick and ratios to it, lower is better. A star marks the path that
`choose_tile` takes ("+addmm" or a tile); "wrong" a result further from float32 than twice the error of +addmm;
"-" a tile that does not compile or launch, which is reported above the table.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.testing import do_bench

from slothcore.kernels.lora_gemm import HOPPER_TILE, Tile, choose_tile, linear_add, linear_input_grad

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
"""(out_features, in_features): q/k/v joined, o, gate/up joined, down."""

RANKS = (16, 32, 48)

TILES = (
    HOPPER_TILE,
    Tile(128, 256, 64, warps=8, stages=4),
    Tile(256, 128, 64, warps=8, stages=3),
    Tile(128, 128, 64, warps=4, stages=4),
    Tile(128, 128, 64, warps=8, stages=4),
    Tile(64, 256, 64, warps=4, stages=4),
)


@dataclass(frozen=True)
class Product:
    """One matrix product with a LoRA term: left @ right + lora_left @ lora_right.

    In the forward direction `weight` and `lora_weight` are stored transposed, as nn.Linear stores them.
    """

    forward: bool
    left: Tensor
    weight: Tensor
    lora_left: Tensor
    lora_weight: Tensor

    @staticmethod
    def random(forward: bool, rows: int, out_features: int, in_features: int, rank: int) -> "Product":
        inner, columns = (in_features, out_features) if forward else (out_features, in_features)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        return Product(
            forward=forward,
            left=normal(rows, inner),
            weight=normal(out_features, in_features) / inner**0.5,
            lora_left=normal(rows, rank),
            lora_weight=(normal(columns, rank) if forward else normal(rank, columns)) / rank**0.5,
        )

    def plain(self) -> Tensor:
        return self.left @ (self.weight.t() if self.forward else self.weight)

    def with_lora(self, path: Tile | str) -> Tensor:
        if self.forward:
            return linear_add(self.left, self.weight, lora_x=self.lora_left, lora_B=self.lora_weight, _path=path)
        return linear_input_grad(self.left, self.weight, lora_dy=self.lora_left, lora_A=self.lora_weight, _path=path)

    def wide(self) -> Callable[[], Tensor]:
        """cuBLAS over the joined operands, padded to 64 columns as its kernels like."""
        rank = self.lora_left.shape[1]
        padding = self.lora_left.new_zeros(self.left.shape[0], -rank % 64)
        left = torch.cat([self.left, self.lora_left, padding], dim=1)
        axis = 1 if self.forward else 0
        shape = list(self.lora_weight.shape)
        shape[axis] = -rank % 64
        weight = torch.cat([self.weight, self.lora_weight, self.weight.new_zeros(shape)], dim=axis)
        return lambda: left @ (weight.t() if self.forward else weight)

    def exact(self) -> Tensor:
        left, weight, lora_left, lora_weight = (
            t.float() for t in (self.left, self.weight, self.lora_left, self.lora_weight)
        )
        if self.forward:
            return left @ weight.t() + lora_left @ lora_weight.t()
        return left @ weight + lora_left @ lora_weight


def microseconds(function: Callable[[], Tensor]) -> float:
    return 1e3 * do_bench(function, warmup=5, rep=25, return_mode="median")


def tile_name(tile: Tile) -> str:
    return f"{tile.rows}x{tile.columns}x{tile.inner}/{tile.warps}/{tile.stages}"


def measure(product: Product, yardstick: float, tiles: tuple[Tile, ...], failed: set[Tile]) -> list[str]:
    """One table row: the ratio to the yardstick of every path."""
    exact = product.exact()
    budget = 2 * error(product.with_lora("matmul"), exact)
    properties = torch.cuda.get_device_properties(0)
    chosen = choose_tile(
        *exact.shape,
        dtype=product.left.dtype,
        capability_major=properties.major,
        multiprocessors=properties.multi_processor_count,
    )

    def cell(function: Callable[[], Tensor], star: bool) -> str:
        if not error(function(), exact) <= budget:
            return "wrong"
        return f"{microseconds(function) / yardstick:.2f}" + ("*" if star else "")

    cells = [cell(lambda: product.with_lora("matmul"), chosen is None), cell(product.wide(), False)]
    for tile in TILES:
        if tile not in tiles or tile in failed:
            cells.append("-" if tile in failed else "")
            continue
        try:
            cells.append(cell(lambda tile=tile: product.with_lora(tile), tile == chosen))
        except Exception as problem:  # a sweep reports what does not work and goes on
            failed.add(tile)
            print(f"{tile_name(tile)} failed: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
            cells.append("-")
    return cells


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.float() - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 2048, 8192], help="numbers of tokens")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("sweep_gemm needs a CUDA GPU")

    torch.manual_seed(0)
    failed: set[Tile] = set()
    table = [["what", "M", "N x K", "R", "matmul us", "+addmm", "wide", *map(tile_name, TILES)]]
    for forward in (True, False):
        for rows in arguments.rows:
            for out_features, in_features in SHAPES:
                for rank in RANKS:
                    product = Product.random(forward, rows, out_features, in_features, rank)
                    # Every tile shape at the first rank; beyond it only how the chosen one grows with the rank.
                    tiles = TILES if rank == RANKS[0] else TILES[:1]
                    yardstick = microseconds(product.plain)
                    what, shape = "y" if forward else "dx", f"{out_features}x{in_features}"
                    cells = measure(product, yardstick, tiles, failed)
                    table.append([what, str(rows), shape, str(rank), f"{yardstick:.0f}", *cells])
        print(f"{'forward' if forward else 'input gradient'} measured", flush=True)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
