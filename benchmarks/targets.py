"""What slothcore sets out to reach, as data, and how a measured figure is held against it.

The figures are stated for `MACHINE`, a model of Llama-3.1-8B's shape and LoRA r=16 on all seven linears of a layer.
On another GPU the reports print them all the same, and say so.
"""

from dataclasses import dataclass

MACHINE = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True)
class Target:
    """One figure to reach.

    Attributes:
        what: is measured.
        goal: the figure.
        unit: of the figure, as printed behind it.
        at_least: whether more is better; if not, the goal is the most that it may be.
    """

    what: str
    goal: float
    unit: str = "x"
    at_least: bool = True

    @property
    def stated(self) -> str:
        """The goal as text."""
        return f"{'at least' if self.at_least else 'at most'} {quantity(self.goal, self.unit)}"

    def verdict(self, measured: float | None) -> str:
        """ "met", "missed by" how much of the goal, or "not measured"."""
        if measured is None:
            return "not measured"
        short = 1 - measured / self.goal if self.at_least else measured / self.goal - 1
        # Written so that NaN is a miss.
        return "met" if short <= 0 else f"missed by {short:.1%}"


@dataclass(frozen=True)
class StepTarget(Target):
    """A target of a whole optimizer step.

    Attributes:
        case, bits: of the step, as `shapes.parse_case` reads it.
        within: GiB that the step may take; None for any.
        peer: the system whose tokens/s the figure is a multiple of; None for plain tokens/s.
        peer_case: how that system runs the step; None for its best way.
        of_floor: the figure is the step's time over its floor.
    """

    case: str = ""
    bits: int = 4
    within: float | None = None
    peer: str | None = None
    peer_case: str | None = None
    of_floor: bool = False


SPEED = "tokens/s"
STEPS = (
    StepTarget("NF4, 4x2048, under 30 GiB", 18_500, SPEED, case="4x2048", within=30.0),
    StepTarget("NF4, 4x2048, within 7.8 GiB", 13_500, SPEED, case="4x2048", within=7.8),
    StepTarget("NF4, 2x256", 12_000, SPEED, case="2x256"),
    StepTarget("NF4, alpaca, over transformers", 30, case="alpaca", peer="transformers", peer_case="alpaca/2"),
    StepTarget("NF4, alpaca, over Unsloth's best", 10, case="alpaca", peer="unsloth"),
    StepTarget("bfloat16, 2x4096", 17_500, SPEED, case="2x4096", bits=16),
    StepTarget("NF4, 4x2048, step over its floor", 1.12, at_least=False, case="4x2048", of_floor=True),
)

OPERATIONS = {
    "few rows, 1": Target("share of what the bandwidth allows", 0.60, ""),
    "few rows, 16 and 64": Target("times as fast as decode, product, LoRA", 3.0),
    "few rows, 512": Target("of a bare product's time", 1.3, at_least=False),
    "linear, 2048": Target("of a bare product's time", 1.12, at_least=False),
    "linear, 8192": Target("of a bare product's time", 1.06, at_least=False),
    "memory": Target("share of the copy's speed", 0.85, ""),
    "memory, peers": Target("times as fast as the best peer", 1.0),
    "head": Target("of its two products' time", 1.10, at_least=False),
    "head, memory": Target("extra memory", 700, " MiB", at_least=False),
    "attention, cuDNN": Target("of cuDNN's time", 1.10, at_least=False),
    "attention, varlen_attn": Target("times as fast as varlen_attn", 1.5),
}


def quantity(value: float, unit: str) -> str:
    """A figure with its unit: 18,500 tokens/s, 1.12x, 60%."""
    if unit == SPEED:
        return f"{value:,.0f} {unit}"
    if unit == "":
        return f"{value:.0%}"
    return f"{value:,.2f}{unit}" if unit == "x" else f"{value:,.0f}{unit}"


def heading(gpu: str) -> str:
    """What to say above a table of targets."""
    return "Targets" if gpu == MACHINE else f"Targets, stated for {MACHINE}; this is {gpu}"
