"""Training passes replayed as two CUDA graphs, with the loss between them.

    on the host: pack, pad | one copy | graph: embedding, layers, norm | loss | graph: their backward pass | optimizer

A short pass of an 8B model is 2,000 launches, which take the host three times as long as the GPU. Replayed, they are
two. The loss is not captured: its dozen launches are issued while the first graph still runs, and so targets need no
padding and any `num_items` or factor of a gradient scaler goes through it.

What is computed depends on the inputs alone. A pass that can be replayed is always padded to its bucket; whether Python
runs it, as at the first sight of a bucket, or a graph does, the kernels and their shapes are the same, and so are the
bits. A run that is resumed therefore gives what it would have given.

All graphs share one pool of memory, so one pass at a time may be between its forward and its backward. Another one that
begins meanwhile is run by Python.

The pool is as large as its largest bucket needs, if that is captured first: in rising order, where every tensor is a
little larger than the place that one like it left, the pool of an 8B model grows to three times of that. So whoever
knows the longest pass to come says so (`expected_tokens`), and its bucket is captured before any other. A bucket larger
than all captured ones begins a new pool, into which the smaller ones are captured anew when they come again.
"""

import copy
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slothcore.autograd.first_order import once_differentiable
from slothcore.layers.bucket import Bucket, bucket_for, pad_to
from slothcore.layers.packed import PackedInputs
from slothcore.models.config import DecoderConfig
from slothcore.models.decoder_body import DecoderBody
from slothcore.models.flat_factors import FlatFactors, factors_apart
from slothcore.models.graph_runs import Buffers, CudaRecorder, Factors, PaddedRun, RecordedRun, Recorder, rehearse
from slothcore.models.graph_watch import GraphWatch, adapted_layers

MOST_BUCKETS = 32
"""So many are captured; passes of further ones are run by Python."""
TRAINED = ("lora_A", "lora_B", "lora_magnitude_vector", "bias")


class StepGraphs:
    """The graphs of one model; `Decoder.enable_graphs` makes it, and `Decoder.forward` asks it first.

    Attributes:
        max_tokens: the longest pass that is replayed.
        expected_tokens: the longest pass that will come, as far as anybody knows; 0: nobody does. Set it before the
            first pass, to save captures that would be thrown away.
        flat: the trained parameters of the layers, end to end; None while the model cannot be captured.
        captures: buckets captured so far, replays: passes replayed, padded: passes run by Python that a graph could
            have run, eager: passes that were not for a graph.
        reason: why the last pass was not for a graph; None if it was.
    """

    def __init__(
        self, body: DecoderBody, config: DecoderConfig, *, max_tokens: int, recorder: Recorder | None = None
    ) -> None:
        """
        Args:
            recorder: default: CUDA graphs, which need a GPU. Another one takes their place on any device.
        Raises: ValueError if max_tokens is not positive.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens of a pass for graphs must be at least 1, got {max_tokens}")
        self.max_tokens, self.expected_tokens = max_tokens, 0
        self.captures = self.replays = self.padded = self.eager = 0
        self.reason: str | None = None
        self._body, self._config = body, config
        self._given_recorder = recorder
        self._factors: Factors | None = None
        self._watch: GraphWatch | None = None
        self._obstacle: str | None = None
        self._has_failed = False
        self._seen: set[Bucket] = set()  # run once by Python, so that every kernel is compiled
        self._under_way: weakref.ref[_Pass] | None = None
        self._recorder: Recorder | None = None
        self._buffers: Buffers | None = None
        self._recorded: dict[Bucket, RecordedRun] = {}
        self._refresh()

    @property
    def flat(self) -> FlatFactors | None:
        return None if self._factors is None else self._factors.flat

    def why_not(self, inputs: PackedInputs | None = None) -> str | None:
        """Why a pass is not for a graph, in a sentence; None if it is. Without inputs: why no pass of the model is.

        These run as if graphs were not enabled: passes without labels, without gradients, or in evaluation mode; on
        tokens that are on the GPU already; of more than `max_tokens` tokens; under torch.autocast; and all passes of a
        model on the CPU, with LoRA dropout, with the auxiliary loss of experts, with the noise of NEFTune, with
        `gradient_checkpointing` "offload", or whose layers or embedding train anything but LoRA factors, magnitudes and
        biases. (What trains in the head is no obstacle: the head is part of the loss.)
        """
        if inputs is not None:
            tokens = len(inputs.input_ids)
            if inputs.targets is None:
                return "a pass without labels gives logits, and only passes that give a loss are replayed"
            if not torch.is_grad_enabled() or not self._body.training:
                return "a pass outside training has no backward pass to replay"
            if inputs.input_ids.device.type != "cpu":
                return f"the tokens are on {inputs.input_ids.device} already; they are padded on the host"
            if tokens > self.max_tokens:
                return f"the pass has {tokens} tokens, and max_tokens is {self.max_tokens}"
            if torch.is_autocast_enabled(self._device.type):
                return "torch.autocast is on, and a graph would keep it for ever"
        self._refresh()
        return self._obstacle

    def hidden_states(self, inputs: PackedInputs) -> tuple[Tensor, PackedInputs] | None:
        """Hidden states of a padded pass, and its inputs on the device; None if the pass is not for a graph.

        Args:
            inputs: on the host.
        Returns: [T, H] with T the tokens of a bucket, to be read before the next pass; and the padded inputs, whose
            targets and rows are those given. The backward pass adds to the gradients of `flat`.
        """
        self.reason = self.why_not(inputs)
        if self.reason is not None:
            self.eager += 1
            return None
        bucket = bucket_for(len(inputs.input_ids), len(inputs.documents))
        inputs = pad_to(inputs, bucket).to(self._device)
        # A leaf of its own: autograd's node of a longer-lived one would belong to the stream that it first ran on.
        hidden = _Replayed.apply(torch.zeros(0, requires_grad=True), self._next_pass(bucket), inputs)
        return hidden, inputs

    def __deepcopy__(self, memo: dict[int, Any]) -> "StepGraphs":
        """For a copy of the model: nothing captured, and vectors of its own."""
        body = copy.deepcopy(self._body, memo)
        graphs = StepGraphs(body, self._config, max_tokens=self.max_tokens, recorder=self._given_recorder)
        graphs.expected_tokens = self.expected_tokens
        return graphs

    @property
    def _device(self) -> torch.device:
        return self._body.embed_tokens.weight.device

    def _next_pass(self, bucket: Bucket) -> "_Pass":
        assert self._factors is not None
        earlier = None if self._under_way is None else self._under_way()
        recorded = self._recorded_run(bucket) if earlier is None or earlier.is_done else None
        if recorded is None:
            self.padded += 1
            run = PaddedRun(self._body, self._factors)
            # Seen when its backward pass has run: until then some kernels are not compiled.
            return _Pass(run, self._factors.flat, when_done=partial(self._seen.add, bucket))
        self.replays += 1
        current = _Pass(recorded, self._factors.flat)
        self._under_way = weakref.ref(current)
        return current

    def _recorded_run(self, bucket: Bucket) -> RecordedRun | None:
        """That of the bucket, recorded now if it is due."""
        if bucket in self._recorded or bucket not in self._seen or self._has_failed:
            return self._recorded.get(bucket)
        if len(self._recorded) == MOST_BUCKETS:
            return None
        longest = bucket_for(min(self.max_tokens, self.expected_tokens), documents=1)
        if self._recorded and all(bucket.tokens > other.tokens for other in self._recorded):
            self._drop()
        if not self._recorded and longest.tokens > bucket.tokens and not self._record(longest):
            return None
        return self._record(bucket)

    def _record(self, bucket: Bucket) -> RecordedRun | None:
        """Capture a bucket; None, and no graphs from now on, if that fails."""
        assert self._factors is not None
        try:
            if bucket not in self._seen:
                rehearse(self._body, self._factors, bucket)
                self._seen.add(bucket)
            if self._recorder is None:
                self._recorder = self._given_recorder or CudaRecorder(self._device)
            if self._buffers is None:
                self._buffers = Buffers.of(self._body, bucket_for(self.max_tokens, documents=1).tokens)
            run = RecordedRun(self._body, self._factors, bucket, self._buffers, self._recorder)
        except Exception as error:
            self._drop()
            self._has_failed = True
            first_line = str(error).partition("\n")[0]
            warnings.warn(
                f"a training pass of {bucket.tokens} tokens cannot be captured as a CUDA graph ({first_line}); "
                "training goes on without graphs, with the same results",
                stacklevel=2,
            )
            return None
        self._recorded[bucket] = run
        self.captures += 1
        return run

    def _drop(self) -> None:
        """Let go of all graphs and their memory; a pass under way keeps what it needs until its backward pass."""
        self._recorded = {}
        self._recorder = self._buffers = None

    def _refresh(self) -> None:
        """Graphs hold addresses, and numbers as they were: begin anew when weights, factors or options changed."""
        if self._watch is not None and self._watch.is_unchanged():
            return
        self._drop()
        self._seen = set()
        self._obstacle = self._find_obstacle()
        if self._obstacle is not None:
            self._factors = None
        else:
            trained = [p for _, p in factors_apart(self._body.named_parameters()) if p.requires_grad]
            flat = self.flat
            if flat is None or set(flat.parameters) != set(trained) or not flat.is_intact():
                flat = FlatFactors(trained)
            self._factors = Factors.of(self._body, flat)
        self._watch = GraphWatch(self._body)

    def _find_obstacle(self) -> str | None:
        """Why no pass of the model, as it is now, can be captured."""
        if self._given_recorder is None and self._device.type != "cuda":
            return f"the model is on {self._device}, and CUDA graphs need a GPU"
        return obstacle_in(self._body, self._config)


class _Pass:
    """A forward pass whose backward pass is to come; `when_done` is called when that has run."""

    def __init__(
        self, run: PaddedRun | RecordedRun, flat: FlatFactors, *, when_done: Callable[[], None] | None = None
    ) -> None:
        self._run: PaddedRun | RecordedRun | None = run
        self._flat, self._when_done = flat, when_done

    @property
    def is_done(self) -> bool:
        """Whether its backward pass has begun."""
        return self._run is None

    def forward(self, inputs: PackedInputs) -> Tensor:
        assert self._run is not None
        return self._run.forward(inputs)

    def backward(self, grad_hidden: Tensor) -> None:
        # A loss may be kept for its value; it must not keep a graph and its memory.
        run, self._run = self._run, None
        if run is None:
            raise RuntimeError("backward was called twice for one pass; what it needs is gone, so run forward again")
        self._flat.attach()
        run.backward(grad_hidden)
        if self._when_done is not None:
            self._when_done()


class _Replayed(torch.autograd.Function):
    """A pass as one node of autograd; its backward pass puts gradients in place and returns none."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, current: _Pass, inputs: PackedInputs) -> Tensor:
        ctx.current = current
        return current.forward(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[None, None, None]:
        ctx.current.backward(grad_hidden)
        return None, None, None


def obstacle_in(body: DecoderBody, config: DecoderConfig) -> str | None:
    """Why no pass through `body`, as it is now, can be captured on any GPU; None if some can."""
    if body.gradient_checkpointing == "offload":
        return 'gradient_checkpointing is "offload", whose copies to the host are not captured'
    if body.neftune_noise_alpha is not None:
        return "neftune_noise_alpha is set, and captures draw from its generator: a resumed run would see other noise"
    if config.moe is not None and config.moe.use_aux_loss:
        return "the auxiliary loss of the experts averages over tokens, and padding would count"
    if any(layer.lora_dropout > 0 for layer in adapted_layers(body)):
        return "LoRA dropout draws its seed on the host, and a graph would repeat one mask for ever"
    trained = [name for name, parameter in body.named_parameters() if parameter.requires_grad]
    others = [name for name in trained if name.rpartition(".")[2] not in TRAINED]
    if others:
        return f"{others[0]} trains, and graphs are made for LoRA factors, magnitudes and biases only"
    return None if trained else "nothing in the layers trains"
