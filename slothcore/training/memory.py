"""The memory plan of a model, or of a configuration alone: see `memory_plan.py` for what it says."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from slothcore.autograd.cross_entropy import max_chunk_rows
from slothcore.kernels.nf4_tensor import BLOCK, NESTED_BLOCK
from slothcore.layers.experts import ExpertLinear
from slothcore.layers.linear import Linear
from slothcore.lora.attach import attach
from slothcore.lora.config import LoraConfig
from slothcore.lora.plan import AdapterPlan
from slothcore.models.config import DecoderConfig
from slothcore.models.decoder import Decoder
from slothcore.models.decoder_body import GradientCheckpointing
from slothcore.models.decoder_layer import DecoderLayer
from slothcore.training.memory_layers import FLOAT, INDEX, counts_as_nf4, layer_memory, trains
from slothcore.training.memory_plan import Cost, LossMemory, MemoryPlan
from slothcore.training.optimizer_kinds import KINDS, Optim

INDICES = 4 * INDEX  # of a token: its id, its position, its target and the target's row


def plan_memory(
    config: DecoderConfig,
    *,
    bits: int,
    dtype: torch.dtype = torch.bfloat16,
    lora: LoraConfig | None = None,
    lora_dtype: torch.dtype = torch.float32,
    optim: Optim = "adamw",
    gradient_checkpointing: GradientCheckpointing = False,
    graph_tokens: int = 0,
) -> MemoryPlan:
    """What training a model of this configuration takes; no weight is allocated.

    Args:
        bits: 4 (NF4 with double quantisation for the linears of the layers), 16 or 32.
        dtype: in which it computes, and in which dense weights are kept.
        lora: the adapter; None: all weights train.
        lora_dtype: of its factors.
        optim: one of `KINDS`.
        gradient_checkpointing: True: layers are computed again in the backward pass; "mlp": the first products of the
            MLP are; "offload": as "mlp", and what is kept waits in host memory.
        graph_tokens: passes of up to so many tokens replay CUDA graphs; 0: none does.
    """
    model = Decoder(config, dtype=dtype, device="meta", bits=bits)
    if lora is not None:
        attach_unfilled(model, lora, dtype=lora_dtype)
    model.gradient_checkpointing = gradient_checkpointing
    return replace(memory_of(model, optim=optim), graph_tokens=graph_tokens)


def attach_unfilled(model: Decoder, lora: LoraConfig, *, dtype: torch.dtype) -> None:
    """Put an adapter on a model of the meta device, with factors that have a shape alone.

    Raises: ValueError if a name of the configuration fits nothing in the model.
    """
    adapter = AdapterPlan.of(model, lora)

    def factor(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    factors = {path: (factor(target.shape_A), factor(target.shape_B)) for path, target in adapter.targets.items()}
    attach(model, adapter, factors)


def memory_of(model: Decoder, *, optim: Optim) -> MemoryPlan:
    """What training this model takes as it is now: what trains, what it computes again, whether it replays graphs.

    Decoded weights do not count, kept or not; see `MemoryPlan.keeping_decoded`. The model may be on the meta device.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    passed = trains(model.model.embed_tokens)
    recompute, graphs = model.gradient_checkpointing, model.graphs
    layers = []
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        layers.append(
            layer_memory(
                layer,
                model.dtype,
                bits=model.bits,
                after_trained=passed,
                keep_gate_up=recompute not in ("mlp", "offload"),
            )
        )
        passed = passed or trains(layer)
    return MemoryPlan(
        weights=sum(_frozen_bytes(model)),
        trained=sum(parameter.nbytes for parameter in trained),
        gradients=sum(parameter.nbytes for parameter in trained),
        optimizer=sum(map(KINDS[optim].state_bytes, trained)),
        layers=tuple(layers),
        body=Cost(INDICES + _angles(model)),
        loss=_loss(model),
        embedding=_embedding(model),
        head_waits=model.has_tied_head and model.lm_head.weight.requires_grad,
        update=KINDS[optim].update_bytes(trained),
        pages=float(sum(map(KINDS[optim].page_bytes, trained))),
        recompute=recompute,
        hidden=model.config.hidden_size * model.dtype.itemsize,
        graph_tokens=0 if graphs is None or graphs.why_not() is not None else graphs.max_tokens,
    )


def _frozen_bytes(model: Decoder) -> Iterator[int]:
    """Of every parameter that does not train, and every buffer."""
    for path, module in model.named_modules():
        in_layer = path.startswith("model.layers.")
        quantised = in_layer and isinstance(module, Linear | ExpertLinear) and counts_as_nf4(module, model.bits)
        if isinstance(module, Linear | ExpertLinear) and quantised and not module.is_nf4:
            yield _nf4_bytes(module)
        for name, parameter in module.named_parameters(recurse=False):
            # A tied head is the embedding, which is counted there.
            shared = module is model.lm_head and model.has_tied_head
            if not (parameter.requires_grad or shared or (quantised and name == "weight")):
                yield parameter.nbytes
        for _, buffer in module.named_buffers(recurse=False):
            yield buffer.nbytes


def _nf4_bytes(linear: Linear | ExpertLinear) -> int:
    """Codes, their scales, and the scales of those: `kernels/nf4_tensor.py`."""
    elements = linear.in_features * linear.out_features
    blocks = -(-elements // BLOCK)
    one = -(-elements // 2) + blocks + -(-blocks // NESTED_BLOCK) * FLOAT + (NESTED_BLOCK + 1) * FLOAT
    return one * (linear.num_experts if isinstance(linear, ExpertLinear) else 1)


def _angles(model: Decoder) -> int:
    """Cosines and sines of a token, one float32 of each a rotated pair."""
    total = 0
    for rope in (model.config.rope, model.config.local_rope):
        total += 0 if rope is None else rope.rotary_dim(model.config.head_dim) * FLOAT
    return total


def _loss(model: Decoder) -> LossMemory:
    e, head = model.dtype.itemsize, model.lm_head
    stream, vocabulary = model.config.hidden_size * e, model.config.vocab_size
    # The sum before the final norm, what comes out of it, and the gradient of that.
    hidden = Cost(3 * stream + 2 * FLOAT)
    if head.lora_A is not None:
        # A head with an adapter makes all logits: its own, in float32, and their logarithms.
        # DoRA keeps what it scales, and scales its gradient.
        rescaled = 0 if head.lora_magnitude_vector is None else 2 * e
        logits = Cost(vocabulary * (e + 2 * FLOAT + rescaled))
        return LossMemory(hidden + logits, hidden + logits)
    summed = scaled = rounded = Cost()
    if head.weight.requires_grad:
        # The head's gradient is summed in float32, then scaled in the dtype of the weight: where it is, if that is so.
        summed = Cost(0, head.weight.numel() * max(e, FLOAT))
        scaled = Cost(0, 0 if head.weight.dtype == torch.float32 else head.weight.nbytes)
    if head.weight.dtype != model.dtype:
        # A float32 head of a model in 16 bits is rounded before it multiplies.
        rounded = Cost(0, head.weight.numel() * e)
    # A row of a chunk: its logits, its hidden state and the gradient of that.
    rows, row = max_chunk_rows(vocabulary, model.dtype), vocabulary * e + 2 * stream
    return LossMemory(hidden + summed + rounded, hidden + summed + scaled, chunk_rows=rows, chunk_row=row)


def _embedding(model: Decoder) -> Cost:
    """The gradient of an embedding that trains, and that of the hidden states in its dtype, from which it is summed."""
    weight = model.model.embed_tokens.weight
    if not weight.requires_grad:
        return Cost()
    row = model.config.hidden_size
    return Cost(row * (model.dtype.itemsize + (weight.itemsize if weight.dtype != model.dtype else 0)), weight.nbytes)
