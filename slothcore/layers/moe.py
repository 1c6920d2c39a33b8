"""A feed-forward block of experts, of which a router chooses k for each token.

E  experts    T  tokens, packed: there is no padding to route    k  experts of a token    H  hidden_size
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slothcore.autograd.experts import expert_mlp
from slothcore.kernels.glu import Activation
from slothcore.layers.experts import ExpertLinear


class Router(nn.Module):
    """Scores of the experts, x W^T. Its weight stays dense also in a model of 4 bits, and gets no LoRA.

    Attributes:
        weight: [E, H].
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] to [T, E]."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class Experts(nn.Module):
    """Gated MLPs of which each token goes through k: sum over its experts of weight * down(act(gate(x)) * up(x))."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        names: tuple[str, str, str],
        activation: Activation,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            names: what the checkpoint calls the gate, up and down projections, and so does this module.
        """
        super().__init__()
        self.activation: Activation = activation
        self.names = names
        sizes = [(hidden_size, intermediate_size)] * 2 + [(intermediate_size, hidden_size)]
        for name, (size_in, size_out) in zip(names, sizes, strict=True):
            self.add_module(name, ExpertLinear(num_experts, size_in, size_out, dtype=dtype, device=device))
        # In memory `gate_proj.3.weight`, on disk `3.gate_proj.weight`: the same swap leads either way.
        self.register_state_dict_post_hook(_swap_names)
        self.register_load_state_dict_pre_hook(_swap_names)

    def projections(self) -> Sequence[ExpertLinear]:
        """The gate, up and down projections."""
        modules = (self._modules[name] for name in self.names)
        return [module for module in modules if isinstance(module, ExpertLinear)]

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """[T, H] to [T, H], for the chosen experts [T, k] and their weights [T, k] in x's dtype."""
        gate, up, down = (layer.projection() for layer in self.projections())
        return expert_mlp(x, expert_ids, expert_weights, gate, up, down, activation=self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class SparseMoe(nn.Module):
    """y = sum over the k best experts e of p_e * expert_e(x), p = softmax(router(x)).

    Attributes:
        gate: the router.
        experts: the experts.
        keeps_router_logits: whether a forward pass gives the router's logits too, for the auxiliary loss.
    Source: Fedus et al. 2021, arXiv:2101.03961; Jiang et al. 2024 (Mixtral), arXiv:2401.04088.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        experts_per_token: int,
        normalize_weights: bool,
        expert_names: tuple[str, str, str],
        activation: Activation,
        keeps_router_logits: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            intermediate_size: of each expert.
            normalize_weights: whether the weights of a token's experts are scaled to the sum 1.
            expert_names: names of the gate, up and down projections.
        """
        super().__init__()
        self.experts_per_token = experts_per_token
        self.normalize_weights = normalize_weights
        self.keeps_router_logits = keeps_router_logits
        self.gate = Router(hidden_size, num_experts, dtype=dtype, device=device)
        self.experts = Experts(
            hidden_size,
            intermediate_size,
            num_experts=num_experts,
            names=expert_names,
            activation=activation,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, H] to [T, H], and the router's logits [T, E] if they are kept."""
        logits = self.gate(x)
        expert_ids, weights = route(logits, self.experts_per_token, normalize_weights=self.normalize_weights)
        y = self.experts(x, expert_ids, weights)
        return y, logits if self.keeps_router_logits else None

    def extra_repr(self) -> str:
        return f"experts_per_token={self.experts_per_token}, normalize_weights={self.normalize_weights}"


def route(logits: Tensor, experts_per_token: int, *, normalize_weights: bool) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, from the router's logits [T, E].

    Returns: [T, k] int64, and [T, k] in the dtype of the logits, differentiable; the softmax is taken in float32.
    """
    weights, expert_ids = torch.topk(_probabilities(logits), experts_per_token, dim=-1)
    if normalize_weights:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return expert_ids, weights.to(logits.dtype)


def load_balancing_loss(router_logits: Sequence[Tensor], *, experts_per_token: int) -> Tensor:
    """How unevenly the tokens spread over the experts: E * sum_e f_e P_e, which is k when they spread evenly.

    f_e is the number of choices of expert e for each token, P_e the mean of its probability; both over the tokens of
    all layers together, and only P has a gradient.

    Args:
        router_logits: [T, E] of each sparse layer; at least one.
    Returns: 0-dim float32.
    Source: Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6.
    """
    choices, probabilities = [], []
    for logits in router_logits:
        p = _probabilities(logits)
        expert_ids = torch.topk(p.detach(), experts_per_token, dim=-1).indices
        # Counting by sums of zeros and ones needs neither atomic adds nor a wait for the GPU.
        choices.append(torch.zeros_like(p).scatter_(1, expert_ids, 1.0).sum(0))
        probabilities.append(p.sum(0))
    rows = sum(len(logits) for logits in router_logits)
    num_experts = router_logits[0].shape[1]
    f, p = torch.stack(choices).sum(0) / rows, torch.stack(probabilities).sum(0) / rows
    return num_experts * torch.sum(f * p)


def _probabilities(logits: Tensor) -> Tensor:
    """Softmax over the experts, in float32 or what is wider."""
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _swap_names(experts: nn.Module, state: dict[str, Any], prefix: str, *unused: object) -> None:
    """Swap the first two parts of every name below `prefix`."""
    for key in [key for key in state if key.startswith(prefix)]:
        first, _, rest = key.removeprefix(prefix).partition(".")
        second, dot, last = rest.partition(".")
        value = state.pop(key)
        state[f"{prefix}{second}.{first}{dot}{last}" if second else key] = value
