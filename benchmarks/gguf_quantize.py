"""Time the quantisers of GGUF's kinds beside llama.cpp's own, which xllamacpp brings along, on the same weights.

    python benchmarks/gguf_quantize.py                       # on the GPU, or the CPU where there is none
    python benchmarks/gguf_quantize.py --device cpu          # as many threads as torch takes, for both
    python benchmarks/gguf_quantize.py --millions 1          # the machinery alone

Each kind takes the same float32 weights to bytes on the host, alternately with slothcore's and llama.cpp's code; the
best of `--rounds` counts, and both must give the same bytes. GB/s are of the float32 numbers. Then the time of all
tensors of Llama-3.1-8B at these rates, without reading and writing them.
"""

import argparse
import ctypes
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from slothcore.export.gguf_quantize import PACKS, quantize
from slothcore.export.gguf_types import USUAL, Kind, Mixture, kind_of, row_bytes
from slothcore.layers.rope import RopeParameters
from slothcore.models.config import DecoderConfig

COLUMNS = 4096
MIXTURES: tuple[Mixture, ...] = tuple(mixture for mixture, kind in USUAL.items() if kind in PACKS)
# What llama.cpp calls the kinds.
TYPES: dict[Kind, int] = {"Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
LLAMA_8B = DecoderConfig(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    rope=RopeParameters(rope_theta=500000.0),
)
Quantize = Callable[[Tensor, Kind], np.ndarray]


def tensors_of_8b() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor in a GGUF file of Llama-3.1-8B."""
    hidden, inner, vocab = LLAMA_8B.hidden_size, LLAMA_8B.intermediate_size, LLAMA_8B.vocab_size
    keys = LLAMA_8B.num_key_value_heads * LLAMA_8B.head_dim
    yield from (("token_embd.weight", (vocab, hidden)), ("output.weight", (vocab, hidden)))
    yield from (("output_norm.weight", (hidden,)), ("rope_freqs.weight", (LLAMA_8B.head_dim // 2,)))
    of_a_layer = {
        "attn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, hidden),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    for layer in range(LLAMA_8B.num_hidden_layers):
        for name, shape in of_a_layer.items():
            yield f"blk.{layer}.{name}.weight", shape


def llama_cpp_quantizer() -> Quantize | None:
    """`ggml_quantize_chunk` of llama.cpp, on as many threads as torch takes; None without xllamacpp."""
    spec = find_spec("xllamacpp")
    library = next(Path(spec.origin).parent.glob("xllamacpp*.so"), None) if spec and spec.origin else None
    if library is None:
        return None
    chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantize_with_llama_cpp(weight: Tensor, kind: Kind) -> np.ndarray:
        values = np.ascontiguousarray(weight.numpy(), dtype=np.float32)
        rows, columns = values.shape
        packed = np.zeros((rows, row_bytes(kind, columns)), np.uint8)

        def some_rows(start: int) -> None:
            count = min(16, rows - start)
            offset = start * columns
            chunk(TYPES[kind], values.ctypes.data, packed.ctypes.data, offset, count, columns, None)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(some_rows, range(0, rows, 16)))
        return packed

    return quantize_with_llama_cpp


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--millions", type=float, default=64.0, help="numbers of the weight, in millions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the CSV; default: benchmarks/results on a GPU, none on a CPU"
    )
    args = parser.parse_args(argv)
    if args.out is None and args.device == "cuda":
        args.out = harness.RESULTS
    return args


def main(argv: list[str] | None = None) -> int:
    """Time, print, record. Returns: the exit status, 1 if bytes differ."""
    args = parse_arguments(argv)
    torch.manual_seed(0)
    rows = max(1, round(args.millions * 1e6 / COLUMNS))
    weight = torch.randn(rows, COLUMNS) * 0.02
    theirs = llama_cpp_quantizer()
    figures = [timed(kind, weight, theirs, args) for kind in PACKS]
    threads = torch.get_num_threads()
    print(f"{harness.environment()['gpu']}, {args.device}; llama.cpp on {threads} of {os.cpu_count()} CPU cores")
    header = ["", "M numbers/s", "GB/s", "llama.cpp", "same bytes"]
    print(harness.format_table(header, [line_of(figure) for figure in figures]))
    for name in ("rate", "their_rate"):
        if all(name in figure for figure in figures):
            print(f"Llama-3.1-8B, {'slothcore' if name == 'rate' else 'llama.cpp'}: {estimates(figures, name)}")
    if args.out is not None:
        settings = f"device={args.device} millions={args.millions:g} threads={threads}"
        print(f"appended to {harness.append_csv(args.out, csv_rows(figures, rows * COLUMNS, settings))}")
    return int(any(figure.get("same") is False for figure in figures))


def timed(kind: Kind, weight: Tensor, theirs: Quantize | None, args: argparse.Namespace) -> dict[str, Any]:
    """Numbers a second of one kind, and whether the bytes are llama.cpp's."""
    placed = weight.to(args.device)
    seconds, their_seconds = [], []
    for _ in range(args.rounds + 1):  # the first one warms up
        began = time.perf_counter()
        packed = quantize(placed, kind)
        seconds.append(time.perf_counter() - began)
        if theirs is not None:
            began = time.perf_counter()
            expected = theirs(weight, kind)
            their_seconds.append(time.perf_counter() - began)
    figure: dict[str, Any] = {"kind": kind, "rate": weight.numel() / min(seconds[1:])}
    if theirs is not None:
        figure |= {"their_rate": weight.numel() / min(their_seconds[1:]), "same": np.array_equal(packed, expected)}
    return figure


def line_of(figure: dict[str, Any]) -> list[str]:
    rate, their_rate = figure["rate"], figure.get("their_rate")
    cells = [figure["kind"], f"{rate / 1e6:.1f}", f"{4 * rate / 1e9:.2f}"]
    if their_rate is None:
        return [*cells, "-", "-"]
    return [*cells, f"{their_rate / 1e6:.1f}", "yes" if figure["same"] else "NO"]


def estimates(figures: list[dict[str, Any]], name: str) -> str:
    """Seconds for all tensors of an 8B model at these rates."""
    rates = {figure["kind"]: figure[name] for figure in figures}
    found = []
    for mixture in MIXTURES:
        numbers: Counter[Kind] = Counter()
        for tensor, shape in tensors_of_8b():
            numbers[kind_of(tensor, mixture, LLAMA_8B, shape=shape, tied=False)] += prod(shape)
        seconds = sum(count / rates[kind] for kind, count in numbers.items() if kind in rates)
        found.append(f"{mixture} {seconds:.1f} s")
    return ", ".join(found)


def csv_rows(figures: list[dict[str, Any]], numbers: int, settings: str) -> Iterator[dict[str, str]]:
    for figure in figures:
        for system, name in (("slothcore", "rate"), ("llama.cpp", "their_rate")):
            if name in figure:
                yield {
                    "benchmark": "gguf_quantize",
                    "system": system,
                    "case": figure["kind"],
                    "settings": settings,
                    "median_ms": f"{1e3 * numbers / figure[name]:.6g}",
                    "rate": f"{4 * figure[name] / 1e9:.4g} GB/s",
                }


if __name__ == "__main__":
    sys.exit(main())
