"""How much GPU memory a training run takes, worked out from the model's shapes without a GPU.

    peak = weights + trained weights + optimizer state + workspaces + the largest of
           the loss         everything kept, the chunk of logits, hidden states and their gradient
           layer l          what layers 0..l keep, the gradients of the layers from l on, the moment of layer l
           the optimizer    all gradients, and its copies

With more than one pass a step, the gradients of all layers are there throughout. With recomputation, layers keep their
inputs, and layer l the rest of what it would keep too.

The figures are those of torch's allocator (`torch.cuda.max_memory_allocated`): the CUDA context, and what lies unused
between tensors, come on top.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slothcore.autograd.cross_entropy import max_chunk_rows
from slothcore.kernels.nf4_tensor import BLOCK, NESTED_BLOCK
from slothcore.layers.experts import ExpertLinear
from slothcore.layers.linear import Linear
from slothcore.lora.attach import AdapterPlan, attach
from slothcore.lora.config import LoraConfig
from slothcore.models.config import DecoderConfig
from slothcore.models.decoder import Decoder
from slothcore.models.decoder_layer import DecoderLayer
from slothcore.training.memory_layers import FLOAT, INDEX, Cost, LayerMemory, counts_as_nf4, layer_memory, trains

SMALLEST_8BIT = 4096  # below as many elements bitsandbytes keeps its state in float32
STATE_BLOCK = 256  # elements of 8-bit state that share a scale
# cuBLAS asks torch for one for each thread that calls it: that of forward passes, and autograd's. 32 MiB on Hopper, and
# less elsewhere.
WORKSPACES = 2 * 32 * 2**20
INDICES = 4 * INDEX  # of a token: its id, its position, its target and the target's row


@dataclass(frozen=True)
class LossMemory:
    """The final norm, then the head and its loss in chunks of rows: `autograd/cross_entropy.py`.

    Attributes:
        forward, backward: what it has allocated in each direction, without the chunk.
        chunk_rows: most tokens whose logits exist at once, in the forward pass.
        chunk_row: bytes of one of them.
    """

    forward: Cost
    backward: Cost
    chunk_rows: int = 0
    chunk_row: int = 0

    def at(self, tokens: int) -> float:
        chunk = min(tokens, self.chunk_rows) * self.chunk_row
        return max(self.forward.at(tokens) + chunk, self.backward.at(tokens))


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs, in bytes.

    Attributes:
        weights: of the model, frozen.
        trained: adapter, or the weights that train.
        gradients: of those, all together.
        optimizer: its state.
        layers: what each layer keeps and needs.
        body: kept of a token outside of the layers.
        loss: what the loss needs.
        update: what the optimizer copies in an update.
        recompute: whether layers keep their inputs only.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    layers: tuple[LayerMemory, ...]
    body: Cost
    loss: LossMemory
    update: int
    recompute: bool

    @property
    def static(self) -> int:
        """What is there from the first update on, whatever the tokens of a pass."""
        return self.weights + self.trained + self.optimizer + WORKSPACES

    def activations(self, tokens: int) -> float:
        """What all layers keep of a pass between its forward and its backward."""
        return self.body.at(tokens) + sum(self._held(layer).at(tokens) for layer in self.layers)

    def peak(self, tokens: int, *, passes: int = 1) -> float:
        """The most memory that a step takes whose largest pass has this many tokens.

        Args:
            passes: of the step; from the second on, there are gradients from the beginning.
        """
        before = self.gradients if passes > 1 else 0
        kept = self.activations(tokens)
        most = before + kept + self.loss.at(tokens)
        gradients = float(self.gradients - sum(layer.gradients for layer in self.layers))
        for layer in reversed(self.layers):
            gradients += layer.gradients
            held = kept + max(before, gradients)
            if self.recompute:
                held += layer.kept.at(tokens)
            most = max(most, held + _largest(layer.feed_forward.moments, tokens))
            held -= layer.feed_forward.kept.at(tokens)
            most = max(most, held + _largest(layer.attention.moments, tokens))
            kept -= self._held(layer).at(tokens)
        return self.static + max(most, self.gradients + self.update)

    def largest_pass(self, budget: float, *, at_most: int, passes: int = 2) -> int:
        """The most tokens, up to `at_most`, whose `peak` is within `budget` bytes; 0 if not even one token's is."""
        fits, too_many = 0, at_most + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.peak(middle, passes=passes) <= budget:
                fits = middle
            else:
                too_many = middle
        return fits

    def _held(self, layer: LayerMemory) -> Cost:
        return layer.inputs if self.recompute else layer.kept


def plan_memory(
    config: DecoderConfig,
    *,
    bits: int,
    dtype: torch.dtype = torch.bfloat16,
    lora: LoraConfig | None = None,
    lora_dtype: torch.dtype = torch.float32,
    optim: str = "adamw",
    gradient_checkpointing: bool = False,
) -> MemoryPlan:
    """What training a model of this configuration takes; no weight is allocated.

    Args:
        bits: 4 (NF4 with double quantisation for the linears of the layers), 16 or 32.
        dtype: in which it computes, and in which dense weights are kept.
        lora: the adapter; None: all weights train.
        lora_dtype: of its factors.
        optim: adamw or adamw_8bit.
        gradient_checkpointing: whether layers are computed again in the backward pass.
    """
    model = Decoder(config, dtype=dtype, device="meta", bits=bits)
    if lora is not None:
        adapter = AdapterPlan.of(model, lora)

        def factor(shape: tuple[int, ...]) -> Tensor:
            return torch.empty(shape, dtype=lora_dtype, device="meta")

        factors = {path: (factor(target.shape_A), factor(target.shape_B)) for path, target in adapter.targets.items()}
        attach(model, adapter, factors)
    model.gradient_checkpointing = gradient_checkpointing
    return memory_of(model, optim=optim)


def memory_of(model: Decoder, *, optim: str) -> MemoryPlan:
    """What training this model takes, with what requires a gradient now; it may be on the meta device."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    passed = trains(model.model.embed_tokens)
    layers = []
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        layers.append(layer_memory(layer, model.dtype, bits=model.bits, after_trained=passed))
        passed = passed or trains(layer)
    return MemoryPlan(
        weights=sum(_frozen_bytes(model)),
        trained=sum(parameter.nbytes for parameter in trained),
        gradients=sum(parameter.nbytes for parameter in trained),
        optimizer=sum(_state_bytes(parameter, optim) for parameter in trained),
        layers=tuple(layers),
        body=Cost(INDICES + _angles(model)),
        loss=_loss(model),
        update=_update(trained, optim),
        recompute=model.gradient_checkpointing,
    )


def _largest(moments: tuple[Cost, ...], tokens: int) -> float:
    return max((moment.at(tokens) for moment in moments), default=0.0)


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


def _state_bytes(parameter: nn.Parameter, optim: str) -> int:
    """Two moments."""
    if optim == "adamw":
        return 2 * parameter.nbytes + FLOAT  # and the step, which the fused kernel reads
    if parameter.numel() < SMALLEST_8BIT:
        return 2 * FLOAT * parameter.numel()
    return 2 * (parameter.numel() + FLOAT * -(-parameter.numel() // STATE_BLOCK))


def _update(trained: list[nn.Parameter], optim: str) -> int:
    """8-bit AdamW lays parameters and their gradients end to end; torch's works in place."""
    if optim == "adamw" or not trained:
        return 0
    # It imports bitsandbytes, which takes a second.
    from slothcore.training.adamw_8bit import LARGEST_BATCH

    most = min(LARGEST_BATCH, sum(parameter.numel() for parameter in trained))
    return 2 * max(most, *(p.numel() for p in trained)) * max(p.itemsize for p in trained)


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
        logits = Cost(vocabulary * (e + 2 * FLOAT))
        return LossMemory(hidden + logits, hidden + logits)
    summed = scaled = Cost()
    if head.weight.requires_grad:
        # The head's gradient is summed in float32, then scaled in the dtype of the weight.
        summed, scaled = Cost(0, head.weight.numel() * max(e, FLOAT)), Cost(0, head.weight.nbytes)
    # A row of a chunk: its logits, its hidden state and the gradient of that.
    rows, row = max_chunk_rows(vocabulary, model.dtype), vocabulary * e + 2 * stream
    return LossMemory(hidden + summed, hidden + summed + scaled, chunk_rows=rows, chunk_row=row)
