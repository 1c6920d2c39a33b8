"""From a name to a folder: a local one, or a snapshot from the Hugging Face Hub."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# No pickles and no second copies of the weights in other formats.
NEEDED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",  # not read, but a folder exported for others should have it
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "adapter_config.json",
)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_folder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder with a model's files; of a Hub repository, only the files that slothcore reads are fetched.

    Args:
        name_or_path: an existing folder, or a Hub name such as "meta-llama/Llama-3.1-8B".
        revision: branch, tag or commit on the Hub; default: main.
        token: access token; default: the one that `hf auth login` stored.
        cache_dir: where snapshots are kept; default: huggingface_hub's cache.
        local_files_only: use the cache and never the network.
    Raises: ValueError, in one sentence, if there is no such folder or repository, access is refused, or the Hub is
        out of reach and the cache lacks the model.
    """
    name = str(name_or_path)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{name} is a file; give the folder that holds config.json")
    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"the folder {name} does not exist")

    at_revision = f" at revision {revision!r}" if revision else ""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=list(NEEDED_FILES),
            )
        )
    except GatedRepoError:
        raise ValueError(
            f"{name} is gated on the Hugging Face Hub: accept its terms at https://huggingface.co/{name}, then run "
            "`hf auth login` or pass token="
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{name} on the Hugging Face Hub has no revision {revision!r}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ValueError(
            f"{name} is neither a local folder nor a repository on the Hugging Face Hub that this token may read"
        ) from None
    except LocalEntryNotFoundError:
        reason = "local_files_only is set" if local_files_only else "the Hugging Face Hub cannot be reached"
        raise ValueError(
            f"{name}{at_revision} is neither a local folder nor in the download cache, and {reason}"
        ) from None
    except Exception as error:  # a broken transfer raises whatever the HTTP library of huggingface_hub has for it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"downloading {name}{at_revision} from the Hugging Face Hub failed: {reason}") from None
