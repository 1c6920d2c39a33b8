"""Each way in which a download cannot be, and the sentence that tells the user what to do."""

import json
from pathlib import Path

import pytest

from tests.hub.repositories import MEMBER, STRANGER, files_of
from tests.hub.server import Repository

LINEAR = {"rope_type": "linear", "factor": 2.0}


def test_a_file_that_the_server_stumbles_over_once_is_asked_for_again(client, server, tmp_path) -> None:
    server.failures["/org/model/resolve/"] = [503]
    client.result("load", "org/model", cache_dir=tmp_path)
    assert [request.status for request in server.requests].count(503) == 1


def test_without_cache_and_without_network(client, offline, server, tmp_path) -> None:
    with server.unreachable():
        message = client.refused("load", "org/model", cache_dir=tmp_path)
        of_dataset = client.refused("dataset", "org/data", cache_dir=tmp_path)
    assert "org/model is neither a local folder nor complete in the download cache" in message
    assert "the Hugging Face Hub cannot be reached; check the connection" in message
    assert of_dataset == (
        "org/data is neither a local file or folder nor complete in the download cache, and "
        "the Hugging Face Hub cannot be reached; check the connection, and HF_ENDPOINT if it is set"
    )
    message = client.refused("load", "org/model", cache_dir=tmp_path, local_files_only=True)
    assert message.endswith("local_files_only is set; unset it once to download")
    message = offline.refused("load", "org/model", revision="v1", cache_dir=tmp_path)
    assert "org/model at revision 'v1' is neither" in message
    assert message.endswith("HF_HUB_OFFLINE is set; unset it once to download")
    assert server.requests == []


def test_a_cache_that_lacks_a_shard_is_not_a_model(client, offline, server, tmp_path) -> None:
    found = client.result("folder", "org/sharded", cache_dir=tmp_path)
    shard = max(name for name in found["files"] if name.endswith(".safetensors"))
    (Path(found["folder"]) / shard).unlink()
    message = client.refused("folder", "org/sharded", cache_dir=tmp_path, local_files_only=True)
    assert f"org/sharded only in part: {shard} is missing, and local_files_only is set" in message
    message = offline.refused("folder", "org/sharded", cache_dir=tmp_path)
    assert f"{shard} is missing, and HF_HUB_OFFLINE is set" in message
    assert client.result("folder", "org/sharded", cache_dir=tmp_path) == found


def test_refused_tokens(client, server, tmp_path) -> None:
    message = client.refused("load", "org/gated", cache_dir=tmp_path, token=STRANGER)
    assert "org/gated is gated" in message
    assert "this token's account has no access: ask for it at" in message
    message = client.refused("load", "org/model", cache_dir=tmp_path, token="hf_expired")
    assert "does not know this token; make a new one at" in message
    server.failures["/org/model/resolve/"] = [403] * 20
    message = client.refused("load", "org/model", cache_dir=tmp_path, token=STRANGER)
    assert "this token may not read org/model on the Hugging Face Hub; change what it may do at" in message
    assert STRANGER not in message
    assert server.downloads() == []


@pytest.mark.parametrize("token", [None, MEMBER])
def test_missing_repository(client, tmp_path, token) -> None:
    message = client.refused("load", "org/modle", cache_dir=tmp_path, token=token)
    assert message.startswith("org/modle is neither a local folder nor a repository on the Hugging Face Hub")
    assert "check the spelling, and if it is private, run `hf auth login`" in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/pickled", "has no model.safetensors, only pickled weights (pytorch_model.bin), which slothcore does not"),
        ("org/quantized", "has no model.safetensors, only model-q4_k_m.gguf, which is in another layout"),
        ("org/empty", "has no weights, neither model.safetensors nor others"),
    ],
)
def test_repositories_without_usable_weights(client, server, tmp_path, name, expected) -> None:
    assert expected in client.refused("load", name, cache_dir=tmp_path)
    assert not {"pytorch_model.bin", "model-q4_k_m.gguf"} & set(server.downloads())


def test_a_shard_that_the_index_names_and_the_repository_lacks(client, server, tmp_path) -> None:
    files = dict(*server.repositories["org/sharded"].commits.values())
    shard = max(name for name in files if "-of-" in name)
    del files[shard]
    server.repositories["org/half"] = Repository.of(files)
    message = client.refused("load", "org/half", cache_dir=tmp_path)
    assert f"org/half lacks {shard}, which its model.safetensors.index.json names" in message
    assert not [name for name in server.downloads() if name.endswith(".safetensors")]


def test_what_the_small_files_tell_spares_the_download(client, server, folders, tmp_path) -> None:
    model, adapter = files_of(folders / "model"), files_of(folders / "adapter")
    config, lora = json.loads(model["config.json"]), json.loads(adapter["adapter_config.json"])
    for name, change in {"mamba": {"model_type": "mamba2"}, "scaled": {"rope_scaling": LINEAR}}.items():
        changed = {**model, "config.json": json.dumps({**config, **change}).encode()}
        server.repositories[f"org/{name}"] = Repository.of(changed)
    replicated = {**adapter, "adapter_config.json": json.dumps({**lora, "layer_replication": [[0, 1]]}).encode()}
    server.repositories["me/replicated"] = Repository.of(replicated)
    assert "mamba2" in client.refused("load", "org/mamba", cache_dir=tmp_path)
    assert "layer_replication" in client.refused("load", "me/replicated", cache_dir=tmp_path)
    message = client.refused("load", "org/scaled", cache_dir=tmp_path, max_seq_length=4096)
    assert "max_seq_length 4096 cannot be had" in message
    assert not [name for name in server.downloads() if name.endswith(".safetensors")]


def test_a_hub_that_is_ill_is_said_to_be(client, server, tmp_path) -> None:
    server.failures["/api/models/org/model"] = [500]
    message = client.refused("load", "org/model", cache_dir=tmp_path)
    assert "answered with status 500 for org/model, and the download cache lacks it; try again later" in message
    expected = client.result("load", "org/model", cache_dir=tmp_path)
    server.failures["/api/models/org/model"] = [500]
    assert client.result("load", "org/model", cache_dir=tmp_path) == expected
    assert [request.status for request in server.requests].count(500) == 2
