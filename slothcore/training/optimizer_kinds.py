"""The optimizers by name: where each one's update comes from, and what it keeps of every weight."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    # Options name optimizers, and a command knows its options before it needs torch.
    import torch

Optim = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit", "adafactor", "sgd"]

# What one launch of 8-bit AdamW takes at most of parameters that have to be copied end to end: it bounds the extra
# memory. Here, because the plan of a run's memory needs it, and importing bitsandbytes takes a second.
LARGEST_BATCH = 2**24

FLOAT = 4
SMALLEST_8BIT = 4096  # below as many elements bitsandbytes keeps its state in float32
STATE_BLOCK = 256  # elements of 8-bit state that share a scale
SMALLEST_PAGED = 100_000  # below as many elements bitsandbytes keeps its state in ordinary memory


@dataclass(frozen=True)
class OptimizerKind:
    """What an optimizer keeps.

    Attributes:
        moments: numbers of a weight.
        is_8bit: whether they have 8 bits, with a scale for each block, instead of 32.
        is_paged: whether they lie in memory that the driver moves between GPU and host as it is needed.
        is_bitsandbytes: whether the update is one of its kernels, for GPUs alone.
        is_factored: whether it keeps a row and a column of numbers in place of each matrix.
    """

    moments: int = 0
    is_8bit: bool = False
    is_paged: bool = False
    is_bitsandbytes: bool = True
    is_factored: bool = False

    def state_bytes(self, parameter: "torch.Tensor") -> int:
        """What the state of one parameter takes of torch's memory on its device; pages are none of that."""
        count = parameter.numel()
        if self.is_factored:
            return _factored(parameter.shape) * FLOAT
        if not self.is_bitsandbytes:
            # torch's moments have the dtype of the parameter; beside them the step, which the fused kernel reads.
            return self.moments * parameter.nbytes + (FLOAT if self.moments else 0)
        paged = self.is_paged and count >= SMALLEST_PAGED
        if not self.is_8bit or count < SMALLEST_8BIT:
            return 0 if paged else self.moments * FLOAT * count
        return self.moments * ((0 if paged else count) + FLOAT * -(-count // STATE_BLOCK))

    def page_bytes(self, parameter: "torch.Tensor") -> int:
        """What the state of one parameter takes of pages."""
        count = parameter.numel()
        return self.moments * count * (1 if self.is_8bit else FLOAT) if self.is_paged and count >= SMALLEST_PAGED else 0

    def update_bytes(self, trained: "list[torch.nn.Parameter]") -> int:
        """What the update copies for a while."""
        if not trained:
            return 0
        if self.is_factored:
            # The update of one parameter; of one in 16 bits also its gradient and its values, in float32.
            return max(FLOAT * p.numel() * (3 if p.itemsize < FLOAT else 1) for p in trained)
        if not (self.is_8bit and self.moments == 2 and not self.is_paged):
            return 0
        # 8-bit AdamW lays parameters and their gradients end to end; one that is a batch by itself stays where it is.
        copied = [parameter for parameter in trained if parameter.numel() <= LARGEST_BATCH]
        most = min(LARGEST_BATCH, sum(parameter.numel() for parameter in copied))
        return 2 * most * max((parameter.itemsize for parameter in copied), default=0)


KINDS: dict[Optim, OptimizerKind] = {
    "adamw": OptimizerKind(moments=2, is_bitsandbytes=False),
    "adamw_8bit": OptimizerKind(moments=2, is_8bit=True),
    "paged_adamw": OptimizerKind(moments=2, is_paged=True),
    "paged_adamw_8bit": OptimizerKind(moments=2, is_8bit=True, is_paged=True),
    "lion": OptimizerKind(moments=1),
    "lion_8bit": OptimizerKind(moments=1, is_8bit=True),
    "adafactor": OptimizerKind(is_bitsandbytes=False, is_factored=True),
    "sgd": OptimizerKind(is_bitsandbytes=False),
}


def check_optimizer(optim: Optim, device: "torch.device") -> None:
    """Raises ValueError unless this optimizer can run on `device`."""
    if KINDS[optim].is_bitsandbytes and device.type != "cuda":
        raise ValueError(
            f"optim {optim} needs a GPU, and the model is on {device.type}; set optim to adamw, adafactor or sgd"
        )


def _factored(shape: "torch.Size") -> int:
    """Numbers that Adafactor keeps: rows and columns of each matrix, or every element of a vector."""
    if len(shape) < 2:
        return shape.numel()
    return shape[:-1].numel() + shape[:-2].numel() * shape[-1]
