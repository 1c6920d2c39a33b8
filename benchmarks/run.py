"""Time an optimizer step of slothcore beside its peers and print one table.

    python benchmarks/run.py --cases 4x2048,2x256,alpaca --recompute both --within 7.8,36 --compare
    python benchmarks/run.py --bits 16 --cases 2x4096
    python benchmarks/run.py --growth

Every system loads the same random-weight checkpoint, gets the same LoRA factors and the same tokens, and steps with the
same optimizer, each in a process of its own with a time limit. With --rounds they take turns, and each keeps its best
round: other work on the machine only ever adds time, and most to small cases, which wait for the host. A figure is
refused, and the exit status is 1, unless the first loss agrees with that of transformers and every gradient norm is
finite and above zero. A case that runs out of memory is run once more with recomputation, in a row of its own.
Beside slothcore's time stands the floor of the same step, measured in the same run (see floor.py).
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import chart, checkpoint, compare, harness, report, shapes, worker
from benchmarks.floor import Floor
from benchmarks.peers import MODULES, Settings, installed, variants
from benchmarks.processes import run_module
from benchmarks.report import OWN, Row, believed

# What worker.py calls it; the one problem that is no failure.
OUT_OF_MEMORY = "out of memory"
RECOMPUTE = {"no": [False], "yes": [True], "both": [False, True]}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", help=f"of {', '.join(MODULES)}, comma-separated; default: all installed")
    parser.add_argument(
        "--cases",
        default="4x2048,2x256",
        help="comma-separated: ROWSxLENGTH, or alpaca, 8 sequences of Alpaca's lengths; "
        "with /N, N sequences of the step at a time",
    )
    parser.add_argument("--bits", type=int, default=4, choices=(4, 16, 32))
    parser.add_argument("--lora-r", type=int, default=16, metavar="R")
    parser.add_argument(
        "--recompute",
        nargs="?",
        const="yes",
        default="no",
        choices=tuple(RECOMPUTE),
        help="compute activations again in the backward pass; both: once with and once without",
    )
    parser.add_argument(
        "--within", default="", metavar="GIB", help="memory limits, comma-separated: the fastest row within each"
    )
    parser.add_argument(
        "--growth", action="store_true", help="instead of --cases: 1k to 64k tokens, 1 to 16 documents; slothcore alone"
    )
    parser.add_argument(
        "--compare", action="store_true", help="print the change of each figure since it last landed on this GPU"
    )
    parser.add_argument("--layers", type=int, help="fewer layers than the model has (32; tiny: 2)")
    parser.add_argument("--tiny", action="store_true", help="a very small model, to try the machinery")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=7, help="timed steps")
    parser.add_argument("--rounds", type=int, default=1, help="how often each system runs; the best round counts")
    parser.add_argument("--time-limit", type=float, default=240, metavar="SECONDS", help="of one system's process")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="where the random checkpoint is kept")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the CSV and the chart; default: benchmarks/results on a GPU, none on a CPU",
    )
    args = parser.parse_args(argv)
    args.series = shapes.growth_cases(16 if args.tiny else 1024) if args.growth else ()
    if args.growth:
        args.cases = ",".join(dict.fromkeys(case for cases in args.series for case in cases))
    default_systems = [OWN] if args.growth else installed()
    args.systems = args.systems.split(",") if args.systems else default_systems
    args.cases = args.cases.split(",")
    try:
        args.within = [float(limit) for limit in args.within.split(",") if limit]
        longest = max(shapes.parse_case(case)[0].longest for case in args.cases)
    except ValueError as error:
        parser.error(str(error))
    if unknown := set(args.systems) - MODULES.keys():
        parser.error(f"unknown system {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}")
    if args.steps < 1 or args.rounds < 1 or args.warmup < 0:
        parser.error("--steps and --rounds must be at least 1 and --warmup at least 0")
    args.config = dict(shapes.TINY if args.tiny else shapes.LLAMA_3_1_8B)
    if args.layers is not None:
        args.config["num_hidden_layers"] = args.layers
    args.checkpoint = args.checkpoint or checkpoint.default_folder(args.config)
    if args.out is None and args.device == "cuda":
        args.out = harness.RESULTS
    args.settings = Settings(str(args.checkpoint), args.bits, False, args.lora_r, longest=longest, device=args.device)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run, print, record. Returns: the exit status."""
    args = parse_arguments(argv)
    checkpoint.write_checkpoint(args.checkpoint, args.config, device=args.device)
    rows: list[Row] = []
    for number in range(args.rounds):
        # Every other round backwards, so that nobody is always the first or the last.
        for system in args.systems if number % 2 == 0 else reversed(args.systems):
            run_round(system, rows, args)
    floors, floor_problem = measure_floors(args) if OWN in args.systems else ({}, "")
    report.judge(rows)
    rows = report.best_rounds(rows)
    report.add_floors(rows, floors)
    report.mark_limits(rows, args.within)
    print(describe(args))
    print(report.table(rows))
    if floor_text := report.floor_lines(floors, floor_problem):
        print("\n" + floor_text)
    if args.within:
        print("\n" + report.limits_table(rows, args.within))
    if args.growth:
        print("\n" + report.growth_table([row for row in rows if row["system"] == OWN], args.series))
    record(rows, args)
    return int(any(row.get("problem", OUT_OF_MEMORY) != OUT_OF_MEMORY for row in rows))


def run_round(system: str, rows: list[Row], args: argparse.Namespace) -> None:
    """Append the rows of one system, all its cases in the ways that its users run them."""

    def too_big() -> set[str]:
        return {
            row["case"]
            for row in rows
            if row["system"] == system and not row["recompute"] and row.get("problem") == OUT_OF_MEMORY
        }

    cases = list(dict.fromkeys(variant for case in args.cases for variant in variants(system, case)))
    for recompute in RECOMPUTE[args.recompute]:
        fitting = cases if recompute else [case for case in cases if case not in too_big()]
        if fitting:
            rows += run_system(system, fitting, replace(args.settings, recompute=recompute), args)
    if args.recompute == "no" and (again := too_big()):
        rows += run_system(
            system, [case for case in cases if case in again], replace(args.settings, recompute=True), args
        )


def run_system(system: str, cases: list[str], settings: Settings, args: argparse.Namespace) -> list[Row]:
    """A row for each case; those that the process did not reach say why."""
    print(f"{system}{', recompute' if settings.recompute else ''}: {', '.join(cases)}", file=sys.stderr, flush=True)
    layers, vocab_size = args.config["num_hidden_layers"], args.config["vocab_size"]
    request = worker.request(
        system, settings, cases, layers=layers, vocab_size=vocab_size, warmup=args.warmup, steps=args.steps
    )
    rows, problem = run_module("benchmarks.worker", request, args.time_limit)
    done = {row["case"] for row in rows}
    missing = [case for case in cases if case not in done]
    return rows + [
        {"system": system, "case": case, "recompute": settings.recompute, "problem": problem} for case in missing
    ]


def measure_floors(args: argparse.Namespace) -> tuple[dict[str, Floor], str]:
    """The floor of every step, and why some are missing, or ""."""
    steps = list(dict.fromkeys(shapes.step_name(case) for case in args.cases))
    print(f"floor: {', '.join(steps)}", file=sys.stderr, flush=True)
    request: dict[str, Any] = {
        "config": args.config,
        "cases": steps,
        "bits": args.bits,
        "device": args.device,
        "warmup": args.warmup,
        "steps": args.steps,
    }
    found, problem = run_module("benchmarks.floor", request, args.time_limit)
    return {row.pop("case"): Floor(**row) for row in found}, problem


def record(rows: list[Row], args: argparse.Namespace) -> None:
    """Print what has changed, append the figures to the CSV, and draw them beside it."""
    settings = f"bits={args.bits} r={args.lora_r} layers={args.config['num_hidden_layers']} tiny={args.tiny}"
    good = [report.csv_row(row, settings) for row in believed(rows)]
    figures = [harness.environment() | row for row in good]
    if args.compare:
        before = compare.landed(args.out or harness.RESULTS)
        print("\n" + compare.table(compare.pairs(figures, before)))
    if args.out is not None:
        path = harness.append_csv(args.out, good)
        print(f"\nappended {len(good)} rows to {path}")
        if figures and not args.growth:
            print(chart.draw(figures, chart.path_beside(path, args.bits), title=chart.title_of(figures[0])))


def describe(args: argparse.Namespace) -> str:
    """The line above the table: everything that the figures depend on."""
    about = harness.environment()
    name = "tiny Llama" if args.tiny else "Llama-3.1-8B shape"
    return (
        f"{name}, {args.config['num_hidden_layers']} layers, bits {args.bits}, LoRA r={args.lora_r}, "
        f"{about['gpu']}, torch {about['torch']}, triton {about['triton']}, {about['date']}, commit {about['commit']}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
