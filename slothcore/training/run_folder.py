"""The folder of a run: what lies where, who may write into it, and how to open what it holds.

output_dir/
    config.yaml         the options, complete: `slothcore train --config` repeats the run
    log.jsonl           a line every logging_steps, and one for each evaluation
    samples.jsonl       what the model said on the way, with sample_prompts
    run.json            what the run is made of, and what became of it
    report.html         both as a page
    loss.png
    tensorboard/, wandb/ what report_to asks for
    checkpoint-N/       see run_state.py
    adapter/ or model/  the result
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from slothcore.models.hub import ADAPTER_CONFIG_FILE
from slothcore.report.page import REPORT_FILE
from slothcore.report.saved_run import LOG_FILE, NOTES_FILE, SAMPLES_FILE, read_notes
from slothcore.report.writing import replace_text
from slothcore.training.config import TrainConfig
from slothcore.training.run_state import STATE_FILE, checkpoints, remove_folder, remove_partial

CONFIG_FILE = "config.yaml"
PLOT_FILE = "loss.png"
ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"


@dataclass(frozen=True)
class Source:
    """What a name stands for.

    Attributes:
        path: the folder or Hub name to load.
        config: the options of the run that it came from, if any.
        note: what the user should hear, where a run's folder may stand for another state of it than is meant.
    """

    path: str
    config: TrainConfig | None = None
    note: str | None = None


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
    """Raise ValueError if what is trained on lies where this run deletes what was before, or writes its result."""
    folder = Path(config.output_dir).resolve()
    for option, name in (("model", config.model), ("adapter", config.adapter)):
        if not name:
            continue
        base = Path(find_source(name).path).expanduser().resolve()
        if base.exists() and base != folder and base.is_relative_to(folder):
            first = base.relative_to(folder).parts[0]
            if first in (ADAPTER_FOLDER, MODEL_FOLDER) or first.startswith("checkpoint-"):
                raise ValueError(
                    f"{option} {name} lies in output_dir {config.output_dir}, where this run would replace it; "
                    "choose another output_dir"
                )


def has_result(checkpoint: Path) -> bool:
    """Whether the run of a checkpoint has written what it came to since; it may have been shorter before."""
    written = (checkpoint / STATE_FILE).stat().st_mtime
    results = [checkpoint.parent / name for name in (ADAPTER_FOLDER, MODEL_FOLDER)]
    return any(path.exists() and path.stat().st_mtime >= written for path in results)


def check_writable(folder: Path) -> None:
    """Raise ValueError unless `folder` is one that can be written into, or can be made; nothing is left in it."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        where = "is a file" if nearest == folder else f"would lie in {nearest}, which is a file"
        raise ValueError(f"output_dir {folder} {where}; choose a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir {folder}: {nearest} may not be written into; choose another folder")
    try:
        # Some file systems, such as /proc, say that they can be written into, and take nothing.
        Path(tempfile.mkdtemp(prefix=".slothcore-", dir=nearest)).rmdir()
    except OSError as error:
        raise ValueError(
            f"output_dir {folder}: {nearest} takes no new folder ({error.strerror}); choose another folder"
        ) from error


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
        for file in (LOG_FILE, SAMPLES_FILE, PLOT_FILE, NOTES_FILE, REPORT_FILE):
            (folder / file).unlink(missing_ok=True)
    replace_text(folder / CONFIG_FILE, config.to_yaml())
    return folder


def find_source(name_or_run: str | Path) -> Source:
    """What `name_or_run` names: a run's result, an adapter's folder, a model's, or a repository on the Hub.

    Raises: ValueError if a run has no result yet, or not what is named in it.
    """
    folder, config = Path(name_or_run).expanduser(), options_behind(name_or_run)
    if not folder.exists() and _is_run(folder.parent):
        # It would be looked for on the Hub.
        there = [path.name for path in (folder.parent / ADAPTER_FOLDER, folder.parent / MODEL_FOLDER) if path.exists()]
        there += [path.name for path in checkpoints(folder.parent)]
        raise ValueError(f"{folder} does not exist; the run {folder.parent} has {', '.join(there) or 'saved nothing'}")
    if config is None or _holds_weights(folder):
        return Source(str(name_or_run), config)
    saved = [path for path in checkpoints(folder) if _holds_weights(path)]
    for result in (folder / ADAPTER_FOLDER, folder / MODEL_FOLDER):
        if _holds_weights(result):
            return Source(str(result), config, _note_if_older(result, saved))
    if not saved:
        raise ValueError(f"the run {folder} has saved nothing yet; let it reach a checkpoint or its end")
    return Source(str(saved[-1]), config, f"the run {folder} has no result yet; {saved[-1]} is used")


def options_behind(name_or_run: str | Path) -> TrainConfig | None:
    """The options of the run that a name is, whatever it has saved, or whose result or checkpoint it is; else None."""
    folder = Path(name_or_run).expanduser()
    run: Path | None = folder
    if _holds_weights(folder):
        # Other programs, too, write a config.yaml beside, and a model comes with one of its own.
        is_adapter = (folder / ADAPTER_CONFIG_FILE).is_file()
        is_left = is_adapter or folder.name == MODEL_FOLDER or (folder / STATE_FILE).is_file()
        places = [*([folder] if is_adapter else []), *([folder.absolute().parent] if is_left else [])]
        run = next((place for place in places if _is_run(place)), None)
    return TrainConfig.from_yaml(run / CONFIG_FILE) if run and (run / CONFIG_FILE).is_file() else None


def _holds_weights(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG_FILE).is_file() or (folder / "config.json").is_file()


def _note_if_older(result: Path, saved: list[Path]) -> str | None:
    """What to say if the run has gone on since it wrote its result, and has saved more."""
    # A copy of the folder may have other times; a run that says it has ended has nothing newer.
    ended = read_notes(result.parent / NOTES_FILE).get("status") == "finished"
    if ended or not saved or has_result(saved[-1]):
        return None
    return f"{result} is used, which the run saved before it went on; {saved[-1]} is newer: name that to use it"


def run_behind(name_or_run: str | Path) -> Path | None:
    """The folder of the run that `name_or_run` is, or lies in as its result or a checkpoint; None if there is none."""
    folder = Path(name_or_run).expanduser()
    return next((path for path in (folder, folder.absolute().parent) if _is_run(path)), None)


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and (folder / LOG_FILE).is_file()
