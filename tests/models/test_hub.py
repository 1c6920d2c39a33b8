"""Names to folders, without a network; the tests in `tests/hub` speak with a server."""

import errno
import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from slothcore.models.hub import check_listed, model_folder, weight_files


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HfApi, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))


@pytest.mark.usefixtures("no_hub")
def test_a_local_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_folder(tmp_path) == tmp_path
    assert model_folder(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_folder("org/model") == Path("org/model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_folder("~/org") == tmp_path / "org"


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "~/nowhere-at-all", ""])
def test_a_missing_folder_is_not_looked_up(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        model_folder(name or str(tmp_path / "nowhere"))


@pytest.mark.usefixtures("no_hub")
def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=f"is a file; give the folder that holds it, {tmp_path}$"):
        model_folder(tmp_path / "model.safetensors")
    (tmp_path / "model.Q4_K_M.gguf").touch()
    with pytest.raises(ValueError, match=r"is a GGUF file, .* writes and does not read; give the Hugging Face folder"):
        model_folder(tmp_path / "model.Q4_K_M.gguf")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "the disk is full: org/name does not fit into the download cache /the/cache; make room, or choose another "
            "place with cache_dir= or HF_HOME",
        ),
        (RuntimeError("Xet: No space left on device (os error 28)"), "the disk is full: org/name does not fit"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "the download cache /the/cache may not be written into; choose another with cache_dir= or HF_HOME",
        ),
        (
            ConnectionResetError("reset by peer\nin the middle"),
            "downloading org/name at revision 'v9' from the Hugging Face Hub failed: reset by peer; start again: files "
            "that have arrived whole are not fetched twice",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_trouble_on_this_side_becomes_one_sentence(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(*args: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(HfApi, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"\w") as caught:
        model_folder("org/name", revision="v9", cache_dir="/the/cache")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_name_that_the_hub_would_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library checks names before it asks anyone."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"neither a local folder nor a repository .*check the spelling"):
        model_folder("org/two--dashes")


def test_an_endpoint_without_a_scheme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As mirrors are often written; the real library sends nothing."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "mirror.example")
    message = r"^HF_ENDPOINT is mirror.example, which is no address; begin it with https://, or unset it$"
    with pytest.raises(ValueError, match=message):
        model_folder("org/name", cache_dir=tmp_path)


def test_the_weights_of_a_folder(tmp_path: Path) -> None:
    assert weight_files(tmp_path) == ["model.safetensors"]
    index = {"weight_map": {"c": "model-2.safetensors", "a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(tmp_path) == ["model-1.safetensors", "model-2.safetensors"]
    (tmp_path / "adapter_config.json").write_text("{}")
    assert weight_files(tmp_path) == ["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("weights", "files", "message"),
    [
        ("model.safetensors", ["original/consolidated.00.pth"], "only pickled weights .original/consolidated.00.pth."),
        ("model.safetensors", ["training_args.bin", "config.json"], "weights, neither model.safetensors nor others"),
        ("model.safetensors", ["model.safetensors", "model_index.json"], "config.json, so its weights are not in the"),
        ("model.safetensors", ["model.fp16.safetensors"], "only model.fp16.safetensors, which is in another layout"),
        ("adapter_model.safetensors", ["adapter_model.bin"], "only pickled weights .adapter_model.bin."),
        (
            "adapter_model.safetensors",
            ["model.safetensors.index.json"],
            "weights, neither adapter_model.safetensors nor",
        ),
    ],
)
def test_a_list_of_files_that_is_of_no_use(weights: str, files: list[str], message: str) -> None:
    check_listed([weights], [*files, weights, "config.json"], "org/name")
    with pytest.raises(ValueError, match=f"org/name has no .*{message}"):
        check_listed([weights], files, "org/name")
