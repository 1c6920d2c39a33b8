"""Names to folders, without a network: huggingface_hub's answers are stood in for by its own exceptions."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from slothcore.models.hub import model_folder


def test_a_local_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    assert model_folder(tmp_path) == tmp_path
    assert model_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "~/nowhere-at-all"])
def test_a_missing_folder_is_not_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match="does not exist"):
        model_folder(name)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="is a file; give the folder"):
        model_folder(tmp_path / "model.safetensors")


def test_only_needed_files_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    folder = model_folder("org/name", revision="v2", token="t", cache_dir="/c", local_files_only=True)
    assert folder == tmp_path
    assert (asked["name"], asked["revision"], asked["token"], asked["cache_dir"]) == ("org/name", "v2", "t", "/c")
    assert asked["local_files_only"] is True

    repository = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "pytorch_model.bin",
        "original/tokenizer.model",
        "original/consolidated.00.pth",
        "original/params.json",
        "consolidated.safetensors",
        "onnx/model.onnx",
        "flax_model.msgpack",
        "README.md",
    ]
    kept = list(huggingface_hub.utils.filter_repo_objects(repository, allow_patterns=asked["allow_patterns"]))
    assert kept == repository[:6]


def http_error(kind: type[Exception], message: str) -> Exception:
    """The exception without a response in it: which HTTP library makes one depends on huggingface_hub's version."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(errors.GatedRepoError, "403"), "org/name is gated.*accept its terms.*token="),
        (http_error(errors.RepositoryNotFoundError, "404"), "neither a local folder nor a repository"),
        (http_error(errors.RevisionNotFoundError, "404"), "has no revision 'v9'"),
        (
            http_error(errors.HfHubHTTPError, "503 from the server\nRequest ID: x"),
            "downloading org/name at revision 'v9' .* failed: 503",
        ),
        (errors.LocalEntryNotFoundError("no"), "nor in the download cache, and the Hugging Face Hub cannot be reached"),
        (errors.OfflineModeIsEnabled("offline mode"), "failed: offline mode"),
        (errors.HFValidationError("bad"), "neither a local folder nor a repository"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_hub_errors_become_one_sentence(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=message) as caught:
        model_folder("org/name", revision="v9")
    assert "\n" not in str(caught.value)


def test_offline_without_a_cache(tmp_path: Path) -> None:
    """The real library, told not to use the network."""
    with pytest.raises(ValueError, match="nor in the download cache, and local_files_only is set"):
        model_folder("some-org/some-model", cache_dir=tmp_path, local_files_only=True)
