"""Times one system in its own process; `run.py` starts it.

    python -m benchmarks.worker REQUEST.json RESULTS.jsonl

A line of JSON is written as soon as a case is done, so a case that hangs or fails loses no earlier one. What libraries
print goes to the process's own output, away from the results.
"""

import gc
import json
import re
import statistics
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.checkpoint import SPECIAL_TOKENS
from benchmarks.harness import quantiles
from benchmarks.peers import FIXED_AT_LOADING, Peer, Settings, peer
from benchmarks.plan import Run, fallbacks, timed_steps, warmup_steps
from benchmarks.shapes import LORA_TARGETS, AlpacaCase, StepCase, parse_case

LORA_B_STD = 0.01
LEARNING_RATE = 2e-4
MAX_GRAD_NORM = 1.0
# The one problem that is no failure.
OUT_OF_MEMORY = "out of memory"


def main(request_path: str, results_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    settings = Settings(**request["settings"])
    system = peer(request["system"])
    model = system.load(settings)
    factors = lora_factors(model, layers=request["layers"])
    for run in request["runs"]:
        # Where memory runs out, the case is run again with recomputation.
        for recompute in [run["recompute"], *run["fallbacks"]]:
            way = replace(settings, recompute=recompute, decoded=run["decoded"])
            row = measure(system, model, factors, way, run, request)
            with open(results_path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"system": request["system"]} | row) + "\n")
            if "problem" not in row:
                break


def measure(
    system: Peer,
    model: nn.Module,
    factors: dict[str, nn.Parameter],
    settings: Settings,
    run: dict[str, Any],
    request: dict[str, Any],
) -> dict[str, Any]:
    """The row of one case run in one way; afterwards all its memory is free again."""
    case, micro_batch = parse_case(run["case"])
    row: dict[str, Any] = {
        "case": run["case"],
        "bits": settings.bits,
        "recompute": settings.recompute,
        "decoded": settings.decoded,
    }
    start = time.perf_counter()
    try:
        system.configure(model, settings)
        row |= time_steps(
            system,
            model,
            factors,
            settings,
            case,
            micro_batch=micro_batch,
            warmup=run["warmup"],
            steps=request["steps"],
            budget=request["budget"],
            vocab_size=request["vocab_size"],
        )
    except torch.OutOfMemoryError:
        row |= {"problem": OUT_OF_MEMORY}
    model.zero_grad(set_to_none=True)
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.empty_cache()
    return row | {"seconds": time.perf_counter() - start}


def time_steps(
    system: Peer,
    model: nn.Module,
    factors: dict[str, nn.Parameter],
    settings: Settings,
    case: StepCase | AlpacaCase,
    *,
    micro_batch: int,
    warmup: int,
    steps: int,
    vocab_size: int,
    budget: float = float("inf"),
) -> dict[str, Any]:
    """Optimizer steps on random tokens: forward, backward, clipping, AdamW. The first loss precedes any update.

    A step of several micro-batches of `micro_batch` sequences sums their gradients; its loss is the mean over all
    targets of the step all the same. Timed steps follow one another as in training: nothing waits between them.

    Args:
        warmup: steps before the timed ones; fewer where those after the first take more than `budget` seconds, but
            always one for each of the case's batches.
        steps: timed steps, as `plan.timed_steps` has it.
    """
    set_factors(factors)
    optimizer = make_optimizer(system, list(factors.values()), settings)
    synchronize = torch.cuda.synchronize if settings.device == "cuda" else lambda: None
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    tokens: list[int] = []
    losses: list[Tensor] = []
    norms: list[Tensor] = []

    def step() -> None:
        number = len(tokens)
        lengths = case.lengths(number)
        sequences = random_sequences(lengths, number, vocab_size)
        micro_batches = [sequences[i : i + micro_batch] for i in range(0, len(sequences), micro_batch)]
        num_items = sum(lengths) - len(lengths) if len(micro_batches) > 1 else None
        parts = []
        for part in micro_batches:
            loss = system.loss(model, part, settings, num_items)
            loss.backward()
            parts.append(loss.detach())
        norms.append(nn.utils.clip_grad_norm_(factors.values(), MAX_GRAD_NORM))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens.append(sum(lengths))
        losses.append(torch.stack(parts).sum())

    def seconds() -> float:
        synchronize()
        return time.perf_counter()

    ends = [seconds()]
    while len(tokens) < warmup:
        step()
        ends.append(seconds())
        if len(tokens) > case.batches and ends[-1] - ends[1] > budget:
            break
    expected_ms = 1e3 * statistics.mean(later - before for before, later in pairwise(ends[-3:])) if warmup else 0.0
    clock = Clock(settings.device)
    clock.mark()
    warm = len(tokens)
    for _ in range(timed_steps(expected_ms, steps=steps, batches=case.batches, budget=budget)):
        step()
        clock.mark()
    milliseconds = clock.milliseconds()
    median, p20, p80 = quantiles(milliseconds)
    return {
        "median_ms": median,
        "p20_ms": p20,
        "p80_ms": p80,
        "tokens_per_second": tokens_per_second(tokens[warm:], milliseconds),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if settings.device == "cuda" else None,
        "losses": [loss.item() for loss in losses],
        "gradient_norms": [norm.item() for norm in norms],
    }


class Clock:
    """Marks moments without waiting for them: by events in the GPU's queue, or on a CPU by the time."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between each mark and the next, once the last has been reached."""
        if self.device == "cuda":
            self.marks[-1].synchronize()
            return [before.elapsed_time(later) for before, later in pairwise(self.marks)]
        return [1e3 * (later - before) for before, later in pairwise(self.marks)]


def tokens_per_second(tokens: list[int], milliseconds: list[float]) -> float:
    """Real tokens, padding not counted: by the median step if all have as many.

    If not, all tokens over all the time, since the median step has no number of tokens.
    """
    if len(set(tokens)) == 1:
        return 1e3 * tokens[0] / statistics.median(milliseconds)
    return 1e3 * sum(tokens) / sum(milliseconds)


def make_optimizer(system: Peer, parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """8-bit AdamW, the same arithmetic for every system; a CPU, which has none, gets torch's."""
    if settings.device == "cpu":
        return torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    return system.adamw_8bit(parameters, LEARNING_RATE)


def random_sequences(lengths: list[int], step: int, vocab_size: int) -> list[Tensor]:
    """The tokens of one step, a vector of int64 on the CPU for each sequence; the same for every system."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(len(SPECIAL_TOKENS), vocab_size, (sum(lengths),), generator=generator)
    return list(ids.split(lengths))


def random_batch(case: StepCase, step: int, vocab_size: int) -> Tensor:
    """The same tokens for sequences of one length, as [rows, length]."""
    return torch.stack(random_sequences(case.lengths(step), step, vocab_size))


def lora_factors(model: nn.Module, *, layers: int) -> dict[str, nn.Parameter]:
    """The trainable parameters under names that do not depend on the system, such as "0.q_proj.lora_A".

    Raises: RuntimeError if anything but the LoRA factors of the seven linears of each layer trains.
    """
    found = {}
    for name, parameter in model.named_parameters():
        match = re.search(r"layers\.(\d+)\.\w+\.(\w+)\.(lora_[AB])\b", name)
        if match and parameter.requires_grad:
            found[".".join(match.groups())] = parameter
        elif parameter.requires_grad:
            raise RuntimeError(f"{name} must not train")
    expected = {f"{i}.{target}.lora_{ab}" for i in range(layers) for target in LORA_TARGETS for ab in "AB"}
    if found.keys() != expected:
        raise RuntimeError(f"the LoRA factors differ from the expected in {sorted(found.keys() ^ expected)[:4]} ...")
    return found


def set_factors(factors: dict[str, nn.Parameter]) -> None:
    """Give every system the same start. B is not zero, as it would be by default, or A would have no gradient."""
    for name, parameter in factors.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        std = parameter.shape[1] ** -0.5 if name.endswith("lora_A") else LORA_B_STD
        with torch.no_grad():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def request(
    system: str,
    settings: Settings,
    runs: Sequence[Run],
    *,
    layers: int,
    vocab_size: int,
    warmup: int,
    steps: int,
    budget: float,
) -> dict[str, Any]:
    """What `main` reads back from the request file."""
    return {
        "system": system,
        "settings": asdict(settings),
        "runs": [
            asdict(run)
            | {"warmup": warmup_steps(system, run.case, warmup), "fallbacks": reachable_fallbacks(system, run, runs)}
            for run in runs
        ],
        "layers": layers,
        "vocab_size": vocab_size,
        "steps": steps,
        "budget": budget,
    }


def reachable_fallbacks(system: str, run: Run, runs: Sequence[Run]) -> list[str]:
    """`plan.fallbacks`, as far as the system can change its mind once it is loaded."""
    return [] if system in FIXED_AT_LOADING else fallbacks(system, run, runs)


if __name__ == "__main__":
    main(*sys.argv[1:])
