"""Time every operation that has a target beside its peers, and say which targets are met. Needs a CUDA GPU.

    python benchmarks/ops/bench_targets.py [--only few,many,memory,head,attention,paths] [--rows 512,2048]
                                             [--out DIR] [--deadline 300]

Groups: `few` NF4 + LoRA product at 1 to 512 rows; `many` the whole LoRA linear over NF4 at 2048 and 8192, forward and
dX, beside a bare product; `memory` norm, rotary positions, gate and decoding beside Liger and torch.compile, as a share
of a copy's speed; `head` the loss with its frozen head beside Liger and cut-cross-entropy; `attention` on packed
documents beside varlen_attn and cuDNN; `paths` the product by each path, by rows and shape, and which one is taken.

Every result is checked before anything is timed; slothcore's own wrong result is refused, and the exit status is 1.
How the times are taken stands in contest.py, the targets in ../targets.py. Each group's table is printed and its rows
are appended to the CSV as soon as it is done, and everything is printed once more at the end.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton

from benchmarks import harness, shapes, targets
from benchmarks.ops.bench_ops import Machine, timings
from benchmarks.ops.contest import OWN, Contest, Outcome, hold, take_turns
from benchmarks.ops.contest_linear import FEW_ROWS, few_rows_contests, many_rows_contests, path_contests
from benchmarks.ops.contest_memory import memory_contests
from benchmarks.ops.contest_model import ATTENTION_CASES, attention_contests, head

GROUPS = ("few", "many", "memory", "head", "attention", "paths")
MANY_ROWS = (2048, 8192)
TABLE_ROWS = (1, 16, 64, 256, 512, 1024, 2048, 8192)
COPY_BYTES = 2**30
PRODUCT_SIZE = 8192
Factory = Callable[[], Contest]


def main(argv: list[str] | None = None) -> int:
    """Check, time, print, record. Returns: the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GROUPS), metavar="GROUPS", help="comma-separated; default: all")
    parser.add_argument(
        "--rows", type=lambda text: tuple(map(int, text.split(","))), metavar="ROWS", help="of few and many, only these"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the CSV; default: benchmarks/results on a GPU"
    )
    parser.add_argument(
        "--deadline", type=float, default=float("inf"), metavar="SECONDS", help="begin nothing after it"
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="very small shapes in float32 on a CPU, to try the machinery; set TRITON_INTERPRET=1",
    )
    args = parser.parse_args(argv)
    groups = args.only.split(",")
    if unknown := set(groups) - set(GROUPS):
        parser.error(f"unknown group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    if args.tiny and not triton.knobs.runtime.interpret:
        parser.error("--tiny runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU; --tiny tries the machinery without one")
    if args.out is None and not args.tiny:
        args.out = harness.RESULTS
    return Bench(args.out, tiny=args.tiny, deadline=args.deadline, rows=args.rows).run(groups)


class Bench:
    """One run over the groups."""

    def __init__(self, out: Path | None, *, tiny: bool, deadline: float, rows: tuple[int, ...] | None = None) -> None:
        self.device = "cpu" if tiny else "cuda"
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.config = shapes.TINY if tiny else shapes.LLAMA_3_1_8B
        self.many_rows = (24, 32) if tiny else MANY_ROWS
        self.rows = rows
        self.table_rows = (1, 16, 32) if tiny else TABLE_ROWS
        self.attention_cases = ((2, 16), (3, 7)) if tiny else ATTENTION_CASES
        tokens = self.many_rows[-1]
        self.shape = shapes.OpShape.of(self.config, tokens=tokens, document_length=tokens // 4)
        self.journal = None if out is None else harness.Journal(out)
        self.begun, self.deadline = time.monotonic(), deadline
        self.failures: list[str] = []
        torch.manual_seed(0)
        self.machine = measure_machine(self.device, tiny=tiny)

    def run(self, groups: Iterable[str]) -> int:
        about = harness.environment()
        heading = (
            f"{about['gpu']}, torch {about['torch']}, triton {about['triton']}, {about['date']}, "
            f"commit {about['commit']}; copy {self.machine.bytes_per_ms / 1e6:,.0f} GB/s, "
            f"product {self.machine.flops_per_ms / 1e9:,.0f} TF/s, {str(self.dtype).removeprefix('torch.')}"
        )
        print(heading, flush=True)
        tables, reached = [heading], []
        for group in groups:
            if group == "paths":
                text = self.paths_table()
            else:
                outcomes = list(self.outcomes(self.contests(group)))
                text = table(outcomes)
                reached += [line for outcome in outcomes for line in verdict_lines(outcome)]
                reached += total_lines(outcomes)
            tables.append(f"{group}, {time.monotonic() - self.begun:.0f} s\n\n{text}")
            print("\n" + tables[-1], flush=True)
        if reached:
            header = ["operation", "shape", "target", "goal", "measured", "verdict"]
            tables.append(f"{targets.heading(about['gpu'])}:\n\n{harness.format_table(header, reached)}")
        print("\n\n".join(["", *tables, *self.failures]), flush=True)
        return int(bool(self.failures))

    def contests(self, group: str) -> Iterator[Factory]:
        where = (self.dtype, self.device)
        if group == "few":
            yield from few_rows_contests(self.shape, *where, rows=self.chosen(FEW_ROWS))
        elif group == "many":
            yield from many_rows_contests(self.shape, *where, rows=self.chosen(self.many_rows))
        elif group == "memory":
            yield from memory_contests(self.shape, *where)
        elif group == "head":
            yield lambda: head(self.shape, *where)
        else:
            yield from attention_contests(self.config, self.attention_cases, *where)

    def chosen(self, rows: tuple[int, ...]) -> tuple[int, ...]:
        """Those of a group's rows that were asked for."""
        return rows if self.rows is None else tuple(count for count in rows if count in self.rows)

    def outcomes(self, factories: Iterable[Factory]) -> Iterator[Outcome]:
        """Each contest held; one that cannot be made is said and passed over."""
        for factory in factories:
            if outcome := self.attempt(factory):
                if outcome.refused:
                    name = f"{outcome.contest.op} {outcome.contest.shape}"
                    self.failures.append(f"refused: {name}: {'; '.join(outcome.problems)}")
                self.record(outcome)
                yield outcome

    def attempt(self, factory: Factory) -> Outcome | None:
        if time.monotonic() - self.begun > self.deadline:
            return None
        try:
            contest = factory()
            return hold(contest, device=self.device, floor_ms=self.floor_ms(contest))
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"failed: {factory}: {type(error).__name__}: {error}"[:400])
            return None
        finally:
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def floor_ms(self, contest: Contest) -> float:
        return max(contest.bytes / self.machine.bytes_per_ms, contest.flops / self.machine.flops_per_ms)

    def record(self, outcome: Outcome) -> None:
        if self.journal is not None:
            self.journal.add(csv_rows(outcome, self.dtype))

    def paths_table(self) -> str:
        """Microseconds of the product by each path; the one that the library takes is marked."""
        header: list[str] = []
        lines = []
        for name, rows, factory in path_contests(self.shape, self.dtype, self.device, rows=self.table_rows):
            taken: list[str] = []
            outcome = self.attempt(partial(paths_of, factory, taken))
            if outcome is None:
                continue
            ways = list(outcome.contest.entries)
            header = header or ["linear", "rows", *ways, "taken", "best over taken"]
            medians = {way: times[0] for way, times in outcome.milliseconds.items()}
            cells = [f"{1e3 * medians[way]:.1f}" if way in medians else "-" for way in ways]
            lost = f"{min(medians.values()) / medians[taken[0]]:.2f}" if taken[0] in medians else "-"
            lines.append([f"{name} {outcome.contest.shape.rpartition(' ')[2]}", str(rows), *cells, taken[0], lost])
        return (
            f"us of a product with LoRA, NF4 weights\n\n{harness.format_table(header, lines)}" if lines else "nothing"
        )


def paths_of(factory: Callable[[], tuple[Contest, str]], taken: list[str]) -> Contest:
    """The contest of the paths; the one that the library takes is put into `taken`."""
    contest, path = factory()
    taken.append(path)
    return contest


def measure_machine(device: str, *, tiny: bool) -> Machine:
    """A copy and a large matrix product, in turns."""
    source = torch.empty(2**16 if tiny else COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 64 if tiny else PRODUCT_SIZE
    left, right = (torch.randn(size, size, device=device).to(torch.float32 if tiny else torch.bfloat16) for _ in "ab")
    times, _ = take_turns({"copy": lambda: target.copy_(source), "product": lambda: left @ right}, device)
    copy_ms, product_ms = (harness.quantiles(times[name])[0] for name in ("copy", "product"))
    return Machine(2 * source.nbytes / copy_ms, 2 * size**3 / product_ms)


def table(outcomes: Iterable[Outcome]) -> str:
    """One line a contest: own time, its share of the floor, and each peer's time over it."""
    lines = []
    for outcome in outcomes:
        contest, times = outcome.contest, outcome.milliseconds
        peers = [
            f"{name} {times[name][0] / times[OWN][0]:.2f}x" if name in times and not outcome.refused else f"{name} -"
            for name in contest.entries
            if name != OWN
        ]
        own = "refused" if outcome.refused else f"{1e3 * times[OWN][0]:,.1f}"
        share = "-" if outcome.refused or not outcome.floor_ms else f"{outcome.floor_ms / times[OWN][0]:.0%}"
        extra = "" if outcome.extra_mib is None else f"{outcome.extra_mib:,.0f} MiB extra"
        remarks = "; ".join([*([extra] if extra else []), *outcome.problems])
        lines.append([contest.op, contest.shape, own, share, ", ".join(peers), remarks])
    return harness.format_table(["operation", "shape", "us", "of floor", "peers' time over it", "remarks"], lines)


def verdict_lines(outcome: Outcome) -> list[list[str]]:
    return [
        [outcome.contest.op, outcome.contest.shape, *judged(target, figure)] for target, figure in outcome.verdicts()
    ]


def judged(target: targets.Target, figure: float | None) -> list[str]:
    measured = "-" if figure is None else targets.quantity(figure, target.unit)
    return [target.what, target.stated, measured, target.verdict(figure)]


def total_lines(outcomes: Iterable[Outcome]) -> list[list[str]]:
    """All linears of a layer together, where each has a target of its own: what a step feels."""
    sums: dict[tuple[str, str, str], list[float]] = {}
    for outcome in outcomes:
        for score in outcome.contest.scores:
            if score.target.startswith("linear, ") and not outcome.refused:
                own, bare = (outcome.milliseconds[name][0] for name in outcome.contest.entries)
                rows = outcome.contest.shape.partition(" ")[0]
                total = sums.setdefault((outcome.contest.op, rows, score.target), [0.0, 0.0])
                total[0] += own
                total[1] += bare
    return [
        [op, f"{rows} of all together", *judged(targets.OPERATIONS[name], own / bare)]
        for (op, rows, name), (own, bare) in sums.items()
    ]


def csv_rows(outcome: Outcome, dtype: torch.dtype) -> list[dict[str, Any]]:
    contest = outcome.contest
    common = {"benchmark": contest.op, "case": contest.shape, "settings": str(dtype).removeprefix("torch.")}
    rows = []
    for name, times in outcome.milliseconds.items():
        row: dict[str, Any] = common | timings(name, times)
        if outcome.floor_ms:
            row["fraction_of_floor"] = f"{outcome.floor_ms / times[0]:.3f}"
            rate = contest.flops / times[0] / 1e9 if contest.flops else contest.bytes / times[0] / 1e6
            row["rate"] = f"{rate:.4g} {'TF/s' if contest.flops else 'GB/s'}"
        if name == OWN and outcome.extra_mib is not None:
            row["peak_gib"] = f"{outcome.extra_mib / 1024:.4g}"
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
