"""Which system runs what, in which order, and about how long it takes.

A case is written NAME[/N][@BITS][:WAY+WAY..]: the sequences of a step, how many of them at a time, the bits of the
frozen weights, and the ways in which slothcore runs it. A way is one of `RECOMPUTE`, or `decoded`, or `decoded16`: the
decoded weights of all layers kept, or of 16. The peers know recomputation or none, and run either once.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.peers import FIXED_AT_LOADING, RECOMPUTE, variants
from benchmarks.shapes import parse_case

OWN = "slothcore"
BITS = (4, 16, 32)

# Seconds until the first step, kernels compiled, and milliseconds of a pass and of a token of it: from earlier runs on
# an H100 with Llama-3.1-8B's shape. They only decide what is begun before a deadline.
SECONDS_TO_START = {"slothcore": 35.0, "unsloth": 60.0, "liger": 35.0, "transformers": 30.0}
PASS_MS = {"slothcore": 40.0, "unsloth": 160.0, "liger": 450.0, "transformers": 550.0}
TOKEN_MS = {"slothcore": 0.055, "unsloth": 0.055, "liger": 0.10, "transformers": 0.12}
RECOMPUTATION = {"no": 1.0, "mlp": 1.2, "offload": 1.3, "yes": 1.45}
# torch.compile meets each new length for the first time.
COMPILE_SECONDS = {"unsloth": 12.0}


@dataclass(frozen=True)
class Run:
    """One case in one way.

    Attributes:
        case: with its micro-batch, as `shapes.parse_case` reads it.
        bits: of the frozen weights.
        recompute: one of `RECOMPUTE`.
        decoded: how many layers keep their weights decoded.
    """

    case: str
    bits: int
    recompute: str = "no"
    decoded: int = 0


@dataclass(frozen=True)
class Job:
    """What one process runs: the runs share a loaded model."""

    system: str
    runs: tuple[Run, ...]

    @property
    def bits(self) -> int:
        return self.runs[0].bits

    def seconds(self, *, warmup: int, steps: int, budget: float) -> float:
        """About how long it takes."""
        return SECONDS_TO_START[self.system] + sum(
            run_seconds(self.system, run, warmup=warmup, steps=steps, budget=budget) for run in self.runs
        )

    def __str__(self) -> str:
        ways = dict.fromkeys(f"{run.case} {way(run.recompute, run.decoded)}" for run in self.runs)
        return f"{self.system}, {self.bits} bits: {', '.join(ways)}"


def way(recompute: str, decoded: int) -> str:
    """How a run is named in tables."""
    return f"decoded {decoded}" if decoded else recompute


def parse_spec(text: str, *, bits: int, ways: str) -> tuple[str, int, list[str]]:
    """The case, the bits and the ways of one written case; `bits` and `ways` where it does not say.

    Raises: ValueError for a case, bits or a way that does not exist.
    """
    name, _, chosen = text.partition(":")
    case, at, own_bits = name.partition("@")
    parse_case(case)
    if at:
        if not own_bits.isdigit() or int(own_bits) not in BITS:
            raise ValueError(f"the bits of {text!r} must be one of {', '.join(map(str, BITS))}")
        bits = int(own_bits)
    return case, bits, parse_ways(chosen or ways)


def parse_ways(text: str) -> list[str]:
    """Ways joined by +. Raises: ValueError for one that does not exist."""
    found = text.split("+")
    for one in found:
        if one not in RECOMPUTE and not re.fullmatch(r"decoded\d*", one):
            raise ValueError(f"a way is one of {', '.join(RECOMPUTE)}, decoded or decodedN, got {one!r}")
    return found


def runs_of(system: str, specs: Iterable[tuple[str, int, list[str]]], *, layers: int) -> list[Run]:
    """What a system runs of the cases, each run once, the ones with decoded weights last."""
    found: dict[Run, None] = {}
    for case, bits, ways in specs:
        for cut in variants(system, case):
            for one in ways:
                if one.startswith("decoded"):
                    # There is nothing to decode but NF4, and no peer that keeps it.
                    if system == OWN and bits == 4:
                        count = one.removeprefix("decoded")
                        found[Run(cut, bits, "no", min(int(count), layers) if count else layers)] = None
                elif system == OWN or one == "no":
                    found[Run(cut, bits, one)] = None
                else:
                    found[Run(cut, bits, "yes")] = None
    return sorted(found, key=lambda run: run.decoded > 0)


def jobs_of(system: str, runs: Iterable[Run]) -> list[Job]:
    """The processes that the runs of a system take: one for each kind of weights, or way of loading."""
    groups: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.bits, run.recompute if system in FIXED_AT_LOADING else ""), []).append(run)
    return [Job(system, tuple(group)) for group in groups.values()]


def fallbacks(system: str, run: Run, others: Iterable[Run]) -> list[str]:
    """The recomputation to try in turn where a run is out of memory: none if it is planned anyway."""
    planned = {other.recompute for other in others if (other.case, other.bits) == (run.case, run.bits)}
    if run.recompute != "no" or run.decoded or planned - {"no"}:
        return []
    return ["mlp", "yes"] if system == OWN else ["yes"]


def warmup_steps(system: str, case: str, wanted: int) -> int:
    """Steps before the timed ones.

    Where lengths vary, systems that prepare for each meet all of them three times: slothcore captures a graph at the
    second sight of a length, and once more after a longer one, Unsloth compiles anew. transformers prepares for
    nothing, and its steps are the longest.
    """
    batches = parse_case(case)[0].batches
    if system in ("transformers", "liger"):
        return min(wanted, 2)
    return wanted if batches == 1 else max(wanted, 3 * batches)


def timed_steps(expected_ms: float, *, steps: int, batches: int, budget: float) -> int:
    """How many steps to time: `steps`, fewer if they take more than `budget` seconds, at least two.

    Each length of a case comes equally often.
    """
    affordable = int(1e3 * budget / expected_ms) if expected_ms > 0 else steps
    count = min(steps, max(affordable, 2))
    return max(1, round(count / batches)) * batches


def run_seconds(system: str, run: Run, *, warmup: int, steps: int, budget: float) -> float:
    """About how long one run takes, warm-up and all."""
    case, micro_batch = parse_case(run.case)
    tokens = sum(case.lengths(0))
    passes = case.rows // micro_batch
    step_ms = (PASS_MS[system] * passes + TOKEN_MS[system] * tokens) * RECOMPUTATION[run.recompute]
    timed = timed_steps(step_ms, steps=steps, batches=case.batches, budget=budget)
    compiling = COMPILE_SECONDS.get(system, 0.0)
    return (warmup_steps(system, run.case, warmup) + timed) * step_ms / 1e3 + compiling + 1.0
