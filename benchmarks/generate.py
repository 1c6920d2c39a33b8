"""Time greedy writing of slothcore beside its peers, and print one table.

    python benchmarks/generate.py
    python benchmarks/generate.py --systems slothcore --cases 1x128,16x128 --new-tokens 128

A model of Llama-3.1-8B's shape with random weights in NF4, and a LoRA adapter that is not merged, the same for every
system. Each runs in a process of its own with a time limit. A case is ROWSxLENGTH: so many prompts of so many tokens,
each continued by --new-tokens. What comes before the first token is timed apart, so the rate of decoding is that of the
tokens behind it. `unequal` is 128 prompts of 16 to 512 tokens with 16 to 128 new ones each, and its rate is all new
tokens over all the time, prompts included; the peers pad prompts and go on until the longest is complete.

The floor of a decode step is the time to read what it must read (weights in NF4, factors, head, keys and values) at the
speed of a copy, measured in the same run; that of a prompt its bare matrix products and attention (see floor.py).
As a check the first token of every prompt is compared with that of transformers, or else of slothcore: random weights
give near ties, which other orders of sums decide otherwise, so a part of them may differ. Under half of 16 or more, and
the rows are refused and the exit status is 1.
"""

import argparse
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import checkpoint, harness, random_model
from benchmarks.peers import PACKAGES, Settings
from benchmarks.processes import run_module
from benchmarks.worker import OUT_OF_MEMORY
from benchmarks.writers import MODULES
from benchmarks.writing_cases import UNEQUAL, WritingCase

DEFAULT_CASES = f"1x128,16x128,128x128,1x8192,{UNEQUAL}"
# So many prompts are needed to judge a system by their first tokens.
ENOUGH_PROMPTS, ENOUGH_EQUAL = 16, 0.5
SHORTEST_LIMIT = 20.0
# Prompts from here on have a floor of products, measured; shorter ones are bound by reading the weights.
FLOOR_TOKENS = 4096
TINY_SHRINK = 16
Row = dict[str, Any]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", help=f"of {', '.join(MODULES)}, comma-separated; default: all installed")
    parser.add_argument("--cases", default=DEFAULT_CASES, help=f"ROWSxLENGTH or {UNEQUAL}; default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="of each prompt, at least 2")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of a case; the median counts")
    parser.add_argument(
        "--budget", type=float, default=6, metavar="SECONDS", help="of the timed runs of a case: slow ones take fewer"
    )
    parser.add_argument("--no-graphs", action="store_true", help="slothcore launches every kernel itself")
    parser.add_argument("--no-floor", action="store_true", help="leave the floor of long prompts out")
    parser.add_argument("--time-limit", type=float, default=120, metavar="SECONDS", help="of one system's process")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="begin nothing that would outlast it")
    random_model.add_options(parser)
    args = parser.parse_args(argv)
    args.begun = time.monotonic()
    installed = [name for name in MODULES if all(find_spec(package) for package in PACKAGES[name])]
    args.systems = args.systems.split(",") if args.systems else installed
    if unknown := set(args.systems) - MODULES.keys():
        parser.error(f"unknown system {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}")
    if args.new_tokens < 2 or args.runs < 1:
        parser.error("--new-tokens must be at least 2 and --runs at least 1")
    args.shrink = TINY_SHRINK if args.tiny else 1
    try:
        args.cases = [
            WritingCase.parse(name, new_tokens=args.new_tokens, shrink=args.shrink) for name in args.cases.split(",")
        ]
    except ValueError as error:
        parser.error(str(error))
    random_model.complete(args)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run, print, record. Returns: the exit status."""
    args = parse_arguments(argv)
    checkpoint.write_checkpoint(args.checkpoint, args.config, device=args.device)
    say(f"checkpoint after {time.monotonic() - args.begun:.0f} s")
    bandwidth = copy_speed(args.device)
    rows: list[Row] = []
    for system in args.systems:
        rows += run_system(system, args)
    prompt_floors = {} if args.no_floor else floors_of_prompts(args)
    compare_tokens(rows)
    add_floors(rows, args, bandwidth, prompt_floors)
    about = harness.environment()
    print(
        f"{'tiny Llama' if args.tiny else 'Llama-3.1-8B shape'}, {args.config['num_hidden_layers']} layers, "
        f"bits={args.bits}, LoRA r={args.lora_r} not merged, {args.new_tokens} new tokens, copy {bandwidth / 1e12:.2f} "
        f"TB/s, {about['gpu']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}, "
        f"{time.monotonic() - args.begun:.0f} s\n"
    )
    print(table(rows), flush=True)
    if args.out is not None:
        good = [line for row in rows if "problem" not in row for line in csv_rows(row, args)]
        print(f"\nappended {len(good)} rows to {harness.append_csv(args.out, good)}")
    return int(any(row.get("problem", OUT_OF_MEMORY) != OUT_OF_MEMORY for row in rows))


def run_system(system: str, args: argparse.Namespace) -> list[Row]:
    """The rows of one process; those that it did not reach say why."""
    limit = args.time_limit
    if args.deadline is not None:
        limit = min(limit, args.deadline - (time.monotonic() - args.begun))
    results: list[Row] = []
    problem = f"not run: {limit:.0f} s are left of {args.deadline:g}" if limit < SHORTEST_LIMIT else ""
    if not problem:
        say(f"{system}, at most {limit:.0f} s")
        longest = max(case.longest for case in args.cases)
        settings = Settings(
            str(args.checkpoint), args.bits, "no", args.lora_r, longest, args.device, graphs=not args.no_graphs
        )
        request = {
            "system": system,
            "settings": vars(settings),
            "cases": [case.name for case in args.cases],
            "new_tokens": args.new_tokens,
            "shrink": args.shrink,
            "layers": args.config["num_hidden_layers"],
            "vocab_size": args.config["vocab_size"],
            "runs": args.runs,
            "budget": args.budget,
        }
        begun = time.monotonic()

        def landed(row: Row) -> None:
            what = row.get("problem") or f"{row['new_tokens'] / row['total_s']:,.0f} new tokens/s with the prompts"
            say(f"  {time.monotonic() - begun:5.1f} s  {row['case']}: {what}")

        results, problem = run_module("benchmarks.writing_worker", request, limit, landed)
    done = {row["case"] for row in results}
    return results + [
        {"system": system, "case": case.name, "problem": problem or "failed: no result"}
        for case in args.cases
        if case.name not in done
    ]


def compare_tokens(rows: list[Row]) -> None:
    """Note for how many prompts the first token is the reference's, and refuse what is too far from it."""
    for row in rows:
        others = [r for r in rows if r["case"] == row["case"] and "tokens" in r and r is not row]
        reference = next((r for r in others if r["system"] == "transformers"), None)
        if row["system"] != "transformers" and reference is None:
            reference = next((r for r in others if r["system"] == "slothcore"), None)
        if "tokens" not in row or reference is None or row["system"] == "transformers":
            continue
        pairs = list(zip(row["tokens"], reference["tokens"], strict=True))
        row["equal"], row["compared"] = sum(own[0] == other[0] for own, other in pairs), len(pairs)
    for row in rows:
        if row.get("compared", 0) >= ENOUGH_PROMPTS and row["equal"] < ENOUGH_EQUAL * row["compared"]:
            row["problem"] = f"refused: first tokens differ, {row['equal']} of {row['compared']} are equal"


def add_floors(rows: list[Row], args: argparse.Namespace, bandwidth: float, prompts: dict[str, float]) -> None:
    cases = {case.name: case for case in args.cases}
    for row in rows:
        case = cases[row["case"]]
        if "step_ms" in row:
            row["floor_ms"] = 1e3 * step_bytes(args.config, case, args.bits, args.lora_r) / bandwidth
        if case.name in prompts:
            row["first_floor_ms"] = prompts[case.name]


def step_bytes(config: dict[str, Any], case: WritingCase, bits: int, lora_r: int) -> float:
    """What a decode step must read halfway through the case: each weight once, and the keys and values of every row."""
    width = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 16: 2.0, 32: 4.0}[bits]
    dense = 4 if bits == 32 else 2
    total = 0.0
    for shard in checkpoint.shard_shapes(config):
        for name, shape in shard.items():
            if len(shape) == 2 and "layers" in name:
                total += shape[0] * shape[1] * width + lora_r * sum(shape) * dense
            elif name.startswith("lm_head"):
                total += shape[0] * shape[1] * dense
    held = sum(length + new / 2 for length, new in zip(case.lengths, case.new_tokens, strict=True))
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * dense
    return total + held * per_token


def copy_speed(device: str) -> float:
    """Bytes read and written a second by a large copy."""
    if device != "cuda":
        return 1e10
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    del source, target
    torch.cuda.empty_cache()
    return 2 * 2**30 / statistics.median(times)


def floors_of_prompts(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the products and the attention of long prompts, by case."""
    names = [case.name for case in args.cases if case.name != UNEQUAL and sum(case.lengths) >= FLOOR_TOKENS]
    left = float("inf") if args.deadline is None else args.deadline - (time.monotonic() - args.begun)
    if not names or left < SHORTEST_LIMIT:
        return {}
    say(f"floor: {', '.join(names)}")
    request = {"config": args.config, "cases": names, "bits": args.bits, "device": args.device}
    found, _ = run_module("benchmarks.floor", request, min(args.time_limit, left))
    return {row["case"]: row["products_forward"] + row["attention_forward"] for row in found}


def table(rows: list[Row]) -> str:
    header = ["case", "system", "first ms", "/ floor", "ms/step", "/ floor", "tokens/s", "peak GiB", "first tokens"]
    order = list(dict.fromkeys(row["case"] for row in rows))
    cells = []
    for row in sorted(rows, key=lambda row: order.index(row["case"])):
        line = [row["case"], row["system"]]
        if "total_s" not in row or "problem" in row:
            cells.append([*line, *["-"] * 6, row["problem"]])
            continue
        first, step = row.get("first_ms"), row.get("step_ms")
        equal = f"{row['equal']}/{row['compared']} equal" if "equal" in row else "-"
        cells.append(
            [
                *line,
                "-" if first is None else f"{first:.1f}",
                f"{first / row['first_floor_ms']:.2f}" if first and "first_floor_ms" in row else "-",
                "-" if step is None else f"{step:.2f}",
                f"{step / row['floor_ms']:.2f}" if step and "floor_ms" in row else "-",
                f"{tokens_per_second(row):,.0f}",
                "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
                equal,
            ]
        )
    return harness.format_table(header, cells)


def tokens_per_second(row: Row) -> float:
    """Of decoding, without the prompts; where rows differ, of everything."""
    if "step_ms" in row:
        return 1e3 * len(row["tokens"]) / row["step_ms"]
    return row["new_tokens"] / row["total_s"]


def csv_rows(row: Row, args: argparse.Namespace) -> list[Row]:
    """The figures of a row in the columns of the results file: the first token, and the steps behind it."""
    graphs = " graphs=no" if args.no_graphs and row["system"] == "slothcore" else ""
    new = "drawn" if row["case"] == UNEQUAL else args.new_tokens
    settings = f"bits={args.bits} r={args.lora_r} layers={args.config['num_hidden_layers']} new={new}{graphs}"
    common = {"benchmark": "generate", "system": row["system"], "settings": settings}
    if row["peak_gib"] is not None:
        common["peak_gib"] = f"{row['peak_gib']:.4g}"
    rate = {"tokens_per_second": f"{tokens_per_second(row):.6g}"}
    if "step_ms" not in row:
        return [common | rate | {"case": row["case"], "median_ms": f"{1e3 * row['total_s']:.6g}"}]
    steps = common | rate | {"case": f"{row['case']} step", "median_ms": f"{row['step_ms']:.6g}"}
    first = common | {"case": f"{row['case']} first", "median_ms": f"{row['first_ms']:.6g}"}
    if "floor_ms" in row:
        steps["fraction_of_floor"] = f"{row['floor_ms'] / row['step_ms']:.4g}"
    if "first_floor_ms" in row:
        first["fraction_of_floor"] = f"{row['first_floor_ms'] / row['first_ms']:.4g}"
    return [first, steps]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
