"""Time the export of an 8B-shaped model in NF4 with an adapter, beside a bare write of the same bytes to the same disk.

    python benchmarks/export.py                                   # every case, the shape of Llama-3.1-8B, on the GPU
    python benchmarks/export.py --formats merged gguf:q4_k_m      # these alone
    python benchmarks/export.py --folder /dev/shm                 # without a disk in the way
    python benchmarks/export.py --gigabytes 0.05                  # the machinery alone, on whatever there is

Each case runs in a process of its own: it loads or draws the model, then exports it without the check, up to files
that are on the disk under their final name; then the check is timed alone, on the same files. The peak of host memory
is that of the export, and of the check, beyond what the process held before it; a GGUF file is mapped to be checked,
and its own pages, which the system may take back, count there. A bare write is one thread that writes as many bytes
from one small buffer, in pieces as large as the export's, and waits for the disk; it runs behind each case, on the room
that this one has left. One runs before the first case as well, and is not counted: whoever touches memory or blocks
first pays for it. What ends in `:original` needs the 16-bit files, which are written first.
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import harness
from benchmarks.loading import forget_peak_memory, memory_status, model_config, write_checkpoint
from slothcore.export.export import export_model
from slothcore.export.formats import FORMATS
from slothcore.layers.linear import Linear
from slothcore.lora.attach import add_lora
from slothcore.lora.merge import merged_weight
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config, load_model
from slothcore.models.writing import PIECE_BYTES

# A format, its dtype or the base after a colon.
CASES = ("merged", "merged:original", "merged-4bit", "gguf:q8_0", "gguf:q4_k_m", "gguf:q5_k_m", "gguf:q6_k", "gguf:f16")
RANK = 16
Row = dict[str, Any]
T = TypeVar("T")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", metavar="FORMAT[:DTYPE]", help=f"default: {' '.join(CASES)}")
    parser.add_argument("--gigabytes", type=float, default=16.0, help="of the 16-bit model; 16 is Llama-3.1-8B")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write; default: a temporary folder")
    parser.add_argument(
        "--originals", type=Path, metavar="DIR", help="where the 16-bit files of merged:original go; default: --folder"
    )
    parser.add_argument("--no-check", action="store_true", help="do not time the self-check")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the CSV; default: benchmarks/results on a GPU, none on a CPU"
    )
    parser.add_argument("--worker", metavar="CASE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.formats is None:
        args.formats = [case for case in CASES if case.partition(":")[0] in FORMATS]
    for case in args.formats:
        if case.partition(":")[0] not in FORMATS:
            parser.error(f"{case} is no format; there are {', '.join(FORMATS)}")
    if args.folder is None:
        args.folder = Path(tempfile.gettempdir())
    if args.out is None and args.device == "cuda":
        args.out = harness.RESULTS
    return args


def main(argv: list[str] | None = None) -> int:
    """Export, time, print, record. Returns: the exit status."""
    args = parse_arguments(argv)
    if args.worker:
        print(json.dumps(timed_export(args)))
        return 0
    scratch = Path(tempfile.mkdtemp(prefix="slothcore-benchmark-export-", dir=args.folder))
    originals = Path(tempfile.mkdtemp(prefix="slothcore-benchmark-original-", dir=args.originals or args.folder))
    rows: list[Row] = []
    failed: list[str] = []
    try:
        timed_write(scratch / "bare", int(args.gigabytes * 1e9))
        for case in args.formats:
            if case.endswith(":original") and not (originals / "config.json").exists():
                write_checkpoint(originals, args.gigabytes, 5 * 10**9, device=args.device)
            row = exported_in_a_process(case, scratch, originals, args)
            if row is None:
                failed.append(case)
                continue
            row["bare_seconds"] = timed_write(scratch / "bare", row["bytes"])
            rows.append(row)
            print(f"{case}: {row['seconds']:.1f} s; {row['found']}", flush=True)
        if args.out is not None and rows:
            settings = f"gigabytes={args.gigabytes:g} r={RANK} device={args.device} folder={args.folder}"
            print(f"appended to {harness.append_csv(args.out, [csv_row(row, settings) for row in rows])}")
        print(f"{harness.environment()['gpu']}, {os.cpu_count()} CPU cores, exported to {args.folder}")
        print(table(rows))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(originals, ignore_errors=True)
    if failed:
        print(f"failed, as said above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def exported_in_a_process(case: str, scratch: Path, originals: Path, args: argparse.Namespace) -> Row | None:
    """None, after its own words on stderr, if it failed."""
    command = [sys.executable, __file__, "--worker", case, "--folder", str(scratch), "--originals", str(originals)]
    command += ["--gigabytes", str(args.gigabytes), "--device", args.device]
    command += ["--no-check"] if args.no_check else []
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(scratch / "exported", ignore_errors=True)
    if finished.returncode != 0:
        return None
    return {"case": case, **json.loads(finished.stdout.splitlines()[-1])}


def timed_export(args: argparse.Namespace) -> Row:
    """One case, with the model there and its adapter moved."""
    warnings.simplefilter("ignore")
    format, _, variant = args.worker.partition(":")
    is_original = variant == "original"
    options: dict[str, Any] = {"format": format}
    options |= {"base": "original"} if is_original else {"dtype": variant or None}
    model = adapted_model(args, from_files=is_original)
    target = args.folder / "exported"
    for layer in model.model.layers[0].modules():
        if isinstance(layer, Linear):
            merged_weight(layer, torch.float32)  # starts and compiles what the export calls
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before_on_gpu = torch.cuda.memory_allocated()
    found, seconds, peak = measured(lambda: export_model(model, None, target, check=False, **options))
    row: Row = {"seconds": seconds, "peak_bytes": peak, "found": found}
    if args.device == "cuda":
        row["gpu_bytes"] = torch.cuda.max_memory_allocated() - before_on_gpu
    row["bytes"] = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    if not args.no_check:
        chosen = FORMATS[format]
        bases = {"base": "original" if is_original else "loaded"} if chosen.takes_base else {}
        dtype = options.get("dtype") or chosen.default_dtype
        check = partial(chosen.writer().check, model, target, dtype, give_up=True, **bases)
        row["found"], row["check_seconds"], row["check_peak_bytes"] = measured(check)
    shutil.rmtree(target)
    return row


def measured(call: Callable[[], T]) -> tuple[T, float, int]:
    """What a call gives, its seconds, and its peak of host memory in bytes, beyond what the process needs before it."""
    # What was freed and kept for later would be used by the call, and not be counted.
    gc.collect()
    if torch.cuda.is_initialized() and hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()
    ctypes.CDLL(None).malloc_trim(0)
    forget_peak_memory()
    before = memory_status("VmRSS")
    began = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - began
    return result, seconds, memory_status("VmHWM") - before


def adapted_model(args: argparse.Namespace, *, from_files: bool) -> Decoder:
    torch.manual_seed(0)
    if from_files:
        model = load_model(args.originals, bits=4, device=args.device)
    else:
        model = from_config(model_config(args.gigabytes), bits=4, device=args.device)
    add_lora(model, r=RANK)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.01)
    return model.eval()


def timed_write(file: Path, size: int) -> float:
    """Seconds of one thread that writes so many bytes, until they are on the disk. The file is removed."""
    buffer = memoryview(os.urandom(PIECE_BYTES))
    began = time.perf_counter()
    with file.open("wb", buffering=0) as stream:
        for position in range(0, size, PIECE_BYTES):
            stream.write(buffer[: min(PIECE_BYTES, size - position)])
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - began
    file.unlink()
    return seconds


def table(rows: list[Row]) -> str:
    header = ["", "GB", "s", "GB/s", "bare GB/s", "of bare", "peak host GB", "peak GPU GB", "check s", "its peak"]
    cells = []
    for row in rows:
        size = row["bytes"] / 1e9
        gpu = f"{row['gpu_bytes'] / 1e9:.2f}" if "gpu_bytes" in row else ""
        check = ["", ""]
        if "check_seconds" in row:
            check = [f"{row['check_seconds']:.1f}", f"{row['check_peak_bytes'] / 1e9:.2f}"]
        figures = [f"{size:.2f}", f"{row['seconds']:.1f}", f"{size / row['seconds']:.2f}"]
        figures += [f"{size / row['bare_seconds']:.2f}", f"{row['bare_seconds'] / row['seconds']:.0%}"]
        cells.append([row["case"], *figures, f"{row['peak_bytes'] / 1e9:.2f}", gpu, *check])
    return harness.format_table(header, cells)


def csv_row(row: Row, settings: str) -> Row:
    return {
        "benchmark": "export",
        "system": "slothcore",
        "case": row["case"],
        "settings": settings,
        "median_ms": f"{1e3 * row['seconds']:.6g}",
        "rate": f"{row['bytes'] / 1e9 / row['seconds']:.4g} GB/s",
        "fraction_of_floor": f"{row['bare_seconds'] / row['seconds']:.4g}",
        "peak_gib": f"{row['peak_bytes'] / 2**30:.4g}",
    }


if __name__ == "__main__":
    sys.exit(main())
