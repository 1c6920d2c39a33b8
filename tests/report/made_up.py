"""Run folders written by hand, for tests of the page: what a training leaves, without the training."""

import json
import math
from pathlib import Path
from typing import Any

GIB = 2**30


def write_run(folder: Path, *, steps: int = 60, loss: float = 3.0, **notes: Any) -> Path:
    """A run of `steps` logged steps with three evaluations, and notes of which any part can be replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "epoch": step / steps,
                "loss": 1 + (loss - 1) * math.exp(-3 * step / steps) + 0.05 * math.sin(7 * step),
                "learning_rate": 2e-4 * (1 - step / steps),
                "grad_norm": 0.5 + 0.2 * math.cos(5 * step),
                "tokens": 1000 * step,
                "tokens_per_second": 5000 + 10 * (step % 7),
                "elapsed": 0.2 * step,
                "memory_gib": 10.0,
            }
        )
        if step % (steps // 3) == 0:
            lines.append({"step": step, "eval_loss": 1.1 + step / 1e6, "eval_perplexity": math.exp(1.1)})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({**made_up_notes(), **notes}), encoding="utf-8")
    return folder


def made_up_notes() -> dict[str, Any]:
    """Of a run on a GPU."""
    return {
        "status": "finished",
        "started": 1.7e9,
        "ended": 1.7e9 + 3600,
        "total_steps": 60,
        "model": {"name": "models/babyllama", "weights": 1_000_000, "trained": 20_000, "bits": 4},
        "machine": {"device": "NVIDIA H100", "CUDA": "12.8"},
        "versions": {"slothcore": "0.1.0", "torch": "2.11.0", "triton": "3.6.0"},
        "files": [{"path": "data/train.jsonl", "use": "training", "bytes": 2048, "sha256": "ab" * 32, "rows": 1234}],
        "rows": {
            "training": {
                "documents": 1234,
                "rows": 100,
                "tokens": 45678,
                "targets": 22839,
                "median": 37,
                "longest": 59,
                "edges": [10, 20, 30, 40, 50, 60],
                "counts": [1, 200, 800, 0, 233],
            }
        },
        "memory": {"predicted": 11 * GIB, "parts": {"weights": 8 * GIB, "activations": 3 * GIB}, "actual": 10 * GIB},
        "options": [
            {"name": "bits", "value": 4, "default": 4, "group": "Model"},
            {"name": "r", "value": 32, "default": 16, "group": "LoRA"},
            {"name": "learning_rate", "value": 0.0002, "default": 0.0002, "group": "Optimization"},
        ],
    }


def add_samples(folder: Path, *lines: object) -> None:
    """Append samples, or texts as they are, to what the model said."""
    with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(line if isinstance(line, str) else json.dumps(line) + "\n")


def add_lines(folder: Path, *lines: object) -> None:
    """Append records, or texts as they are, to the log."""
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(line if isinstance(line, str) else json.dumps(line) + "\n")
