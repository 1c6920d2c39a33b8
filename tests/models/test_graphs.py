"""Passes that are replayed have the loss and the gradients of plain ones, whatever was captured before them."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from slothcore.layers.linear import Linear
from tests.models.graph_models import CHOSEN, LENGTHS, VARIANTS, batch, enable, error, loss_of, step, tiny, trained
from tests.models.zoo import Variant


@pytest.mark.parametrize("checkpointing", [False, True, "mlp"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_replays_have_the_loss_and_gradients_of_plain_passes(
    variant: Variant, checkpointing: Any, nan_filled_empty: None
) -> None:
    """First sight, capture, replay and another pass of the same bucket; what nobody writes is NaN and would show."""
    plain, model = tiny(variant), tiny(variant)
    plain.gradient_checkpointing = model.gradient_checkpointing = checkpointing
    vocab_size = plain.config.vocab_size - 3
    graphs = enable(model)
    batches = [batch(lengths, seed, vocab_size) for seed, lengths in enumerate(LENGTHS)]
    for number in (0, 0, 1, 0, 2, 3, 2, 0, 3, 1):
        expected = step(plain, batches[number])
        assert min(float(gradient.abs().max()) for gradient in expected) > 1e-12, "nothing to compare"
        assert error(step(model, batches[number]), expected) <= 1e-12
    # Buckets 256 and 128 were each seen once before; 0 and 2 and 3 share the first.
    assert (graphs.padded, graphs.replays, graphs.captures, graphs.eager) == (2, 8, 2, 0)


@pytest.mark.parametrize("checkpointing", [False, True, "mlp"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.has_experts], ids=str)
def test_replays_of_dora_follow_its_factors(variant: Variant, checkpointing: Any, nan_filled_empty: None) -> None:
    """Norms and scales are those of the factors as the optimizer has left them, not as they were at the capture."""
    plain, model = tiny(variant, use_dora=True), tiny(variant, use_dora=True)
    plain.gradient_checkpointing = model.gradient_checkpointing = checkpointing
    graphs = enable(model)
    optimizers = [torch.optim.SGD(trained(m), lr=1e-2) for m in (plain, model)]
    for number in (0, 0, 1, 0, 2, 2, 0, 1):
        data = batch(LENGTHS[number], number, plain.config.vocab_size - 3)
        expected = step(plain, data)
        assert min(float(gradient.abs().max()) for gradient in expected) > 1e-12, "nothing to compare"
        assert error(step(model, data), expected) <= 1e-10
        for optimizer in optimizers:
            optimizer.step()
    assert (graphs.padded, graphs.replays, graphs.captures, graphs.eager) == (2, 6, 2, 0)


def test_the_variants_are_there() -> None:
    assert {str(variant) for variant in VARIANTS} == CHOSEN
    assert not any(tiny(v).config.moe.use_aux_loss for v in VARIANTS if v.has_experts)


def test_micro_batches_of_several_buckets_add_up() -> None:
    plain, model = tiny(), tiny()
    graphs = enable(model)
    for _ in range(3):
        plain.zero_grad()
        model.zero_grad()
        for seed, lengths in enumerate(LENGTHS):
            loss_of(plain, batch(lengths, seed)).backward()
            (2 * loss_of(model, batch(lengths, seed))).backward()
        doubled = [2 * parameter.grad for parameter in trained(plain)]
        assert error([parameter.grad for parameter in trained(model)], doubled) <= 1e-12
    assert (graphs.padded, graphs.captures) == (2, 2)
    assert graphs.flat.is_attached()


def test_optimizer_steps_are_those_of_the_plain_loop() -> None:
    plain, model = tiny(), tiny()
    enable(model)
    optimizers = [torch.optim.AdamW(trained(m), lr=1e-2) for m in (plain, model)]
    start = [parameter.detach().clone() for parameter in trained(plain)]
    for number in range(6):
        losses = []
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            loss = loss_of(each, batch(LENGTHS[number % 3], number))
            loss.backward()
            losses.append(loss.detach())
            nn.utils.clip_grad_norm_(trained(each), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        assert error(losses[1:], losses[:1]) <= 1e-12
    assert error(trained(model), trained(plain)) <= 1e-10
    assert error(trained(model), start) > 1e-2, "the steps did nothing"


def test_numbers_do_not_depend_on_what_was_captured_before() -> None:
    """Bit for bit: fresh graphs, warm ones, a larger bucket in between, and none at all (a failed capture)."""

    def unable(function: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("no graphs today")

    fresh, warm, failing = tiny(), tiny(), tiny()
    enable(fresh), enable(warm)
    for lengths in ([20], [20], [300], [20], [300], LENGTHS[2], LENGTHS[0]):
        step(warm, batch(lengths))
    enable(failing, unable)
    for number in (0, 1, 2, 0, 1):
        expected = step(fresh, batch(LENGTHS[number], number))
        assert all(map(torch.equal, step(warm, batch(LENGTHS[number], number)), expected))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            actual = step(failing, batch(LENGTHS[number], number))
        assert all(map(torch.equal, actual, expected))
    assert failing.graphs.captures == failing.graphs.replays == 0


def test_a_head_that_trains_is_no_obstacle() -> None:
    plain, model = (tiny(modules_to_save=["lm_head"]) for _ in range(2))
    graphs = enable(model)
    for _ in range(3):
        assert error(step(model, batch(LENGTHS[0])), step(plain, batch(LENGTHS[0]))) <= 1e-12
    assert graphs.replays == 2
    assert not any(p is model.lm_head.weight for p in graphs.flat.parameters)


def test_a_head_with_an_adapter_is_no_obstacle() -> None:
    targets = ["q_proj", "down_proj", "lm_head"]
    plain, model = (tiny(target_modules=targets) for _ in range(2))
    assert isinstance(model.lm_head, Linear)
    assert model.lm_head.lora_A is not None
    graphs = enable(model)
    for _ in range(3):
        assert error(step(model, batch(LENGTHS[0])), step(plain, batch(LENGTHS[0]))) <= 1e-12
    assert graphs.replays == 2


def test_trained_biases_have_a_place_in_the_vectors() -> None:
    variant = next(v for v in VARIANTS if str(v) == "llama-biases")
    plain, model = (tiny(variant, bias="all") for _ in range(2))
    graphs = enable(model)
    for _ in range(3):
        assert error(step(model, batch(LENGTHS[0])), step(plain, batch(LENGTHS[0]))) <= 1e-12
    assert graphs.replays == 2
    assert any(parameter.dim() == 1 for parameter in graphs.flat.parameters)


def test_a_copy_of_the_model_has_graphs_of_its_own() -> None:
    model = tiny()
    enable(model)
    data = batch(LENGTHS[0])
    step(model, data)
    expected = step(model, data)
    twin = copy.deepcopy(model)
    assert (twin.graphs.max_tokens, twin.graphs.replays) == (512, 0)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.zero_()
    for _ in range(3):
        assert all(map(torch.equal, step(twin, data), expected))
    assert twin.graphs.replays == 2
    assert float(step(model, data)[0]) != float(expected[0])


def test_a_batch_of_rows_is_replayed_too() -> None:
    plain, model = tiny(), tiny()
    graphs = enable(model)
    ids = batch([60])[0].view(3, 20)
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    for _ in range(3):
        losses = []
        for each in (plain, model):
            output = each(ids, labels=ids, attention_mask=mask)
            output.loss.backward()
            losses.append(output.loss.detach())
            assert output.num_targets == 19 + 10 + 19
        assert error(losses[1:], losses[:1]) <= 1e-12
    assert graphs.replays == 2
    assert error([p.grad for p in trained(model)], [p.grad for p in trained(plain)]) <= 1e-12


def test_labels_without_a_target_are_refused_before_anything_runs() -> None:
    model = tiny()
    graphs = enable(model)
    ids, labels, _ = batch([30])
    with pytest.raises(ValueError, match="labels have no target"):
        model(ids, labels=torch.full_like(labels, -100))
    assert (graphs.padded, graphs.eager) == (0, 0)
    assert float(model(ids, labels=torch.full_like(labels, -100), num_items=3).loss) == 0.0
    assert graphs.padded == 1


@pytest.mark.parametrize("mode", ["", "MLP", "none", 1, 0, None, 1.0])
def test_gradient_checkpointing_names_its_choices(mode: Any) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r'must be False, True, "mlp" or "offload", got'):
        model.gradient_checkpointing = mode
    assert model.gradient_checkpointing is False


@pytest.mark.parametrize("mode", [False, True, "mlp", "offload"])
def test_gradient_checkpointing_changes_no_gradient(mode: Any) -> None:
    plain, model = tiny(), tiny()
    model.gradient_checkpointing = mode
    assert model.gradient_checkpointing == mode
    assert [layer.keep_gate_up for layer in model.model.layers] == [mode in (False, True)] * 2
    assert all(map(torch.equal, step(model, batch(LENGTHS[0])), step(plain, batch(LENGTHS[0]))))


def test_offloading_surrounds_every_layer_of_a_training_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    model.gradient_checkpointing = "offload"
    seen: list[int] = []
    offload = model.model._offload
    original = offload.layer
    monkeypatch.setattr(offload, "layer", lambda index: seen.append(index) or original(index))
    step(model, batch(LENGTHS[0]))
    assert seen == [0, 1]
    with torch.no_grad():
        loss_of(model, batch(LENGTHS[0]))
    assert seen == [0, 1]
