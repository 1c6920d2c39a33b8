"""What can go wrong with the Hugging Face Hub, and the sentence that tells the user what to do about it."""

import errno
import re
import socket
from pathlib import Path
from typing import Literal

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_ADDRESS = re.compile(r"https?://[^/]+/([^/]+/[^/]+)")
UNREACHABLE = "the Hugging Face Hub cannot be reached; check the connection, and HF_ENDPOINT if it is set"
NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
SIGN_IN = "run `hf auth login`, set HF_TOKEN or pass token="


def check_repository_name(name: str) -> None:
    """Raises: ValueError unless a repository on the Hub can be called so."""
    if HUB_NAME.fullmatch(name) is None:
        raise ValueError(f"a repository on the Hub is named owner/name, got {name!r}")


def explain(
    error: Exception,
    name: str,
    revision: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    *,
    kind: Literal["model", "dataset"] = "model",
) -> str:
    """One sentence for whatever huggingface_hub raised when it was asked for the repository `name` of this kind."""
    is_dataset = kind == "dataset"
    url = f"{constants.ENDPOINT}/{'datasets/' if is_dataset else ''}{name}"
    local, repository = ("a local file or folder", "a dataset") if is_dataset else ("a local folder", "a repository")
    at_revision = f" at revision {revision!r}" if revision else ""
    cache = cache_dir or constants.HF_HUB_CACHE
    status = _status(error)
    if isinstance(error, GatedRepoError):
        if status == 401:
            return f"{name} is gated on the Hugging Face Hub: accept its terms at {url}, then {SIGN_IN}"
        return (
            f"{name} is gated on the Hugging Face Hub, and this token's account has no access: ask for it at {url} "
            "and wait until it is granted; a fine-grained token must also be allowed to read gated repositories"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{name} on the Hugging Face Hub has no revision {revision or 'main'!r}; {url}/tree/main lists its "
            "branches and tags"
        )
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return (
            f"{name} is neither {local} nor {repository} on the Hugging Face Hub that this token may read; "
            f"check the spelling, and if it is private, {SIGN_IN}"
        )
    if status == 401:
        return f"the Hugging Face Hub does not know this token; make a new one at {_tokens_url()}, then {SIGN_IN}"
    if status == 403:
        return f"this token may not read {name} on the Hugging Face Hub; change what it may do at {_tokens_url()}"
    if status is not None:
        return (
            f"the Hugging Face Hub answered with status {status} for {name}{at_revision}, and the download cache lacks "
            "it; try again later"
        )
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled) or _is_unreachable(error):
        reason = without_network(local_files_only) or UNREACHABLE
        return f"{name}{at_revision} is neither {local} nor complete in the download cache, and {reason}"
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return (
            f"the disk is full: {name} does not fit into the download cache {cache}; make room, or choose another "
            "place with cache_dir= or HF_HOME"
        )
    if isinstance(error, PermissionError):
        return f"the download cache {cache} may not be written into; choose another with cache_dir= or HF_HOME"
    if not constants.ENDPOINT.startswith(("http://", "https://")):
        return f"HF_ENDPOINT is {constants.ENDPOINT}, which is no address; begin it with https://, or unset it"
    reason = _reason(error)
    return (
        f"downloading {name}{at_revision} from the Hugging Face Hub failed: {reason}; start again: files "
        "that have arrived whole are not fetched twice"
    )


def explain_upload(error: Exception, name: str) -> str:
    """One sentence for whatever huggingface_hub raised when something was to be uploaded to the model `name`."""
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return f"nothing can be uploaded to {name} while HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{name} on the Hugging Face Hub has no such branch; {constants.ENDPOINT}/{name}/tree/main lists its "
            "branches, and new ones are made there"
        )
    if status == 401:
        return (
            "the Hugging Face Hub takes uploads only with a token that it knows; make one that may write at "
            f"{_tokens_url()}, then {SIGN_IN}"
        )
    if status == 403:
        return (
            f"this token may not write into {name} on the Hugging Face Hub; make one that may at {_tokens_url()}, or "
            "choose a repository of your own"
        )
    if status in (409, 412):
        return f"somebody has changed {name} on the Hugging Face Hub meanwhile; upload again"
    if status is not None:
        return (
            f"the Hugging Face Hub answered with status {status} to the upload to {name}, where nothing has changed; "
            "try again later"
        )
    if _is_unreachable(error):
        return f"nothing was uploaded to {name}: {UNREACHABLE}"
    reason = _reason(error)
    return f"uploading to {name} on the Hugging Face Hub failed: {reason}; nothing has changed there, so start again"


def without_network(local_files_only: bool) -> str | None:
    """Why the network is not used, and how to allow it; None if it is used."""
    if local_files_only:
        return "local_files_only is set; unset it once to download"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it once to download"
    return None


def _reason(error: Exception) -> str:
    """What an error says, in one line; of a token that is no header's value the HTTP library says all."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub("Bearer .*", "the token is no text that can be sent", text)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error; huggingface_hub tells of some refusals as files missing in its cache."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__
    return None


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether no connection came about; what the HTTP libraries raise comes from what the system has told them."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError | socket.gaierror) or type(error).__name__ == "ConnectTimeout":
            return True
        if isinstance(error, OSError) and error.errno in NO_WAY:
            return True
        error = error.__cause__ or error.__context__
    return False


def _tokens_url() -> str:
    return f"{constants.ENDPOINT}/settings/tokens"
