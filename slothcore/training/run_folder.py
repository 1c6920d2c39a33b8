"""The folder of a run: what lies where, who may write into it, and how to open what it holds.

output_dir/
    config.yaml         the options, complete: `slothcore train --config` repeats the run
    log.jsonl           a line every logging_steps, and one for each evaluation
    loss.png
    checkpoint-N/       see run_state.py
    adapter/ or model/  the result
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from slothcore.training.config import TrainConfig
from slothcore.training.report import LOG_FILE, PLOT_FILE
from slothcore.training.run_state import checkpoints, remove_folder, remove_partial

CONFIG_FILE = "config.yaml"
ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"
ADAPTER_CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """What to load: a base model, and an adapter to put on it or None. `config` is the run's, where there is one."""

    base: str
    adapter: Path | None = None
    config: TrainConfig | None = None


def check_output_dir(config: TrainConfig) -> None:
    """Raise ValueError if the output folder cannot be written into, or holds a run that this one would overwrite."""
    folder = Path(config.output_dir)
    check_writable(folder)
    _check_base_is_elsewhere(config)
    if config.resume_from_checkpoint:
        return
    results = [path for name in (ADAPTER_FOLDER, MODEL_FOLDER) if (path := folder / name).exists()]
    if results and not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"output_dir {folder} holds {results[0].name}, which is of no run; choose another folder")
    if config.overwrite_output_dir:
        return
    log = folder / LOG_FILE
    # An empty log is of a run that failed before its first line, as with a batch that does not fit: nothing is lost.
    if results or checkpoints(folder) or (log.is_file() and log.stat().st_size > 0):
        raise ValueError(
            f"output_dir {folder} already holds a run; choose another folder, "
            "or set resume_from_checkpoint: latest or overwrite_output_dir: true"
        )


def _check_base_is_elsewhere(config: TrainConfig) -> None:
    """Raise ValueError if the base model lies where this run deletes what was before, or writes its result."""
    folder, base = Path(config.output_dir).resolve(), Path(config.model or "").resolve()
    if config.model and base.exists() and base != folder and base.is_relative_to(folder):
        first = base.relative_to(folder).parts[0]
        if first in (ADAPTER_FOLDER, MODEL_FOLDER) or first.startswith("checkpoint-"):
            raise ValueError(
                f"model {config.model} lies in output_dir {config.output_dir}, where this run would replace it; "
                "choose another output_dir"
            )


def check_writable(folder: Path) -> None:
    """Raise ValueError unless `folder` is one that can be written into, or can be made; nothing is written yet."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        where = "is a file" if nearest == folder else f"would lie in {nearest}, which is a file"
        raise ValueError(f"output_dir {folder} {where}; choose a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir {folder}: {nearest} may not be written into; choose another folder")


def claim_output_dir(config: TrainConfig) -> Path:
    """Create the output folder, or empty it of the run that it holds if that is allowed; other files stay."""
    check_output_dir(config)
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be made ({error.strerror}); choose another folder") from error
    remove_partial(folder)
    if not config.resume_from_checkpoint:
        for checkpoint in checkpoints(folder):
            remove_folder(checkpoint)
        for result in (ADAPTER_FOLDER, MODEL_FOLDER):
            shutil.rmtree(folder / result, ignore_errors=True)
        for file in (LOG_FILE, PLOT_FILE):
            (folder / file).unlink(missing_ok=True)
    (folder / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    return folder


def find_source(name_or_run: str) -> Source:
    """What `name_or_run` names: a run's folder, an adapter's, a model's, or a model on the Hub.

    Raises: ValueError if a run has no result yet, or an adapter does not say its base.
    """
    folder = Path(name_or_run)
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        return _adapter_source(folder)
    # A model of the Hub may come with a config.yaml of its own.
    if not (folder / CONFIG_FILE).is_file() or (folder / "config.json").is_file():
        return Source(base=name_or_run)
    config = TrainConfig.from_yaml(folder / CONFIG_FILE)
    candidates = [folder / ADAPTER_FOLDER, folder / MODEL_FOLDER, *reversed(checkpoints(folder))]
    for candidate in candidates:
        if (candidate / ADAPTER_CONFIG_FILE).is_file():
            return _adapter_source(candidate)
        if (candidate / "config.json").is_file():
            return Source(base=str(candidate), config=config)
    raise ValueError(f"the run {folder} has saved nothing yet; let it reach a checkpoint or its end")


def _adapter_source(folder: Path) -> Source:
    run = next((parent for parent in (folder, folder.parent) if (parent / CONFIG_FILE).is_file()), None)
    config = TrainConfig.from_yaml(run / CONFIG_FILE) if run else None
    base = read_adapter_base(folder) or (config.model if config else None)
    if not base:
        raise ValueError(f"{folder / ADAPTER_CONFIG_FILE} does not say its base model; fill in base_model_name_or_path")
    return Source(base=base, adapter=folder, config=config)


def read_adapter_base(folder: Path) -> str | None:
    """`base_model_name_or_path` of an adapter folder. Raises ValueError if the file is not valid JSON."""
    path = folder / ADAPTER_CONFIG_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a valid adapter configuration: {error}") from error
