"""Folders that several files of tests export from; a file with a fixture of the same name has its own."""

from pathlib import Path

import pytest

from slothcore.lora.adapter_io import save_adapter
from tests.export.adapted_models import adapted
from tests.training.tiny import write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("export") / "base")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter, as good as a run's."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    model, tokenizer = adapted(base)
    save_adapter(model, folder)
    tokenizer.save(folder)
    return folder
