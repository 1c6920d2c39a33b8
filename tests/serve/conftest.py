"""The server that most tests share."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.serve.running import Served

# Packages of the extras `serve` and `test`, which a GPU machine may lack.
if any(find_spec(name) is None for name in ("starlette", "uvicorn", "openai")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Served]":
    """A base and its adapters; nothing that a test does may keep it from answering the next."""
    from tests.serve.running import ADAPTERS, served

    with served(tmp_path_factory.mktemp("served"), adapters=list(ADAPTERS), max_rows=16) as running:
        yield running
