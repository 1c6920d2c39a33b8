"""First factors of an adapter: drawn, or taken from the weight that it adapts.

    W  base weight [out, in], float32    A  [r, in]    B  [out, r]    s  scaling    q(.)  NF4 and back

    PiSSA   W = U S V^T;  B = U_r (S_r / s)^(1/2),  A = (S_r / s)^(1/2) V_r^T;    base: W - s B A
    OLoRA   W = Q R;      B = the first r columns of Q,  A = the first r rows of R;    base: W - s B A
    LoftQ   (B_0, A_0) = 0;  s B_i A_i = the best rank r for W - q(W - s B_(i-1) A_(i-1)),  split as in PiSSA;
            base: q(W - s B_(n-1) A_(n-1)),  which after one iteration is q(W)

With W from float32 or 16-bit files these are PEFT's factors. Only of LoftQ does PEFT leave out s, so that its adapter
makes up for the quantisation where lora_alpha is r alone; here it does so at every scaling.

Sources: Meng et al. 2024, arXiv:2404.02948; Buyukakyuz 2024, arXiv:2406.01775; Li et al. 2023, arXiv:2310.08659.
"""

import math

import torch
from torch import Tensor, nn

from slothcore.kernels import nf4, nf4_eager
from slothcore.kernels.nf4_tensor import Nf4Tensor
from slothcore.lora.init_names import check_init, power_iterations

Factors = tuple[Tensor, Tensor]


def draw_factors(lora_A: Tensor, lora_B: Tensor, init_lora_weights: bool | str) -> None:
    """Fill A [.., r, in] and B [.., out, r] in place with random numbers, from the same distributions as PEFT.

    Raises: ValueError if `init_lora_weights` is none of `DRAWN`, or the rank is odd and it is "orthogonal".
    """
    check_init(init_lora_weights)
    if init_lora_weights == "orthogonal":
        pairs = zip(lora_A, lora_B, strict=True) if lora_A.dim() == 3 else [(lora_A, lora_B)]
        for A, B in pairs:
            _draw_orthogonal(A, B)
        return
    if init_lora_weights == "gaussian":
        nn.init.normal_(lora_A, std=1 / lora_A.shape[-2])
    else:
        assert isinstance(init_lora_weights, bool)
        # Flat, because a stack's bound depends on the inputs of one expert.
        nn.init.kaiming_uniform_(lora_A.flatten(0, -2), a=math.sqrt(5))
    if init_lora_weights is False:
        nn.init.kaiming_uniform_(lora_B.flatten(0, -2), a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_B)


def _draw_orthogonal(lora_A: Tensor, lora_B: Tensor) -> None:
    """A = (X Q_odd)^T / 10, B = Y^T Q_even / 10 with random X, Y, and Q_odd, Q_even of one orthogonal matrix."""
    rank, in_features = lora_A.shape
    if rank % 2:
        raise ValueError(f"init_lora_weights orthogonal needs an even rank, got {rank}; choose another r")
    if lora_A.is_meta:
        return

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=torch.float32, device=lora_A.device)

    rotation, _ = torch.linalg.qr(draw(rank, rank))
    lora_A.copy_((draw(in_features, rank // 2) @ rotation[0::2]).T / 10)
    lora_B.copy_(draw(rank // 2, lora_B.shape[0]).T @ rotation[1::2] / 10)


def principal_factors(weight: Tensor, rank: int, scaling: float, *, iterations: int | None = None) -> Factors:
    """A and B with scaling * B A the best approximation of `weight` [out, in], float32.

    Args:
        iterations: of the randomised decomposition, which draws from torch's generator; None: the exact one.
    """
    if iterations is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, right = torch.svd_lowrank(weight, rank, niter=iterations)
        right = right.T
    root = (values[:rank] / scaling).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def orthonormal_factors(weight: Tensor, rank: int) -> Factors:
    """A and B of OLoRA for `weight` [out, in], float32."""
    left, right = torch.linalg.qr(weight)
    return right[:rank].contiguous(), left[:, :rank].contiguous()


def loftq_factors(
    weight: Tensor, quantised: Nf4Tensor, rank: int, scaling: float, *, iterations: int, dtype: torch.dtype
) -> tuple[Factors, Factors | None]:
    """A and B of LoftQ, in `dtype`, and what the base weight is to lose before it is quantised; None if nothing.

    Args:
        weight: [out, in] float32.
        quantised: the same in NF4.
    """
    ops = nf4 if weight.is_cuda else nf4_eager
    taken: Factors | None = None
    while True:
        lost = weight - ops.nf4_dequantize(quantised, dtype=torch.float32)
        lora_A, lora_B = (factor.to(dtype) for factor in principal_factors(lost, rank, scaling))
        iterations -= 1
        if iterations == 0:
            return (lora_A, lora_B), taken
        taken = lora_A, lora_B
        quantised = ops.nf4_quantize(without(weight, taken, scaling), double_quant=quantised.nested_absmax is not None)


def factors_of_weight(weight: Tensor, rank: int, scaling: float, init: str, *, dtype: torch.dtype) -> Factors:
    """A and B of PiSSA or OLoRA in `dtype`, for `weight` [out, in] float32."""
    if init == "olora":
        lora_A, lora_B = orthonormal_factors(weight, rank)
    else:
        lora_A, lora_B = principal_factors(weight, rank, scaling, iterations=power_iterations(init))
    return lora_A.to(dtype), lora_B.to(dtype)


def without(weight: Tensor, taken: Factors, scaling: float) -> Tensor:
    """W - scaling * B A in float32, [out, in]."""
    lora_A, lora_B = (factor.to(weight.device, torch.float32) for factor in taken)
    return weight.float() - scaling * lora_B @ lora_A
