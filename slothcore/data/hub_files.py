"""A dataset repository of the Hugging Face Hub to local data files: only those of one split are fetched.

`owner/name` is its split train, `owner/name:validation` another one, `owner/name:config/split` that of a configuration.
Which files belong to a split, the repository's README says (`configs`); where it does not, their names do, as the Hub
reads them: a file or folder whose name holds the word train, validation (valid, dev, val) or test (eval). A repository
without such names is one split, train.
"""

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

from slothcore.data.readers import READERS, extension
from slothcore.hub_errors import HUB_NAME, explain
from slothcore.version import __version__

SCHEME = "hf://datasets/"
DEFAULT_SPLIT = "train"
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
CARD = "README.md"
# Beside the data stand texts and settings that are none.
NOT_DATA = re.compile(
    r"(^|/)(\.[^/]*|[^/]*\.md|dataset_infos?\.json|[^/]*config[^/]*\.json|requirements[^/]*\.txt|license[^/]*)$",
    re.IGNORECASE,
)


def names_dataset(name: str) -> bool:
    """Whether the text has the form of a dataset's name on the Hub and of no data file."""
    repository = _parts(name)[0]
    if HUB_NAME.fullmatch(repository) is None or repository.count("/") != 1:
        return False
    return name.startswith(SCHEME) or extension(Path(repository)) not in READERS


def dataset_files(
    name: str, *, token: str | bool | None = None, local_files_only: bool = False, cache_dir: str | Path | None = None
) -> list[Path]:
    """The files of one split, fetched into the download cache, in the order of their names.

    Raises: ValueError in one sentence if there is no such repository, configuration or split, access is refused, or
        the Hub is out of reach and the cache lacks the files.
    """
    repository, config, split = _parts(name)
    api = HfApi(token=token, library_name="slothcore", library_version=__version__)

    def ask(call: Callable[..., Any], **options: Any) -> Any:
        try:
            return call(repository, repo_type="dataset", **options)
        except Exception as error:  # a broken transfer raises whatever huggingface_hub's HTTP library has for it
            raise ValueError(explain(error, repository, None, cache_dir, local_files_only, kind="dataset")) from None

    def fetch(files: list[str], commit: str | None, *, only_local: bool) -> Path:
        options = {"revision": commit, "cache_dir": cache_dir, "local_files_only": only_local}
        return Path(ask(api.snapshot_download, allow_patterns=files, **options))

    try:
        if local_files_only:
            raise ValueError
        info = ask(api.repo_info)
        commit, listed = info.sha, sorted(file.rfilename for file in info.siblings or ())
        folder = fetch([CARD], commit, only_local=False) if CARD in listed else None
    except ValueError as error:
        # Without network, what an earlier run has fetched serves.
        try:
            folder = fetch(["*"], None, only_local=True)
        except ValueError as absent:
            raise (error if str(error) else absent) from None
        commit, listed = None, sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    card = _card(folder / CARD) if folder is not None and (folder / CARD).is_file() else {}
    chosen = files_of_split(listed, card, repository, config=config, split=split)
    if commit is not None:
        folder = fetch(chosen, commit, only_local=False)
    assert folder is not None
    return [folder / file for file in chosen]


def files_of_split(
    files: list[str], card: Mapping[str, Any], repository: str, *, config: str | None = None, split: str = DEFAULT_SPLIT
) -> list[str]:
    """Which of a repository's files hold the split.

    Args:
        files: all files of the repository, sorted.
        card: the settings at the top of its README.
    Raises: ValueError naming the configurations or splits that there are.
    """
    data = [file for file in files if extension(Path(file)) in READERS and not NOT_DATA.search(file)]
    if not data:
        raise ValueError(
            f"{repository} on the Hugging Face Hub holds no data file that is read here ({', '.join(READERS)}); "
            "choose another dataset, or convert it to Parquet"
        )
    splits = _declared_splits(data, card, repository, config) or named_splits(data)
    if split not in splits:
        raise ValueError(
            f"{repository} on the Hugging Face Hub has no split {split!r}; it has {', '.join(splits)}: name one as "
            f"{repository}:{next(iter(splits))}"
        )
    return splits[split]


def _parts(name: str) -> tuple[str, str | None, str]:
    """Repository, configuration and split of a name."""
    repository, _, wanted = name.removeprefix(SCHEME).partition(":")
    config, slash, split = wanted.rpartition("/")
    return repository, config if slash else None, split or DEFAULT_SPLIT


def _card(path: Path) -> Mapping[str, Any]:
    """The YAML between the two lines of dashes that a README begins with; nothing if there is none."""
    found = re.match(r"---\s*\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.S)
    try:
        card = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, Mapping) else {}


def _declared_splits(
    data: list[str], card: Mapping[str, Any], repository: str, config: str | None
) -> dict[str, list[str]] | None:
    """The splits that the README names, or None if it names no files."""
    configs = {str(c.get("config_name", "default")): c for c in card.get("configs") or () if c.get("data_files")}
    if not configs:
        return None
    if config is None:
        default = [name for name, c in configs.items() if c.get("default") or name == "default"] or list(configs)
        if len(configs) > 1 and len(default) > 1:
            raise ValueError(
                f"{repository} on the Hugging Face Hub has several configurations ({', '.join(configs)}); name one "
                f"as {repository}:{default[0]}/{DEFAULT_SPLIT}"
            )
        config = default[0]
    if config not in configs:
        raise ValueError(
            f"{repository} on the Hugging Face Hub has no configuration {config!r}; it has {', '.join(configs)}"
        )
    declared = configs[config]["data_files"]
    entries = declared if isinstance(declared, list) else [declared]
    splits: dict[str, list[str]] = {}
    for entry in entries:
        # A bare pattern is the split train.
        entry = entry if isinstance(entry, Mapping) else {"split": DEFAULT_SPLIT, "path": entry}
        patterns = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        found = [file for file in data if any(_fits(file, str(pattern)) for pattern in patterns)]
        splits.setdefault(str(entry.get("split", DEFAULT_SPLIT)), []).extend(found)
    return splits


def _fits(file: str, pattern: str) -> bool:
    """Whether a file's path fits a pattern of the Hub, where ** may also stand for no folder."""
    return fnmatch(file, pattern) or fnmatch(file, pattern.replace("**/", ""))


def named_splits(data: list[str]) -> dict[str, list[str]]:
    """The splits that the names of files and folders tell; train alone if they tell none."""
    splits: dict[str, list[str]] = {}
    for file in data:
        # A file's own name goes before those of its folders: training_data/test.jsonl is for tests.
        folders, _, name = file.lower().rpartition("/")
        split = _split_of(name) or _split_of(folders)
        if split is not None:
            splits.setdefault(split, []).append(file)
    return splits or {DEFAULT_SPLIT: data}


def _split_of(name: str) -> str | None:
    """The split whose word the name holds."""
    words = set(re.split(r"[^a-z]+", name))
    return next((split for split, spellings in SPLIT_WORDS.items() if words & set(spellings)), None)
