"""Head dimensions that fill no tile, one key head for many queries, partial rotation, and what must stay untouched."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from slothcore.kernels import qk_norm, qk_norm_eager
from tests.numerics import assert_as_accurate_as_eager, widened

QWEN = {"weight_offset": 0.0, "cast_before_weight": True}
GEMMA = {"weight_offset": 1.0, "cast_before_weight": False}
RULES = pytest.mark.parametrize("rule", [QWEN, GEMMA], ids=["qwen", "gemma"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
EPS = 1e-5

# (tokens, query heads, key heads, head_dim, rotated channels)
ODD_SHAPES = [(1, 2, 1, 64, 64), (7, 3, 1, 80, 80), (33, 4, 2, 20, 20), (2, 9, 3, 96, 72), (5, 1, 1, 6, 2)]


def make_inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str, *, passing: int | None = None
) -> dict[str, Tensor]:
    """Heads of very different size, so that an error in one head's scale cannot hide behind another's."""
    num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim = shape
    heads = num_heads + num_kv_heads + (num_kv_heads if passing is None else passing)
    head_scale = torch.logspace(-2, 1, num_tokens * heads, device=device).view(num_tokens, heads, 1)
    angles = torch.rand(num_tokens, rotary_dim // 2, device=device) * 6.3
    tensors = {
        "qkv": head_scale * torch.randn(num_tokens, heads, head_dim, device=device),
        "q_weight": 1 + 0.3 * torch.randn(head_dim, device=device),
        "k_weight": 1 + 0.3 * torch.randn(head_dim, device=device),
        "grad": torch.randn(num_tokens, heads, head_dim, device=device),
    }
    return {name: t.to(dtype) for name, t in tensors.items()} | {"cos": angles.cos(), "sin": angles.sin()}


def forward(ops: ModuleType, t: dict[str, Tensor], rule: dict, num_heads: int, num_kv_heads: int) -> dict[str, Tensor]:
    names = ("qkv", "q_weight", "k_weight", "cos", "sin")
    y, rstd = ops.qk_norm_forward(
        *(t[name] for name in names), num_heads=num_heads, num_kv_heads=num_kv_heads, eps=EPS, **rule
    )
    assert y.is_contiguous()
    assert torch.equal(y[:, num_heads + num_kv_heads :], t["qkv"][:, num_heads + num_kv_heads :])
    return {"y": y, "rstd": rstd}


def backward(ops: ModuleType, t: dict[str, Tensor], rule: dict, num_heads: int, num_kv_heads: int) -> dict[str, Tensor]:
    """Backward from the exact deviations. dx is split, for a query's gradient may hide an error in a key's."""
    normed = num_heads + num_kv_heads
    rstd = (t["qkv"][:, :normed].double().square().mean(-1) + EPS).rsqrt()
    rstd = rstd if t["qkv"].dtype == torch.float64 else rstd.float()
    grad = t["grad"].clone(memory_format=torch.preserve_format)
    dx, dw = ops.qk_norm_backward_(
        grad,
        *(t[name] for name in ("qkv", "q_weight", "k_weight")),
        rstd,
        t["cos"],
        t["sin"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        weight_grad=True,
        **rule,
    )
    assert dx is grad
    assert torch.equal(dx[:, normed:], t["grad"][:, normed:])
    # The size of a head's gradient is that of r, which spans orders of magnitude here.
    dx = dx[:, :normed] / rstd[..., None].to(dx.dtype)
    return {"dq": dx[:, :num_heads], "dk": dx[:, num_heads:], "dq_weight": dw[0], "dk_weight": dw[1]}


def check_against_eager(t: dict[str, Tensor], rule: dict, num_heads: int, num_kv_heads: int) -> None:
    exact_inputs = dict(zip(t, widened(*t.values()), strict=True))
    for run in (forward, backward):
        fused, eager, exact = (
            run(ops, inputs, rule, num_heads, num_kv_heads)
            for ops, inputs in ((qk_norm, t), (qk_norm_eager, t), (qk_norm_eager, exact_inputs))
        )
        for name in fused:
            assert fused[name].dtype == eager[name].dtype
            assert eager[name].isfinite().all(), f"{name}: eager overflows, so that anything would pass"
            assert_as_accurate_as_eager(fused[name], eager[name], exact[name], what=name)


@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_matches_eager(shape: tuple, dtype: torch.dtype, rule: dict, kernel_device: str) -> None:
    check_against_eager(make_inputs(shape, dtype, kernel_device), rule, *shape[1:3])


@pytest.mark.parametrize("passing", [0, 5])
def test_any_number_of_heads_may_pass(passing: int, kernel_device: str) -> None:
    shape = (3, 3, 2, 16, 16)
    check_against_eager(make_inputs(shape, torch.float32, kernel_device, passing=passing), QWEN, 3, 2)


@RULES
def test_rounds_where_eager_does(rule: dict, kernel_device: str) -> None:
    """A rounding left out or moved would change a third of the results' last digit, and dw by a 16-bit error."""
    t = make_inputs((16, 3, 2, 80, 48), torch.float16, kernel_device)
    fused, eager = (forward(ops, t, rule, 3, 2)["y"] for ops in (qk_norm, qk_norm_eager))
    assert (fused == eager).float().mean() > 0.99
    # Eager also rounds between the rotation and the norm; without a rotation there is nothing to round.
    t |= {"cos": torch.ones_like(t["cos"]), "sin": torch.zeros_like(t["sin"])}
    fused, eager = (backward(ops, t, rule, 3, 2) for ops in (qk_norm, qk_norm_eager))
    for name in ("dq", "dk"):
        assert (fused[name] == eager[name]).float().mean() > 0.99
    for name in ("dq_weight", "dk_weight"):
        torch.testing.assert_close(fused[name], eager[name], rtol=1e-5, atol=1e-5)


@DTYPES
@pytest.mark.parametrize("rotary_dim", [16, 12], ids=["whole", "partial"])
def test_eager_is_the_composition_of_transformers(rotary_dim: int, dtype: torch.dtype) -> None:
    """The norms to the last bit; the rotation in float32, which transformers does in the working dtype."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    t = make_inputs((9, 4, 2, 16, rotary_dim), dtype, "cpu")
    cos, sin = t["cos"].repeat(1, 2), t["sin"].repeat(1, 2)
    for norm, rule in ((Qwen3RMSNorm, QWEN), (Gemma3RMSNorm, GEMMA)):
        q_norm, k_norm = norm(16, eps=EPS), norm(16, eps=EPS)
        q_norm.weight.data, k_norm.weight.data = t["q_weight"], t["k_weight"]
        queries, keys = q_norm(t["qkv"][:, :4]), k_norm(t["qkv"][:, 4:6])
        expected = torch.cat(apply_rotary_pos_emb(queries.float(), keys.float(), cos, sin), dim=1).to(dtype)
        assert torch.equal(forward(qk_norm_eager, t, rule, 4, 2)["y"][:, :6], expected)


def test_strides_do_not_matter(kernel_device: str) -> None:
    """Rows and heads may lie anywhere; a strided last dimension is copied, but not in the gradient to overwrite."""
    t = make_inputs((7, 3, 2, 20, 16), torch.float32, kernel_device)
    table = torch.cat([t["cos"], t["sin"]], dim=1)
    strided = {
        "qkv": torch.cat([t["grad"], t["qkv"], t["grad"]], dim=2)[..., 20:40],
        "q_weight": torch.stack([t["q_weight"], t["k_weight"]], dim=1)[:, 0],
        "k_weight": torch.stack([t["q_weight"], t["k_weight"]], dim=1)[:, 1],
        "grad": t["grad"].transpose(0, 1).contiguous().transpose(0, 1),
        "cos": table[:, :8],
        "sin": table[:, 8:],
    }
    for run in (forward, backward):
        expected = run(qk_norm, t, QWEN, 3, 2)
        for qkv in (strided["qkv"], t["qkv"].permute(2, 1, 0).contiguous().permute(2, 1, 0)):
            for name, actual in run(qk_norm, strided | {"qkv": qkv}, QWEN, 3, 2).items():
                torch.testing.assert_close(actual, expected[name], rtol=5e-6, atol=5e-6)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("num_tokens", [1, 7, 10, 33])
def test_weight_gradient_over_several_tokens_a_program(
    num_tokens: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four programs share the tokens, evenly or not; of seven and of ten tokens the last has none or few left."""
    monkeypatch.setattr(qk_norm, "REDUCTION_PROGRAMS", 4)
    t = make_inputs((num_tokens, 3, 2, 24, 24), torch.float32, kernel_device)
    check_against_eager(t, QWEN, 3, 2)
    first, second = (backward(qk_norm, t, QWEN, 3, 2) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("ops", [qk_norm, qk_norm_eager], ids=["fused", "eager"])
def test_frozen_weights_get_no_gradient(ops: ModuleType, kernel_device: str) -> None:
    t = make_inputs((3, 2, 1, 8, 8), torch.float32, kernel_device)
    options = {"num_heads": 2, "num_kv_heads": 1}
    y, rstd = ops.qk_norm_forward(t["qkv"], t["q_weight"], t["k_weight"], t["cos"], t["sin"], eps=EPS, **options)
    _, dw = ops.qk_norm_backward_(
        torch.ones_like(y), t["qkv"], t["q_weight"], t["k_weight"], rstd, t["cos"], t["sin"], **options
    )
    assert dw is None


def test_shapes_that_do_not_fit_are_refused(kernel_device: str) -> None:
    t = make_inputs((3, 2, 1, 8, 8), torch.float32, kernel_device)
    with pytest.raises(AssertionError, match="5 heads to norm, 4 in all"):
        forward(qk_norm, t, QWEN, 3, 2)
    with pytest.raises(AssertionError, match="angles for 8 channels, heads of 6"):
        forward(qk_norm, t | {name: t[name][..., :6] for name in ("qkv", "q_weight", "k_weight")}, QWEN, 2, 1)


@pytest.mark.gpu
@DTYPES
@RULES
@pytest.mark.parametrize(
    "shape",
    [
        (8192, 32, 8, 128, 128),
        (8192, 16, 8, 256, 256),
        (8192, 4, 1, 256, 256),
        (1, 32, 8, 128, 128),
        (33, 64, 4, 128, 96),
        (2049, 14, 2, 64, 64),
        (2049, 32, 32, 96, 72),
        (2049, 10, 5, 80, 80),
    ],
    ids=str,
)
@pytest.mark.usefixtures("nan_filled_empty")
def test_matches_eager_at_real_sizes(shape: tuple, rule: dict, dtype: torch.dtype) -> None:
    check_against_eager(make_inputs(shape, dtype, "cuda"), rule, *shape[1:3])


@pytest.mark.gpu
@pytest.mark.parametrize("strides", [(2**30, 64, 1), (64, 2**30, 1)], ids=["tokens", "heads"])
def test_offsets_beyond_32_bits(strides: tuple[int, int, int]) -> None:
    """The last of four tokens, or of four heads, starts at element 3 * 2^30."""
    t = make_inputs((4, 2, 1, 64, 64), torch.float16, "cuda")
    expected = forward(qk_norm, t, QWEN, 2, 1) | backward(qk_norm, t, QWEN, 2, 1)

    def far(x: Tensor) -> Tensor:
        memory = torch.empty(3 * 2**30 + 256, dtype=x.dtype, device="cuda")
        return memory.as_strided(x.shape, strides).copy_(x)

    actual = forward(qk_norm, t | {"qkv": far(t["qkv"])}, QWEN, 2, 1)
    actual |= backward(qk_norm, t | {"qkv": far(t["qkv"])}, QWEN, 2, 1)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
