"""Times one system in its own process; `generate.py` starts it.

    python -m benchmarks.writing_worker REQUEST.json RESULTS.jsonl

A line of JSON is written as soon as a case is done, so a case that hangs or fails loses no earlier one.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint import SPECIAL_TOKENS
from benchmarks.peers import Settings
from benchmarks.worker import OUT_OF_MEMORY, lora_factors, set_factors
from benchmarks.writers import Writer, writer
from benchmarks.writing_cases import UNEQUAL, WritingCase

# Enough for every kernel to be compiled, every size of a step to be captured, and graphs to be replayed.
WARM_TOKENS = 6


def main(request_path: str, results_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    settings = Settings(**request["settings"])
    cases = [
        WritingCase.parse(name, new_tokens=request["new_tokens"], shrink=request["shrink"]) for name in request["cases"]
    ]
    system = writer(request["system"])
    model = system.load(settings)
    set_factors(lora_factors(model, layers=request["layers"]))
    rows, tokens = (max(getattr(case, name) for case in cases) for name in ("rows", "tokens"))
    ready = system.prepare(model, settings, rows=rows, tokens=tokens)
    for case in cases:
        row = measure(system, ready, case, settings, request)
        with open(results_path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"system": request["system"], "case": case.name} | row) + "\n")


def measure(
    system: Writer, ready: Any, case: WritingCase, settings: Settings, request: dict[str, Any]
) -> dict[str, Any]:
    """The row of one case; a problem that is memory leaves the next one its chance."""
    prompts = case.prompts(request["vocab_size"], first_token=len(SPECIAL_TOKENS))
    on_gpu = settings.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def timed(new_tokens: list[int], runs: int) -> tuple[float, list[list[int]]]:
        """Median seconds of so many runs, fewer if they take long; and what was written."""
        return repeated(lambda: system.write(ready, prompts, new_tokens), runs, request["budget"], on_gpu)

    try:
        if case.name == UNEQUAL:
            # All of it once: steps of every number of rows will come.
            timed(list(case.new_tokens) if request["system"] == "slothcore" else [2] * case.rows, 1)
            seconds, written = timed(list(case.new_tokens), request["runs"])
            figures = {"total_s": seconds, "new_tokens": sum(case.new_tokens)}
        else:
            timed([min(WARM_TOKENS, case.new_tokens[0])] * case.rows, 1)
            first, written = timed([1] * case.rows, request["runs"] + 2)
            seconds, written = timed(list(case.new_tokens), request["runs"])
            steps = case.new_tokens[0] - 1
            figures = {"first_ms": 1e3 * first, "step_ms": 1e3 * (seconds - first) / steps, "total_s": seconds}
            figures |= {"new_tokens": sum(case.new_tokens)}
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return {"problem": OUT_OF_MEMORY}
    if [len(row) for row in written] != list(case.new_tokens):
        return {"problem": "failed: continuations of other lengths than asked for"}
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return figures | {"peak_gib": peak, "tokens": [row[:4] for row in written]}


def repeated(
    write: Callable[[], list[list[int]]], runs: int, budget: float, on_gpu: bool
) -> tuple[float, list[list[int]]]:
    taken: list[float] = []
    written: list[list[int]] = []
    while len(taken) < runs and sum(taken) < budget:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        written = write()
        if on_gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), written


if __name__ == "__main__":
    main(*sys.argv[1:])
