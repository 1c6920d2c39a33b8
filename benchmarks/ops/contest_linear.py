"""Contests of linears: NF4 with LoRA at few rows and at many, and the table of paths by rows and shape."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from bitsandbytes import matmul_4bit
from torch import Tensor

from benchmarks.ops.case import nf4_tensor, quantize_by_bitsandbytes
from benchmarks.ops.contest import (
    OWN,
    Contest,
    Entry,
    copies_beyond_cache,
    faster_than,
    plain,
    rotating,
    share_of_floor,
    times_of,
)
from benchmarks.shapes import OpShape
from slothcore.autograd.lora import Projection, lora_fused
from slothcore.autograd.lora_group import Group
from slothcore.autograd.lora_projection import decoded_beside_products, decodes_in_kernel, project
from slothcore.kernels import lora_gemm, lora_gemm_eager, nf4, nf4_eager, nf4_few, nf4_gemm, nf4_gemm_group
from slothcore.kernels.nf4_few_eager import Terms
from slothcore.kernels.nf4_tensor import Nf4Tensor

RANK = 16
BARE = "bare product"
TWO_STEP = "decode, product, LoRA"
IN_PRODUCT, BY_CUBLAS, BY_KERNEL = "in product", "decode + cuBLAS", "decode + own GEMM"
BESIDE = "decode beside"
FEW_ROWS = (1, 16, 64, 512)
FEW_ROWS_SCORES = {
    1: share_of_floor("few rows, 1"),
    16: faster_than("few rows, 16 and 64", TWO_STEP),
    64: faster_than("few rows, 16 and 64", TWO_STEP),
    512: times_of("few rows, 512", BARE),
}


def few_rows_contests(
    shape: OpShape, dtype: torch.dtype, device: str, *, rows: Sequence[int] = FEW_ROWS
) -> Iterator[Callable[[], Contest]]:
    """y = x W^T + u B^T with W in NF4, by rows, of three linears. u = x A^T is given to all alike."""
    for out_features, in_features in (
        (shape.hidden_size, shape.hidden_size),
        (shape.intermediate_size, shape.hidden_size),
        (shape.hidden_size, shape.intermediate_size),
    ):
        for count in rows:
            if count <= shape.tokens:
                yield partial(few_rows, count, out_features, in_features, dtype, device)


def few_rows(rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: str) -> Contest:
    x, u, B, weights, packed_shape, state, dense = operands(rows, out_features, in_features, dtype, device)

    def two_step(weight: Nf4Tensor) -> Tensor:
        return (x @ bnb.dequantize_4bit(weight.packed.view(packed_shape), state).T).addmm_(u, B.T)

    def by_bitsandbytes(weight: Nf4Tensor) -> Tensor:
        return matmul_4bit(x, weight.packed.view(packed_shape), state).addmm_(u, B.T)

    entries = {
        OWN: plain(rotating(lambda weight: chosen(x, weight, u, B), weights)),
        TWO_STEP: plain(rotating(two_step, weights)),
        # Whatever it does for as many rows; newer versions decode inside the product too.
        "bitsandbytes": plain(rotating(by_bitsandbytes, weights)),
        # Its result lacks the LoRA term, so the term is added where results are compared.
        BARE: Entry(rotating(lambda weight: x @ weight.T, dense), lambda: [(x @ dense[0].T).addmm_(u, B.T)]),
    }
    floats = dtype.itemsize * (x.numel() + u.numel() + B.numel() + rows * out_features)
    return Contest(
        "NF4 + LoRA product",
        f"{rows} of {out_features}x{in_features}",
        entries,
        lambda: [F.linear(x.float(), dense[0].float()) + F.linear(u.float(), B.float())],
        bytes=weights[0].nbytes + floats,
        flops=2 * rows * out_features * in_features,
        scores=(FEW_ROWS_SCORES[rows],),
    )


def operands(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, list[Nf4Tensor], torch.Size, bnb.QuantState, list[Tensor]]:
    """x, u, B, the weight and its copies in NF4 with what bitsandbytes needs, and the same dense."""

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*size, device=device)).to(dtype)

    packed, state = quantize_by_bitsandbytes(normal(out_features, in_features, std=in_features**-0.5))
    weight = nf4_tensor(packed, state)
    dense = bnb.dequantize_4bit(packed, state)
    weights = [weight]
    weights += [replace(weight, packed=weight.packed.clone()) for _ in range(copies_beyond_cache(weight.nbytes) - 1)]
    copies = [dense, *(dense.clone() for _ in range(copies_beyond_cache(dense.nbytes) - 1))]
    B = normal(out_features, RANK, std=0.1)
    return normal(rows, in_features), normal(rows, RANK), B, weights, packed.shape, state, copies


def chosen(x: Tensor, weight: Nf4Tensor, u: Tensor, B: Tensor) -> Tensor:
    """The product by the path that the library takes for as many rows where nothing needs a gradient."""
    if nf4_few.takes(x, [weight], [None], [B], [None]):
        return nf4_few.linear(x, [weight], Terms(u, [B], [1.0], [None]))
    return project(x, u, group_of(weight), B, None)


def group_of(weight: Nf4Tensor) -> Group:
    return Group.of([Projection(weight=weight)])


def linear_shapes(shape: OpShape) -> dict[str, tuple[int, tuple[int, ...]]]:
    """The linears of a layer as they are multiplied: in_features, and the out_features that lie side by side."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size
    return {
        "qkv": (hidden, (queries, keys, keys)),
        "o": (queries, (hidden,)),
        "gate_up": (hidden, (inner, inner)),
        "down": (inner, (hidden,)),
    }


def many_rows_contests(
    shape: OpShape, dtype: torch.dtype, device: str, *, rows: Sequence[int]
) -> Iterator[Callable[[], Contest]]:
    """The whole LoRA linear over NF4, forward and dX, against a bare product with the dense weight."""
    for count in rows:
        for name, (in_features, outs) in linear_shapes(shape).items():
            for backward in (False, True):
                yield partial(many_rows, name, count, in_features, outs, dtype, device, backward=backward)


def many_rows(
    name: str,
    rows: int,
    in_features: int,
    outs: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    *,
    backward: bool,
) -> Contest:
    """`lora_fused` whole: x A^T, the factors packed, the weights decoded, the product; dX without dA and dB."""

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(*size, device=device)

    x = normal(rows, in_features).to(dtype).requires_grad_()
    dy = normal(rows, sum(outs)).to(dtype)
    projections, denses = [], []
    for out_features in outs:
        packed, state = quantize_by_bitsandbytes(normal(out_features, in_features, std=in_features**-0.5).to(dtype))
        denses.append(bnb.dequantize_4bit(packed, state))
        # In backward, factors that train would have their gradients computed too.
        lora_A = normal(RANK, in_features, std=in_features**-0.5).requires_grad_(not backward)
        lora_B = normal(out_features, RANK, std=0.1).requires_grad_(not backward)
        projections.append(Projection(weight=nf4_tensor(packed, state), lora_A=lora_A, lora_B=lora_B))
    dense = torch.cat(denses)
    del denses
    output = lora_fused(x, projections) if backward else None

    def own() -> Tensor:
        if output is None:
            return lora_fused(x, projections)
        return torch.autograd.grad(output, x, dy, retain_graph=True)[0]

    def terms() -> Tensor:
        """The LoRA terms alone, in the result's shape."""
        pieces = []
        with torch.no_grad():
            for projection, upstream in zip(projections, dy.split(outs, dim=1), strict=True):
                A, B = projection.lora_A, projection.lora_B
                assert A is not None
                assert B is not None
                pieces.append(upstream.float() @ B @ A if backward else x.float() @ A.T @ B.T)
        return torch.stack(pieces).sum(0) if backward else torch.cat(pieces, dim=1)

    def bare() -> Tensor:
        return torch.mm(dy, dense) if backward else torch.mm(x.detach(), dense.T)

    def exact() -> Tensor:
        left = dy.float() if backward else x.detach().float()
        return left @ (dense.float() if backward else dense.float().T) + terms()

    way = "dX" if backward else "forward"
    return Contest(
        f"NF4 + LoRA linear, {way}",
        f"{rows} of {name} {sum(outs)}x{in_features}",
        {OWN: plain(own), BARE: Entry(bare, lambda: [bare().float() + terms()])},
        lambda: [exact()],
        flops=2 * rows * sum(outs) * in_features,
        # Rows other than those of a target are for trying.
        scores=(times_of(f"linear, {rows}", BARE),) if rows in (2048, 8192) else (),
    )


def path_contests(
    shape: OpShape, dtype: torch.dtype, device: str, *, rows: Sequence[int]
) -> Iterator[tuple[str, int, Callable[[], tuple[Contest, str]]]]:
    """Every path at every number of rows: the linear's name, the rows, and what makes the contest of the paths."""
    for name, (in_features, outs) in linear_shapes(shape).items():
        for count in rows:
            yield name, count, partial(paths, name, count, sum(outs), in_features, dtype, device)


def paths(
    name: str, rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: str
) -> tuple[Contest, str]:
    """One product by each path, none of them own or peer; and the path that the library takes."""
    x, u, B, weights, _, _, dense = operands(rows, out_features, in_features, dtype, device)

    def decoded(weight: Nf4Tensor, path: lora_gemm.Tile | Literal["matmul"]) -> Tensor:
        if x.is_cuda:
            return lora_gemm.linear_add(x, nf4.nf4_dequantize(weight, dtype=dtype), lora_x=u, lora_B=B, _path=path)
        return lora_gemm_eager.linear_add(x, nf4_eager.nf4_dequantize(weight, dtype=dtype), lora_x=u, lora_B=B)

    entries = {
        IN_PRODUCT: plain(rotating(lambda weight: nf4_gemm.nf4_linear(x, weight, lora_x=u, lora_B=B), weights)),
        BY_CUBLAS: plain(rotating(lambda weight: decoded(weight, "matmul"), weights)),
        BY_KERNEL: plain(rotating(lambda weight: decoded(weight, lora_gemm.HOPPER_TILE), weights)),
    }
    if nf4_gemm_group.can_take(x, weights[:1], (u, B), backward=False):
        entries[BESIDE] = plain(
            rotating(lambda weight: nf4_gemm_group.nf4_linear_group(x, [weight], lora_x=u, lora_B=B), weights)
        )
    made = Contest(
        f"paths, {name}",
        f"{rows} of {out_features}x{in_features}",
        entries,
        lambda: [F.linear(x.float(), dense[0].float()) + F.linear(u.float(), B.float())],
    )
    return made, chosen_path(x, weights[0])


def chosen_path(x: Tensor, weight: Nf4Tensor) -> str:
    """How the library multiplies x by this weight."""
    if decoded_beside_products(x, group_of(weight), (), backward=False) is not None:
        return BESIDE
    if decodes_in_kernel(x, group_of(weight)):
        return IN_PRODUCT
    if not x.is_cuda:
        return BY_CUBLAS
    properties = torch.cuda.get_device_properties(x.device)
    tile = lora_gemm.choose_tile(
        x.shape[0],
        weight.shape[0],
        dtype=x.dtype,
        capability_major=properties.major,
        multiprocessors=properties.multi_processor_count,
    )
    return BY_CUBLAS if tile is None else BY_KERNEL
