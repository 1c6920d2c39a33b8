"""How much GPU memory a training run takes, worked out from the model's shapes without a GPU.

    peak = weights + trained weights + optimizer state + workspaces + the largest of
           the loss         everything kept, the chunk of logits, hidden states and their gradient
           layer l          what layers 0..l keep, the gradients from the head to layer l, the moment of layer l
           the embedding    all gradients; and its own once more, before it is added to that of an earlier pass
           the optimizer    all gradients, and its copies

With more than one pass a step, the gradients of all layers are there throughout. What gradient_checkpointing changes:

    True       layers keep their inputs, and layer l what it would keep, too
    "mlp"      layers do not keep the outputs of gate and up; the moment of layer l has them
    "offload"  as "mlp", and of what layers keep the GPU has small tensors, and as much of the others as one layer has

Decoded weights that are kept count as weights; their layers need no scratch to decode into.

The figures of `peak` are those of torch's allocator (`torch.cuda.max_memory_allocated`): the CUDA context, and what
lies unused between tensors, come on top.
"""

from dataclasses import dataclass, replace

from slothcore.layers.bucket import bucket_for
from slothcore.layers.offload import MIN_BYTES
from slothcore.models.decoder_body import GradientCheckpointing

# cuBLAS asks torch for one for each thread that calls it on a stream: that of forward passes, and autograd's. 32 MiB on
# Hopper, and less elsewhere.
WORKSPACES = 2 * 32 * 2**20
# Torch gives a pool of graphs segments of 20 MiB and more, and what of them is between tensors stays unused: 10 to 260
# MiB where its rules were followed through captures of 1B and 8B models. The pools of 8B are 15% below to 11% above
# what is predicted with this, and within 3% without recomputation and decoded copies.
GAPS = 64 * 2**20


@dataclass(frozen=True)
class Cost:
    """Bytes as a function of the tokens of a pass.

    Attributes:
        scratch: of the fixed bytes, those into which NF4 weights are decoded; kept copies make them unnecessary.
    """

    per_token: float = 0.0
    fixed: float = 0.0
    scratch: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.per_token + other.per_token, self.fixed + other.fixed, self.scratch + other.scratch)

    def at(self, tokens: int, *, decoded: bool = False) -> float:
        """`decoded`: whether the weights have kept copies."""
        return self.per_token * tokens + self.fixed - (self.scratch if decoded else 0.0)


@dataclass(frozen=True)
class Branch:
    """Attention or the feed-forward branch, with the norm before it.

    Attributes:
        tensors: each that is kept from the forward pass until the backward pass of this branch is over.
        moments: what that pass has allocated beside `kept` where it has most; which is most depends on the tokens.
    """

    tensors: tuple[Cost, ...]
    moments: tuple[Cost, ...]

    @property
    def kept(self) -> Cost:
        """All of them."""
        return sum(self.tensors, Cost())


@dataclass(frozen=True)
class LayerMemory:
    """One layer.

    Attributes:
        inputs: what is kept of it with recomputation, in place of the rest.
        gradients: bytes that its backward pass leaves.
        decoded: bytes of its NF4 weights, decoded; stacked experts apart, which are never kept so.
    """

    attention: Branch
    feed_forward: Branch
    inputs: Cost
    gradients: int
    decoded: int = 0

    @property
    def tensors(self) -> tuple[Cost, ...]:
        return self.attention.tensors + self.feed_forward.tensors

    @property
    def kept(self) -> Cost:
        return self.attention.kept + self.feed_forward.kept


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
        embedding: what the backward pass of an embedding that trains needs; nothing of one that does not.
        head_waits: whether the embedding is the head as well, whose gradient waits there to be added.
        update: what the optimizer copies in an update.
        recompute: the model's `gradient_checkpointing`.
        decoded_layers: how many layers, the first ones, keep their NF4 weights decoded.
        graph_tokens: passes of up to so many tokens replay CUDA graphs; 0: none does.
        hidden: bytes of a token's hidden state.
        pages: of the optimizer's state, those that the driver moves between host and GPU; they are no part of a peak,
            because they go where there is room.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    layers: tuple[LayerMemory, ...]
    body: Cost
    loss: LossMemory
    update: int
    recompute: GradientCheckpointing
    hidden: int
    decoded_layers: int = 0
    graph_tokens: int = 0
    embedding: Cost = Cost()
    head_waits: bool = False
    pages: float = 0.0

    @property
    def decoded(self) -> int:
        """Bytes of the decoded weights that are kept."""
        return sum(layer.decoded for layer in self.layers[: self.decoded_layers])

    @property
    def static(self) -> int:
        """What is there from the first update on, whatever the tokens of a pass."""
        held = self.weights + self.decoded + self.trained + self.optimizer + self.workspaces
        if not self.graph_tokens:
            return held
        # What graphs leave their hidden states in, and take the gradient of those from.
        return held + 2 * bucket_for(self.graph_tokens, documents=1).tokens * self.hidden

    @property
    def workspaces(self) -> int:
        """Bytes that cuBLAS has; graphs are captured on a stream of their own."""
        return (2 if self.graph_tokens else 1) * WORKSPACES

    def keeping_decoded(self, layers: int) -> "MemoryPlan":
        """The plan of the same run that keeps the decoded weights of the first `layers` layers."""
        return replace(self, decoded_layers=layers)

    def activations(self, tokens: int) -> float:
        """What the GPU keeps of a pass between its forward and its backward."""
        return self.body.at(tokens) + sum(self._held(layer, tokens) for layer in self.layers)

    def host(self, tokens: int) -> float:
        """What waits in host memory: between forward and backward, all but the last layer's tensors; and pages."""
        if self.recompute != "offload":
            return self.pages
        return self.pages + sum(layer.kept.at(tokens) - self._held(layer, tokens) for layer in self.layers[:-1])

    def peak(self, tokens: int, *, passes: int = 1) -> float:
        """The most memory that a step takes whose largest pass has this many tokens.

        Args:
            passes: of the step; from the second on, there are gradients from the beginning.
        """
        # With graphs there is a vector of all gradients, which stays.
        there = self.gradients if passes > 1 or self.graph_tokens else 0
        if tokens <= self.graph_tokens:
            # Such a pass is padded, and has gradients of its own, which are added to the vector in the end.
            padded = bucket_for(tokens, documents=1).tokens
            in_backward = there + self._backward(padded, gradients=0)
        else:
            padded, in_backward = tokens, self._backward(tokens, gradients=there)
        at_loss = there + self._after_forward(padded) + self.loss.at(tokens)
        # The gradient of a pass is a tensor of its own before it is added. Where the head has another, so is their sum.
        others = self.gradients - (0 if there else self.embedding.fixed)
        at_embedding = others + self.embedding.at(tokens) + (2 * self.embedding.fixed if self.head_waits else 0)
        # What lies end to end is updated where it is.
        copies = 0 if self.graph_tokens else self.update
        return self.static + max(at_loss, in_backward, at_embedding, self.gradients + copies)

    def graph_pool(self, tokens: int) -> float:
        """What CUDA graphs keep for themselves, once passes of up to this many tokens are captured.

        That is all that the largest of them needs, but for the loss. Graphs alone can use it again. Elsewhere gradients
        take the place of activations, but torch keeps blocks of up to 1 MiB in segments apart, and most gradients of
        factors are no larger. They count as if all were there from the beginning.
        """
        if not self.graph_tokens:
            return 0.0
        captured = bucket_for(min(tokens, self.graph_tokens), documents=1).tokens
        return max(self._after_forward(captured), self._backward(captured, gradients=self.gradients)) + GAPS

    def footprint(self, tokens: int, *, passes: int = 1) -> float:
        """The peak, and the pool of graphs beside it: no pass outside of a graph can have memory from there.

        Every bucket is run outside of a graph once, before it is captured, and longer passes always are.
        """
        return self.peak(tokens, passes=passes) + self.graph_pool(tokens)

    def largest_pass(self, budget: float, *, at_most: int, passes: int = 2) -> int:
        """The most tokens, up to `at_most`, whose `footprint` is within `budget` bytes; 0 if not even one is."""
        fits, too_many = 0, at_most + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.footprint(middle, passes=passes) <= budget:
                fits = middle
            else:
                too_many = middle
        return fits

    def _after_forward(self, tokens: int) -> float:
        """What is there of all layers when the forward pass is over."""
        return self.activations(tokens) + self._window(tokens)

    def _backward(self, tokens: int, *, gradients: float) -> float:
        """The most that the backward passes of the layers take; `gradients`: bytes of those that are there before."""
        most, kept, window = 0.0, self.activations(tokens), self._window(tokens)
        # Beside the layers' there is the head's; that of an embedding is made when the layers are through.
        first = self.gradients - (0 if self.head_waits else self.embedding.fixed)
        made = float(first - sum(layer.gradients for layer in self.layers))
        for index in reversed(range(len(self.layers))):
            layer, decoded = self.layers[index], index < self.decoded_layers
            made += layer.gradients
            held = kept + max(gradients, made)
            if self.recompute == "offload":
                held += window + max((tensor.at(tokens) for tensor in layer.tensors), default=0.0)
            elif self.recompute is True:
                held += layer.kept.at(tokens)
            most = max(most, held + _largest(layer.feed_forward.moments, tokens, decoded=decoded))
            if self.recompute != "offload":  # where the window moves on to the layer before
                held -= layer.feed_forward.kept.at(tokens)
            most = max(most, held + _largest(layer.attention.moments, tokens, decoded=decoded))
            kept -= self._held(layer, tokens)
        return most

    def _window(self, tokens: int) -> float:
        """What the GPU has of the tensors that wait in host memory: as much as one layer's."""
        if self.recompute != "offload":
            return 0.0
        return max((layer.kept.at(tokens) - self._held(layer, tokens) for layer in self.layers), default=0.0)

    def _held(self, layer: LayerMemory, tokens: int) -> float:
        """What the GPU keeps of a layer until its backward pass."""
        if self.recompute is True:
            return layer.inputs.at(tokens)
        if self.recompute == "offload":
            sizes = [tensor.at(tokens) for tensor in layer.tensors]
            return sum(size for size in sizes if size < MIN_BYTES)
        return layer.kept.at(tokens)


def _largest(moments: tuple[Cost, ...], tokens: int, *, decoded: bool) -> float:
    return max((moment.at(tokens, decoded=decoded) for moment in moments), default=0.0)
