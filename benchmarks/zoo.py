"""One real-size training step of every kind of model: tokens/s, peak memory, loss and gradient norm in one table.

    python benchmarks/zoo.py
    python benchmarks/zoo.py --models Gemma-2-9B,Qwen3-30B-A3B --bits 4 --case 4x2048

Weights are random, drawn (and quantised) on the device, so nothing is downloaded. A step is forward, backward, clipping
and 8-bit AdamW, with LoRA on all linears. A row is refused, and the exit status is 1, if a loss is not finite or a
gradient norm is zero or not finite. A model that runs out of memory is run again with recomputation.
"""

import argparse
import gc
import math
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import slothcore
from benchmarks import harness, worker
from benchmarks.shapes import StepCase
from benchmarks.zoo_shapes import ZOO, tiny
from slothcore.models.decoder import Decoder

DEFAULT = "Llama-3.2-1B,Qwen2.5-7B,Gemma-2-9B,Phi-3.5-mini,Mistral-Nemo"
Row = dict[str, Any]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=DEFAULT, help=f"of {', '.join(ZOO)}")
    parser.add_argument("--bits", default="4,16", help="4 (NF4), 16 (bfloat16) or 32, comma-separated")
    parser.add_argument("--case", default="4x2048", help="ROWSxLENGTH")
    parser.add_argument("--lora-r", type=int, default=16, metavar="R")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--tiny", action="store_true", help="very small models, to try the machinery")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the CSV; default: benchmarks/results on a GPU, none on a CPU"
    )
    args = parser.parse_args(argv)
    args.models, args.bits = args.models.split(","), [int(bits) for bits in args.bits.split(",")]
    if unknown := [name for name in args.models if name not in ZOO]:
        parser.error(f"unknown model {', '.join(unknown)}; there are {', '.join(ZOO)}")
    if args.steps < 1 or args.warmup < 0:
        parser.error("--steps must be at least 1 and --warmup at least 0")
    args.case = StepCase.parse(args.case)
    if args.out is None and args.device == "cuda":
        args.out = harness.RESULTS
    return args


def main(argv: list[str] | None = None) -> int:
    """Run, print, record. Returns: the exit status."""
    args = parse_arguments(argv)
    rows: list[Row] = []
    for name in args.models:
        for bits in args.bits:
            rows.append(measure(name, bits, args, recompute=False))
            if rows[-1].get("problem") == "out of memory":
                rows[-1] = measure(name, bits, args, recompute=True)
            print(" ".join(line(rows[-1])), file=sys.stderr, flush=True)
    about = harness.environment()
    print(
        f"LoRA r={args.lora_r} on all linears, {args.case} tokens, {about['gpu']}, torch {about['torch']}, "
        f"triton {about['triton']}, {about['date']}, commit {about['commit']}\n"
    )
    header = ["model", "bits", "recompute", "ms/step", "tokens/s", "peak GiB", "first loss", "gradient norm"]
    print(harness.format_table(header, [line(row) for row in rows]))
    if args.out is not None:
        good = [csv_row(row, args) for row in rows if "problem" not in row]
        print(f"\nappended {len(good)} rows to {harness.append_csv(args.out, good)}")
    return int(any("problem" in row for row in rows))


def measure(name: str, bits: int, args: argparse.Namespace, *, recompute: bool) -> Row:
    """The row of one model; with a "problem" if it failed."""
    row: Row = {"model": name, "bits": bits, "recompute": recompute}
    try:
        row |= time_steps(build(name, bits, args, recompute=recompute), args)
    except torch.OutOfMemoryError:
        row["problem"] = "out of memory"
    except Exception as error:
        traceback.print_exc()
        row["problem"] = f"failed: {type(error).__name__}"
    # What the failed step left is reachable until its frames are gone, which is now.
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return row


def build(name: str, bits: int, args: argparse.Namespace, *, recompute: bool) -> Decoder:
    """The model with random weights and LoRA, in training mode."""
    torch.manual_seed(0)
    config = tiny(ZOO[name]) if args.tiny else ZOO[name]
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    model = slothcore.from_config(config, bits=bits, dtype=dtype, device=args.device)
    slothcore.add_lora(model, r=args.lora_r, lora_alpha=args.lora_r)
    model.gradient_checkpointing = recompute
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Zero, as it starts, would leave lora_A without a gradient.
            if parameter_name.endswith("lora_B"):
                parameter.normal_(0.0, worker.LORA_B_STD)
    return model.train()


def time_steps(model: Decoder, args: argparse.Namespace) -> Row:
    """Optimizer steps on random tokens; the first loss precedes any update."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.device == "cuda":
        from slothcore.training.adamw_8bit import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(trained, lr=worker.LEARNING_RATE)
        synchronize = torch.cuda.synchronize
        torch.cuda.reset_peak_memory_stats()
    else:
        optimizer, synchronize = torch.optim.AdamW(trained, lr=worker.LEARNING_RATE), lambda: None
    milliseconds, losses, norms = [], [], []
    for step in range(args.warmup + args.steps):
        input_ids = worker.random_batch(args.case, step, model.config.vocab_size)
        synchronize()
        start = time.perf_counter()
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, worker.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        milliseconds.append(1e3 * (time.perf_counter() - start))
        losses.append(loss.item())
        norms.append(norm.item())
    median, p20, p80 = harness.quantiles(milliseconds[args.warmup :])
    row: Row = {
        "median_ms": median,
        "p20_ms": p20,
        "p80_ms": p80,
        "tokens_per_second": 1e3 * args.case.tokens / median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None,
        "first_loss": losses[0],
        "gradient_norm": norms[0],
    }
    if not all(map(math.isfinite, losses)):
        row["problem"] = f"refused: losses {losses}"
    elif not all(math.isfinite(norm) and norm > 0 for norm in norms):
        row["problem"] = f"refused: gradient norms {norms}"
    return row


def line(row: Row) -> list[str]:
    """One row of the table."""
    cells = [row["model"], str(row["bits"]), "yes" if row["recompute"] else "no"]
    if "problem" in row:
        return [*cells, *["-"] * 4, row["problem"]]
    return [
        *cells,
        f"{row['median_ms']:.1f}",
        f"{row['tokens_per_second']:,.0f}",
        "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}",
        f"{row['first_loss']:.4f}",
        f"{row['gradient_norm']:.4g}",
    ]


def csv_row(row: Row, args: argparse.Namespace) -> Row:
    """The row in the columns of the results file."""
    settings = f"bits={row['bits']} r={args.lora_r} recompute={'yes' if row['recompute'] else 'no'}"
    kept = {name: value for name, value in row.items() if name in harness.CSV_FIELDS and value is not None}
    rounded = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in kept.items()}
    return {
        "benchmark": f"zoo {row['model']}",
        "system": "slothcore",
        "case": str(args.case),
        "settings": settings,
        **rounded,
    }


if __name__ == "__main__":
    sys.exit(main())
