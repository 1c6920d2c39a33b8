"""From a name to a folder: a local one, or a snapshot from the Hugging Face Hub.

A repository may hold the same weights in several formats, so it is fetched in two steps: the small files first, which
say whether it is a model, in which shards, or an adapter; then exactly the weights that are read, after a look at the
repository's list of files. Whatever is in the cache is not fetched again, and huggingface_hub resumes a transfer that
breaks off.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from slothcore.hub_errors import HUB_ADDRESS, HUB_NAME, explain, without_network
from slothcore.models.checkpoint import INDEX_FILE, SINGLE_FILE
from slothcore.models.hf_config import read_json
from slothcore.version import __version__

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
SMALL_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    INDEX_FILE,
    ADAPTER_CONFIG_FILE,
    "tokenizer.json",
    "tokenizer.model",  # not read, but a folder exported for others should have it
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
# Weights, and not an optimizer or arguments of training, which are pickled too.
PICKLED = re.compile(r"(.*/)?(pytorch_model|adapter_model|consolidated|model)[^/]*\.(bin|pt|pth|ckpt)")


def model_folder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: bool = True,
    weights: bool = True,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """The folder with the files of a model or an adapter; of a repository, only those that slothcore reads.

    Args:
        name_or_path: an existing folder, or a Hub name such as "meta-llama/Llama-3.1-8B".
        revision: branch, tag or commit on the Hub; default: main.
        token: access token; default: the environment's HF_TOKEN, or what `hf auth login` stored; False: none.
        cache_dir: where snapshots are kept; default: huggingface_hub's cache (HF_HUB_CACHE, HF_HOME).
        local_files_only: use the cache and never the network, as with HF_HUB_OFFLINE=1.
        progress: show huggingface_hub's progress bars.
        weights: False: the small files are enough, and nothing else is fetched.
        check: called with the folder when the small files are in it and before weights are fetched; what it raises
            spares the user the download.
    Raises: ValueError, in one sentence that says what to do, if there is no such folder, repository or revision,
        access is refused, the repository has no safetensors, the disk is full, or the Hub is out of reach and the
        cache lacks the files.
    """
    name = str(name_or_path)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        if folder.suffix == ".gguf":
            raise ValueError(
                f"{name} is a GGUF file, which slothcore writes and does not read; give the Hugging Face folder that "
                "it was made from, or its name on the Hub"
            )
        raise ValueError(f"{name} is a file; give the folder that holds it, {folder.parent}")
    if address := HUB_ADDRESS.match(name):
        raise ValueError(f"{name} is an address; give the repository's name, {address[1]}")
    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"the folder {name} does not exist; a model on the Hub is named owner/name")

    api = HfApi(token=token, library_name="slothcore", library_version=__version__)

    def ask(call: Callable[..., Any], **options: Any) -> Any:
        try:
            return call(name, **options)
        except Exception as error:  # a broken transfer raises whatever the HTTP library of huggingface_hub has for it
            raise ValueError(explain(error, name, revision, cache_dir, local_files_only)) from None

    def fetch(patterns: list[str], revision: str | None) -> Path:
        where = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return Path(ask(api.snapshot_download, allow_patterns=patterns, **where))

    with _progress_bars(shown=progress):
        snapshot = fetch(list(SMALL_FILES), revision)
        commit = snapshot.name
        if not weights:
            return snapshot
        files = weight_files(snapshot)
        if missing := _missing(snapshot, files):
            if reason := without_network(local_files_only):
                raise ValueError(f"the download cache has {name} only in part: {missing[0]} is missing, and {reason}")
            check_listed(files, ask(api.list_repo_files, revision=commit), name)
            if check is not None:
                check(snapshot)
            fetch(files, commit)
    return snapshot


def weight_files(folder: Path) -> list[str]:
    """The files of weights that belong to a folder, by its small files: an adapter's, the index's, or the only one."""
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        return [ADAPTER_FILE]
    if not (folder / INDEX_FILE).is_file():
        return [SINGLE_FILE]
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    # What is wrong with an index, the reader of checkpoints says.
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({file for file in files if isinstance(file, str)})


def check_listed(weights: list[str], files: list[str], name: str) -> None:
    """Raise ValueError unless a repository with these files has the weights; said before anything large is fetched."""
    missing = [file for file in weights if file not in files]
    if not missing:
        if CONFIG_FILE not in files and weights != [ADAPTER_FILE]:
            raise ValueError(
                f"{name} has no {CONFIG_FILE}, so its weights are not in the layout of transformers; choose a "
                "repository that transformers can load"
            )
        return
    if INDEX_FILE in files and weights != [ADAPTER_FILE]:
        raise ValueError(f"{name} lacks {missing[0]}, which its {INDEX_FILE} names; choose another revision or source")
    if pickled := [file for file in files if PICKLED.fullmatch(file)]:
        raise ValueError(
            f"{name} has no {missing[0]}, only pickled weights ({pickled[0]}), which slothcore does not open; choose a "
            "repository with safetensors, or convert this one with transformers' save_pretrained"
        )
    if others := [file for file in files if file.endswith((".safetensors", ".gguf"))]:
        raise ValueError(
            f"{name} has no {missing[0]}, only {others[0]}, which is in another layout; choose the repository of the "
            "original weights in the layout of transformers"
        )
    raise ValueError(f"{name} has no weights, neither {missing[0]} nor others; choose a repository that holds a model")


def _missing(folder: Path, files: list[str]) -> list[str]:
    return [file for file in files if not (folder / file).is_file()]


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    """Without progress bars unless they are `shown`; a user who has switched them off keeps them so."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
