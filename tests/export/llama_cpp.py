"""llama.cpp as xllamacpp brings it: a server in a process of its own, which may abort, asked over loopback."""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.error import HTTPError

SERVER = """
import json, sys
import xllamacpp

options = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path = options["model"]
params.n_ctx = options["context"]
params.n_parallel = 1
params.n_gpu_layers = 0
params.warmup = params.fit_params = False
params.verbosity = 2  # errors and warnings
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
# Numbers as exact as they can be had: no 16-bit cache, no fused attention that rounds.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if options["adapter"]:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(options["adapter"], 1.0)]
server = xllamacpp.Server(params)
print("address", server.listening_address, flush=True)
sys.stdin.read()
"""

# Past whatever proxy the machine has.
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class LlamaCpp:
    """One GGUF file, loaded. Use it in a `with` statement."""

    def __init__(self, model: Path, *, adapter: Path | None = None, context: int = 256) -> None:
        """Raises: RuntimeError, with what llama.cpp said, if it cannot load the file."""
        options = {"model": str(model), "adapter": adapter and str(adapter), "context": context}
        # A file takes whatever llama.cpp says; a pipe that nobody reads would stop it.
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVER, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
            assert self._process.stdout is not None
            lines = (line.split() for line in self._process.stdout)
            self._address = next((words[1] for words in lines if words[:1] == ["address"]), "")
            if not self._address:
                self.close()
                said.seek(0)
                raise RuntimeError(f"llama.cpp cannot load {model.name}:\n{said.read()[-2000:]}")

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def ask(self, path: str, **body: Any) -> Any:
        """The answer to a request as its server takes it."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, {"Content-Type": "application/json"})
        try:
            with LOCAL.open(request, timeout=60) as answer:
                return json.load(answer)
        except HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def tokenize(self, text: str) -> list[int]:
        """Token ids with those that the tokenizer adds; special tokens that are written out are their own ids."""
        return self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def greedy(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """The next tokens, the likeliest each; the end of a text ends nothing."""
        options = {"n_predict": tokens, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        return self.ask("/completion", prompt=list(prompt), **options)["tokens"]

    def logprobs(self, prompt: Sequence[int], vocab_size: int) -> dict[int, float]:
        """The logarithm of each token's probability to be the next."""
        # What the sampler never takes keeps its probability here.
        options = {"n_predict": 1, "temperature": 0, "ignore_eos": True, "n_probs": vocab_size}
        found = self.ask("/completion", prompt=list(prompt), **options)
        return {token["id"]: token["logprob"] for token in found["completion_probabilities"][0]["top_logprobs"]}
