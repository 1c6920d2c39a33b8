"""Loss and perplexity on held-out rows."""

import math
from dataclasses import dataclass

import torch

from slothcore.models.decoder import Decoder
from slothcore.training.ahead import Ahead
from slothcore.training.batches import RowSet
from slothcore.training.out_of_memory import DoesNotFit, evaluation_remedy


@dataclass(frozen=True)
class EvalResult:
    """Mean loss of all target tokens, each counted once, and its exponential."""

    loss: float
    num_targets: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700.0 else math.inf


@torch.no_grad()
def evaluate(model: Decoder, rows: RowSet, *, batch_size: int) -> EvalResult:
    """Run the model over `rows` without dropout; it is left in the mode in which it was.

    Each batch's loss is divided by the targets of the whole set, so the sum is the mean over tokens, not over batches.
    The experts' auxiliary loss is no part of it: it would depend on the batches, and no perplexity follows from it.

    Raises: DoesNotFit if a batch does not fit into the GPU's memory.
    """
    num_targets = sum(rows.row_targets)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    was_training = model.training
    model.eval()
    try:
        with Ahead(rows.micro_batches(range(len(rows)), batch_size)) as batches:
            for batch in batches:
                total += model(
                    batch.input_ids,
                    labels=batch.labels,
                    cu_seqlens=batch.cu_seqlens,
                    num_items=num_targets,
                    auxiliary_loss=False,
                ).loss
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(evaluation_remedy(batch_size, tokens=len(batch.input_ids))) from error
    finally:
        model.train(was_training)
    return EvalResult(loss=total.item(), num_targets=num_targets)
