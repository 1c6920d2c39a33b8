"""Clients that stream from a server, all at once; `serve.py` starts them in a process of their own.

    python -m benchmarks.serve_clients REQUEST.json RESULT.json

Nothing but the standard library speaks HTTP here: a GPU machine may have no client, and a fast one measures the server.
"""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

EVENT, DONE = b"data: ", b"data: [DONE]"
READ_BYTES = 1 << 16


def main(request_path: str, result_path: str) -> None:
    """Run the rounds one after the other; write what each client of each round met."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    rounds = [asyncio.run(one_round(request)) for _ in range(request["rounds"])]
    Path(result_path).write_text(json.dumps(rounds), encoding="utf-8")


async def one_round(request: dict[str, Any]) -> dict[str, Any]:
    """All clients together.

    Returns: seconds from the first request to the last answer; what each client met.
    """
    began = time.perf_counter()
    clients = await asyncio.gather(*(one_client(request["port"], body, began) for body in request["bodies"]))
    return {"seconds": time.perf_counter() - began, "clients": clients}


async def one_client(port: int, body: dict[str, Any], began: float) -> dict[str, Any]:
    """One request, read to its end.

    Returns: seconds until its first and its last piece, how many pieces came, the text, and the tokens as the server
        counts them.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    payload = json.dumps(body).encode()
    head = [
        "POST /v1/completions HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(payload)}",
        "Connection: close",
    ]
    writer.write("\r\n".join([*head, "", ""]).encode() + payload)
    received, first, last = bytearray(), 0.0, 0.0
    while part := await reader.read(READ_BYTES):
        if EVENT in part:
            last = time.perf_counter() - began
            first = first or last
        received += part
    writer.close()
    status = received.partition(b"\r\n")[0]
    if b" 200 " not in status or DONE not in received:
        raise RuntimeError(
            f"the server answered {status.decode()!r}: {bytes(received[-400:]).decode(errors='replace')}"
        )
    # A piece is written in one chunk, so no size of a chunk stands within its line.
    lines = [line for line in bytes(received).split(b"\n") if line.startswith(EVENT) and not line.startswith(DONE)]
    events = [json.loads(line.removeprefix(EVENT)) for line in lines]
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    tokens = events[-1]["usage"]["completion_tokens"]
    return {"first_s": first, "last_s": last, "pieces": len(events) - 1, "text": text, "tokens": tokens}


if __name__ == "__main__":
    main(*sys.argv[1:])
