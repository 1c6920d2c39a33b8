"""Systems in processes of their own: one that patches the libraries, hangs or fails takes no other with it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import checkpoint, harness

POLL_SECONDS = 0.2
Result = dict[str, Any]


def run_module(
    module: str, request: Result, seconds: float, on_result: Callable[[Result], None] = lambda result: None
) -> tuple[list[Result], str]:
    """Run `python -m module REQUEST.json RESULTS.jsonl`.

    Args:
        on_result: is told each result as soon as it is there.
    Returns: the results that it wrote, and why it stopped early, or "".
    """
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        request_path, results_path, log = (Path(scratch) / name for name in ("request.json", "results.jsonl", "log"))
        checkpoint.write_json(request_path, request)

        def read_on() -> None:
            lines = results_path.read_text(encoding="utf-8") if results_path.exists() else ""
            # What has no end yet is still being written.
            for line in lines.splitlines(keepends=True)[len(results) :]:
                if line.endswith("\n"):
                    results.append(json.loads(line))
                    on_result(results[-1])

        command = [sys.executable, "-m", module, str(request_path), str(results_path)]
        problem = run_with_limit(command, log, seconds, read_on)
        read_on()
    return results, problem


def run_with_limit(command: list[str], log: Path, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> str:
    """Run a command with its output in `log`. Returns: why it stopped early, and then the log is shown; or ""."""
    offline = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Unsloth writes a cache where it starts, so that is not the checkout, which therefore must be named.
    paths = [str(harness.REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | offline | {"PYTHONPATH": os.pathsep.join(paths)}
    with log.open("wb") as output:
        # Its own session, so that processes which the system starts end with it.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=log.parent, start_new_session=True
        )
        try:
            problem = wait(process, seconds, meanwhile)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if problem:
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join(lines[-40:]), file=sys.stderr, flush=True)
        error = next((line for line in reversed(lines) if "Error" in line), "")
        return f"{problem} {error}".strip()
    return problem


def wait(process: subprocess.Popen[bytes], seconds: float, meanwhile: Callable[[], None]) -> str:
    """Until it ends or its time is over. Returns: how it failed, or ""."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            status = process.wait(min(POLL_SECONDS, left))
        except subprocess.TimeoutExpired:
            meanwhile()
        else:
            return f"failed: exit status {status}" if status else ""
    return f"failed: over the limit of {seconds:g} s"
