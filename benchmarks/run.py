"""Time an optimizer step of slothcore beside its peers and print one table.

    python benchmarks/run.py
    python benchmarks/run.py --cases 4x2048:no+mlp+offload+yes,2x256:no+decoded --within 7.8,36 --compare
    python benchmarks/run.py --growth

Every system loads the same random-weight checkpoint, gets the same LoRA factors and the same tokens, and steps with the
same optimizer, in a process of its own with a time limit. With --rounds they take turns, and each keeps its best
round: other work on the machine only ever adds time, and most to small cases, which wait for the host. A figure is
refused, and the exit status is 1, unless the first loss agrees with that of transformers and every gradient norm is
finite and above zero. A case that runs out of memory is run once more with recomputation, in a row of its own.
Beside each time stands the floor of the same step, measured in the same run (see floor.py).

What is planned is printed first, with an estimate of its time. Rows are appended to the CSV as they come, and put in
order when all have run, so that a run that is killed loses nothing but what it had not measured.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import chart, checkpoint, compare, harness, report, shapes, worker
from benchmarks.arguments import parse_arguments
from benchmarks.floor import Floor
from benchmarks.peers import FIXED_AT_LOADING, Settings
from benchmarks.plan import OWN, Job, Run, fallbacks, jobs_of, runs_of
from benchmarks.processes import run_module
from benchmarks.report import Row, believed
from benchmarks.worker import OUT_OF_MEMORY

# What a floor takes at least, and a system.
FLOOR_SECONDS = 8.0
SHORTEST_LIMIT = 30.0


def main(argv: list[str] | None = None) -> int:
    """Run, print, record. Returns: the exit status."""
    args = parse_arguments(argv, __doc__)
    jobs = plan(args)
    say(describe(args) + "\n".join(f"{seconds_of(job, args):5.0f} s  {job}" for job in jobs))
    checkpoint.write_checkpoint(args.checkpoint, args.config, device=args.device)
    journal = None if args.out is None else harness.Journal(args.out)
    rows: list[Row] = []
    floors: dict[str, Floor] = {}
    problems: list[str] = []
    for number, job in enumerate(jobs):
        rows += run_job(job, args, journal)
        later = [(other.system, other.bits) for other in jobs[number + 1 :]]
        if job.system == OWN and (OWN, job.bits) not in later:
            found, problem = measure_floors(args, job.bits)
            floors |= found
            problems += [problem] if problem else []
        if number + 1 < len(jobs):
            # In case that no more comes.
            say(f"so far:\n\n{report.table(presentable(rows, floors))}\n")
    rows = presentable(rows, floors)
    report.mark_limits(rows, args.within)
    print_all(rows, floors, "; ".join(problems), args)
    record(rows, journal, args)
    return int(any(row.get("problem", OUT_OF_MEMORY) != OUT_OF_MEMORY for row in rows))


def plan(args: argparse.Namespace) -> list[Job]:
    """What is to be run, in order."""
    jobs: list[Job] = []
    for number in range(args.rounds):
        # Every other round backwards, so that nobody is always the first or the last.
        for system in args.systems if number % 2 == 0 else reversed(args.systems):
            jobs += jobs_of(system, runs_of(system, args.specs, layers=args.config["num_hidden_layers"]))
    # All of one kind of weights before the next: a run that is cut short then has whole comparisons.
    bits = list(dict.fromkeys(job.bits for job in jobs))
    return sorted(jobs, key=lambda job: bits.index(job.bits)) if args.rounds == 1 else jobs


def seconds_of(job: Job, args: argparse.Namespace) -> float:
    return job.seconds(warmup=args.warmup, steps=args.steps, budget=args.budget)


def run_job(job: Job, args: argparse.Namespace, journal: harness.Journal | None) -> list[Row]:
    """A row for each run of a job, and for what it had to be run again with."""
    rows = run_system(job, args, journal)
    if job.system not in FIXED_AT_LOADING:
        return rows
    # Loaded with recomputation, for what ran out of memory without.
    short = {row["case"] for row in rows if row.get("problem") == OUT_OF_MEMORY}
    every = runs_of(job.system, args.specs, layers=args.config["num_hidden_layers"])
    again = [
        Run(run.case, run.bits, recompute)
        for run in job.runs
        if run.case in short
        for recompute in fallbacks(job.system, run, every)
    ]
    return rows + (run_system(Job(job.system, tuple(again)), args, journal) if again else [])


def run_system(job: Job, args: argparse.Namespace, journal: harness.Journal | None) -> list[Row]:
    """The rows of one process; those that it did not reach say why."""
    limit, estimate = args.time_limit, seconds_of(job, args)
    if args.deadline is not None:
        left = args.deadline - (time.monotonic() - args.begun)
        limit = min(limit, left)
        if left < max(SHORTEST_LIMIT, 0.7 * estimate):
            return missing(job, [], f"not run: {left:.0f} s are left of {args.deadline:g}")
    say(f"{job}; about {estimate:.0f} s, at most {limit:.0f}")
    first = job.runs[0]
    settings = Settings(
        str(args.checkpoint),
        job.bits,
        first.recompute,
        args.lora_r,
        longest=args.longest,
        device=args.device,
        graphs=not args.no_graphs,
    )
    request = worker.request(
        job.system,
        settings,
        job.runs,
        layers=args.config["num_hidden_layers"],
        vocab_size=args.config["vocab_size"],
        warmup=args.warmup,
        steps=args.steps,
        budget=args.budget,
    )
    begun = time.monotonic()

    def landed(row: Row) -> None:
        """Keep a row at once, unless it is wrong on the face of it; what others say of it comes later."""
        figures = dict(row)
        if "problem" not in figures:
            report.check_alone(figures)
        text = figures.get("problem") or f"{row['median_ms']:.1f} ms, {row['tokens_per_second']:,.0f} tokens/s"
        say(f"  {time.monotonic() - begun:5.1f} s  {row['case']}, {report.way_of(row)}: {text}")
        if journal is not None and "problem" not in figures:
            journal.add([report.csv_row(figures, csv_settings(row, args))])

    rows, problem = run_module("benchmarks.worker", request, limit, landed)
    return rows + missing(job, rows, problem)


def missing(job: Job, rows: Iterable[Row], problem: str) -> list[Row]:
    """A row for each run of a job that has none."""
    done = {(row["case"], row["recompute"], row["decoded"]) for row in rows}
    return [
        {
            "system": job.system,
            "case": run.case,
            "bits": run.bits,
            "recompute": run.recompute,
            "decoded": run.decoded,
            "problem": problem,
        }
        for run in job.runs
        if (run.case, run.recompute, run.decoded) not in done
    ]


def measure_floors(args: argparse.Namespace, bits: int) -> tuple[dict[str, Floor], str]:
    """The floor of every step over weights of these bits, by its name in the tables; why some are missing, or ""."""
    steps = list(dict.fromkeys(shapes.step_name(case) for case, of, _ in args.specs if of == bits))
    limit = args.time_limit
    if args.deadline is not None:
        limit = min(limit, args.deadline - (time.monotonic() - args.begun))
    if limit < FLOOR_SECONDS:
        return {}, f"not run, {limit:.0f} s are left"
    say(f"floor, {bits} bits: {', '.join(steps)}")
    request: dict[str, Any] = {"config": args.config, "cases": steps, "bits": bits, "device": args.device}
    found, problem = run_module("benchmarks.floor", request, limit)
    names = [report.step_of(row) for row in found]
    values = [{name: value for name, value in row.items() if name not in ("case", "bits")} for row in found]
    return {name: Floor(**of) for name, of in zip(names, values, strict=True)}, problem


def presentable(rows: list[Row], floors: dict[str, Floor]) -> list[Row]:
    """Copies of the rows so far, judged, the best of each kind, with their floors."""
    judged = [dict(row) for row in rows]
    report.judge(judged)
    best = report.best_rounds(judged)
    report.add_floors(best, floors)
    return best


def print_all(rows: list[Row], floors: dict[str, Floor], floor_problem: str, args: argparse.Namespace) -> None:
    parts = [describe(args) + "\n" + report.table(rows), report.floor_lines(floors, floor_problem)]
    if args.within:
        parts.append(report.limits_table(rows, args.within))
    if args.growth:
        parts.append(report.growth_table([row for row in rows if row["system"] == OWN], args.series))
    if not args.growth and not args.tiny:
        parts.append(report.targets_table(rows, harness.environment()["gpu"]))
    print("\n\n".join(part for part in parts if part), flush=True)


def record(rows: list[Row], journal: harness.Journal | None, args: argparse.Namespace) -> None:
    """Print what has changed, settle the figures in the CSV, and draw them beside it."""
    good = [report.csv_row(row, csv_settings(row, args)) for row in believed(rows)]
    figures = [harness.environment() | row for row in good]
    if args.compare:
        own = set() if journal is None else journal.lines
        before = [row for row in compare.landed(args.out or harness.RESULTS) if harness.csv_line(row) not in own]
        print("\n" + compare.table(compare.pairs(figures, before)))
    if journal is not None:
        journal.settle(good)
        print(f"\n{len(good)} rows in {journal.path}")
        if figures and not args.growth:
            print(chart.draw_commit(journal.path, figures[0]["commit"], tiny=args.tiny))


def csv_settings(row: Row, args: argparse.Namespace) -> str:
    """What a row was run with, and does not say itself."""
    graphs = " graphs=no" if args.no_graphs and row["system"] == OWN else ""
    return f"r={args.lora_r} layers={args.config['num_hidden_layers']} tiny={args.tiny}{graphs}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def describe(args: argparse.Namespace) -> str:
    """The line above the table: everything that the figures depend on."""
    about = harness.environment()
    name = "tiny Llama" if args.tiny else "Llama-3.1-8B shape"
    return (
        f"{name}, {args.config['num_hidden_layers']} layers, LoRA r={args.lora_r}, "
        f"{about['gpu']}, torch {about['torch']}, triton {about['triton']}, {about['date']}, commit {about['commit']}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
