"""What cannot be answered is refused as OpenAI's API refuses it, and clients that go away cost nothing more."""

import asyncio
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.serve.running import BASE, SECONDS, Served, served

MESSAGES = [{"role": "user", "content": "the cat"}]
CHAT = {"model": BASE, "messages": MESSAGES}
COMPLETION = {"model": BASE, "prompt": "the cat"}


def post(server: Served, path: str, body: bytes | str, **headers: str) -> tuple[int, Any]:
    """Status and JSON of what is answered to a raw body."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", int(server.url.split(":")[2].partition("/")[0]), timeout=SECONDS
    )
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", path, body, {"Content-Type": "application/json", **named})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def answers_at_all(server: Served) -> bool:
    try:
        server.client().models.list()
    except openai.APIError:
        return False
    return True


def until(holds: Callable[[], bool], *, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": ["hello"]}, "messages", r"messages\[0\] must be an object with a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "parts of type text only"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "must be a text or a list of parts"),
        ({"temperature": -1}, "temperature", r"temperature must lie in 0\.\.100, got -1.0"),
        ({"temperature": "warm"}, "temperature", "temperature must be a number, got 'warm'"),
        ({"temperature": 10**400}, "temperature", "a number that a float64 can hold"),
        ({"top_p": 1.5}, "top_p", "top_p must be above 0 and at most 1"),
        ({"n": 0}, "n", r"n must lie in 1\.\.128, got 0"),
        ({"n": True}, "n", "n must be a whole number, got True"),
        ({"seed": -1}, "seed", "seed must lie in"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0"),
        ({"max_completion_tokens": 2.5}, "max_completion_tokens", "must be a whole number, got 2.5"),
        ({"stop": ["a", ""]}, "stop", "none of them empty"),
        ({"stream": "yes"}, "stream", "stream must be true or false, got 'yes'"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "goes with stream"),
        ({"top_logprobs": 2}, "top_logprobs", "no effect without logprobs"),
        ({"top_logprobs": -1}, "top_logprobs", "no effect without logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs", "at most 20 alternatives"),
        ({"temprature": 1}, "temprature", "unrecognized field 'temprature'"),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not served here"),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format is not served here"),
        ({"presence_penalty": 1e308}, "presence_penalty", r"presence_penalty must lie in -2\.\.2, got 1e\+308"),
        ({"repetition_penalty": 0}, "repetition_penalty", r"must lie in 0.01\.\.100, got 0"),
        ({"stop": ["a"] * 33}, "stop", "at most 32 texts, got 33"),
        ({"chat_template_kwargs": 1}, "chat_template_kwargs", "must be an object"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "without messages, self"),
        ({"model": None}, "model", "model must be the name of a served model"),
    ],
    ids=str,
)
def test_a_wrong_chat_is_refused(server: Served, changes: dict[str, Any], param: str, message: str) -> None:
    status, body = post(server, "/v1/chat/completions", json.dumps({**CHAT, **changes}))
    assert status == 400
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == param
    assert re.search(message, body["error"]["message"]), body


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"prompt": None}, "prompt", "prompt must be a text, a list of texts"),
        ({"prompt": [1, "a"]}, "prompt", "prompt must be a text, a list of texts"),
        ({"prompt": [[]]}, "prompt", "prompt must be a text, a list of texts"),
        ({"prompt": [5, 100_000]}, "prompt", "got 100000"),
        ({"prompt": [-1]}, "prompt", "got -1"),
        ({"prompt": [-1], "echo": True}, "prompt", "got -1"),
        ({"prompt": [2**40], "echo": True}, "prompt", f"got {2**40}"),
        ({"echo": True, "logprobs": 1}, "echo", "of new tokens only"),
        ({"best_of": 3}, "best_of", "best_of must be n, which is 1, got 3"),
        ({"prompt": ["a"] * 65, "n": 2}, "n", "must be at most 128"),
        ({"suffix": "end"}, "suffix", "suffix is not served here"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias is not served here"),
    ],
    ids=str,
)
def test_a_wrong_completion_is_refused(server: Served, changes: dict[str, Any], param: str, message: str) -> None:
    status, body = post(server, "/v1/completions", json.dumps({**COMPLETION, **changes}))
    assert (status, body["error"]["param"]) == (400, param)
    assert message in body["error"]["message"]


def test_what_asks_for_nothing_is_let_through(server: Served) -> None:
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "tools": [],
        "tool_choice": "none",
        "logprobs": False,
        "top_logprobs": 0,
        "response_format": {"type": "text"},
        "logit_bias": {},
        "stop": None,
        "top_p": 1,
        "min_p": 0,
        "top_k": -1,
        "frequency_penalty": 0,
        "max_tokens": 3.0,
    }
    plain = post(server, "/v1/chat/completions", json.dumps({**CHAT, "temperature": 0, "max_tokens": 3}))
    status, body = post(server, "/v1/chat/completions", json.dumps({**CHAT, "temperature": 0, **harmless}))
    assert status == plain[0] == 200
    assert body["choices"] == plain[1]["choices"]


@pytest.mark.parametrize(
    "body",
    [
        *("", "{", "[]", '"text"', "nul", "[" * 100_000, b"\xff{}"),
        # Half a character, in every way in which it can be written.
        *('{"model": "\\ud800"}', b'{"model": "\xed\xa0\x80"}', '{"model": "\\ud800"}'.encode("utf-16")),
    ],
    ids=repr,
)
def test_bad_json_is_refused(server: Served, body: str | bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        status, answer = post(server, path, body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), path
        assert "JSON" in answer["error"]["message"]


def test_a_body_of_another_kind_or_size_is_refused(server: Served) -> None:
    status, answer = post(server, "/v1/completions", json.dumps(COMPLETION), Content_Type="text/plain")
    assert (status, "Content-Type: application/json" in answer["error"]["message"]) == (415, True)
    status, answer = post(server, "/v1/completions", json.dumps({**COMPLETION, "prompt": "a" * (33 * 2**20)}))
    assert (status, "more than" in answer["error"]["message"]) == (413, True)


def test_a_prompt_that_is_too_long_is_refused(server: Served) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.client().chat.completions.create(model=BASE, messages=[{"role": "user", "content": "abc " * 200}])
    assert refused.value.code == "context_length_exceeded"
    assert "takes 300 tokens in all, and the prompt has 8" in str(refused.value)
    with pytest.raises(openai.BadRequestError, match="no room for the 299 tokens that max_tokens asks for"):
        server.client().completions.create(model=BASE, prompt="the cat", max_tokens=299)
    ids = [5] * 299
    assert server.client().completions.create(model=BASE, prompt=ids, max_tokens=1).choices[0].finish_reason
    with pytest.raises(openai.BadRequestError, match="leaves no room"):
        server.client().completions.create(model=BASE, prompt=[5] * 300, max_tokens=1)


def test_unknown_models_and_paths(server: Served) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9' here; served are tiny, law, poems") as no:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert no.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    status, answer = post(server, "/v1/embeddings", "{}")
    assert (status, answer["error"]["message"][:36]) == (404, "there is nothing at /v1/embeddings; ")
    status, answer = post(server, "/v1/models", "{}")
    assert (status, answer["error"]["type"]) == (405, "invalid_request_error")


def test_a_key_is_asked_for(tmp_path: Path) -> None:
    with served(tmp_path, api_key="sesame") as server:
        for key in ("any", "Sesame", "sesame!", "sesam"):
            with pytest.raises(openai.AuthenticationError) as refused:
                server.client(api_key=key).models.list()
            assert refused.value.code == "invalid_api_key"
        status, answer = post(server, "/v1/completions", json.dumps(COMPLETION))
        assert (status, answer["error"]["message"][:22]) == (401, "the API key is missing")
        status, _ = post(server, "/v1/completions", json.dumps(COMPLETION), Authorization="Basic sesame")
        assert status == 401
        assert server.client(api_key="sesame").models.list().data[0].id == BASE
        assert server.client(api_key="sesame").completions.create(**COMPLETION).choices[0].finish_reason


def test_strangers_names_for_this_machine_are_refused(server: Served) -> None:
    for host, expected in (("evil.example", 403), ("evil.example:80", 403), ("localhost:1", 200), ("[::1]:8", 200)):
        assert post(server, "/v1/completions", json.dumps(COMPLETION), Host=host)[0] == expected, host


def test_a_model_without_a_template_takes_no_conversation(tmp_path: Path) -> None:
    with served(tmp_path, chat_template=None) as server:
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            server.client().chat.completions.create(model=BASE, messages=MESSAGES)
        assert server.client().completions.create(model=BASE, prompt="the cat").choices[0].finish_reason


@pytest.fixture
def steps(server: Served, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When each step of the engine was done, from now on."""
    done: list[float] = []
    engine = server.server._engine
    step = engine.step

    def counted() -> Any:
        events = step()
        done.append(time.monotonic())
        return events

    monkeypatch.setattr(engine, "step", counted)
    return done


def test_a_stream_that_nobody_reads_any_more_is_given_up(server: Served, steps: list[float]) -> None:
    endless: Any = {"max_tokens": 250, "extra_body": {"ignore_eos": True}, "n": 4}
    stream = server.client().completions.create(**COMPLETION, **endless, stream=True)
    assert next(iter(stream)).choices
    assert server.is_busy
    stream.close()
    assert until(lambda: not server.is_busy)
    assert 1 <= len(steps) < 200, "it went on to the end"
    steps.clear()
    server.client().completions.create(**COMPLETION, **endless)
    assert len(steps) >= 250


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_before_its_answer_is_forgotten(
    server: Served, steps: list[float], stream: bool
) -> None:
    body = json.dumps({**COMPLETION, "max_tokens": 280, "ignore_eos": True, "n": 40, "stream": stream}).encode()
    port = int(server.url.split(":")[2].partition("/")[0])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
        connection.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        assert until(lambda: server.is_busy)
    assert until(lambda: not server.is_busy)
    assert len(steps) < 400, "forty answers of 280 tokens in sixteen rows take more than 700"
    assert server.client().completions.create(**COMPLETION).choices[0].finish_reason


def test_a_client_that_hangs_up_does_not_disturb_the_others(server: Served) -> None:
    client = server.async_client()

    async def leave() -> None:
        stream = await client.completions.create(**COMPLETION, max_tokens=250, stream=True)
        async for _ in stream:
            await stream.close()
            return

    async def stay(i: int) -> str:
        reply = await client.completions.create(model=BASE, prompt=f"number {i}", temperature=0, max_tokens=40)
        return reply.choices[0].text

    async def both() -> tuple[list[str], list[str]]:
        results = await asyncio.gather(*(leave() if i % 2 else stay(i) for i in range(24)))
        return [text for text in results if text is not None], [await stay(i) for i in range(0, 24, 2)]

    disturbed, alone = asyncio.run(both())
    assert disturbed == alone


def test_who_still_waits_when_the_server_ends_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slothcore.serve.server.SECONDS_TO_END", 0.2)
    told: list[str] = []
    with served(tmp_path) as server:
        step = server.server._engine.step
        monkeypatch.setattr(server.server._engine, "step", lambda: (time.sleep(0.05), step())[1])
        stream = server.client().completions.create(**COMPLETION, max_tokens=290, stream=True)
        assert next(iter(stream)).choices

        def read_on() -> None:
            try:
                told.extend("piece" for _ in stream)
                told.append("ended")
            except openai.APIError as error:
                told.append(f"error: {error}")

        reader = threading.Thread(target=read_on)
        reader.start()
    reader.join(SECONDS)
    assert told
    assert told[-1] != "ended"


def test_memory_that_is_full_costs_the_requests_under_way_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with served(tmp_path) as server:
        engine = server.server._engine
        step, calls = engine.step, 0

        def fail_once() -> Any:
            nonlocal calls
            calls += 1
            if calls == 5:
                engine.close()
                raise torch.OutOfMemoryError("as full as can be")
            return step()

        monkeypatch.setattr(engine, "step", fail_once)
        with pytest.raises(openai.InternalServerError, match="the GPU's memory is full") as refused:
            server.client().completions.create(**COMPLETION, extra_body={"ignore_eos": True}, n=3)
        assert refused.value.code == "out_of_memory"
        calls = 0
        chunks = server.client().completions.create(**COMPLETION, extra_body={"ignore_eos": True}, stream=True)
        with pytest.raises(openai.APIError, match="the GPU's memory is full"):
            list(chunks)
        assert not server.is_busy
        assert server.client().completions.create(**COMPLETION).choices[0].finish_reason
    assert "as full as can be" in capfd.readouterr().err


def test_an_engine_that_fails_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    with served(tmp_path) as server:

        def fail() -> None:
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(server.server._engine, "step", fail)
        with pytest.raises(openai.InternalServerError, match="the engine has failed"):
            server.client().completions.create(**COMPLETION)
        assert until(lambda: not answers_at_all(server))
    assert "the device is gone" in capfd.readouterr().err
    assert server.server._thread.failure is not None


def test_health_needs_no_key(tmp_path: Path) -> None:
    with served(tmp_path, api_key="key") as server:
        connection = http.client.HTTPConnection("127.0.0.1", int(server.url.split(":")[2].partition("/")[0]))
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
