"""The memory plans of a run, one for each gradient_checkpointing, from its options and the model's config.json."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from slothcore.commands.model_files import read_model_files
from slothcore.lora.attach import add_lora
from slothcore.lora.recorded import trained_config
from slothcore.models.decoder import Decoder
from slothcore.models.decoder_body import GradientCheckpointing
from slothcore.models.graphs import obstacle_in
from slothcore.models.load import resolve_dtype
from slothcore.training.adapter_choice import adapter_options
from slothcore.training.config import TrainConfig
from slothcore.training.memory import attach_unfilled, memory_of
from slothcore.training.memory_plan import MemoryPlan
from slothcore.training.micro_batches import GIB, RESERVE

MODES: tuple[GradientCheckpointing, ...] = (False, "mlp", "offload", True)
USUAL_GPU_GIB = 24.0
# No search goes further: many times what any model is made for.
MOST_TOKENS = 2**21


@dataclass(frozen=True)
class Plans:
    """What is known of a run before it begins.

    Attributes:
        config: its options, max_seq_length resolved.
        family: whose model it is.
        longest_document: how many tokens the model takes.
        parameters, trained: how many weights the model has, and how many weights train.
        dtype: in which it computes.
        gpu: bytes of the GPU that is meant.
        gpu_name: what that is, for people.
        modes: the plan with each gradient_checkpointing.
    """

    config: TrainConfig
    family: str
    longest_document: int
    parameters: int
    trained: int
    dtype: torch.dtype
    gpu: float
    gpu_name: str
    modes: dict[GradientCheckpointing, MemoryPlan]

    @property
    def row_tokens(self) -> int:
        """Tokens of a full row."""
        assert self.config.max_seq_length is not None
        return self.config.max_seq_length

    @property
    def pass_tokens(self) -> int:
        """Tokens of a pass of full rows, as per_device_train_batch_size cuts a step."""
        return self.row_tokens * self.config.per_device_train_batch_size


def longest_pass(plan: MemoryPlan, gpu: float) -> int:
    """The most tokens of a pass, and so of a document, on an empty GPU of so many bytes; as memory_budget auto."""
    return plan.largest_pass((1 - RESERVE) * gpu, at_most=MOST_TOKENS, passes=2)


def plans_of(config: TrainConfig, *, gpu_gib: float | None) -> Plans:
    """The plans of a run; no weight is read or allocated.

    Args:
        gpu_gib: memory of the GPU that is meant; None: the one that is present, else USUAL_GPU_GIB.
    Raises: ValueError if the model, or the adapter that is asked for, is not one that slothcore trains.
    """
    files = read_model_files(config)
    # As on a GPU: on a CPU 4 bits would compute in float32.
    dtype = resolve_dtype(config.bits, config.dtype, torch.device("meta"))
    model = Decoder(files.decoder, dtype=dtype, device="meta", bits=config.bits)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _choose_trained(model, config, files.found.adapter)
    gpu, gpu_name = _gpu(gpu_gib)
    return Plans(
        config=replace(config, max_seq_length=files.max_seq_length),
        family=files.family,
        longest_document=files.longest_document,
        parameters=parameters,
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        dtype=dtype,
        gpu=gpu,
        gpu_name=gpu_name,
        modes={mode: _plan(model, config, mode) for mode in MODES},
    )


def _choose_trained(model: Decoder, config: TrainConfig, adapter: Path | None) -> None:
    """Let train what will train: all weights, the adapter that is there, or a new one."""
    if config.full_finetuning:
        model.requires_grad_(True)
    elif adapter is not None:
        attach_unfilled(model, trained_config(adapter), dtype=torch.float32)
    else:
        add_lora(model, **adapter_options(config))


def _plan(model: Decoder, config: TrainConfig, mode: GradientCheckpointing) -> MemoryPlan:
    model.gradient_checkpointing = mode
    model.neftune_noise_alpha = config.neftune_noise_alpha
    replays = config.cuda_graphs is not False and obstacle_in(model.model, model.config) is None
    return replace(memory_of(model, optim=config.optim), graph_tokens=config.graph_tokens if replays else 0)


def _gpu(gib: float | None) -> tuple[float, str]:
    """Bytes and name of the GPU that is meant."""
    if gib is None and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1], torch.cuda.get_device_name()
    gib = gib or USUAL_GPU_GIB
    return gib * GIB, f"a GPU of {gib:g} GiB"
