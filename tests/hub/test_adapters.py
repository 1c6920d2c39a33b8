"""Adapters on the Hub: with their base, with its revision, without it, and from the command line."""

import json

from tests.hub.repositories import MEMBER, TOKENIZER, files_of, local
from tests.hub.server import Repository
from tests.training.tiny import write_records


def test_an_adapter_as_the_name(client, offline, server, folders, tmp_path) -> None:
    loaded = client.result("load", "me/adapter", cache_dir=tmp_path)
    fetched = ["adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors", *TOKENIZER]
    assert server.downloads() == sorted(fetched)
    assert (loaded["name"], loaded["rank"], loaded["trainable"]) == ("org/model", 4, ["lora_A", "lora_B"])
    base = local(folders / "model")
    assert loaded["logits"] != base["logits"]
    assert loaded["eos"] == base["eos"]
    assert not loaded["training"]
    assert client.result("load_adapter", "org/model", "me/adapter", cache_dir=tmp_path) == loaded
    assert client.result("load_adapter", str(folders / "model"), str(folders / "adapter"))["logits"] == loaded["logits"]
    assert offline.result("load", "me/adapter", cache_dir=tmp_path) == loaded


def test_an_adapter_beside_the_name_of_its_base(client, server, folders, tmp_path) -> None:
    expected = client.result("load", "me/adapter", cache_dir=tmp_path)
    assert client.result("load", "org/model", adapter="me/adapter", cache_dir=tmp_path) == expected
    assert client.result("load", str(folders / "model"), adapter="me/adapter", cache_dir=tmp_path)["rank"] == 4
    refused = client.refused("load", "me/adapter", adapter="me/adapter", cache_dir=tmp_path)
    assert "me/adapter is no base model, so the adapter me/adapter cannot be put on it" in refused


def test_the_base_revision_of_an_adapter(client, server, folders, tmp_path) -> None:
    """An adapter pins its base; `revision` chooses among the adapter's own commits."""
    adapter = files_of(folders / "adapter")
    first = server.repositories["org/model"].branches["main"]
    config = json.loads(adapter["adapter_config.json"])
    pinned = {**adapter, "adapter_config.json": json.dumps({**config, "revision": first}).encode()}
    server.repositories["me/pinned"] = Repository.of(pinned)
    model = server.repositories["org/model"].commits[first]
    other = json.loads(model["config.json"])
    server.repositories["org/model"].commit(
        {**model, "config.json": json.dumps({**other, "rope_theta": 20.0}).encode()}
    )
    try:
        moved = client.result("load", "me/adapter", cache_dir=tmp_path)
        kept = client.result("load", "me/pinned", revision="main", cache_dir=tmp_path)
    finally:
        server.repositories["org/model"].branches["main"] = first
    assert kept["logits"] == client.result("load", "me/adapter", cache_dir=tmp_path)["logits"]
    assert moved["logits"] != kept["logits"]


def test_an_adapter_without_its_base(client, server, folders, tmp_path) -> None:
    adapter = files_of(folders / "adapter")
    config = json.loads(adapter["adapter_config.json"])
    for name, base in {"lost": "org/gone", "none": None, "chained": "me/adapter", "other": "org/wide"}.items():
        changed = json.dumps({**config, "base_model_name_or_path": base}).encode()
        server.repositories[f"me/{name}"] = Repository.of({**adapter, "adapter_config.json": changed})
    server.repositories["me/pickled"] = Repository.of(
        {"adapter_config.json": adapter["adapter_config.json"], "adapter_model.bin": b"\x80"}
    )
    for name, expected in {
        "me/lost": "the base model of the adapter me/lost cannot be had: org/gone is neither a local folder nor",
        "me/none": "does not say its base model; fill in base_model_name_or_path",
        "me/chained": "the adapter me/chained was trained on me/adapter, which is an adapter itself",
        "me/other": "it was made for org/wide",
        "me/pickled": "me/pickled has no adapter_model.safetensors, only pickled weights (adapter_model.bin)",
    }.items():
        assert expected in client.refused("load", name, cache_dir=tmp_path)


def test_the_command_takes_adapters_on_the_hub(client, server, home, tmp_path) -> None:
    common = ["--model", "me/adapter", "--bits", "32", "--device", "cpu"]
    written = client.result("command", "generate", *common, "--prompt", "Add", "--max-new-tokens", "3")
    assert written["status"] == 0, written["errors"]
    merged = tmp_path / "merged"
    assert client.result("command", "merge", *common, "--output-dir", merged, "--dtype", "float32")["status"] == 0
    again = client.result(
        "command", "generate", "--model", merged, *common[2:], "--prompt", "Add", "--max-new-tokens", "3"
    )
    assert again["output"] == written["output"]

    data, run = write_records(tmp_path / "data.jsonl", 4), tmp_path / "run"
    flags = ["--data", data, "--output-dir", run, "--max-steps", "1", "--plot", "false", "--disable-tqdm"]
    trained = client.result("command", "train", *common, *flags, "--token", MEMBER, "--local-files-only")
    assert trained["status"] == 0, trained["errors"]
    assert "training the adapter of me/adapter further: r 4" in trained["output"]
    assert not [file for file in run.rglob("*") if file.is_file() and MEMBER.encode() in file.read_bytes()]
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, "org/model")
    assert client.result("load", str(run), local_files_only=True)["rank"] == 4
    refused = client.result("command", "train", *common, *flags, "--overwrite-output-dir", "--r", "8")
    assert "comes with an adapter, whose r is 4, and r is set to 8; drop the option" in refused["errors"]
