"""A program that uses slothcore and a Hub, as a process of its own: huggingface_hub reads its environment once.

Each line of stdin is one request in JSON, each line of stdout the answer to it.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Client:
    """The other end: starts the program with an environment and asks it.

    Args:
        home: its HF_HOME, with the default cache and the stored login; what it says on stderr goes there too.
    """

    def __init__(self, home: Path, endpoint: str, *, offline: bool = False) -> None:
        self.stderr = home / "stderr.txt"
        home.mkdir(parents=True, exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1" if offline else "0"}
        own["HF_HUB_DISABLE_XET"] = "1"  # the server speaks the older protocol of uploads
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub.client"],
            cwd=ROOT,
            env={**inherited, **own, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr.open("w"),
            text=True,
        )

    def ask(self, action: str, *arguments: Any, environment: Mapping[str, str] | None = None, **options: Any) -> Any:
        """The result of an action, or the text of the error that it ended in (see `refused`)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"action": action, "arguments": arguments, "options": options, "environment": environment or {}}
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the program ended: {self.stderr.read_text()[-2000:]}"
        return json.loads(line)

    def result(self, action: str, *arguments: Any, **options: Any) -> Any:
        answer = self.ask(action, *arguments, **options)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def refused(self, action: str, *arguments: Any, **options: Any) -> str:
        """The one sentence of the ValueError in which the action ends."""
        answer = self.ask(action, *arguments, **options)
        assert "error" in answer, f"not refused: {answer}"
        kind, message = answer["error"]
        assert kind == "ValueError", answer["error"]
        assert "\n" not in message
        return message

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def describe(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What shows that a model is the right one: its outputs, what it is called, what trains."""
    import torch

    with torch.no_grad():
        logits = model(torch.arange(1, 9)[None]).logits
    return {
        "name": model.name_or_path,
        "bits": model.bits,
        "logits": logits[0, -1, :64].tolist(),
        "rank": model.lora_config.r if model.lora_config else None,
        "trainable": sorted({n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}),
        "eos": tokenizer.eos_token_id if tokenizer else None,
        "training": model.training,
    }


def load(name: str, **options: Any) -> dict[str, Any]:
    import slothcore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return describe(*slothcore.load(name, device="cpu", **{"bits": 32, **options}))


def load_adapter(base: str, adapter: str, **options: Any) -> dict[str, Any]:
    import slothcore

    model, tokenizer = slothcore.load(base, device="cpu", bits=32, **options)
    return describe(slothcore.load_adapter(model, adapter, **options).eval(), tokenizer)


def folder(name: str, **options: Any) -> dict[str, Any]:
    from slothcore.models.hub import model_folder

    found = model_folder(name, **options)
    return {"folder": str(found), "files": sorted(str(f.relative_to(found)) for f in found.rglob("*") if f.is_file())}


def dataset(name: str, **options: Any) -> list[str]:
    from slothcore.data.hub_files import dataset_files

    return [str(file) for file in dataset_files(name, **options)]


def push(name: str, repo_id: str, **options: Any) -> str:
    import slothcore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer = slothcore.load(name, device="cpu", bits=32)
        return slothcore.push_to_hub(model, tokenizer, repo_id, **options)


def command(*argv: str) -> dict[str, Any]:
    from slothcore.cli import main

    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = main(argv)
    return {"status": status, "output": output.getvalue(), "errors": errors.getvalue()}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    actions = {
        "load": load,
        "load_adapter": load_adapter,
        "folder": folder,
        "dataset": dataset,
        "push": push,
        "command": command,
    }
    before = dict(os.environ)
    os.environ.update(request["environment"])
    try:
        return {"result": actions[request["action"]](*request["arguments"], **request["options"])}
    except Exception as error:
        return {"error": [type(error).__name__, str(error)]}
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
