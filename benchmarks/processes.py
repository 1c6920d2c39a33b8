"""Systems in processes of their own: one that patches the libraries, hangs or fails takes no other with it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import checkpoint, harness


def run_module(module: str, request: dict[str, Any], seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Run `python -m module REQUEST.json RESULTS.jsonl`.

    Returns: the results that it wrote, and why it stopped early, or "".
    """
    with tempfile.TemporaryDirectory() as scratch:
        request_path, results_path, log = (Path(scratch) / name for name in ("request.json", "results.jsonl", "log"))
        checkpoint.write_json(request_path, request)
        command = [sys.executable, "-m", module, str(request_path), str(results_path)]
        problem = run_with_limit(command, log, seconds)
        lines = results_path.read_text(encoding="utf-8").splitlines() if results_path.exists() else []
    return [json.loads(line) for line in lines], problem


def run_with_limit(command: list[str], log: Path, seconds: float) -> str:
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
            status = process.wait(seconds)
            problem = f"failed: exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            problem = f"failed: over the limit of {seconds:g} s"
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
