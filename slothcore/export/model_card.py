"""README.md of a repository: what the model is, how to load it, and what it was trained on and with."""

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from slothcore.lora.attach import lora_config_of
from slothcore.models.decoder import Decoder
from slothcore.models.hub import CONFIG_FILE
from slothcore.models.load import read_config
from slothcore.report.saved_run import SavedRun
from slothcore.report.words import count, duration, figure
from slothcore.version import __version__

MARK = "<!-- Made by slothcore, which writes it anew with every upload, unless this line is gone. -->"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# What Markdown would take for emphasis, HTML, a link or an end of line: <s>[INST] and .*_proj among it.
MARKUP = re.compile(r"[\\`*<>~&\[\]\n]|\b_|_\b")
PLACEHOLDER = "THIS_REPOSITORY"

TRANSFORMERS = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repository}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{repository}")
```"""
PEFT = """\
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{repository}")
```"""
LLAMA_CPP = """\
```console
llama-cli -hf {repository}
```"""
LLAMA_CPP_LORA = """\
```console
llama-cli -m BASE.gguf --lora FILE_OF_THIS_REPOSITORY.gguf
```"""
OLLAMA = """\
```console
ollama run hf.co/{repository}
```"""
# Of each format: Hugging Face's names of the library and of the relation to the base, what it is, how it is loaded.
KINDS = {
    "adapter": ("peft", "adapter", "A LoRA adapter for {base}", PEFT),
    "merged": ("transformers", "finetune", "A fine-tune of {base}", TRANSFORMERS),
    "merged-4bit": ("transformers", "quantized", "A fine-tune of {base} in 4 bits (NF4, bitsandbytes)", TRANSFORMERS),
    "gguf": ("gguf", "quantized", "A fine-tune of {base} in GGUF", LLAMA_CPP),
    "ollama": ("gguf", "quantized", "A fine-tune of {base} in GGUF, with a Modelfile", OLLAMA),
    "gguf-adapter": ("gguf", "adapter", "A LoRA adapter for {base} in GGUF", LLAMA_CPP_LORA),
}
# Options that a reader wants to know whatever they are; of all others those that were set. None that names a file here.
ALWAYS = (
    *("bits", "max_seq_length", "r", "lora_alpha", "target_modules", "learning_rate", "lr_scheduler_type", "optim"),
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "packing", "seed"),
)
GROUPS = ("Model", "Data", "LoRA", "Optimization")
NEVER = frozenset(
    {
        *("adapter", "data", "device", "eval_data", "local_files_only", "logging_dir", "memory_budget", "model"),
        *("output_dir", "report_to", "resume_from_checkpoint", "revision", "run_name", "sample_prompts", "token"),
    }
)


def model_card(model: Decoder, format: str, *, repository: str = PLACEHOLDER, run: str | Path | None = None) -> str:
    """The text of README.md.

    Args:
        format: one of the formats of export.
        repository: its name on the Hub.
        run: the folder of the run that trained the model: its options, data, losses and versions are listed.
    Raises: FileNotFoundError or ValueError if `run` is no run's folder.
    """
    library, relation, title, snippet = KINDS[format]
    base = public_base(model)
    config = lora_config_of(model)
    named = base or "a model that its configuration names"
    head = [
        "---",
        *([f"base_model: {base}"] if base else []),
        f"library_name: {library}",
        *([f"base_model_relation: {relation}"] if base else []),
        "pipeline_tag: text-generation",
        "tags:",
        *(["- lora"] if config is not None else []),
        "- slothcore",
        "---",
    ]
    made = f"Made with slothcore {__version__}."
    if config is not None:
        made = f"Rank {config.r}, alpha {config.lora_alpha:g}. {made}"
    parts = ["\n".join(head), f"# {title.format(base=named)}", made, snippet.format(repository=repository)]
    scaled = scaled_rope(model)
    if relation == "adapter" and scaled is not None:
        parts.append(f"Trained with RoPE scaled ({scaled}): give the base that `rope_scaling`, or the output differs.")
    if run is not None:
        parts += _training(SavedRun(Path(run)))
    return "\n\n".join([*parts, MARK]) + "\n"


def public_base(model: Decoder) -> str | None:
    """The name of the base model, if it is one on the Hub and not a folder of this machine."""
    config = lora_config_of(model)
    name = model.name_or_path if config is None else config.base_model_name_or_path
    is_public = name is not None and HUB_NAME.fullmatch(name) is not None and not Path(name).exists()
    return name if is_public else None


def scaled_rope(model: Decoder) -> str | None:
    """How far and by which type RoPE is scaled where the model's folder does not say so; None where it does."""
    if model.folder is None or not (model.folder / CONFIG_FILE).is_file():
        return None
    rope = model.config.rope
    if rope == read_config(model.folder)[2].rope:
        return None
    return f"{rope.rope_type}, factor {rope.factor:g}, {model.config.longest_document} positions"


def warn_of_scaled_rope(model: Decoder) -> None:
    """Say of an adapter what no field of its files does, and others have to know."""
    scaled = scaled_rope(model)
    if scaled is not None:
        warnings.warn(
            f"the adapter was trained with RoPE scaled ({scaled}), which its files have no field for; other programs "
            "give other logits unless their base has that rope_scaling, and the format merged says it by itself",
            stacklevel=3,
        )


def _training(run: SavedRun) -> Iterator[str]:
    """The sections that tell of a run."""
    yield "## Training"
    yield _table(["", ""], list(_outcome(run)))
    files = [[_data_name(item), str(item.get("use", "")), count(item.get("rows"))] for item in run.items("files")]
    if files:
        yield "### Data"
        yield _table(["Name", "Use", "Rows"], files)
    options = [option for option in run.options() if _is_shown(option)]
    if options:
        yield "### Options"
        yield _table(["Option", "Value"], [[f"`{option['name']}`", _value(option["value"])] for option in options])
    versions = run.section("versions")
    if versions:
        yield "### Versions"
        yield _table(["Package", "Version"], [[str(name), str(version)] for name, version in versions.items()])


def _outcome(run: SavedRun) -> Iterator[list[str]]:
    """How far it went, and its losses."""
    columns = run.log.columns
    yield ["Optimizer steps", count(run.step)]
    for label, name in (("Epochs", "epoch"), ("Tokens", "tokens")):
        if columns[name]:
            yield [label, figure(columns[name].last)]
    if columns["elapsed"]:
        yield ["Time", duration(columns["elapsed"].last)]
    machine = run.section("machine").get("device")
    if machine:
        yield ["Machine", str(machine)]
    loss = columns["loss"]
    if loss:
        yield ["Loss, first and last", f"{figure(loss.values[0])}, {figure(loss.last)}"]
    evaluated = columns["eval_loss"]
    if evaluated:
        lowest, step = min(zip(evaluated.values, evaluated.steps, strict=True))
        yield ["Evaluation loss, last", figure(evaluated.last)]
        yield ["Evaluation loss, lowest", f"{figure(lowest)} at step {count(step)}"]


def _data_name(item: dict[str, Any]) -> str:
    """The name of a data set on the Hub, or of a file without the folders of this machine."""
    path = str(item.get("path", ""))
    is_here = "bytes" in item or PurePath(path).is_absolute()
    return _literal(PurePath(path).name if is_here else path)


def _is_shown(option: dict[str, Any]) -> bool:
    if option["name"] in NEVER or option.get("group", "Optimization") not in GROUPS:
        return False
    return option["name"] in ALWAYS or option.get("value") != option.get("default")


def _value(value: Any) -> str:
    """An option as one reads it; a path without its folders."""
    if isinstance(value, str) and (path := PurePath(value)).name:
        # Not Path.is_file, which raises for texts that are too long for a name, as templates are.
        is_path = path.is_absolute() or path.suffix == ".jinja" or os.path.isfile(value)
        value = path.name if is_path else value
    if isinstance(value, list | tuple):
        return _literal(", ".join(map(str, value))) or "none"
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    return figure(value) if isinstance(value, float) else _literal(str(value))


def _literal(text: str) -> str:
    """A text as Markdown shows it unchanged: as code where it means something there, the end of a line as \\n."""
    if not MARKUP.search(text):
        return text
    text = text.replace("\n", "\\n")
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in (text[:1], text[-1:]) else f"{ticks}{text}{ticks}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, whatever the cells hold."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
