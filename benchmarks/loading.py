"""Time the loading of a 16 GB checkpoint to NF4 beside a bare read of the same files.

    python benchmarks/loading.py                           # 16 GB, the shape of Llama-3.1-8B, on the GPU
    python benchmarks/loading.py --gigabytes 0.2           # the machinery alone, on whatever there is

The files are written first, in bfloat16 and in shards of at most 5 GB. A bare read uses as many threads and as large
reads as the loader, into one small buffer a thread, and does nothing else: it is what the disk (cold) or the page cache
(warm) can give. Before each cold run the page cache is asked to drop the files, and the share that it kept is printed:
a cold figure with much kept is no figure of the disk. Loading runs in a process of its own, so that its peak memory,
beyond what the process held after importing, starting CUDA and compiling, is the loader's; on a CPU the model is
subtracted too. The table's last column compares that with the largest shard.
"""

import argparse
import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import harness, shapes
from benchmarks.checkpoint import WEIGHT_STD, shard_shapes, write_json
from slothcore.kernels import nf4, nf4_eager
from slothcore.models.load import load_model
from slothcore.models.reading import PIECE_BYTES, THREADS

INDEX_FILE = "model.safetensors.index.json"
Row = dict[str, Any]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=16.0, help="size of the checkpoint; 16 is Llama-3.1-8B")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 16, 32))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--shard-gigabytes", type=float, default=5.0, help="largest size of a shard")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write it; default: a temporary folder")
    parser.add_argument("--keep", action="store_true", help="keep the files, and use those that are there already")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the CSV; default: benchmarks/results on a GPU, none on a CPU"
    )
    parser.add_argument("--worker", choices=("cold", "warm"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.gigabytes <= 0 or args.shard_gigabytes <= 0:
        parser.error("sizes must be positive")
    if args.out is None and args.device == "cuda":
        args.out = harness.RESULTS
    return args


def main(argv: list[str] | None = None) -> int:
    """Write, time, print, record. Returns: the exit status."""
    args = parse_arguments(argv)
    if args.worker:
        print(json.dumps(timed_load(args)))
        return 0
    base = args.folder or Path(tempfile.gettempdir())
    folder = base / f"slothcore-benchmark-loading-{args.gigabytes:g}"
    try:
        began = time.perf_counter()
        files = write_checkpoint(folder, args.gigabytes, int(args.shard_gigabytes * 1e9), device=args.device)
        total, largest = sum(sizes := [file.stat().st_size for file in files]), max(sizes)
        print(f"wrote {total / 1e9:.2f} GB in {len(files)} shards to {folder}: {time.perf_counter() - began:.0f} s")
        rows = []
        for state in ("cold", "warm"):
            rows.append(timed_read(files, state))
            rows.append(loaded_in_a_process(folder, state, args))
        for row in rows:
            row["gigabytes_per_second"] = total / 1e9 / row["seconds"]
        for bare, load in zip(rows[::2], rows[1::2], strict=True):
            load["of_bare"] = load["gigabytes_per_second"] / bare["gigabytes_per_second"]
            load["of_shard"] = load["peak_bytes"] / largest
        if args.out is not None:
            settings = f"bits={args.bits} gigabytes={total / 1e9:.2f} shards={len(files)} device={args.device}"
            print(f"appended to {harness.append_csv(args.out, [csv_row(row, settings) for row in rows])}")
        print(
            f"{harness.environment()['gpu']}, {os.cpu_count()} CPU cores, {THREADS} reading threads, --bits {args.bits}"
        )
        print(table(rows))
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def model_config(gigabytes: float) -> dict[str, Any]:
    """Llama-3.1-8B, in proportion: narrower until at least four layers fit, then as many layers as the size allows."""
    config = dict(shapes.LLAMA_3_1_8B)
    scaled = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    for divisor in (1, 2, 4, 8):
        config |= {key: shapes.LLAMA_3_1_8B[key] // divisor for key in scaled} | {"num_hidden_layers": 1}
        layer, rest = (sum(map(bf16_bytes, group.values())) for group in shard_shapes(config))
        config["num_hidden_layers"] = max(1, round((gigabytes * 1e9 - rest) / layer))
        if config["num_hidden_layers"] >= 4:
            break
    return config


def bf16_bytes(shape: tuple[int, ...]) -> int:
    return 2 * prod(shape)


def write_checkpoint(folder: Path, gigabytes: float, shard_bytes: int, *, device: str) -> list[Path]:
    """Write shards, index and config.json; kept if they are there already. Returns: the shards.

    All matrices begin with the same normal values, drawn once, so that writing waits for nothing but the disk.
    """
    config = model_config(gigabytes)
    tensors = {name: shape for group in shard_shapes(config) for name, shape in group.items()}
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors.items():
        if groups[-1] and sum(map(bf16_bytes, groups[-1].values())) + bf16_bytes(shape) > shard_bytes:
            groups.append({})
        groups[-1][name] = shape
    files = [folder / f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if (folder / INDEX_FILE).exists():
        return files
    if shutil.disk_usage(folder.parent).free < 1.05e9 * gigabytes:
        raise SystemExit(f"{folder.parent} has no room for {gigabytes:g} GB; give another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(0)
    values = torch.empty(max(map(prod, tensors.values())), dtype=torch.bfloat16, device=device)
    data = values.normal_(0, WEIGHT_STD, generator=generator).cpu().view(torch.uint8).numpy().data
    for file, group in zip(files, groups, strict=True):
        write_shard(file, group, data)
    weight_map = {name: file.name for file, group in zip(files, groups, strict=True) for name in group}
    write_json(folder / "config.json", config)
    write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    return files


def write_shard(file: Path, group: dict[str, tuple[int, ...]], data: memoryview) -> None:
    """One safetensors file whose tensors are the first bytes of `data`, on the disk when this returns."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in group.items():
        begin, end = end, end + bf16_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for shape in group.values():
            stream.write(data[: bf16_bytes(shape)])
        stream.flush()
        # The page cache drops only what has reached the disk.
        os.fsync(stream.fileno())


def drop_from_page_cache(files: list[Path]) -> float:
    """Ask for it. Returns: the share of the bytes that is still there."""
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return share_in_page_cache(files)


def share_in_page_cache(files: list[Path]) -> float:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    resident = pages = 0
    for file in files:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            count = -(-len(mapped) // mmap.PAGESIZE)
            flags = ctypes.create_string_buffer(count)
            view = torch.frombuffer(mapped, dtype=torch.uint8)
            if libc.mincore(view.data_ptr(), len(mapped), flags) != 0:
                raise OSError(ctypes.get_errno(), "mincore")
            del view  # or the mapping could not be closed
            resident += torch.frombuffer(flags, dtype=torch.uint8)[:count].bitwise_and(1).sum().item()
            pages += count
    return resident / pages


def timed_read(files: list[Path], state: str) -> Row:
    """Read every byte with the loader's threads and sizes, each thread into a buffer of its own."""
    kept = drop_from_page_cache(files) if state == "cold" else share_in_page_cache(files)
    own = threading.local()

    def read(handle: int, offset: int) -> int:
        if not hasattr(own, "buffer"):
            own.buffer = memoryview(bytearray(PIECE_BYTES))
        return os.preadv(handle, [own.buffer], offset)

    handles = [os.open(file, os.O_RDONLY) for file in files]
    try:
        for handle in handles:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        began = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            jobs = [
                pool.submit(read, handle, offset)
                for handle, file in zip(handles, files, strict=True)
                for offset in range(0, file.stat().st_size, PIECE_BYTES)
            ]
            count = sum(job.result() for job in jobs)
        seconds = time.perf_counter() - began
    finally:
        for handle in handles:
            os.close(handle)
    if count != sum(file.stat().st_size for file in files):
        raise SystemExit("the bare read came to an end too early")
    return {"system": "bare read", "state": state, "seconds": seconds, "cached": kept}


def loaded_in_a_process(folder: Path, state: str, args: argparse.Namespace) -> Row:
    command = [sys.executable, __file__, "--worker", state, "--folder", str(folder)]
    command += ["--bits", str(args.bits), "--device", args.device]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"system": "slothcore", "state": state, **json.loads(finished.stdout.splitlines()[-1])}


def timed_load(args: argparse.Namespace) -> Row:
    """Load once, with everything started and compiled before."""
    ops = nf4 if args.device == "cuda" else nf4_eager
    ops.nf4_quantize(torch.zeros(4096, 4096, dtype=torch.bfloat16, device=args.device))
    files = sorted(args.folder.glob("*.safetensors"))
    kept = drop_from_page_cache(files) if args.worker == "cold" else share_in_page_cache(files)
    forget_peak_memory()
    before = memory_status("VmRSS")
    began = time.perf_counter()
    model = load_model(args.folder, bits=args.bits, device=args.device)
    if args.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = memory_status("VmHWM") - before
    if args.device == "cpu":
        peak -= sum(tensor.nbytes for tensor in model.state_dict().values())
    return {"seconds": seconds, "cached": kept, "peak_bytes": peak}


def forget_peak_memory() -> None:
    """Begin to count the peak anew; a kernel that refuses leaves an earlier, higher one, which hides nothing."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        print(f"the peak of memory includes the start of the process: {error}")


def memory_status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def table(rows: list[Row]) -> str:
    header = ["", "page cache", "held before", "s", "GB/s", "of bare read", "peak host GB", "of largest shard"]
    cells = []
    for row in rows:
        figures = [f"{row['cached']:.0%}", f"{row['seconds']:.2f}", f"{row['gigabytes_per_second']:.2f}"]
        if row["system"] == "slothcore":
            figures += [f"{row['of_bare']:.0%}", f"{row['peak_bytes'] / 1e9:.2f}", f"{row['of_shard']:.0%}"]
        cells.append([row["system"], row["state"], *figures, *[""] * (6 - len(figures))])
    return harness.format_table(header, cells)


def csv_row(row: Row, settings: str) -> Row:
    known = {
        "benchmark": "loading",
        "system": row["system"],
        "case": row["state"],
        "settings": f"{settings} cached={row['cached']:.2f}",
        "median_ms": f"{1e3 * row['seconds']:.6g}",
        "rate": f"{row['gigabytes_per_second']:.4g} GB/s",
    }
    if row["system"] == "slothcore":
        known |= {"fraction_of_floor": f"{row['of_bare']:.4g}", "peak_gib": f"{row['peak_bytes'] / 2**30:.4g}"}
    return known


if __name__ == "__main__":
    sys.exit(main())
