"""Time single operations beside a peer and beside the machine's own limit. Needs a CUDA GPU.

    python benchmarks/ops/bench_ops.py [--only attention] [--out DIR]

Every operation is checked first; the figures of one whose result is wrong are refused, and the exit status is 1.
The floor of an operation is what its bytes take at the speed of a plain copy, or its arithmetic at that of a large
matrix product, whichever is longer; both speeds are measured in the same run.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from triton.testing import do_bench

from benchmarks import harness, shapes
from benchmarks.ops.case import OpCase
from benchmarks.ops.cases import all_cases
from tests.numerics import relative_error


@dataclass(frozen=True)
class Machine:
    """Speeds that bound every operation: bytes and floating-point operations per millisecond."""

    bytes_per_ms: float
    flops_per_ms: float

    def floor_ms(self, case: OpCase) -> float:
        return max(case.bytes / self.bytes_per_ms, case.flops / self.flops_per_ms)


def main(argv: list[str] | None = None) -> int:
    """Check, time, print, record. Returns: the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--document-length", type=int, default=2048)
    parser.add_argument("--only", default="", metavar="TEXT", help="only operations whose name contains it")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, metavar="DIR", help="folder of the CSV")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    try:
        shape = shapes.OpShape.of(shapes.LLAMA_3_1_8B, tokens=args.tokens, document_length=args.document_length)
    except ValueError as error:
        parser.error(str(error))

    torch.manual_seed(0)
    machine = measure_machine()
    lines, records, refusals = [], [], []
    for case in all_cases(shape, dtype=torch.bfloat16, device="cuda"):
        if args.only not in case.op:
            continue
        if problem := wrong_result(case):
            refusals.append(f"{case.op} {case.shape}: {problem}")
            lines.append([case.op, case.shape, *["-"] * 4, case.peer_name, "-", "refused"])
            continue
        line, record = measure(case, machine)
        lines.append(line)
        records += record

    about = harness.environment()
    print(
        f"{about['gpu']}, torch {about['torch']}, triton {about['triton']}, {about['date']}, commit {about['commit']}; "
        f"copy {machine.bytes_per_ms / 1e6:,.0f} GB/s, product {machine.flops_per_ms / 1e9:,.0f} TF/s, bfloat16\n"
    )
    header = ["operation", "shape", "ms", "GB/s", "TF/s", "of floor", "peer", "peer ms", "x faster"]
    print(harness.format_table(header, lines))
    print("\n".join(["", *refusals]) if refusals else f"\nappended to {harness.append_csv(args.out, records)}")
    return int(bool(refusals))


def wrong_result(case: OpCase) -> str:
    """What is wrong with the operation's result; empty if nothing is."""
    for number, (ours, expected) in enumerate(case.check()):
        if ours.shape != expected.shape:
            return f"result {number} has shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
        error = relative_error(ours, expected)
        # Written so that NaN is wrong too.
        if not error <= case.tolerance:
            return f"result {number} is off by {error:.2e}, allowed is {case.tolerance:g}"
    return ""


def measure(case: OpCase, machine: Machine) -> tuple[list[str], list[dict[str, Any]]]:
    """The line for the table, and the rows for the CSV."""
    ours, peer = milliseconds(case.run), milliseconds(case.peer)
    fraction = machine.floor_ms(case) / ours[0]
    by_bytes, by_flops = case.bytes / ours[0] / 1e6, case.flops / ours[0] / 1e9
    line = [
        case.op,
        case.shape,
        f"{ours[0]:.3f}",
        f"{by_bytes:,.0f}" if case.bytes else "-",
        f"{by_flops:,.0f}" if case.flops else "-",
        f"{fraction:.0%}",
        case.peer_name,
        f"{peer[0]:.3f}",
        f"{peer[0] / ours[0]:.2f}",
    ]
    rate = f"{by_flops:.4g} TF/s" if case.flops else f"{by_bytes:.4g} GB/s"
    common = {"benchmark": case.op, "case": case.shape, "settings": "bfloat16"}
    return line, [
        common | timings("slothcore", ours) | {"rate": rate, "fraction_of_floor": f"{fraction:.3f}"},
        common | timings(case.peer_name, peer),
    ]


def timings(system: str, values: tuple[float, float, float]) -> dict[str, str]:
    names = ("median_ms", "p20_ms", "p80_ms")
    return {"system": system} | {name: f"{value:.5g}" for name, value in zip(names, values, strict=True)}


def milliseconds(function: Callable[[], object]) -> tuple[float, float, float]:
    """Median, 20% and 80% quantile of the GPU time of a call, with a cold L2 cache."""
    median, low, high = do_bench(function, warmup=20, rep=80, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


def measure_machine() -> Machine:
    """A copy of 1 GiB (read and written) and a product of 8192 x 8192 matrices."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = milliseconds(lambda: target.copy_(source))[0]
    size = 8192
    left, right = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    product_ms = milliseconds(lambda: left @ right)[0]
    return Machine(2 * source.nbytes / copy_ms, 2 * size**3 / product_ms)


if __name__ == "__main__":
    sys.exit(main())
