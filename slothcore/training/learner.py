"""A model with what makes it learn: all that a step changes and a checkpoint therefore keeps the values of."""

from dataclasses import dataclass

import torch
from torch import nn

from slothcore.data.tokenizer import Tokenizer
from slothcore.models.decoder import Decoder


@dataclass(frozen=True)
class Learner:
    """What learns. The objects are those of the run; what stands in them changes with every step.

    Attributes:
        tokenizer: saved beside the weights, if there is one.
        parameters: name -> each that is trained.
        optimizer: over these parameters.
        scaler: of the loss, against underflow in float16; otherwise it is disabled.
    """

    model: Decoder
    tokenizer: Tokenizer | None
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
