"""Trainable parameters end to end in one vector, and their gradients in another.

A LoRA model has hundreds of small parameters. Laid end to end, all gradients are cleared by one fill, measured by one
norm and scaled by one product, and an optimizer that works on blocks of 256 elements updates everything in one launch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

GRANULE = 256
"""Every parameter begins at a multiple of so many elements: aligned for TMA, and whole blocks for 8-bit optimizers."""


@dataclass(frozen=True)
class FlatGroup:
    """Parameters of one dtype on one device.

    Attributes:
        parameters: matrices first, then vectors (biases), each kind in the order in which they were given.
        parameters_vector: [n], the values of all. Each parameter's `.data` is a view of it.
        gradients_vector: [n], their gradients. Each parameter's `.grad` is a view of it, once it is attached.
        gradients: those views.
        starts: where in the vectors each parameter begins, and n. What lies between one parameter's end and the next
            one's start is zero in both vectors, and no update that maps zero to zero changes that.
    """

    parameters: tuple[nn.Parameter, ...]
    parameters_vector: Tensor
    gradients_vector: Tensor
    gradients: tuple[Tensor, ...]
    starts: tuple[int, ...]

    @staticmethod
    @torch.no_grad()
    def of(parameters: Sequence[nn.Parameter]) -> "FlatGroup":
        """Move the values into one vector; gradients that are there stay where they are until the next pass."""
        ordered = sorted(parameters, key=lambda parameter: parameter.dim() < 2)
        sizes = (-(-parameter.numel() // GRANULE) * GRANULE for parameter in ordered)
        starts = tuple(accumulate(sizes, initial=0))
        values = torch.zeros(starts[-1], dtype=ordered[0].dtype, device=ordered[0].device)
        vector = torch.zeros_like(values)
        gradients = []
        for parameter, start in zip(ordered, starts, strict=False):
            place = slice(start, start + parameter.numel())
            home = values[place].view(parameter.shape)
            home.copy_(parameter)
            parameter.data = home
            gradients.append(vector[place].view(parameter.shape))
        return FlatGroup(tuple(ordered), values, vector, tuple(gradients), starts)

    def attach(self) -> None:
        """Let every `.grad` be its view. One that is None becomes zero, one that lies elsewhere is moved here."""
        if all(parameter.grad is None for parameter in self.parameters):
            self.gradients_vector.zero_()
            for parameter, view in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = view
            return
        for parameter, view in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is view:
                continue
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
            parameter.grad = view

    def is_attached(self) -> bool:
        """Whether every `.grad` is its view, so that the vector holds all gradients."""
        return all(p.grad is view for p, view in zip(self.parameters, self.gradients, strict=True))

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients, in the order of `parameters`, into the vector; None adds nothing."""
        pairs = [(view, g) for view, g in zip(self.gradients, gradients, strict=True) if g is not None]
        # One strided tensor would send a whole list the slow way, a launch for each.
        for contiguous in (True, False):
            alike = [(view, g) for view, g in pairs if g.is_contiguous() == contiguous]
            if alike:
                torch._foreach_add_([view for view, _ in alike], [g for _, g in alike])


def factors_apart(named: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Matrices, then factors B of LoRA, then vectors, each kind in the given order.

    Those that may have a learning rate of their own then lie end to end, and one launch still updates them.
    """
    return sorted(named, key=lambda item: (item[1].dim() < 2, is_factor_b(item[0])))


def is_factor_b(name: str) -> bool:
    """Whether this is the name of a factor B of LoRA."""
    return name.endswith("lora_B")


class FlatFactors:
    """Parameters whose values and gradients lie end to end, in one group for each dtype and device.

    The parameter objects stay the same, so optimizers, hooks on them and state dicts go on working; only their storage
    moves, which is shared from then on. A copy of the model (`copy.deepcopy`) has storage of its own again.

    Attributes:
        groups: the vectors; a LoRA model has one group, unless it trains biases, whose dtype is the model's.
        parameters: of all groups, one group after the other.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """
        Raises: ValueError if there is no parameter, or one is given twice.
        """
        alike: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        seen: set[int] = set()
        for parameter in parameters:
            if id(parameter) in seen:
                raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is given twice")
            seen.add(id(parameter))
            alike.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        if not alike:
            raise ValueError("there is no parameter to lay end to end")
        self.groups = tuple(FlatGroup.of(group) for group in alike.values())
        self.parameters = tuple(parameter for group in self.groups for parameter in group.parameters)

    def attach(self) -> None:
        """Let every `.grad` be a view of a gradients vector: zero where it was None, moved where it lay elsewhere.

        A backward pass through graphs begins with this. Whoever clears gradients by `zero_grad` instead of setting them
        to None keeps them attached, also through passes without graphs, which add to what is there.
        """
        for group in self.groups:
            group.attach()

    def zero_grad(self) -> None:
        """Clear all gradients, one launch for each group, and leave them attached."""
        for group in self.groups:
            group.gradients_vector.zero_()
            for parameter, view in zip(group.parameters, group.gradients, strict=True):
                if parameter.grad is not view:
                    parameter.grad = view

    def is_attached(self) -> bool:
        """Whether the gradients vectors hold all gradients."""
        return all(group.is_attached() for group in self.groups)

    def is_intact(self) -> bool:
        """Whether every parameter still lies in its vector; moving a model to another device takes them out."""
        return all(
            parameter.data_ptr() == group.parameters_vector.data_ptr() + start * parameter.element_size()
            for group in self.groups
            for parameter, start in zip(group.parameters, group.starts, strict=False)
        )

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients, in the order of `parameters`, into the vectors; None adds nothing."""
        start = 0
        for group in self.groups:
            group.add(gradients[start : start + len(group.parameters)])
            start += len(group.parameters)
