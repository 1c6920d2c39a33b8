"""The routed feed-forward: hand-derived gradients, their error beside plain torch's, dropout, and what is kept."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from slothcore.autograd import expert_projection, experts
from slothcore.autograd.experts import ExpertProjection, expert_mlp
from tests.autograd.expert_reference import Projections, leaves, mlp, plain_expert_mlp, widened_projection
from tests.numerics import assert_as_accurate_as_eager

HIDDEN, WIDTH = 4, 5
# For each token the experts that it chooses, of 4: some idle, one busy; one token; all to one; one choice only.
ROUTES = {
    "mixed": [[0, 1], [3, 0], [0, 3], [1, 0], [3, 1]],
    "one token": [[2, 0]],
    "all to one": [[1], [1], [1]],
    "one each": [[3], [2], [1], [0]],
}


def routed(
    ids: list[list[int]], hidden: int = HIDDEN, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """x, expert_ids and expert_weights; x and the weights get gradients."""
    expert_ids = torch.tensor(ids)
    x = torch.randn(expert_ids.shape[0], hidden).to(dtype).requires_grad_()
    return x, expert_ids, torch.rand(expert_ids.shape).add(0.1).to(dtype).requires_grad_()


def check_gradients(x: Tensor, ids: Tensor, weights: Tensor, projections: Projections, activation: str = "silu"):
    """gradcheck over all that gets a gradient, with the same dropout masks in each evaluation."""

    def seeded(*_: Tensor) -> Tensor:
        torch.manual_seed(3)
        return expert_mlp(x, ids, weights, *projections, activation=activation, inplace=False)

    assert gradcheck(seeded, leaves((x, weights), projections))


VARIANTS = {
    "frozen": {},
    "LoRA": {"ranks": (2, 3, 2), "scaling": 0.5},
    "LoRA of gate": {"ranks": (2, 0, 0)},
    "LoRA of down": {"ranks": (0, 0, 2), "scaling": 2.0},
    "dropout": {"ranks": (2, 1, 3), "scaling": 0.7, "dropout": 0.4},
    "dense experts that train": {"trainable": True},
    "all": {"ranks": (2, 2, 2), "dropout": 0.3, "trainable": True},
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str, route: str) -> None:
    check_gradients(*routed(ROUTES[route]), mlp(4, HIDDEN, WIDTH, **VARIANTS[variant]))


def test_gradcheck_of_the_other_activation() -> None:
    check_gradients(*routed(ROUTES["mixed"]), mlp(4, HIDDEN, WIDTH, (2, 2, 2)), activation="gelu_pytorch_tanh")


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("trained", [(i, name) for i in range(3) for name in ("weight", "lora_A", "lora_B")])
def test_gradcheck_of_one_tensor_alone(trained: tuple[int, str], dropout: float) -> None:
    """Whatever else is frozen, nothing that this gradient needs is left out; x and the router are frozen too."""
    index, name = trained
    projections = mlp(4, HIDDEN, WIDTH, (2, 2, 2), scaling=0.5, dropout=dropout, trainable=True)
    for i, p in enumerate(projections):
        for other in ("weight", "lora_A", "lora_B"):
            getattr(p, other).requires_grad_((i, other) == (index, name))
    x, ids, weights = routed(ROUTES["mixed"])
    check_gradients(x.detach(), ids, weights.detach(), projections)


@pytest.mark.parametrize("frozen", ["x", "weights"])
def test_gradcheck_with_frozen_inputs(frozen: str) -> None:
    x, ids, weights = routed(ROUTES["mixed"])
    (x if frozen == "x" else weights).requires_grad_(False)
    check_gradients(x, ids, weights, mlp(4, HIDDEN, WIDTH))


def check_against_plain(
    x: Tensor, ids: Tensor, weights: Tensor, projections: Projections, *, activation: str = "silu"
) -> None:
    """Output and every gradient are as near to float64 as those of plain torch in the same dtype."""
    wide_x, wide_weights = (t.detach().double().requires_grad_() for t in (x, weights))
    wide = [widened_projection(p, x.dtype) for p in projections]
    exact = plain_expert_mlp(wide_x, ids, wide_weights, wide, activation=activation)
    dy = torch.randn_like(exact).to(x.dtype)
    exact_grads = torch.autograd.grad(exact, leaves((wide_x, wide_weights), wide), dy.double())
    exact = exact.detach()
    del wide
    inputs = leaves((x, weights), projections)
    eager = plain_expert_mlp(x, ids, weights, projections, activation=activation)
    eager_grads = torch.autograd.grad(eager, inputs, dy)
    ours = expert_mlp(x, ids, weights, *projections, activation=activation)
    assert ours.dtype == x.dtype
    # The largest of float32's errors, a few roundings each, is luck: either side's may be twice the other's.
    factor = 3.0 if x.dtype == torch.float32 else 2.0
    assert_as_accurate_as_eager(ours, eager, exact, factor=factor, what="y")
    grads = torch.autograd.grad(ours, inputs, dy)
    for i, (leaf, mine, theirs, truth) in enumerate(zip(inputs, grads, eager_grads, exact_grads, strict=True)):
        assert mine.dtype == leaf.dtype
        what = f"gradient {i} of shape {tuple(leaf.shape)}"
        assert_as_accurate_as_eager(mine, theirs, truth, factor=factor, what=what)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_accurate_as_plain_torch(dtype: torch.dtype, factor_dtype: torch.dtype, bits: int) -> None:
    kind = {"dtype": dtype, "factor_dtype": factor_dtype, "bits": bits, "trainable": bits == 16}
    projections = mlp(6, 64, 96, (8, 4, 8), scaling=2.0, **kind)
    ids = torch.rand(33, 6).topk(2).indices.tolist()
    check_against_plain(*routed(ids, 64, dtype), projections)


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_agrees_with_plain_torch(route: str) -> None:
    check_against_plain(
        *routed(ROUTES[route], 64, torch.float32), mlp(4, 64, 64, (4, 4, 4), bits=4, dtype=torch.float32)
    )


def test_no_tokens() -> None:
    x, ids = torch.zeros(0, HIDDEN, requires_grad=True), torch.zeros(0, 2, dtype=torch.int64)
    projections = mlp(4, HIDDEN, WIDTH, (2, 2, 2), dtype=torch.float32)
    y = expert_mlp(x, ids, torch.zeros(0, 2), *projections, activation="silu")
    grads = torch.autograd.grad(y.sum(), leaves((x,), projections))
    assert y.shape == (0, HIDDEN)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_idle_experts_get_zero_gradients() -> None:
    projections = mlp(4, HIDDEN, WIDTH, (2, 2, 2), trainable=True)
    y = expert_mlp(*routed(ROUTES["all to one"]), *projections, activation="silu")
    for gradient in torch.autograd.grad(y.sum(), leaves((), projections)):
        assert (gradient[[0, 2, 3]] == 0).all()
        assert (gradient[1] != 0).any()


def test_dropout_hides_inputs_of_the_lora_term_only() -> None:
    """Zero factors leave the base alone; the mean over seeds is the map without dropout; seeds give other masks."""
    x, ids, weights = (t.detach() for t in routed(ROUTES["mixed"]))
    projections = mlp(4, HIDDEN, WIDTH, (0, 0, 2), dropout=0.5)

    def run(projections: Projections, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return expert_mlp(x, ids, weights, *projections, activation="silu")

    without = run([replace(p, dropout=0.0) for p in projections], 0)
    assert not torch.equal(run(projections, 1), run(projections, 2))
    assert torch.equal(run(projections, 1), run(projections, 1))
    mean = torch.stack([run(projections, seed) for seed in range(2000)]).mean(0)
    assert (mean - without).abs().max() < 0.1 * without.abs().max()
    silent = [replace(p, lora_B=None if p.lora_B is None else torch.zeros_like(p.lora_B)) for p in projections]
    base = [replace(p, lora_A=None, lora_B=None) for p in projections]
    assert torch.equal(run(silent, 1), run(base, 2))


def test_masks_of_gate_up_and_down_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    original = expert_projection.dropout_mask

    def record(like: Tensor, operands) -> Tensor:
        seeds.append(operands.seed)
        return original(like, operands)

    monkeypatch.setattr(expert_projection, "dropout_mask", record)
    projections = mlp(4, HIDDEN, WIDTH, (2, 2, 2), dropout=0.5)
    expert_mlp(*routed(ROUTES["mixed"]), *projections, activation="silu").sum().backward()
    forward, backward = seeds[:3], seeds[3:]
    assert len(set(forward)) == 3
    assert set(backward) == set(forward)


@pytest.mark.parametrize("factor_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scaling", [1.0, 0.7])
def test_a_scaled_factor_is_rounded_once(scaling: float, dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    """But for the rounding of the arithmetic itself, which is the wider dtype's."""
    factor = torch.randn(3, 40, 7).to(factor_dtype)
    scaled = expert_projection.scaled_factor(factor, scaling, dtype)
    exact = factor.double() * scaling
    wide = torch.promote_types(torch.promote_types(dtype, factor_dtype), torch.float32)
    once = torch.finfo(dtype).eps / 2 + torch.finfo(wide).eps
    assert scaled.dtype == dtype
    assert ((scaled.double() - exact).abs() <= once * exact.abs() + torch.finfo(dtype).smallest_normal).all()


def test_overwriting_refuses_a_second_backward() -> None:
    y = expert_mlp(*routed(ROUTES["mixed"]), *mlp(4, HIDDEN, WIDTH), activation="silu").sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def saved_shapes(x: Tensor, ids: Tensor, weights: Tensor, projections: Projections) -> list[tuple[int, ...]]:
    """Shapes of the floating-point tensors that the graph keeps."""
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        expert_mlp(x, ids, weights, *projections, activation="silu")
    return sorted(kept)


def test_nothing_needless_is_kept() -> None:
    x, ids, weights = routed(ROUTES["mixed"], 64, torch.float32)
    rows, kind = ids.numel(), {"bits": 4, "dtype": torch.float32}
    lora = mlp(4, 64, 64, (2, 2, 2), **kind)
    gate_up, factor, u = (rows, 128), (4, 2, 64), (rows, 2)
    assert saved_shapes(x, ids, weights, mlp(4, 64, 64, **kind)) == sorted([(5, 2), gate_up])
    expected = [tuple(x.shape), (5, 2), gate_up, *[factor] * 3, *[(4, 64, 2)] * 3, *[u] * 3]
    assert saved_shapes(x, ids, weights, lora) == sorted(expected)
    # Only the down projection trains: neither x nor a dense weight is needed.
    last = mlp(4, 64, 64, (0, 0, 2), dtype=torch.float32)
    kept = saved_shapes(x.detach(), ids, weights.detach(), last)
    assert kept == sorted([(5, 2), gate_up, (4, 64, 2), u])


def test_frozen_work_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    ops = expert_projection.grouped_gemm_eager

    def counted(name: str, function):
        def run(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return run

    for name in ("grouped_linear", "grouped_input_grad", "grouped_outer"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    x, ids, weights = routed(ROUTES["mixed"])
    y = expert_mlp(x, ids, weights, *mlp(4, HIDDEN, WIDTH), activation="silu")
    assert calls == ["grouped_linear"] * 3
    calls.clear()
    y.sum().backward()
    assert calls == ["grouped_input_grad"] * 3
    calls.clear()
    projections = mlp(4, HIDDEN, WIDTH, (0, 0, 2))
    expert_mlp(x.detach(), ids, weights.detach(), *projections, activation="silu").sum().backward()
    # Forward: three bases and one x A^T; backward: v, dA and dB, nothing that flows on.
    assert calls == ["grouped_linear"] * 4 + ["grouped_input_grad"] + ["grouped_outer"] * 2


def test_bad_input_is_refused() -> None:
    x, ids, weights = routed(ROUTES["mixed"])
    gate, up, down = mlp(4, HIDDEN, WIDTH)
    call = {"activation": "silu"}
    with pytest.raises(ValueError, match=r"\[tokens, features\] and \[tokens, choices\]"):
        expert_mlp(x[:3], ids, weights, gate, up, down, **call)
    with pytest.raises(ValueError, match=r"expert_weights must be torch.float64.*torch.float32"):
        expert_mlp(x, ids, weights.float(), gate, up, down, **call)
    with pytest.raises(ValueError, match="expert_ids must be integers"):
        expert_mlp(x, weights, weights, gate, up, down, **call)
    with pytest.raises(ValueError, match=r"down \[E, H, I\]; got"):
        expert_mlp(x, ids, weights, gate, up, up, **call)
    with pytest.raises(ValueError, match="cast x to the model's dtype"):
        expert_mlp(x.float(), ids, weights.float(), gate, up, down, **call)
    with pytest.raises(ValueError, match="both lora_A and lora_B"):
        ExpertProjection(gate.weight, lora_A=torch.zeros(4, 2, HIDDEN))
    with pytest.raises(ValueError, match=r"\[E, r, in\] and \[E, out, r\]"):
        ExpertProjection(gate.weight, torch.zeros(2, HIDDEN), torch.zeros(WIDTH, 2))
    with pytest.raises(ValueError, match=r"below 1, got 1\.0"):
        ExpertProjection(gate.weight, dropout=1.0)


# experts, k, hidden_size, intermediate_size: Qwen3-30B-A3B with fewer experts; Mixtral 8x7B also with a quarter of its
# intermediate_size, because the answer in float64 must fit beside (the products alone are tested at full width).
REAL_SHAPES = {"mixtral": (3, 2, 4096, 3584), "qwen3-30b-a3b": (16, 8, 2048, 768)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("model", REAL_SHAPES)
def test_gpu_as_accurate_as_plain_torch(nan_filled_empty, model: str, bits: int, dtype: torch.dtype) -> None:
    count, k, hidden, width = REAL_SHAPES[model]
    kind = {"dtype": dtype, "factor_dtype": torch.float32, "bits": bits, "device": "cuda"}
    projections = mlp(count, hidden, width, (16, 16, 16), scaling=2.0, **kind)
    ids = torch.rand(61, count, device="cuda").topk(k).indices
    x = torch.randn(61, hidden, device="cuda").to(dtype).requires_grad_()
    weights = torch.rand(61, k, device="cuda").softmax(-1).to(dtype).requires_grad_()
    check_against_plain(x, ids, weights, projections)


@pytest.mark.gpu
def test_gpu_trains_dense_experts(nan_filled_empty) -> None:
    projections = mlp(8, 512, 384, dtype=torch.bfloat16, device="cuda", trainable=True)
    ids = torch.rand(300, 8, device="cuda").topk(2).indices
    x = torch.randn(300, 512, device="cuda").bfloat16().requires_grad_()
    weights = torch.rand(300, 2, device="cuda").bfloat16().requires_grad_()
    check_against_plain(x, ids, weights, projections)


@pytest.mark.gpu
def test_gpu_gives_the_same_every_time_without_waiting_for_the_device() -> None:
    projections = mlp(16, 2048, 768, (8, 8, 8), dtype=torch.bfloat16, device="cuda", bits=4, dropout=0.1)
    ids = torch.rand(100, 16, device="cuda").topk(8).indices
    x = torch.randn(100, 2048, device="cuda").bfloat16().requires_grad_()
    weights = torch.rand(100, 8, device="cuda").bfloat16().requires_grad_()
    inputs, dy = leaves((x, weights), projections), torch.randn_like(x)

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        y = expert_mlp(x, ids, weights, *projections, activation="silu")
        return [y, *torch.autograd.grad(y, inputs, dy)]

    first = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert experts.ops_for(x) is expert_projection.grouped_gemm
