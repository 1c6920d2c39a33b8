"""The generated tables of the guides in docs/."""

import json
import re
import tempfile
from pathlib import Path

from benchmarks.shapes import LLAMA_3_1_8B
from benchmarks.zoo_shapes import ZOO
from slothcore.commands.planning import Plans, longest_pass, plans_of
from slothcore.data import formats
from slothcore.data.templates import BUILTIN_TEMPLATES, builtin_template
from slothcore.training.config import TrainConfig
from slothcore.training.micro_batches import GIB

# Memory of usual GPUs; 15 GiB are what a T4 of 16 GB has.
GPUS_GIB = (8, 12, 15, 24, 48, 80)
SHAPES = {
    name: LLAMA_3_1_8B if name == "Llama-3.1-8B" else ZOO[name]
    for name in (
        "Llama-3.2-1B",
        "Phi-3.5-mini",
        "Qwen2.5-7B",
        "Llama-3.1-8B",
        "Gemma-2-9B",
        "Mistral-Nemo",
        "Qwen3-30B-A3B",
    )
}


def layouts_table() -> str:
    """The layouts of records, as the docstring of `data/formats.py` has them."""
    assert formats.__doc__ is not None
    lines = [line for line in formats.__doc__.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells[2:]] == list(formats.LAYOUTS)
    rows = (f"| `{name}` | {fields} | {becomes} |" for name, fields, becomes in cells[2:])
    return "\n".join(["| Format | Fields | Becomes |", "| --- | --- | --- |", *rows])


def templates_table() -> str:
    """The built-in chat templates: what each is, and the control tokens that it writes, as its file begins."""
    rows = []
    for name in BUILTIN_TEMPLATES:
        source = builtin_template(name)
        title = re.match(r"\{#-? *(.*?)[.,;]? *\n", source)
        tokens = re.search(r"(?m)^Control tokens: (.*)$", source)
        assert title is not None
        assert tokens is not None
        listed = " ".join(f"`{token}`" for token in tokens[1].split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {title[1]} | {'none' if tokens[1] == 'none' else listed} |")
    return "\n".join(["| `chat_template` | Format | Control tokens |", "| --- | --- | --- |", *rows])


def fits_table() -> str:
    """The longest document of each model on each GPU, as `slothcore plan` predicts it."""
    head = ["Model", *(f"{gib} GiB" for gib in GPUS_GIB)]
    rows = []
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(shape), encoding="utf-8")
            plans = plans_of(TrainConfig(model=folder, optim="adamw_8bit"), gpu_gib=GPUS_GIB[0])
        rows.append([name, *(f"{_longest(plans, 'mlp', gib)} / {_longest(plans, 'offload', gib)}" for gib in GPUS_GIB)])
    lines = [head, ["---", *("---:" for _ in GPUS_GIB)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _longest(plans: Plans, mode: str, gib: int) -> str:
    """Tokens of the longest document, hundreds below it; no more than the model takes."""
    tokens = min(longest_pass(plans.modes[mode], gib * GIB), plans.longest_document)  # type: ignore[index]
    return f"{tokens // 100 * 100:,}" if tokens >= 100 else "-"
