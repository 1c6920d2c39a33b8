"""What a run is made of, as plain values for its notes: model, data, options, versions, machine, memory."""

import hashlib
import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from slothcore.layers.experts import ExpertLinear
from slothcore.layers.linear import Linear
from slothcore.training.batches import RowSet
from slothcore.training.config import TrainConfig
from slothcore.training.memory_plan import MemoryPlan
from slothcore.version import __version__

if TYPE_CHECKING:
    from slothcore.models.decoder import Decoder

PACKAGES = ("torch", "triton", "safetensors", "huggingface_hub", "tokenizers", "bitsandbytes", "numpy", "jinja2")
# One object a line: lines are rows.
LINES_ARE_ROWS = frozenset({".jsonl", ".ndjson"})
# Reading a larger file only for its hash would hold up the run for more than some ten seconds.
LARGEST_HASHED = 8 * 2**30
CHUNK = 2**20
HISTOGRAM_BARS = 40


def model_facts(model: "Decoder", name: str | None) -> dict[str, Any]:
    """Its name and size."""
    linears = (module for module in model.modules() if isinstance(module, Linear | ExpertLinear) and module.is_nf4)
    packed = sum(m.in_features * m.out_features * getattr(m, "num_experts", 1) for m in linears)
    return {
        "name": name,
        "architecture": next(iter(model.hf_config.get("architectures") or []), None),
        "weights": sum(p.numel() for p in model.parameters()) + packed,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "bits": model.bits,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def option_facts(config: TrainConfig) -> list[dict[str, Any]]:
    """Each option with its default and group; no secrets."""
    groups = {name: item.metadata.get("group") for name, item in config.__dataclass_fields__.items()}
    defaults = TrainConfig().to_dict()
    names = sorted(config.to_dict(), key=lambda name: list(dict.fromkeys(groups.values())).index(groups[name]))
    values = config.to_dict()
    return [{"name": n, "value": values[n], "default": defaults[n], "group": groups[n]} for n in names]


def version_facts() -> dict[str, str]:
    """slothcore, Python and the packages that compute or read."""
    found = {"slothcore": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What it computes on."""
    facts: dict[str, Any] = {"device": "CPU"}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts = {
            "device": gpu.name,
            "GPU memory": f"{gpu.total_memory / 2**30:.1f} GiB",
            "compute capability": f"{gpu.major}.{gpu.minor}",
            "CUDA": torch.version.cuda,
        }
    return {**facts, "system": f"{platform.system()} {platform.machine()}", "CPU cores": os.cpu_count()}


def file_facts(config: TrainConfig) -> list[dict[str, Any]]:
    """Path, size, hash and rows of each data file; of data that are no local file, the name alone."""
    facts = []
    for use, names in (("training", config.data), ("evaluation", config.eval_data)):
        for path in _files([names] if isinstance(names, str) else names or ()):
            facts.append({"path": str(path), "use": use, **_contents(path)})
    return facts


def _files(names: Sequence[str]) -> Iterator[Path]:
    for path in map(Path, names):
        if path.is_dir():
            yield from sorted(inside for inside in path.iterdir() if inside.is_file())
        else:
            yield path


def _contents(path: Path) -> dict[str, Any]:
    """The file is read once, in pieces. Empty for what is no file here, or one that cannot be read any more."""
    try:
        size = path.stat().st_size
        return {"bytes": size} if size > LARGEST_HASHED else {"bytes": size, **_read(path)}
    except OSError:
        return {}


def _read(path: Path) -> dict[str, Any]:
    """Hash, and rows if they are lines."""
    digest, rows, begun = hashlib.sha256(), 0, False
    counts = path.suffix.lower() in LINES_ARE_ROWS
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            if counts:
                # Blank lines are no rows, and a line may reach over several pieces.
                first, *others = chunk.split(b"\n")
                begun = begun or bool(first.strip())
                if others:
                    rows += begun + sum(1 for line in others[:-1] if line.strip())
                    begun = bool(others[-1].strip())
    return {"sha256": digest.hexdigest(), **({"rows": rows + begun} if counts else {})}


def row_facts(rows: RowSet) -> dict[str, Any]:
    """Counts, and a histogram of the documents' lengths: bar i counts those of edges[i] to edges[i + 1] - 1 tokens."""
    lengths = rows.document_lengths
    shortest, longest = min(lengths), max(lengths)
    width = -(-(longest - shortest + 1) // HISTOGRAM_BARS)
    counts = [0] * -(-(longest - shortest + 1) // width)
    for length in lengths:
        counts[(length - shortest) // width] += 1
    return {
        "documents": len(lengths),
        "rows": len(rows),
        "tokens": sum(lengths),
        "targets": sum(rows.row_targets),
        "median": median(lengths),
        "longest": longest,
        "edges": [shortest + width * i for i in range(len(counts) + 1)],
        "counts": counts,
    }


def memory_facts(plan: MemoryPlan, *, tokens: int, passes: int) -> dict[str, Any]:
    """The peak that is predicted for passes of `tokens` tokens, in bytes, and what it is made of."""
    parts = {
        "weights": plan.weights + plan.trained,
        "gradients": plan.gradients,
        "optimizer": plan.optimizer,
        "activations": plan.activations(tokens),
        "decoded weights": plan.decoded,
    }
    return {"predicted": plan.peak(tokens, passes=passes), "parts": parts, "tokens": tokens}
