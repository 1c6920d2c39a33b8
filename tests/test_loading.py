"""`slothcore.load`: model and tokenizer together."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest

from slothcore.loading import load
from tests.models.tiny import saved, tiny_llama


def test_model_and_tokenizer(shared_data: Path) -> None:
    model, tokenizer = load(shared_data / "models" / "babyllama-105", bits=32, device="cpu")
    assert tokenizer is not None
    assert model.config.vocab_size == 105
    assert model.max_seq_length == 256
    ids = tokenizer.encode("Once upon a time")
    assert 1 < len(ids) <= 105


def test_without_a_tokenizer(tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path)
    with pytest.warns(UserWarning, match="has no tokenizer.json, so load returns None"):
        model, tokenizer = load(folder, device="cpu")
    assert tokenizer is None
    assert model.bits == 4


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tiny_llama(), tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(folder))
    with pytest.warns(UserWarning, match="tokenizer"):
        model, _ = load("org/name", bits=16, device="cpu")
    assert model.bits == 16


def test_wrong_options_are_said_before_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match="bits must be one of 4, 16, 32, got 3"):
        load("org/name", bits=3)


def test_a_broken_tokenizer_is_said_before_the_weights_are_read(tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load(folder, device="cpu")
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="does not exist"):
        load(folder, device="cpu")
