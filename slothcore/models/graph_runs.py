"""One training pass of a decoder's body, padded to a bucket: run by Python, or recorded as two CUDA graphs.

Both differentiate with respect to stand-ins: aliases of the trained parameters that take their places in the modules.
So a pass neither reads nor writes the autograd state of the parameters themselves. That of an earlier pass belongs to
the stream on which it ran, and to touch it breaks a capture; and gradients go where `FlatFactors` wants them.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from slothcore.layers.bucket import Bucket
from slothcore.layers.packed import Documents, PackedInputs
from slothcore.models.decoder_body import DecoderBody
from slothcore.models.flat_factors import FlatFactors

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a function and gives one that does the same work again, on the same memory. The first is not run, or not for
its effects: a graph records launches without executing them."""


class CudaRecorder:
    """Records functions as CUDA graphs whose temporaries share one pool of memory.

    Sharing is sound where what one recorded function leaves in temporaries is read before another function begins that
    is not its successor; `StepGraphs` sees to it. The pool lives as long as the recorder and what it recorded.
    """

    _idle: ClassVar[dict[torch.device, list[torch.cuda.Stream]]] = {}
    """Streams on which earlier recorders recorded. Each has workspaces, which two graphs at once must not share."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_spoilt = False
        self._begin()

    def _begin(self) -> None:
        """A new pool, and a stream that no other recorder has."""
        idle = self._idle.setdefault(self._device, [])
        self._stream = idle.pop() if idle else _stream_with_workspaces(self._device)
        self._gives_stream_back = weakref.finalize(self, idle.append, self._stream)
        self._gives_stream_back.atexit = False
        with torch.cuda.device(self._device):
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record `function`, which must have run before: compiling a kernel is no part of a graph.

        Raises: RuntimeError (torch's own kinds) if it does what cannot be recorded, or memory runs out. The stream and
            the random generator of the device are then as before; what is recorded next gets a new pool and stream.
        """
        if self._is_spoilt:
            self._begin()
            self._is_spoilt = False
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._stream.device):
            stream = torch.cuda.current_stream()
            generator = torch.cuda.default_generators[stream.device_index]
            state = generator.clone_state()
            try:
                # Other threads of the process, such as the caller's own, may allocate on the device meanwhile.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    function()
            except BaseException:
                self._recover(stream, generator, state)
                raise
        return partial(self._replay, graph)

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """A method, so that what was recorded keeps its recorder, and with it the stream from others."""
        graph.replay()

    def _recover(self, stream: torch.cuda.Stream, generator: torch.Generator, state: torch.Generator) -> None:
        """Older torch leaves a spoilt capture half open: its stream current, generator and allocator recording."""
        torch.cuda.set_stream(stream)
        self._is_spoilt = True  # neither it nor anybody else should have to rely on a stream whose capture went wrong
        self._gives_stream_back.detach()
        generator.graphsafe_set_state(state)
        try:
            torch._C._cuda_endAllocateToPool(stream.device_index, self._pool)  # type: ignore[attr-defined]
        except RuntimeError:
            return  # the allocator had stopped, and the graph's own destructor gives its share of the pool back
        torch._C._cuda_releasePool(stream.device_index, self._pool)  # type: ignore[attr-defined]


def _stream_with_workspaces(device: torch.device) -> torch.cuda.Stream:
    """A new stream on which products of both directions have run.

    At the first product on a stream cuBLAS gets a workspace of torch, which torch never frees; each thread that calls
    it, ours and autograd's, has its own. In a capture they would come from the pool of the graph. Backward's would lie
    in whatever segment has room, such as that of the largest decoded weight, and hold all of it when the pool is gone.
    """
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream), torch.enable_grad():
        matrix = torch.zeros(16, 16, device=device, requires_grad=True)
        torch.autograd.grad((matrix @ matrix).sum(), matrix)
    return stream


@dataclass(frozen=True)
class Factors:
    """The trained parameters of a body.

    Attributes:
        flat: where they and their gradients lie.
        places: (a module's dictionary of parameters, name in it, index in flat.parameters).
    """

    flat: FlatFactors
    places: tuple[tuple[dict[str, nn.Parameter | None], str, int], ...]

    @staticmethod
    def of(body: nn.Module, flat: FlatFactors) -> "Factors":
        """Look up where in the body the parameters of `flat` are."""
        index = {id(parameter): i for i, parameter in enumerate(flat.parameters)}
        owned = [module._parameters for module in body.modules()]
        places = [(own, name, index[id(p)]) for own in owned for name, p in own.items() if id(p) in index]
        return Factors(flat, tuple(places))

    def stand_ins(self) -> list[Tensor]:
        """A new alias of each parameter, which requires a gradient."""
        return [parameter.detach().requires_grad_() for parameter in self.flat.parameters]

    @contextmanager
    def replaced_by(self, stand_ins: Sequence[Tensor]) -> Iterator[None]:
        """Let the modules see these in place of their parameters."""
        originals = self.flat.parameters
        try:
            for owned, name, index in self.places:
                owned[name] = stand_ins[index]  # type: ignore[assignment]
            yield
        finally:
            for owned, name, index in self.places:
                owned[name] = originals[index]


class PaddedRun:
    """A pass that Python runs."""

    def __init__(self, body: DecoderBody, factors: Factors) -> None:
        self._body, self._factors = body, factors
        self._stand_ins = factors.stand_ins()
        self._output: Tensor | None = None

    def forward(self, inputs: PackedInputs) -> Tensor:
        """Hidden states [T, H] outside autograd; what `backward` needs is kept."""
        with self._factors.replaced_by(self._stand_ins), torch.enable_grad():
            self._output = self._body(inputs.input_ids, inputs.position_ids, inputs.documents)
        return self._output.detach()

    def gradients(self, grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
        """Those of the factors, in the order of `FlatFactors`; grad_hidden is [T, H]."""
        assert self._output is not None
        output, self._output = self._output, None
        # Recomputed layers look their parameters up again.
        with self._factors.replaced_by(self._stand_ins):
            return torch.autograd.grad(output, self._stand_ins, grad_hidden.contiguous(), allow_unused=True)

    def backward(self, grad_hidden: Tensor) -> None:
        """Add the gradients of the factors to the vectors of `FlatFactors`."""
        # All at once, though until then they take as much memory as the vector: a few large launches, where an add for
        # each layer would leave most of the GPU idle each time.
        self._factors.flat.add(self.gradients(grad_hidden))


def rehearse(body: DecoderBody, factors: Factors, bucket: Bucket) -> None:
    """Run a pass of this bucket by Python and keep nothing of it: every kernel that a capture needs is compiled."""
    run = PaddedRun(body, factors)
    hidden = run.forward(_one_document(bucket, body.embed_tokens.weight.device))
    run.gradients(torch.zeros_like(hidden))


def _one_document(bucket: Bucket, device: torch.device) -> PackedInputs:
    """A pass of the bucket's shapes: one document of token 0, and empty ones."""
    ids = torch.zeros(bucket.tokens, dtype=torch.int64, device=device)
    positions = torch.arange(bucket.tokens, dtype=torch.int64, device=device)
    boundaries = torch.full((bucket.documents + 1,), bucket.tokens, dtype=torch.int32, device=device)
    boundaries[:1].zero_()
    documents = Documents(boundaries, max_seqlen=bucket.tokens)
    return PackedInputs(ids, positions, documents, targets=None, rows=None, places=None, shape=ids.shape)


@dataclass(frozen=True)
class Buffers:
    """What all recorded passes take their gradient from and leave their result in; one pass at a time is under way.

    Attributes:
        hidden, grad_hidden: [most tokens, H] in the compute dtype.
    """

    hidden: Tensor
    grad_hidden: Tensor

    @staticmethod
    def of(body: DecoderBody, tokens: int) -> "Buffers":
        """Buffers for passes of at most so many tokens."""
        like = body.embed_tokens.weight
        # An embedding may be float32 in a model that computes in 16 bits.
        hidden = torch.zeros(tokens, like.shape[1], dtype=body.norm.weight.dtype, device=like.device)
        return Buffers(hidden, grad_hidden=torch.zeros_like(hidden))


class RecordedRun:
    """The passes of one bucket, replayed. Weights and factors must lie where they lay when it was recorded."""

    def __init__(
        self, body: DecoderBody, factors: Factors, bucket: Bucket, buffers: Buffers, recorder: Recorder
    ) -> None:
        """
        Raises: what the recorder raises.
        """
        inputs = _one_document(bucket, buffers.hidden.device)
        self._inputs = inputs.input_ids, inputs.position_ids, inputs.documents.cu_seqlens
        self._hidden = hidden = buffers.hidden[: bucket.tokens]
        self._grad_hidden = grad_hidden = buffers.grad_hidden[: bucket.tokens]
        run = PaddedRun(body, factors)

        def forward() -> None:
            hidden.copy_(run.forward(inputs))

        def backward() -> None:
            run.backward(grad_hidden)

        self._replay_forward, self._replay_backward = recorder(forward), recorder(backward)

    def forward(self, inputs: PackedInputs) -> Tensor:
        """Hidden states [T, H], valid until the next pass of any bucket."""
        given = inputs.input_ids, inputs.position_ids, inputs.documents.cu_seqlens
        for static, values in zip(self._inputs, given, strict=True):
            static.copy_(values)
        self._replay_forward()
        return self._hidden.detach()

    def backward(self, grad_hidden: Tensor) -> None:
        """Add the gradients of the factors to the vectors of `FlatFactors`."""
        self._grad_hidden.copy_(grad_hidden)
        self._replay_backward()
