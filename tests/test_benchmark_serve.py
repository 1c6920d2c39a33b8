"""The benchmark of the server on a tiny model: it asks, compares, prints and records, and refuses what is wrong."""

import csv
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from benchmarks import serve, serve_clients

TINY = ["--tiny", "--device", "cpu", "--bits", "32", "--clients", "6", "--prompt", "9", "--new-tokens", "12"]


def test_it_times_prints_and_records(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = [*TINY, "--rounds", "2", "--adapters", "2", "--checkpoint", str(tmp_path / "model")]
    assert serve.main([*options, "--out", str(tmp_path / "csv")]) == 0
    printed = [line.split("|") for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
    assert [cells[1].strip() for cells in printed[2:]] == ["engine", "server"]
    assert printed[3][7].strip() == "100%"
    with (tmp_path / "csv" / "cpu.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["benchmark"], row["system"], row["case"]) for row in rows] == [
        ("serve", "engine", "6x9+12"),
        ("serve", "server", "6x9+12"),
    ]
    for row in rows:
        assert float(row["tokens_per_second"]) == pytest.approx(1e3 * 6 * 12 / float(row["median_ms"]), rel=0.01)
        assert row["settings"] == "bits=32 r=16 adapters=2 layers=2"
        assert row["rate"].startswith("first token ")


def test_wrong_answers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Another text from the server, or fewer tokens: the figures are of no use, and are not recorded."""
    clients = serve.run_clients
    changes: list[dict[str, Any]] = [{"text": "something else"}, {"tokens": 11}]
    for change, message in zip(changes, ("17% of the texts differ", "other lengths than asked for"), strict=True):

        def wrong(*given: Any, change: dict[str, Any] = change) -> list[dict[str, Any]]:
            rounds = clients(*given)
            for each in rounds:
                each["clients"][2] |= change
            return rounds

        monkeypatch.setattr(serve, "run_clients", wrong)
        options = [*TINY, "--rounds", "1", "--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "csv")]
        assert serve.main(options) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "csv").exists()


@pytest.fixture
def answering() -> Iterator[Any]:
    """A server that sends what it is given."""

    class Handler(BaseHTTPRequestHandler):
        answer = b""

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(Handler.answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Handler, server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_clients_count_what_comes(answering, tmp_path: Path) -> None:
    handler, port = answering
    events = [
        {"choices": [{"text": "a b"}], "usage": None},
        {"choices": [{"text": " c\n"}], "usage": None},
        {"choices": [], "usage": {"completion_tokens": 5}},
    ]
    body = b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in events) + b"data: [DONE]\n\n"
    handler.answer = b"HTTP/1.1 200 OK\r\n\r\n" + body
    asked, told = tmp_path / "asked.json", tmp_path / "told.json"
    asked.write_text(json.dumps({"port": port, "bodies": [{}, {}], "rounds": 3}))
    serve_clients.main(str(asked), str(told))
    rounds = json.loads(told.read_text())
    assert [len(each["clients"]) for each in rounds] == [2, 2, 2]
    client = rounds[0]["clients"][1]
    assert (client["text"], client["tokens"], client["pieces"]) == ("a b c\n", 5, 2)
    assert 0 < client["first_s"] <= client["last_s"] <= rounds[0]["seconds"]
    for answer in (b"HTTP/1.1 500 No\r\n\r\n" + body, handler.answer.replace(b"[DONE]", b"")):
        handler.answer = answer
        with pytest.raises(RuntimeError, match="the server answered"):
            serve_clients.main(str(asked), str(told))
