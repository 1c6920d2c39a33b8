"""A run's folder as the page wants it: its notes, its options, its log. Whatever is missing or damaged is left out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from slothcore.report.run_log import RunLog
from slothcore.report.sample_log import SampleLog

LOG_FILE = "log.jsonl"
NOTES_FILE = "run.json"
SAMPLES_FILE = "samples.jsonl"
CONFIG_FILE = "config.yaml"


class SavedRun:
    """One run.

    Attributes:
        name: what the page calls it.
        log, samples: its curves, and what the model said; `update` reads on.
        notes: run.json: what the run was made of and what became of it; {} for a run that has none.
    Raises: FileNotFoundError if the folder is absent, ValueError if it is not that of a run.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.exists():
            raise FileNotFoundError(f"the run folder {folder} does not exist")
        if not any((folder / name).is_file() for name in (LOG_FILE, NOTES_FILE, CONFIG_FILE)):
            raise ValueError(f"{folder} is no run: it holds neither {LOG_FILE} nor {CONFIG_FILE}; give an output_dir")
        self.folder = folder
        self.name = _ending(folder.resolve(), 2)
        self.log = RunLog(folder / LOG_FILE)
        self.samples = SampleLog(folder / SAMPLES_FILE)
        self.notes: dict[str, Any] = {}
        self.update()

    def update(self) -> None:
        """Read what was written since."""
        self.log.update()
        self.samples.update()
        self.notes = read_notes(self.folder / NOTES_FILE)

    def section(self, name: str) -> dict[str, Any]:
        """A part of the notes that is a mapping; {} if there is none."""
        value = self.notes.get(name)
        return value if isinstance(value, dict) else {}

    def items(self, name: str) -> list[dict[str, Any]]:
        """A part of the notes that is a list of mappings."""
        value = self.notes.get(name)
        return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []

    @property
    def status(self) -> str:
        """running, finished, interrupted or failed; "" if nobody noted it."""
        status = self.notes.get("status")
        return status if status in ("running", "finished", "interrupted", "failed") else ""

    @property
    def step(self) -> int:
        """The newest step in the log."""
        return max((column.steps[-1] for column in self.log.columns.values() if column), default=0)

    @property
    def best_step(self) -> int | None:
        """The step of the lowest evaluation loss; None if there were fewer than two. Before training does not count."""
        column = self.log.columns["eval_loss"]
        evaluated = [(value, step) for step, value in zip(column.steps, column.values, strict=True) if step]
        return min(evaluated)[1] if len(evaluated) > 1 else None

    def options(self) -> list[dict[str, Any]]:
        """Name, value, default and group of each option; of a run without notes, name and value from config.yaml."""
        options = [option for option in self.items("options") if isinstance(option.get("name"), str)]
        return options or _read_options(self.folder / CONFIG_FILE)


def name_apart(runs: Sequence[SavedRun]) -> None:
    """Give each run the shortest ending of its path that none of the others has."""
    folders = [run.folder.resolve() for run in runs]
    for length in range(1, 1 + max(len(folder.parts) for folder in folders)):
        names = [_ending(folder, length) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    for run, name in zip(runs, names, strict=True):
        run.name = name


def _ending(folder: Path, length: int) -> str:
    return "/".join(folder.parts[1:][-length:]) or str(folder)


def read_notes(path: Path) -> dict[str, Any]:
    """What run.json holds; {} if it is absent or damaged."""
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _read_options(path: Path) -> list[dict[str, Any]]:
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return []
    return [{"name": str(k), "value": v} for k, v in options.items()] if isinstance(options, dict) else []
