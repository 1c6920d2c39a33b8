"""AdamW with 8-bit state: bitsandbytes' update, for hundreds of parameters at a time and without waiting for it.

A LoRA model has hundreds of small parameters: 448 for an 8B model. bitsandbytes 0.50 launches its kernel for each, and
synchronises the host with the GPU after each: 27 ms a step on an H100 in which the GPU mostly idles. Nothing needs
either. The update works on blocks of 256 elements that know nothing of each other, so parameters whose sizes are whole
blocks are updated in one launch, as one vector: where they lie end to end in memory, that is the vector, and so are
their gradients; elsewhere both are copied into one.

bitsandbytes launches on the legacy default stream, torch's own default, so the update follows what made the gradients;
it takes the learning rate and the number of the step by value, and therefore belongs in no CUDA graph.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW8bit as BitsandbytesAdamW8bit
from torch import Tensor, nn

from slothcore.training.optimizer_kinds import LARGEST_BATCH
from slothcore.training.versions import note_update

BLOCK = 256


class AdamW8bit(BitsandbytesAdamW8bit):
    """The same arguments, state and results as `bitsandbytes.optim.AdamW8bit`, to the last bit.

    Source: Dettmers et al. 2021, arXiv:2110.02861.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._batches: dict[int, list[Batch]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Returns: what `closure` returned, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for group_index, group in enumerate(self.param_groups):
            together: list[nn.Parameter] = []
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, group_index, index)
                if (group_index, index) not in self.mng.index2config and in_whole_blocks(
                    parameter, self.state[parameter]
                ):
                    together.append(parameter)
                else:
                    self.update_step(group, parameter, group_index, index)
            for batch in self._batches_of(group_index, together):
                batch.update(group)
        note_update(self)
        return loss

    def _batches_of(self, group_index: int, parameters: list[nn.Parameter]) -> "list[Batch]":
        """The batches of the last step, unless other parameters have gradients now or a state was loaded since."""
        states = [self.state[parameter] for parameter in parameters]
        batches = self._batches.get(group_index, [])
        known = [*chain.from_iterable(batch.parameters for batch in batches)]
        known_states = [*chain.from_iterable(batch.states for batch in batches)]
        if not (same_objects(known, parameters) and same_objects(known_states, states)):
            batches = [Batch.of(part, [self.state[p] for p in part]) for part in alike(parameters, self.state)]
            self._batches[group_index] = batches
        return batches


@dataclass
class Batch:
    """Parameters that one launch updates.

    Attributes:
        parameters: all of one dtype, on one device, at one step.
        states: bitsandbytes' state of each; its tensors are views of those below, one after the other.
        state1, state2: [n] uint8, codes of the moments; n is the number of elements of all parameters.
        absmax1, absmax2: [n / 256] float32, the scale of each block.
    """

    parameters: list[nn.Parameter]
    states: list[dict[str, Any]]
    state1: Tensor
    state2: Tensor
    absmax1: Tensor
    absmax2: Tensor

    @staticmethod
    def of(parameters: list[nn.Parameter], states: list[dict[str, Any]]) -> "Batch":
        """Lay the states end to end; from now on those of the parameters are views."""
        joined = {}
        for key in ("state1", "state2", "absmax1", "absmax2"):
            joined[key] = torch.cat([state[key].reshape(-1) for state in states])
            edges = accumulate((state[key].numel() for state in states), initial=0)
            for state, (start, end) in zip(states, pairwise(list(edges)), strict=True):
                state[key] = joined[key][start:end].view(state[key].shape)
        return Batch(parameters, states, **joined)

    def update(self, group: dict[str, Any]) -> None:
        """One step with the options of a parameter group."""
        for state in self.states:
            state["step"] += 1
        first = self.states[0]
        gradients, _ = as_vector([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        values, is_copy = as_vector(self.parameters)
        beta1, beta2 = group["betas"]
        functional.optimizer_update_8bit_blockwise(
            "adam",
            gradients,
            values,
            self.state1,
            self.state2,
            beta1,
            beta2,
            0.0,
            0.0,
            group["eps"],
            first["step"],
            group["lr"],
            first["qmap1"],
            first["qmap2"],
            self.absmax1,
            self.absmax2,
            group["weight_decay"],
            gnorm_scale=1.0,
            skip_zeros=False,
        )
        if is_copy:
            parts = values.split([parameter.numel() for parameter in self.parameters])
            torch._foreach_copy_(
                [parameter.data for parameter in self.parameters],
                [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters, strict=True)],
            )


def end_to_end(tensors: Sequence[Tensor]) -> Tensor | None:
    """The vector that contiguous tensors of one dtype are in memory, sharing it; None if they are not one."""
    first = tensors[0]
    # Neighbours may also be two allocations that touch; a vector over both would reach out of the first one's.
    storage, address = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        touches = tensor.data_ptr() == address and tensor.untyped_storage().data_ptr() == storage
        if not (touches and tensor.is_contiguous()):
            return None
        address += tensor.nbytes
    elements = (address - first.data_ptr()) // first.element_size()
    return first.detach().as_strided((elements,), (1,))


def as_vector(tensors: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Tensors of one dtype as one vector: their own memory if they lie end to end, else a copy; and if it is that."""
    vector = end_to_end(tensors)
    return (torch.cat([tensor.reshape(-1) for tensor in tensors]), True) if vector is None else (vector, False)


def same_objects(some: Sequence[object], others: Sequence[object]) -> bool:
    """Whether both hold the very same objects in the same order; `==` on tensors would compare elements."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def in_whole_blocks(parameter: nn.Parameter, state: Mapping[str, Any]) -> bool:
    """Whether the blocks of this parameter stay the same when others follow it."""
    return (
        state["state1"].dtype == torch.uint8
        and parameter.numel() == BLOCK * state["absmax1"].numel()
        and parameter.grad is not None
        and parameter.grad.dtype == parameter.dtype
        and parameter.is_contiguous()
    )


def alike(
    parameters: Sequence[nn.Parameter], states: Mapping[Tensor, Mapping[str, Any]]
) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters that one launch can take: of the same dtype, device and step.

    They are end to end in memory, or else not too many elements to be copied there.
    """

    def kind(parameter: nn.Parameter) -> tuple[Any, ...]:
        return parameter.dtype, parameter.device, states[parameter]["step"]

    scattered: list[nn.Parameter] = []
    for run in runs(parameters, kind):
        alone = len(run) == 1 and run[0].numel() <= LARGEST_BATCH
        if scattered and not (
            alone
            and kind(run[0]) == kind(scattered[0])
            and sum(p.numel() for p in scattered) + run[0].numel() <= LARGEST_BATCH
        ):
            yield scattered
            scattered = []
        if alone:
            scattered += run
        else:
            yield run
    if scattered:
        yield scattered


def runs(parameters: Sequence[nn.Parameter], kind: Callable[[nn.Parameter], object]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one kind, as long as each begins in memory where the one before ends."""
    run: list[nn.Parameter] = []
    for parameter in parameters:
        if run and not (kind(run[0]) == kind(parameter) and end_to_end([run[-1], parameter]) is not None):
            yield run
            run = []
        run.append(parameter)
    if run:
        yield run
