"""The server on loopback and two programs that use it, started once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.client import Client
from tests.hub.repositories import MEMBER, STRANGER, repositories, write_folders
from tests.hub.server import HubServer


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the repositories hold, as folders."""
    folder = tmp_path_factory.mktemp("hub")
    write_folders(folder)
    return folder


@pytest.fixture(scope="session")
def server(folders: Path) -> Iterator[HubServer]:
    tokens, owners = frozenset({MEMBER, STRANGER}), {MEMBER: ("me", "org")}
    server = HubServer(repositories(folders), tokens=tokens, owners=owners)
    yield server
    server.close()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF_HOME of both programs."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def client(server: HubServer, home: Path) -> Iterator[Client]:
    client = Client(home, server.url)
    yield client
    client.close()


@pytest.fixture(scope="session")
def offline(server: HubServer, home: Path) -> Iterator[Client]:
    """The same program under HF_HUB_OFFLINE=1."""
    client = Client(home, server.url, offline=True)
    yield client
    client.close()


@pytest.fixture(autouse=True)
def fresh_record(server: HubServer) -> None:
    """Nothing asked so far, and nothing planned to go wrong."""
    server.forget()
    server.cuts.clear()
    server.failures.clear()
