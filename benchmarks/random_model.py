"""The options of whoever measures a model of random weights: its shape, where it is kept, where figures go."""

import argparse
from pathlib import Path

import torch

from benchmarks import checkpoint, harness, shapes


def add_options(parser: argparse.ArgumentParser, *, out: str = "folder of the CSV") -> None:
    """
    Args:
        out: what is written into the folder that --out names.
    """
    parser.add_argument("--bits", type=int, default=4, choices=(4, 16, 32))
    parser.add_argument("--lora-r", type=int, default=16, metavar="R")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has (32; tiny: 2)")
    parser.add_argument("--tiny", action="store_true", help="a very small model, to try the machinery")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="where the random checkpoint is kept")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"{out}; default: benchmarks/results on a GPU, none on a CPU"
    )


def complete(args: argparse.Namespace) -> None:
    """Add what follows from them: the model's `config`, its `checkpoint`, the folder of the figures."""
    args.config = dict(shapes.TINY if args.tiny else shapes.LLAMA_3_1_8B)
    if args.layers is not None:
        args.config["num_hidden_layers"] = args.layers
    args.checkpoint = args.checkpoint or checkpoint.default_folder(args.config)
    if args.out is None and args.device == "cuda":
        args.out = harness.RESULTS
