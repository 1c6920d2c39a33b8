"""Time an optimizer step of slothcore beside its peers and print one table.

    python benchmarks/run.py --systems slothcore,transformers,unsloth --cases 4x2048,2x256 --bits 4

Every system loads the same random-weight checkpoint, gets the same LoRA factors and the same tokens, and steps with the
same optimizer, each in a process of its own with a time limit. With --rounds they take turns, and each keeps its best
round: other work on the machine only ever adds time, and most to small cases, which wait for the host. A figure is
refused, and the exit status is 1, unless the first loss agrees with that of transformers and every gradient norm is
finite and above zero. A case that runs out of memory is run once more with recomputation, in a row of its own.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import checkpoint, harness, shapes, worker
from benchmarks.peers import MODULES, Settings

REFERENCE = "transformers"
LOSS_TOLERANCE = 1e-2
# Only remarked upon: rounding alone moves a norm more than a loss.
NORM_TOLERANCE = 5e-2
# What worker.py calls it; the one problem that is no failure.
OUT_OF_MEMORY = "out of memory"
Row = dict[str, Any]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default="slothcore,transformers,unsloth", help=f"of {', '.join(MODULES)}")
    parser.add_argument("--cases", default="4x2048,2x256", help="ROWSxLENGTH, comma-separated")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 16, 32))
    parser.add_argument("--lora-r", type=int, default=16, metavar="R")
    parser.add_argument("--recompute", action="store_true", help="compute activations again in the backward pass")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has (32; tiny: 2)")
    parser.add_argument("--tiny", action="store_true", help="a very small model, to try the machinery")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=7, help="timed steps")
    parser.add_argument("--rounds", type=int, default=1, help="how often each system runs; the best round counts")
    parser.add_argument("--time-limit", type=float, default=240, metavar="SECONDS", help="of one system's process")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="where the random checkpoint is kept")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the CSV; default: benchmarks/results on a GPU, none on a CPU"
    )
    args = parser.parse_args(argv)
    args.systems, args.cases = args.systems.split(","), args.cases.split(",")
    try:
        longest = max(shapes.StepCase.parse(case).length for case in args.cases)
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
    args.settings = Settings(
        str(args.checkpoint), args.bits, args.recompute, args.lora_r, longest=longest, device=args.device
    )
    return args


def main(argv: list[str] | None = None) -> int:
    """Run, print, record. Returns: the exit status."""
    args = parse_arguments(argv)
    checkpoint.write_checkpoint(args.checkpoint, args.config, device=args.device)
    rows: list[Row] = []
    for number in range(args.rounds):
        # Every other round backwards, so that nobody is always the first or the last.
        for system in args.systems if number % 2 == 0 else reversed(args.systems):
            too_big = {r["case"] for r in rows if r["system"] == system and r.get("problem") == OUT_OF_MEMORY}
            fitting = [case for case in args.cases if case not in too_big]
            rows += run_system(system, fitting, args.settings, args) if fitting else []
            too_big |= {r["case"] for r in rows if r["system"] == system and r.get("problem") == OUT_OF_MEMORY}
            if too_big and not args.recompute:
                rows += run_system(system, sorted(too_big), replace(args.settings, recompute=True), args)
    judge(rows)
    rows = best_rounds(rows)
    print(describe(args))
    print(table(rows))
    if args.out is not None:
        settings = f"bits={args.bits} r={args.lora_r} layers={args.config['num_hidden_layers']} tiny={args.tiny}"
        good = [csv_row(row, settings) for row in rows if "problem" not in row]
        print(f"\nappended {len(good)} rows to {harness.append_csv(args.out, good)}")
    return int(any(row.get("problem", OUT_OF_MEMORY) != OUT_OF_MEMORY for row in rows))


def best_rounds(rows: list[Row]) -> list[Row]:
    """One row a system, case and recomputation: its fastest, or the one with a problem, which is never passed over."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row["system"], row["case"], row["recompute"])
        other = best.get(key)
        if other is None or "problem" in row or ("problem" not in other and row["median_ms"] < other["median_ms"]):
            best[key] = row
    return list(best.values())


def run_system(system: str, cases: list[str], settings: Settings, args: argparse.Namespace) -> list[Row]:
    """A row for each case; those that the process did not reach say why."""
    print(f"{system}{', recompute' if settings.recompute else ''}: {', '.join(cases)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        request, results, log = (Path(scratch) / name for name in ("request.json", "results.jsonl", "log"))
        layers, vocab_size = args.config["num_hidden_layers"], args.config["vocab_size"]
        checkpoint.write_json(
            request,
            worker.request(
                system, settings, cases, layers=layers, vocab_size=vocab_size, warmup=args.warmup, steps=args.steps
            ),
        )
        command = [sys.executable, "-m", "benchmarks.worker", str(request), str(results)]
        problem = run_with_limit(command, log, args.time_limit)
        rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {row["case"] for row in rows}
    missing = [case for case in cases if case not in done]
    return rows + [
        {"system": system, "case": case, "recompute": settings.recompute, "problem": problem} for case in missing
    ]


def run_with_limit(command: list[str], log: Path, seconds: float) -> str:
    """Run a command with its output in `log`. Returns: why it stopped early, and then the log is shown; or ""."""
    offline = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Unsloth writes a cache where it starts, so that is not the checkout, which therefore must be named.
    paths = [str(harness.REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | offline | {"PYTHONPATH": os.pathsep.join(paths)}
    with log.open("wb") as output:
        # Its own session, so that processes which the system starts end with it.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=log.parent, start_new_session=True
        )
        try:
            status = process.wait(seconds)
            problem = f"failed: exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            problem = f"failed: over the limit of {seconds:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if problem:
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join(lines[-40:]), file=sys.stderr, flush=True)
        error = next((line for line in reversed(lines) if "Error" in line), "")
        return f"{problem} {error}".strip()
    return problem


def judge(rows: list[Row]) -> None:
    """Mark with a "problem" each row whose figures must not be believed, with a "note" what else is to be said."""
    references = {row["case"]: row for row in rows if row["system"] == REFERENCE and "problem" not in row}
    for row in rows:
        if "problem" in row:
            continue
        loss, norm = row["first_loss"], row["gradient_norm"] = row["losses"][0], row["gradient_norms"][0]
        reference = references.get(row["case"])
        if not all(math.isfinite(norm) and norm > 0 for norm in row["gradient_norms"]):
            row["problem"] = f"refused: gradient norms {row['gradient_norms']}"
        elif not math.isfinite(loss):
            row["problem"] = f"refused: first loss {loss}"
        elif reference is None:
            row["note"] = f"loss unverified without {REFERENCE}"
        elif not relative_difference(loss, reference["losses"][0]) <= LOSS_TOLERANCE:
            row["problem"] = f"refused: first loss {loss:.4f}, {REFERENCE} has {reference['losses'][0]:.4f}"
        elif not relative_difference(norm, reference["gradient_norms"][0]) <= NORM_TOLERANCE:
            row["note"] = f"gradient norm {norm:.4g}, {REFERENCE} has {reference['gradient_norms'][0]:.4g}"


def relative_difference(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected)


def describe(args: argparse.Namespace) -> str:
    """The line above the table: everything that the figures depend on."""
    about = harness.environment()
    name = "tiny Llama" if args.tiny else "Llama-3.1-8B shape"
    return (
        f"{name}, {args.config['num_hidden_layers']} layers, bits {args.bits}, LoRA r={args.lora_r}, "
        f"{about['gpu']}, torch {about['torch']}, triton {about['triton']}, {about['date']}, commit {about['commit']}\n"
    )


def table(rows: list[Row]) -> str:
    """One line a row, cases together, as Markdown, then what is to be said of single rows.

    The last column is this row's time over slothcore's of the same case.
    """
    own = {row["case"]: row for row in reversed(rows) if row["system"] == "slothcore" and "problem" not in row}
    header = ["system", "case", "recompute", "ms/step", "tokens/s", "peak GiB", "first loss", "gradient norm", "x time"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines, remarks = [], []
    for row in sorted(rows, key=lambda row: cases.index(row["case"])):
        cells = [row["system"], row["case"], "yes" if row["recompute"] else "no"]
        remark = row.get("problem") or row.get("note")
        if remark:
            remarks.append(f"{' '.join(cells[:2])}: {remark}")
        if "problem" in row:
            lines.append([*cells, *["-"] * 5, row["problem"].partition(":")[0]])
            continue
        base = own.get(row["case"])
        figures = [
            f"{row['median_ms']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}",
            f"{row['first_loss']:.4f}",
            f"{row['gradient_norm']:.4g}",
            "-" if base is None else f"{row['median_ms'] / base['median_ms']:.2f}",
        ]
        lines.append([*cells, *figures])
    return "\n".join([harness.format_table(header, lines), *(["", *remarks] if remarks else [])])


def csv_row(row: Row, settings: str) -> Row:
    recompute = "yes" if row["recompute"] else "no"
    kept = {name: value for name, value in row.items() if name in harness.CSV_FIELDS and value is not None}
    rounded = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in kept.items()}
    return {"benchmark": "step", "settings": f"{settings} recompute={recompute}", **rounded}


if __name__ == "__main__":
    sys.exit(main())
