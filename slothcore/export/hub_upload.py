"""A model or its adapter as a repository on the Hugging Face Hub: exported, checked, and uploaded in one commit."""

import tempfile
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from slothcore.data.tokenizer import Tokenizer
from slothcore.data.tokenizer_files import ADDITIONAL_TEMPLATES, TOKENIZER_FILES
from slothcore.export.export import ExportJob, export_model
from slothcore.export.model_card import MARK, model_card
from slothcore.export.new_folder import place_of, require_new
from slothcore.hub_errors import check_repository_name, explain_upload
from slothcore.lora.attach import lora_config_of
from slothcore.lora.merge import Base
from slothcore.models.decoder import Decoder
from slothcore.models.hub import ADAPTER_CONFIG_FILE, CONFIG_FILE
from slothcore.version import __version__

CARD_FILE = "README.md"
# Of a model that lies in the repository already: what the new one does not replace by name. GGUF files stay, for one
# repository often holds several.
STALE = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "generation_config.json"]
T = TypeVar("T")


def push_to_hub(
    model: Decoder,
    tokenizer: Tokenizer | None,
    repo_id: str,
    *,
    format: str | None = None,
    dtype: str | None = None,
    base: Base = "loaded",
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    run: str | Path | None = None,
    path: str | Path | None = None,
    commit_message: str | None = None,
    give_up_model: bool = False,
) -> str:
    """Upload a model, or its adapter, to the Hugging Face Hub.

    The repository is made if there is none, and whether one may be written into is asked before anything is exported.
    The files arrive together or not at all. Its README.md, the model card, is written anew, unless somebody has taken
    it over by deleting the line that says so.

    Args:
        repo_id: owner/name; a name alone lies with the owner of the token.
        format, dtype, base: as `export_model` has them; default: the adapter, or without one the merged model.
        private: only who is allowed to may read a repository that is made. One that exists keeps its visibility; if it
            is public, that has to be said by private=False.
        revision: branch to upload to, which exists; default: main.
        token: with write access; default: the environment's HF_TOKEN, or what `hf auth login` stored.
        run: the folder of the run that trained the model, for the model card: options, data, losses, versions.
        path: a new folder that keeps the export; default: a temporary one.
        commit_message: default: says what was uploaded.
        give_up_model: as in `export_model`.
    Returns: the address of the commit.
    Raises: ValueError, in one sentence, for whatever `export_model` refuses, or if the Hub refuses the upload or is
        out of reach. OSError if the disk fails.
    """
    format = format or ("merged" if lora_config_of(model) is None else "adapter")
    check_repository_name(repo_id)
    # What is read from a file often ends with its line.
    api = HfApi(token=token.strip() if token else token, library_name="slothcore", library_version=__version__)
    # What is wrong on this side is found before anything is made on the other.
    ExportJob.of(model, format, dtype, base)
    if path is not None:
        require_new(place_of(path))
    card = model_card(model, format, repository=repo_id, run=run)

    def ask(call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        try:
            return call(*arguments, **options)
        except Exception as error:  # whatever the HTTP library of huggingface_hub raises
            raise ValueError(explain_upload(error, repo_id)) from None

    repo_id = ask(_repository, api, repo_id, private=private)
    info = ask(api.model_info, repo_id, revision=revision)
    if private and not info.private:
        raise ValueError(
            f"{repo_id} exists and everybody can read it; say private=False (--public) to upload into it, or choose "
            "another name"
        )
    files = {sibling.rfilename for sibling in info.siblings or ()}
    _check_contents(files, format, repo_id)
    with tempfile.TemporaryDirectory(prefix="slothcore-upload-") as scratch:
        folder = Path(scratch) / "export" if path is None else place_of(path)
        export_model(model, tokenizer, folder, format=format, dtype=dtype, base=base, give_up_model=give_up_model)
        (folder / CARD_FILE).unlink(missing_ok=True)
        if CARD_FILE not in files or MARK in ask(_card, api, repo_id, revision, Path(scratch)):
            (folder / CARD_FILE).write_text(card, encoding="utf-8")
        commit = ask(
            api.upload_folder,
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or f"Upload {format} made with slothcore {__version__}",
            delete_patterns=_stale(folder, format),
        )
    return str(commit.commit_url)


def _repository(api: HfApi, name: str, *, private: bool) -> str:
    """The full name of a repository that is there from now on and may be written into."""
    try:
        if "/" not in name:
            return str(api.create_repo(name, private=private, exist_ok=True).repo_id)
        api.model_info(name)
    except RepositoryNotFoundError:
        return str(api.create_repo(name, private=private).repo_id)
    # Older versions of huggingface_hub cannot ask; a refusal then comes with the upload.
    if "write" in signature(api.auth_check).parameters:
        api.auth_check(name, write=True)
    return name


def _check_contents(files: set[str], format: str, name: str) -> None:
    """Raise ValueError if what lies there already would be read in place of the upload, or beside it."""
    if format.startswith("merged") and ADAPTER_CONFIG_FILE in files:
        raise ValueError(
            f"{name} holds a LoRA adapter, which transformers would load in place of the merged model; choose another "
            "repository"
        )
    if format == "adapter" and CONFIG_FILE in files:
        raise ValueError(f"{name} holds a whole model; choose another repository for its adapter")


def _stale(folder: Path, format: str) -> list[str]:
    """Patterns of what goes from the repository unless it is uploaded anew."""
    patterns = list(STALE) if format.startswith("merged") else []
    if (folder / TOKENIZER_FILES[0]).is_file():
        # A chat template of the older tokenizer's would be taken for this one's.
        patterns += [*TOKENIZER_FILES, f"{ADDITIONAL_TEMPLATES}/*.jinja"]
    return patterns


def _card(api: HfApi, name: str, revision: str | None, scratch: Path) -> str:
    """The README.md that is there."""
    file = api.hf_hub_download(name, CARD_FILE, revision=revision, local_dir=scratch)
    return Path(file).read_text(encoding="utf-8", errors="replace")
