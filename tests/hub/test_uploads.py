"""push_to_hub: a repository that others can load, with a card; or one sentence and nothing changed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from slothcore.export.formats import FORMATS
from slothcore.export.model_card import KINDS, MARK, model_card
from slothcore.models.load import from_config
from slothcore.run import train_from_config
from slothcore.training.config import TrainConfig
from tests.hub.client import Client
from tests.hub.repositories import MEMBER, STRANGER
from tests.hub.server import HubServer, Repository
from tests.training.tiny import CONFIG, QUIET, write_records

TOKEN = {"HF_TOKEN": MEMBER}


def files_of(server: HubServer, name: str, branch: str = "main") -> dict[str, bytes]:
    repository = server.repositories[name]
    return repository.commits[repository.branches[branch]]


@pytest.fixture
def run(tmp_path: Path, folders: Path) -> Path:
    """A run of a few steps on the small model."""
    (tmp_path / "secret place").mkdir()
    data = write_records(tmp_path / "secret place" / "my data.jsonl")
    train_from_config(
        TrainConfig(
            model=str(folders / "model"),
            data=str(data),
            output_dir=str(tmp_path / "run"),
            max_steps=4,
            eval_fraction=0.25,
            eval_steps=2,
            learning_rate=0.0123,
            bits=32,
            device="cpu",
            **QUIET,
        )
    )
    return tmp_path / "run"


@pytest.mark.parametrize("format", ["adapter", "merged", "merged-4bit"])
def test_what_is_pushed_can_be_loaded(format: str, client: Client, server: HubServer, folders: Path) -> None:
    name = f"me/pushed-{format}"
    address = client.result("push", folders / "adapter", name, format=format, environment=TOKEN)
    commit = server.repositories[name].branches["main"]
    assert address == f"{server.url}/{name}/commit/{commit}"
    assert server.repositories[name].private
    files = files_of(server, name)
    weights = "adapter_model.safetensors" if format == "adapter" else "model.safetensors"
    assert files.keys() >= {weights, "tokenizer.json", "README.md", ".gitattributes"}
    card = files["README.md"].decode()
    assert card.startswith("---\n")
    assert name in card
    assert "## Training" not in card
    before = client.result("load", folders / "adapter")["logits"] if format == "adapter" else None
    bits = 4 if format == "merged-4bit" else 32
    after = client.result("load", name, bits=bits, environment=TOKEN)
    assert after["bits"] == bits
    if before is not None:
        assert after["logits"] == before


def test_a_gguf_file(client: Client, server: HubServer, folders: Path) -> None:
    """Beside another one, which stays; and a model that has no adapter is a fine-tune as well."""
    pytest.importorskip("gguf")
    for dtype in ("q8_0", "f16"):
        client.result("push", folders / "model", "me/gguf", format="gguf", dtype=dtype, environment=TOKEN)
    files = files_of(server, "me/gguf")
    assert {name for name in files if name.endswith(".gguf")} == {"model-Q8_0.gguf", "model-F16.gguf"}
    assert all(files[name].startswith(b"GGUF") for name in files if name.endswith(".gguf"))
    assert "llama-cli -hf me/gguf" in files["README.md"].decode()


def test_every_format_has_a_card() -> None:
    assert KINDS.keys() == FORMATS.keys()


def test_the_card_tells_of_the_run(run: Path, client: Client, server: HubServer) -> None:
    """Options, data, losses, versions; and no folder of this machine, nor anything secret."""
    words = ["export", "--model", str(run), "--format", "adapter", "--push", "me/carded", "--device", "cpu"]
    done = client.result("command", *words, "--token", MEMBER)
    assert done["status"] == 0, done["errors"]
    commit = server.repositories["me/carded"].branches["main"]
    assert done["output"] == f"uploaded {server.url}/me/carded/commit/{commit}\n"
    card = files_of(server, "me/carded")["README.md"].decode()
    lines = card.splitlines()
    for line in ("| `learning_rate` | 0.0123 |", "| `max_steps` | 4 |", "| Optimizer steps | 4 |", "| my data.jsonl |"):
        assert any(found.startswith(line) for found in lines), line
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = [record["loss"] for record in log if "loss" in record][-1]
    assert f"{last:.4g} |" in next(line for line in lines if line.startswith("| Loss, first and last"))
    assert any(line.startswith("| Evaluation loss, lowest |") for line in lines)
    assert any(line.startswith("| torch | ") for line in lines)
    assert str(run.parent) not in card
    assert "secret place" not in card
    assert MEMBER not in card


@pytest.mark.parametrize("notes", ["run.json", "none"])
def test_the_card_of_a_run_whose_folders_are_gone(notes: str, tmp_path: Path, monkeypatch) -> None:
    """Where it lay on this machine, relative or not, is nobody's business, and neither is a token in its options."""
    monkeypatch.chdir(tmp_path)
    values = {
        "output_dir": "secret/run",
        "chat_template": "secret/own.jinja",
        "sample_prompts": "secret/prompts.txt",
        "resume_from_checkpoint": "secret/run/checkpoint-4",
        "logging_dir": "secret/logs",
        "run_name": "secret",
        "token": "hf_secret",
        "learning_rate": 0.5,
        "prompt_template": "Yes/No: {instruction}",
    }
    (tmp_path / "run").mkdir()
    if notes == "run.json":
        options = [{"name": name, "value": value, "default": None, "group": "Model"} for name, value in values.items()]
        (tmp_path / "run" / "run.json").write_text(json.dumps({"options": options}))
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(values))
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    card = model_card(from_config(CONFIG, device="cpu"), "merged", run=tmp_path / "run")
    assert "secret" not in card
    assert "| `chat_template` | own.jinja |" in card
    assert "| `learning_rate` | 0.5 |" in card
    assert "| `prompt_template` | Yes/No: {instruction} |" in card


def test_the_card_shows_what_means_something_to_markdown(tmp_path: Path) -> None:
    """Templates with tokens that look like HTML, or of many words, expressions, and odd names of files."""
    values = {
        "completion_template": "word " * 99 + "{output}",
        "prompt_template": "<s>[INST] {instruction} [/INST]\n| `code`",
        "target_modules": r".*\.(q|v)_proj",
        "new_tokens": ["<b>", "</b>"],
        "optim": "adamw_8bit",
    }
    options = [{"name": name, "value": value, "default": None, "group": "Model"} for name, value in values.items()]
    files = [{"path": "<s>_mine_*.json", "use": "training", "rows": 3, "bytes": 9}]
    (tmp_path / "run.json").write_text(json.dumps({"options": options, "files": files}))
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    lines = model_card(from_config(CONFIG, device="cpu"), "merged", run=tmp_path).splitlines()
    assert r"| `prompt_template` | `` <s>[INST] {instruction} [/INST]\n\| `code` `` |" in lines
    assert r"| `target_modules` | `.*\.(q\|v)_proj` |" in lines
    assert "| `new_tokens` | `<b>, </b>` |" in lines
    assert "| `optim` | adamw_8bit |" in lines
    assert f"| `completion_template` | {'word ' * 99}{{output}} |" in lines
    assert "| `<s>_mine_*.json` | training | 3 |" in lines


def test_pushing_again(client: Client, server: HubServer, folders: Path, tmp_path: Path) -> None:
    """Shards of an earlier model go, other files stay; so does a card that somebody has taken over."""
    name = "me/again"
    earlier = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}", "model-Q8_0.gguf": b"2"}
    earlier["generation_config.json"] = b'{"temperature": 9}'
    server.repositories[name] = Repository.of({**earlier, "README.md": f"old\n{MARK}\n".encode()})
    server.repositories[name].private = True
    options = {"format": "merged", "environment": TOKEN}
    client.result("push", folders / "adapter", name, path=tmp_path / "kept", **options)
    files = files_of(server, name)
    assert not files.keys() & {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    assert files.get("generation_config.json") != earlier["generation_config.json"]
    assert files["model-Q8_0.gguf"] == b"2"
    assert files["model.safetensors"] == (tmp_path / "kept" / "model.safetensors").read_bytes()
    assert b"A fine-tune of" in files["README.md"]
    server.repositories[name].commit({**files, "README.md": b"mine"})
    client.result("push", folders / "adapter", name, dtype="float16", **options)
    assert files_of(server, name)["README.md"] == b"mine"
    assert files_of(server, name)["model.safetensors"] != files["model.safetensors"]


@pytest.mark.parametrize("format", ["adapter", "merged"])
def test_an_older_tokenizer_goes(format: str, client: Client, server: HubServer, folders: Path) -> None:
    """Readers take a template in a file of its own before the one that the new tokenizer has."""
    name = "me/older"
    templates = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "added_tokens.json")
    server.repositories[name] = Repository.of({**dict.fromkeys(templates, b"old"), "notes.jinja": b"mine"})
    server.repositories[name].private = True
    client.result("push", folders / "adapter", name, format=format, environment=TOKEN)
    files = files_of(server, name)
    assert "tokenizer.json" in files
    assert not files.keys() & set(templates)
    assert files["notes.jinja"] == b"mine"


def test_a_branch_and_a_name_without_owner(client: Client, server: HubServer, folders: Path) -> None:
    address = client.result("push", folders / "adapter", "short", environment=TOKEN)
    assert f"{server.url}/me/short/commit/" in address
    server.repositories["me/short"].branches["next"] = server.repositories["me/short"].branches["main"]
    before = files_of(server, "me/short")
    client.result("push", folders / "adapter", "short", dtype="bfloat16", revision="next", environment=TOKEN)
    assert files_of(server, "me/short") == before
    assert files_of(server, "me/short", "next")["adapter_model.safetensors"] != before["adapter_model.safetensors"]


@pytest.mark.parametrize("token", ["hf_hidden\n", "hf_hid\x01den", "hf_hid\nden", "hf_hidd\u00e9n"], ids=ascii)
def test_no_error_tells_a_token(token: str, client: Client, folders: Path, tmp_path: Path) -> None:
    """HTTP libraries quote what cannot be sent."""
    for said in (
        client.refused("push", folders / "adapter", "me/new", token=token),
        client.refused("load", "me/private", token=token, cache_dir=tmp_path),
    ):
        assert "hf_" not in said
        assert "hid" not in said


def test_a_token_read_with_the_end_of_its_line(client: Client, server: HubServer, folders: Path) -> None:
    client.result("push", folders / "adapter", "me/line", token=f"{MEMBER}\n")
    assert "adapter_model.safetensors" in files_of(server, "me/line")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("me/new", {}, "takes uploads only with a token that it knows; make one that may write at .*, then run `hf"),
        ("me/new", {"token": "hf_wrong"}, "takes uploads only with a token that it knows"),
        ("me/new", {"token": STRANGER}, "this token may not write into me/new .*; make one that may at "),
        ("org/model", {"token": STRANGER}, "this token may not write into org/model"),
        ("org/wide", {"token": MEMBER}, r"org/wide exists and everybody can read it; say private=False \(--public\)"),
        ("org/model", {"token": MEMBER, "private": False}, "holds a whole model; choose another repository for its ad"),
        ("me/adapter", {"token": MEMBER, "private": False, "format": "merged"}, "holds a LoRA adapter, which transf"),
        ("me/adapter", {"token": MEMBER, "private": False, "revision": "absent"}, "has no such branch"),
        ("a/b/c", {"token": MEMBER}, "a repository on the Hub is named owner/name, got 'a/b/c'"),
        ("me/new", {"token": MEMBER, "format": "gif"}, "format must be one of"),
        ("me/new", {"token": MEMBER, "run": "nowhere"}, "the run folder nowhere does not exist"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str, client, server, folders, tmp_path) -> None:
    """One sentence, and no commit anywhere. What the Hub refuses is refused before anything is exported."""
    commits = {name: len(repository.commits) for name, repository in server.repositories.items()}
    answer = client.ask("push", folders / "adapter", name, path=tmp_path / "kept", **options)
    kind, said = answer["error"]
    assert kind in ("ValueError", "FileNotFoundError")
    assert "\n" not in said
    assert re.search(message, said), said
    assert not (tmp_path / "kept").exists()
    assert {name: len(repository.commits) for name, repository in server.repositories.items()} == commits


def test_an_upload_that_breaks_off(client: Client, server: HubServer, folders: Path, tmp_path: Path) -> None:
    """The export stays where its folder was named; the repository is as it was."""
    client.result("push", folders / "adapter", "me/broken", environment=TOKEN)
    before = files_of(server, "me/broken")
    server.failures["/api/models/me/broken/commit/main"] = [500]
    options = {"dtype": "float16", "environment": TOKEN}
    said = client.refused("push", folders / "adapter", "me/broken", path=tmp_path / "kept", **options)
    assert "answered with status 500 to the upload to me/broken, where nothing has changed; try again later" in said
    assert (tmp_path / "kept" / "adapter_model.safetensors").is_file()
    assert files_of(server, "me/broken") == before
    with server.unreachable():
        said = client.refused("push", folders / "adapter", "me/broken", **options)
    assert said.startswith("nothing was uploaded to me/broken: the Hugging Face Hub cannot be reached; check the ")


def test_offline(offline: Client, folders: Path) -> None:
    said = offline.refused("push", folders / "adapter", "me/new", token=MEMBER)
    assert said == "nothing can be uploaded to me/new while HF_HUB_OFFLINE is set; unset it"


def test_the_command_says_what_is_missing(client: Client, folders: Path) -> None:
    words = ["export", "--model", str(folders / "adapter"), "--format", "adapter"]
    done = client.result("command", *words)
    assert done["status"] == 2
    assert "give --output-dir DIR, or --push OWNER/NAME for the Hub" in done["errors"]
    done = client.result("command", *words, "--output-dir", "somewhere", "--public")
    assert done["status"] == 2
    assert "--public is of no use without --push" in done["errors"]
