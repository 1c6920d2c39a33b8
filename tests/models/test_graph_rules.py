"""Which passes are replayed and which are not, and what becomes of graphs when the model changes or a capture fails."""

import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from slothcore.kernels.nf4_eager import nf4_quantize
from slothcore.models.decoder import Decoder
from tests.models.graph_models import LENGTHS, Batch, batch, enable, error, loss_of, step, tiny, trained
from tests.models.zoo import ALL_VARIANTS


def test_a_larger_bucket_is_captured_into_new_memory() -> None:
    model = tiny()
    graphs = enable(model)
    small, large = batch([60]), batch([200])
    for data in (small, small, large, large):
        step(model, data)
    assert graphs.captures == 2
    step(model, small)  # anew, at once: it was seen before
    step(model, large)
    assert (graphs.captures, graphs.padded, graphs.replays) == (3, 2, 4)


def test_a_pass_under_way_is_not_overwritten() -> None:
    """Two losses that wait for their backward pass: the second is run by Python, and both have their gradients."""
    plain, model = tiny(), tiny()
    graphs = enable(model)
    one, two = batch(LENGTHS[0]), batch(LENGTHS[2])
    step(model, one)
    step(model, two)
    step(model, two)
    plain.zero_grad()
    model.zero_grad()
    (loss_of(plain, one) + loss_of(plain, two)).backward()
    before = graphs.padded
    (loss_of(model, one) + loss_of(model, two)).backward()
    assert graphs.padded == before + 1
    assert error([p.grad for p in trained(model)], [p.grad for p in trained(plain)]) <= 1e-12


def test_a_loss_without_backward_blocks_nothing() -> None:
    model = tiny()
    graphs = enable(model)
    data = batch(LENGTHS[0])
    expected = step(model, data)
    step(model, data)
    loss = loss_of(model, data)
    assert torch.equal(loss.detach(), expected[0])
    del loss
    gc.collect()
    before = graphs.replays
    assert all(map(torch.equal, step(model, data), expected))
    assert graphs.replays == before + 1
    # Nor does a loss whose backward pass is over, however long it is kept.
    kept = loss_of(model, data)
    kept.backward()
    assert all(map(torch.equal, step(model, data), expected))
    assert graphs.replays == before + 3


def test_a_second_backward_pass_is_refused() -> None:
    model = tiny()
    enable(model)
    for _ in range(3):
        loss = loss_of(model, batch(LENGTHS[0]))
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="twice for one pass"):
            loss.backward()


def test_gradients_that_are_there_are_kept() -> None:
    model = tiny()
    enable(model)
    data = batch(LENGTHS[0])
    expected = step(model, data)[1:]
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        foreign = trained(model)[::2]
        for parameter in foreign:
            parameter.grad = torch.full_like(parameter, 0.5)
        loss_of(model, data).backward()
        for parameter, gradient in zip(trained(model), expected, strict=True):
            was = 0.5 if any(parameter is other for other in foreign) else 0.0
            assert torch.equal(parameter.grad, was + gradient)


def test_eager_passes_between_replays_add_to_the_same_gradients() -> None:
    plain, model = tiny(), tiny()
    graphs = enable(model, max_tokens=128)
    short, long = batch([100]), batch([200])
    step(model, short)
    for order in ([short, long], [long, short]):
        plain.zero_grad()
        model.zero_grad()
        for data in order:
            loss_of(plain, data).backward()
            loss_of(model, data).backward()
        assert error([p.grad for p in trained(model)], [p.grad for p in trained(plain)]) <= 1e-12
    assert (graphs.eager, graphs.replays) == (2, 2)
    assert "200 tokens" in graphs.why_not(model_inputs(long))


def model_inputs(data: Batch) -> Any:
    ids, labels, boundaries = data
    return tiny().pack(ids, labels=labels, cu_seqlens=boundaries)


def evaluation(model: Decoder) -> None:
    model.eval()


def dropout(model: Decoder) -> None:
    model.model.layers[1].self_attn.q_proj.lora_dropout = 0.1


def offloading(model: Decoder) -> None:
    model.gradient_checkpointing = "offload"


def embedding_trains(model: Decoder) -> None:
    model.model.embed_tokens.weight.requires_grad_(True)


def nothing_trains(model: Decoder) -> None:
    model.model.requires_grad_(False)
    model.lm_head.requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (evaluation, "outside training"),
        (dropout, "dropout"),
        (offloading, "offload"),
        (embedding_trains, "embed_tokens.weight trains"),
        (nothing_trains, "nothing in the layers trains"),
    ],
)
def test_what_cannot_be_replayed_runs_as_before(change: Callable[[Decoder], None], reason: str) -> None:
    plain, model = tiny(), tiny()
    graphs = enable(model)
    data = batch(LENGTHS[0])
    step(model, data)
    step(model, data)
    assert graphs.replays == 1
    results = []
    for each in (plain, model):
        change(each)
        each.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        loss = loss_of(each, data)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in trained(each))])
    assert all(map(torch.equal, results[1], results[0]))
    assert (graphs.replays, graphs.eager) == (1, 1)
    assert reason in graphs.reason


def test_passes_without_loss_or_gradients_run_as_before() -> None:
    plain, model = tiny(), tiny()
    graphs = enable(model)
    ids, _, boundaries = data = batch(LENGTHS[0])
    with torch.no_grad():
        assert torch.equal(loss_of(model, data), loss_of(plain, data))
    assert "outside training" in graphs.reason
    assert torch.equal(model(ids, cu_seqlens=boundaries).logits, plain(ids, cu_seqlens=boundaries).logits)
    assert "without labels" in graphs.reason
    assert "meta already" in graphs.why_not(replace(model_inputs(data), input_ids=ids.to("meta")))
    with torch.autocast("cpu"):
        assert "autocast" in graphs.why_not(model_inputs(data))
    assert graphs.why_not(model_inputs(data)) is None


def test_the_balance_of_experts_keeps_a_model_from_graphs() -> None:
    variant = next(v for v in ALL_VARIANTS if str(v) == "mixtral-windows-and-balance")
    plain, model = tiny(variant), tiny(variant)
    graphs = enable(model)
    for _ in range(3):
        assert all(map(torch.equal, step(model, batch(LENGTHS[0])), step(plain, batch(LENGTHS[0]))))
    assert (graphs.eager, graphs.flat) == (3, None)
    assert "auxiliary loss" in graphs.why_not()


def test_a_model_on_the_cpu_runs_as_before() -> None:
    plain, model = tiny(), tiny()
    model.enable_graphs(max_tokens=256)
    for _ in range(3):
        assert all(map(torch.equal, step(model, batch(LENGTHS[0])), step(plain, batch(LENGTHS[0]))))
    assert "the model is on cpu" in model.graphs.why_not()
    assert (model.graphs.eager, model.graphs.flat) == (3, None)
    model.disable_graphs()
    assert model.graphs is None
    with pytest.raises(ValueError, match="max_tokens"):
        model.enable_graphs(max_tokens=0)


def rescaled(model: Decoder) -> None:
    model.model.layers[0].mlp.up_proj.lora_scaling = 0.7


def requantised(model: Decoder) -> None:
    layer = model.model.layers[0].mlp.down_proj
    layer.set_nf4(nf4_quantize(layer.weight.detach().float()))


def moved(model: Decoder) -> None:
    weight = model.model.layers[1].input_layernorm.weight
    weight.data = 1.5 * weight.data


def frozen(model: Decoder) -> None:
    model.model.layers[0].self_attn.v_proj.lora_A.requires_grad_(False)


def detached(model: Decoder) -> None:
    model.model.layers[0].self_attn.k_proj.detach_lora()


def recomputing(model: Decoder) -> None:
    model.gradient_checkpointing = True


def new_factors(model: Decoder) -> None:
    layer = model.model.layers[0].self_attn.o_proj
    torch.manual_seed(4)
    layer.attach_lora(torch.randn(4, 32).double(), torch.randn(32, 4).double(), scaling=0.5)


def keeping_decoded(model: Decoder) -> None:
    requantised(model)
    step(model, batch(LENGTHS[0]))
    step(model, batch(LENGTHS[0]))
    model.model.layers[0].mlp.down_proj.keep_decoded(torch.float64)


CHANGES = [rescaled, requantised, moved, frozen, detached, recomputing, new_factors, keeping_decoded]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_captured_anew(change: Callable[[Decoder], None]) -> None:
    plain, model = tiny(), tiny()
    graphs = enable(model)
    data = batch(LENGTHS[0])
    step(model, data)
    step(model, data)
    change(plain)
    change(model)
    padded, replays, captures = graphs.padded, graphs.replays, graphs.captures
    for _ in range(3):
        assert error(step(model, data), step(plain, data)) <= 1e-12
    assert (graphs.padded, graphs.replays, graphs.captures) == (padded + 1, replays + 2, captures + 1)


def test_a_step_of_the_optimizer_is_no_change() -> None:
    model = tiny()
    graphs = enable(model)
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    for _ in range(5):
        step(model, batch(LENGTHS[0]))
        optimizer.step()
        model.eval()
        with torch.no_grad():
            loss_of(model, batch(LENGTHS[1]))
        model.train()
    assert (graphs.padded, graphs.replays, graphs.captures, graphs.eager) == (1, 4, 1, 5)


def test_recording_may_run_the_function_itself() -> None:
    """As a capture runs its Python once, and a replay runs none."""

    def at_once(function: Callable[[], None]) -> Callable[[], None]:
        function()
        return function

    plain, model = tiny(), tiny()
    model.gradient_checkpointing = True
    graphs = enable(model, at_once)
    for lengths in (LENGTHS[0], LENGTHS[0], LENGTHS[1], LENGTHS[1], LENGTHS[0]):
        assert error(step(model, batch(lengths)), step(plain, batch(lengths))) <= 1e-12
    assert (graphs.padded, graphs.replays, graphs.captures) == (2, 3, 2)


def test_a_failed_capture_is_said_once_and_changes_nothing() -> None:
    def unable(function: Callable[[], None]) -> Callable[[], None]:
        function()
        raise RuntimeError("operation not permitted\nand a long trace")

    plain, model = tiny(), tiny()
    graphs = enable(model, unable)
    data = batch(LENGTHS[0])
    step(model, data)
    with pytest.warns(UserWarning, match=r"256 tokens cannot be captured as a CUDA graph \(operation not permitted\)"):
        actual = step(model, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lengths in (LENGTHS[0], LENGTHS[1], LENGTHS[1]):
            assert error(step(model, batch(lengths)), step(plain, batch(lengths))) <= 1e-12
    assert error(actual, step(plain, data)) <= 1e-12
    assert (graphs.padded, graphs.replays, graphs.captures) == (5, 0, 0)


def test_a_pass_that_raises_leaves_the_parameters_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    enable(model)
    data = batch(LENGTHS[0])
    expected, parameters = step(model, data), list(map(id, trained(model)))
    mlp = model.model.layers[1].mlp
    with monkeypatch.context() as broken:
        broken.setattr(mlp, "forward", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(model, data)
    assert list(map(id, trained(model))) == parameters
    assert all(isinstance(parameter, nn.Parameter) for parameter in trained(model))
    assert all(map(torch.equal, step(model, data), expected))


def test_passes_leave_the_parameters_own_autograd_alone() -> None:
    """A hook on a parameter's gradient node fires in plain passes; no padded or replayed pass reaches it."""
    model = tiny()
    graphs = enable(model)
    parameter, fired = trained(model)[0], []
    parameter.register_post_accumulate_grad_hook(fired.append)
    for _ in range(3):
        step(model, batch(LENGTHS[0]))
    assert (graphs.padded, graphs.replays, len(fired)) == (1, 2, 0)
    model.disable_graphs()
    step(model, batch(LENGTHS[0]))
    assert len(fired) == 1
