"""From the name of a model, an adapter or a run to the folders that hold it, fetched from the Hub where need be."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slothcore.data.tokenizer import Tokenizer
from slothcore.lora.config import LoraConfig
from slothcore.lora.stored_adapter import adapter_weights
from slothcore.models.hub import ADAPTER_CONFIG_FILE, CONFIG_FILE, model_folder
from slothcore.models.load import read_config
from slothcore.training.config import TrainConfig
from slothcore.training.run_folder import Source, find_source, options_behind


@dataclass(frozen=True)
class Located:
    """Where a model lies.

    Attributes:
        folder: of the base model.
        adapter: of the adapter, if the name is one's or one was named beside.
        base: name or folder of the base model, as others may write it.
        revision: of that on the Hub; None for a folder, which has none.
        max_seq_length, rope_scaling: what was asked for, or what an adapter was trained with.
    """

    folder: Path
    adapter: Path | None
    base: str
    revision: str | None
    max_seq_length: int | None
    rope_scaling: str | Mapping[str, Any] | None

    def tokenizer(self) -> Tokenizer | None:
        """The adapter's own tokenizer, else the base's; None if neither has one."""
        for folder in (self.adapter, self.folder):
            if folder is not None and (folder / "tokenizer.json").is_file():
                return Tokenizer.from_folder(folder)
        return None


def locate(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    max_seq_length: int | None = None,
    rope_scaling: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    weights: bool = True,
    **hub: Any,
) -> Located:
    """The folders of a model; a repository's files are fetched into the download cache.

    Args:
        name_or_path, adapter, max_seq_length, rope_scaling, revision: as `load` has them.
        weights: False: configuration and tokenizer are enough.
        hub: token, cache_dir, local_files_only, progress, as `model_folder` has them.
    Raises: ValueError, in one sentence, for whatever is wrong with the name or the files.
    """
    source = find_source(name_or_path)

    def check(folder: Path) -> None:
        """What the small files of a repository tell is said before the large ones are downloaded."""
        if (folder / ADAPTER_CONFIG_FILE).is_file():
            LoraConfig.from_folder(folder)
        else:
            read_config(folder, max_seq_length=max_seq_length, rope_scaling=rope_scaling)

    hub = {**hub, "weights": weights, "check": check}
    runs: list[TrainConfig] = []
    own: Path | None = None  # the adapter's folder
    if adapter is not None:
        beside = find_source(adapter)
        own, runs = model_folder(beside.path, **hub), list(_runs_behind(beside))
        _check_beside(own, str(adapter), name_or_path, weights=weights)
        _tell(beside, weights=weights)
    folder = model_folder(source.path, revision=revision, **hub)
    _tell(source, weights=weights)
    base, base_revision = source.path, revision
    if own is not None and not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{name_or_path} is no base model, so the adapter {adapter} cannot be put on it; name the adapter's base, "
            "or leave it out to take the one that the adapter names"
        )
    if own is None and (folder / ADAPTER_CONFIG_FILE).is_file():
        own, runs = folder, list(_runs_behind(source))
        base, base_revision = _base_of(own, weights=weights)
        # On the Hub `revision` has chosen the adapter's commit; a folder has none.
        if Path(source.path).expanduser().is_dir():
            of_the_run = next((run.revision for run in runs if run.model == base), None)
            base_revision = revision or base_revision or of_the_run
        folder = _base_folder(base, adapter_name=str(name_or_path), revision=base_revision, **hub)
    # The factors fit the angles that they were trained with; a base that turns otherwise would be another model.
    lengths = [length for length in (max_seq_length, *(run.max_seq_length for run in runs)) if length is not None]
    max_seq_length = max(lengths, default=None)
    rope_scaling = rope_scaling or next((run.rope_scaling for run in runs if run.rope_scaling), None)
    return Located(
        folder=folder,
        adapter=own,
        base=base,
        revision=None if Path(base).expanduser().is_dir() else base_revision,
        max_seq_length=max_seq_length,
        rope_scaling=rope_scaling,
    )


def _tell(source: Source, *, weights: bool) -> None:
    """Warn if a run's folder may stand for other weights than are meant."""
    if source.note is not None and weights:
        warnings.warn(source.note, stacklevel=4)


def _runs_behind(source: Source) -> Iterator[TrainConfig]:
    """The options of the run that an adapter came from, and of those whose adapters it went on with, newest first."""
    run, known = source.config, list[TrainConfig]()
    # One that took the name of the run that it went on with stands before itself.
    while run is not None and run not in known:
        yield run
        known.append(run)
        before = run.adapter or run.model
        run = options_behind(before) if before else None


def _check_beside(folder: Path, adapter: str, base: str | Path, *, weights: bool) -> None:
    """Look at the small files of an adapter that is to go on `base`, and say if they name another.

    Raises: ValueError if this is no adapter, or one that cannot be used in any case.
    """
    if (folder / "config.json").is_file() and not (folder / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(f"{adapter} is a whole model and no adapter; give it as the model, and leave adapter out")
    named = LoraConfig.from_folder(folder).base_model_name_or_path
    if weights:
        adapter_weights(folder)
    # The same model may lie in many folders, but two names on the Hub are two models.
    names = [str(name) for name in (named, base) if name and not Path(name).expanduser().is_dir()]
    if len(set(names)) > 1:
        warnings.warn(f"the adapter {adapter} was made for {named}, and is put on {base}", stacklevel=4)


def _base_of(adapter: Path, *, weights: bool) -> tuple[str, str | None]:
    """The name or folder of an adapter's base model, and its revision, as `adapter_config.json` gives them.

    Raises: ValueError if it names none, or the adapter cannot be used in any case: said here, before a base is
        fetched for it.
    """
    config = LoraConfig.from_folder(adapter)
    if weights:
        adapter_weights(adapter)
    base = config.base_model_name_or_path
    if not (isinstance(base, str) and base):
        raise ValueError(
            f"{adapter / ADAPTER_CONFIG_FILE} does not say its base model; fill in base_model_name_or_path, or load "
            "the base and call load_adapter"
        )
    beside = adapter / base
    if beside.is_dir() and not Path(base).expanduser().is_dir():
        base = str(beside)
    return base, config.revision


def _base_folder(base: str, *, adapter_name: str, **hub: Any) -> Path:
    """The folder of an adapter's base model. Raises: ValueError, naming both, if it is not to be had."""
    try:
        folder = model_folder(base, **hub)
    except ValueError as error:
        raise ValueError(f"the base model of the adapter {adapter_name} cannot be had: {error}") from None
    # A folder may well hold a model and an adapter for it.
    if (folder / ADAPTER_CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"the adapter {adapter_name} was trained on {base}, which is an adapter itself; merge that into its base "
            "model with `slothcore merge`, and name the result in adapter_config.json"
        )
    return folder
