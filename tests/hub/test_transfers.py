"""What is fetched, how often, with which token and at which revision, and what the cache keeps."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.hub.client import Client
from tests.hub.repositories import MEMBER, TOKENIZER, files_of, local
from tests.training.tiny import write_records

MIB = 2**20


def test_only_needed_files_are_fetched_and_only_once(client, server, folders, tmp_path) -> None:
    loaded = client.result("load", "org/model", cache_dir=tmp_path)
    assert server.downloads() == sorted(["config.json", "model.safetensors", *TOKENIZER])
    assert loaded == {**local(folders / "model"), "name": "org/model"}
    assert {request.token for request in server.requests} == {None}
    server.forget()
    assert client.result("load", "org/model", cache_dir=tmp_path) == loaded
    assert server.downloads() == []
    assert not [request for request in server.requests if request.method == "HEAD"]


@pytest.mark.parametrize("words", [["preview", "--data", "{data}"], ["plan"]], ids=str)
def test_what_needs_no_weights_fetches_none(words, server, tmp_path) -> None:
    """Of an adapter, and of its base."""
    data = write_records(tmp_path / "data.jsonl", 4)
    client = Client(tmp_path / "home", server.url)
    try:
        words = [word.replace("{data}", str(data)) for word in words]
        done = client.result("command", *words, "--model", "me/adapter")
    finally:
        client.close()
    assert done["status"] == 0, done["errors"]
    assert server.downloads() == sorted(["adapter_config.json", "config.json", *TOKENIZER])


def test_the_default_cache_is_in_hf_home(client, home) -> None:
    found = client.result("folder", "org/model")
    assert Path(found["folder"]).is_relative_to(home / "hub" / "models--org--model" / "snapshots")
    assert client.result("folder", "org/model", local_files_only=True) == found


def test_shards_are_those_of_the_index_and_a_cut_transfer_is_resumed(client, server, folders, tmp_path) -> None:
    shards = {name: content for name, content in files_of(folders / "sharded").items() if name.startswith("model-")}
    largest = max(shards, key=lambda name: len(shards[name]))
    assert len(shards) > 1
    assert len(shards[largest]) > 11 * MIB
    server.cuts[f"org/sharded/{largest}"] = 11 * MIB
    found = client.result("folder", "org/sharded", cache_dir=tmp_path)
    assert found["files"] == sorted(
        ["config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER, *shards]
    )
    for name, content in shards.items():
        assert (Path(found["folder"]) / name).read_bytes() == content
    first, second = (r for r in server.requests if r.method == "GET" and r.path.endswith(largest))
    assert (first.range, first.status, first.body_bytes) == (None, 200, 11 * MIB)
    assert (second.range, second.status) == (f"bytes={10 * MIB}-", 206)
    assert first.body_bytes + second.body_bytes < 2 * len(shards[largest])
    assert sorted(set(server.downloads())) == found["files"]
    loaded = client.result("load", "org/sharded", cache_dir=tmp_path, local_files_only=True)
    assert loaded["logits"] == local(folders / "sharded")["logits"]


def test_after_a_failure_only_the_rest_is_fetched(client, server, folders, tmp_path) -> None:
    shard = sorted(file.name for file in (folders / "sharded").glob("*.safetensors"))[-1]
    (files,) = server.repositories["org/sharded"].commits.values()
    server.failures[server.storage_path("org/sharded", shard)] = [410]
    message = client.refused("folder", "org/sharded", cache_dir=tmp_path)
    assert "answered with status 410 for org/sharded" in message
    assert "try again later" in message
    server.forget()
    found = client.result("folder", "org/sharded", cache_dir=tmp_path)
    assert server.downloads() == [shard]
    assert all((Path(found["folder"]) / name).read_bytes() == files[name] for name in found["files"])


def test_a_revision_pins_the_files(client, server, folders, tmp_path) -> None:
    repository = server.repositories["org/wide"]
    first = repository.branches["main"]
    config = json.loads(repository.commits[first]["config.json"])
    newer = {**repository.commits[first], "config.json": json.dumps({**config, "rope_theta": 20.0}).encode()}
    repository.branches["old"] = first
    second = repository.commit(newer)
    old, new = (client.result("load", "org/wide", revision=r, cache_dir=tmp_path) for r in (first, None))
    assert old["logits"] == local(folders / "wide")["logits"]
    assert old["logits"] != new["logits"]
    assert client.result("load", "org/wide", revision="old", cache_dir=tmp_path) == old
    # Weights that both commits share are in the cache once.
    assert server.downloads().count("model.safetensors") == 1
    found = client.result("folder", "org/wide", revision=second, cache_dir=tmp_path, local_files_only=True)
    assert Path(found["folder"]).name == second
    message = client.refused("load", "org/wide", revision="v9", cache_dir=tmp_path)
    assert message.startswith("org/wide on the Hugging Face Hub has no revision 'v9'; ")
    assert message.endswith("/org/wide/tree/main lists its branches and tags")


def test_tokens_by_argument_environment_and_login(client, server, home, tmp_path) -> None:
    ways: list[dict[str, Any]] = [{"token": MEMBER}, {"environment": {"HF_TOKEN": MEMBER}}]
    for number, way in enumerate(ways):
        client.result("load", "org/gated", cache_dir=tmp_path / str(number), **way)
    (home / "token").write_text(MEMBER)
    try:
        client.result("load", "org/gated", cache_dir=tmp_path / "login")
        asked = [request for request in server.requests if not request.path.startswith("/storage/")]
        assert {request.token for request in asked} == {MEMBER}
        # The other host, where large files lie, must not see it.
        assert {request.token for request in server.requests if request not in asked} == {None}
        server.forget()
        message = client.refused("load", "org/gated", cache_dir=tmp_path / "none", token=False)
    finally:
        (home / "token").unlink()
    assert {request.token for request in server.requests} == {None}
    assert "org/gated is gated on the Hugging Face Hub: accept its terms at http" in message
    assert message.endswith("/org/gated, then run `hf auth login`, set HF_TOKEN or pass token=")


def test_the_cache_serves_without_a_network(client, offline, server, folders, tmp_path) -> None:
    expected = client.result("load", "org/model", cache_dir=tmp_path)
    assert {f.name for f in (tmp_path / "models--org--model").iterdir()} >= {"blobs", "refs", "snapshots"}
    with server.unreachable():
        assert client.result("load", "org/model", cache_dir=tmp_path) == expected
    server.forget()
    assert client.result("load", "org/model", cache_dir=tmp_path, local_files_only=True) == expected
    assert offline.result("load", "org/model", cache_dir=tmp_path) == expected
    assert server.requests == []


def test_progress_bars_are_shown_unless_refused(client, home, tmp_path) -> None:
    log = home / "stderr.txt"
    log.open("w").close()
    client.result("load", "org/model", cache_dir=tmp_path / "quiet", progress=False)
    assert "Fetching" not in log.read_text()
    client.result("load", "org/model", cache_dir=tmp_path / "shown")
    assert "Fetching" in log.read_text()
