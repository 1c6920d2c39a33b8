"""`slothcore serve` as a process: what it says, whom it answers, how it ends, and what it refuses before it begins."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import openai
import pytest

import slothcore
from slothcore.cli import main
from slothcore.commands.serve import adapters_of, open_models
from slothcore.serve.port import Port
from slothcore.serve.requests import model_defaults
from slothcore.training.config import TrainConfig
from tests.guides import serving
from tests.serve.running import BASE, SECONDS, served
from tests.training.tiny import write_model

MESSAGES = [{"role": "user", "content": "the cat"}]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", max_position_embeddings=512)


def saved(model: Path, folder: Path, **options: Any) -> Path:
    """An adapter that changes what the model says."""
    base, tokenizer = slothcore.load(model, bits=32, device="cpu")
    slothcore.add_lora(base, r=4, init_lora_weights=False, lora_alpha=64, **options)
    slothcore.save_adapter(base, folder)
    assert tokenizer is not None
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = main(["serve", *words])
    return status, capsys.readouterr().err


def test_a_server_of_a_model_and_its_adapters(model: Path, tmp_path: Path) -> None:
    for name in ("law", "poems"):
        saved(model, tmp_path / name)
    command = (
        f"slothcore serve --model {model} --served-model-name base --bits 32 --device cpu --chat-template alpaca "
        f"--adapter law={tmp_path / 'law'} --adapter poems={tmp_path / 'poems'} --max-length 300 --api-key secret"
    )
    with serving(command) as shown:
        assert shown.startswith("serving base, law, poems at http://127.0.0.1:")
        url = shown.split(" at ")[1].split(";")[0]
        client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
        assert [(each.id, each.max_model_len) for each in client.models.list()] == [
            ("base", 300),
            ("law", 300),
            ("poems", 300),
        ]
        for name in ("base", "law", "poems"):
            base, tokenizer = slothcore.load(model, bits=32, device="cpu")
            assert tokenizer is not None
            tokenizer.use_chat_template("alpaca")
            if name != "base":
                slothcore.load_adapter(base, tmp_path / name)
            prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
            expected = slothcore.generate(base, tokenizer, prompt, add_special_tokens=False, max_new_tokens=12)[0]
            reply = client.chat.completions.create(model=name, messages=MESSAGES, temperature=0, max_tokens=12)
            assert reply.choices[0].message.content == expected, name
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="other", max_retries=0).models.list()


def test_the_key_may_stand_in_the_environment(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOTHCORE_API_KEY", "from the environment")
    with serving(f"slothcore serve --model {model} --bits 32") as shown:
        url = shown.split(" at ")[1].split(";")[0]
        assert openai.OpenAI(base_url=url, api_key="from the environment").models.list().data[0].id == str(model)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="k", max_retries=0).models.list()


def test_an_open_door_is_spoken_of(model: Path) -> None:
    with serving(f"slothcore serve --model {model} --bits 32 --host 0.0.0.0") as shown:
        assert "may ask; --api-key asks for a key\n" in shown
    with serving(f"slothcore serve --model {model} --bits 32 --host 0.0.0.0 --api-key k") as shown:
        assert "may ask" not in shown


def test_wrong_calls_are_refused_in_one_sentence(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, status, message in (
        (["--adapter", "law"], 2, "--adapter takes NAME=FOLDER, as in law=runs/law, got 'law'"),
        (["--adapter", "=law"], 2, "--adapter takes NAME=FOLDER"),
        (["--adapter", "a=x", "--adapter", "a=y"], 2, "two adapters are called a"),
        (["--adapter", "a=x", "--served-model-name", "a"], 2, "the model and an adapter are both called a"),
        (["--port", "70000"], 2, "--port must lie in 0..65535, got 70000"),
        (["--api-key", ""], 2, "the API key must be printable ASCII"),
        (["--api-key", "clé"], 2, "the API key must be printable ASCII"),
        (["--host", ""], 2, "--host is empty; give the name or address where to listen"),
        (["--chat-template", "chatlm"], 2, "did you mean chatml?"),
        (["--host", "no.such.name.example"], 1, "cannot be had"),
        (["--adapter", f"a={model}", "--port", "0"], 1, "is a whole model and no adapter"),
        (["--max-rows", "0"], 2, "--max-rows must be at least 1, got 0"),
        (["--max-length", "-5"], 2, "--max-length must be at least 1, got -5"),
        (["--cache-tokens", "0"], 2, "--cache-tokens must be at least 1, got 0"),
    ):
        ended, error = said(capsys, "--model", str(model), "--bits", "32", *words)
        assert (ended, message in error) == (status, True), (words, error)
        assert len(error.splitlines()) == 1, words
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, error = said(capsys, "--model", str(model), "--port", port)
        assert (status, error.startswith(f"slothcore: error: port {port} of 127.0.0.1 cannot be had (")) == (1, True)
    monkeypatch.setattr("slothcore.commands.serve.find_spec", lambda name: None if name == "uvicorn" else object())
    assert "slothcore serve needs uvicorn: pip install 'slothcore[serve]'" in said(capsys, "--model", str(model))[1]


def test_the_adapters_of_runs_bring_their_options(model: Path, tmp_path: Path) -> None:
    """Bits and positions as the runs had them, and a chat template of its own for each that has one."""
    runs = {}
    for name in ("short", "long"):
        runs[name] = tmp_path / name
        saved(model, runs[name] / "adapter")
        config = TrainConfig(model=str(model), data="x.jsonl", bits=32, max_seq_length=700, output_dir=str(runs[name]))
        (runs[name] / "config.yaml").write_text(config.to_yaml())
    _, tokenizer = slothcore.load(model, bits=32)
    assert tokenizer is not None
    tokenizer.use_chat_template("alpaca")
    tokenizer.save(runs["long"] / "adapter")
    values = {"model": str(model), "chat_template": None, "bits": None, "device": "cpu"}
    values |= {"revision": None, "token": None, "local_files_only": False}
    with pytest.warns(UserWarning, match="takes the model from 512 positions to 700"):
        opened, several, served = open_models(values, "base", {name: str(run) for name, run in runs.items()})
    assert (opened.bits, opened.max_seq_length) == (32, 700)
    assert several is not None
    assert several.names == ("short", "long")
    assert [(each.name, each.adapter, each.parent) for each in served] == [
        ("base", None, None),
        ("short", "short", "base"),
        ("long", "long", "base"),
    ]
    assert served[0].tokenizer.chat_template != served[2].tokenizer.chat_template
    with pytest.raises(ValueError, match="is no base model"):
        open_models({**values, "model": str(runs["long"])}, "base", {"short": str(runs["short"])})
    as_it_was = (runs["short"] / "config.yaml").read_text()
    for change, told in (
        (("rope_scaling: null", "rope_scaling: dynamic"), "short: dynamic, 700 positions, long: linear, 700 positions"),
        # Another factor, and none at all.
        (("max_seq_length: 700", "max_seq_length: 600"), "short: linear, 600 positions, long: linear, 700 positions"),
        (("max_seq_length: 700", "max_seq_length: 400"), "short: default, 512 positions, long: linear, 700 positions"),
    ):
        (runs["short"] / "config.yaml").write_text(as_it_was.replace(*change))
        with pytest.raises(ValueError, match=f"positions scaled unlike each other .{told}.; serve them apart"):
            open_models(values, "base", {name: str(run) for name, run in runs.items()})
    # Lengths that the base has anyway do not matter.
    for name, length in (("short", 400), ("long", 500)):
        other = as_it_was.replace("max_seq_length: 700", f"max_seq_length: {length}")
        (runs[name] / "config.yaml").write_text(other)
    opened, _, _ = open_models(values, "base", {name: str(run) for name, run in runs.items()})
    assert (opened.config.rope.rope_type, opened.max_seq_length) == ("default", 500)


def test_a_run_is_served_under_its_name(model: Path, tmp_path: Path) -> None:
    folder = saved(model, tmp_path / "adapter")
    with serving(f"slothcore serve --model {folder} --bits 32 --served-model-name mine --max-length 600") as shown:
        beyond, note, line = shown.splitlines()
        assert beyond.startswith("slothcore: --max-length 600 goes beyond the 512 positions that the model was")
        assert note.startswith("slothcore: no chat template for mine: conversations are refused; --chat-template")
        assert line.startswith("serving mine at ")


def test_silence_is_read_as_the_model_says(model: Path) -> None:
    opened, _ = slothcore.load(model, bits=32)
    opened.generation_config = {}
    assert model_defaults(opened).temperature == 1.0
    opened.generation_config = {"temperature": 0.6, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.1}
    found = model_defaults(opened)
    assert (found.temperature, found.top_p, found.top_k, found.repetition_penalty) == (0.6, 0.9, None, 1.1)
    opened.generation_config |= {"do_sample": False}
    found = model_defaults(opened)
    assert (found.temperature, found.top_p, found.repetition_penalty) == (1.0, None, 1.1)
    opened.generation_config = {"temperature": 1e-9, "top_k": 50.0}
    assert (model_defaults(opened).temperature, repr(model_defaults(opened).top_k)) == (0.0, "50")
    for name, value, told in (
        ("temperature", "0.7", "temperature must be a number, got '0.7'"),
        ("top_k", 50.5, "top_k must be a whole number, got 50.5"),
        ("top_p", 1.5, "top_p must be above 0 and at most 1, got 1.5"),
        ("repetition_penalty", -1, "repetition_penalty must lie in 0.01..100, got -1"),
    ):
        opened.generation_config = {name: value}
        with pytest.raises(ValueError, match=rf"generation_config\.json: {told}.*; correct it there"):
            model_defaults(opened)


def test_names_of_adapters() -> None:
    assert adapters_of(["a=x", "b=owner/name=1"]) == {"a": "x", "b": "owner/name=1"}


def test_a_port_is_taken_at_once() -> None:
    """By one of two servers that are started together, before either has loaded its model."""
    port = Port()
    number = port.socket.getsockname()[1]
    with pytest.raises(OSError, match=rf"port {number} of 127\.0\.0\.1 cannot be had \(.*\); choose another --port"):
        Port(port=number)
    port.close()
    Port(port=number).close()


def test_who_comes_before_the_server_is_ready_waits(tmp_path: Path) -> None:
    port = Port()
    found: list[str] = []
    asking = threading.Thread(
        target=lambda: found.extend(
            m.id for m in openai.OpenAI(base_url=port.url, api_key="k", max_retries=0).models.list()
        )
    )
    asking.start()
    with served(tmp_path, port=port):
        asking.join(SECONDS)
    assert found == [BASE]


def test_a_port_on_another_family() -> None:
    port = Port("localhost")
    assert port.url.startswith("http://localhost:")
    assert port.is_loopback
    port.close()
    if socket.has_ipv6:
        port = Port("::1")
        assert port.url.startswith("http://[::1]:")
        port.close()


def test_help_needs_neither_torch_nor_a_server() -> None:
    code = "import json, sys, slothcore.cli; slothcore.cli.build_parser(); print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    assert {"torch", "starlette", "uvicorn"}.isdisjoint(json.loads(done.stdout))
