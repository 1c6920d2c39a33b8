"""A stream of documents against rows of padding: the same loss, gradients and logits, and no leak between documents."""

import pytest
import torch
from torch import Tensor

from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config
from tests.models.test_config import TINY
from tests.models.tiny import token_ids
from tests.numerics import relative_error

LENGTHS = (7, 1, 12, 4)


@pytest.fixture
def model() -> Decoder:
    return from_config({**TINY, "num_key_value_heads": 2, "initializer_range": 0.2}, device="cpu")


def packed_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids [T], labels [T] with some ignored, cu_seqlens."""
    ids = token_ids(sum(LENGTHS))
    labels = ids.masked_fill(torch.arange(len(ids)) % 5 == 2, -100)
    return ids, labels, torch.tensor([0, *LENGTHS]).cumsum(0).int()


def padded(values: Tensor, fill: int, side: str) -> Tensor:
    rows = []
    for document in values.split(LENGTHS):
        padding = torch.full((max(LENGTHS) - len(document),), fill)
        rows.append(torch.cat([padding, document] if side == "left" else [document, padding]))
    return torch.stack(rows)


def gradients(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_equals_padded(model: Decoder, side: str) -> None:
    ids, labels, cu_seqlens = packed_batch()
    packed = model(ids, labels=labels, cu_seqlens=cu_seqlens)
    packed_gradients = gradients(model, packed.loss)
    mask = padded(torch.ones_like(ids), 0, side)
    # Labels at padding are no targets even if the caller forgot to ignore them.
    batch = model(padded(ids, 3, side), labels=padded(labels, 3, side), attention_mask=mask)
    assert batch.num_targets == packed.num_targets
    assert abs(batch.loss - packed.loss) < 1e-6
    for name, gradient in gradients(model, batch.loss).items():
        assert relative_error(gradient, packed_gradients[name]) < 1e-6, name

    with torch.no_grad():
        logits = model(padded(ids, 3, side), attention_mask=mask).logits
        expected = model(ids, cu_seqlens=cu_seqlens).logits
    assert logits.shape == (len(LENGTHS), max(LENGTHS), 97)
    torch.testing.assert_close(logits[mask.bool()], expected, rtol=1e-5, atol=1e-5)
    assert (logits[mask == 0] == 0).all()


def test_packed_equals_one_by_one(model: Decoder) -> None:
    ids, labels, cu_seqlens = packed_batch()
    packed = model(ids, labels=labels, cu_seqlens=cu_seqlens)
    packed_gradients = gradients(model, packed.loss)
    model.zero_grad()
    targets = 0
    for document, document_labels in zip(ids.split(LENGTHS), labels.split(LENGTHS), strict=True):
        output = model(document, labels=document_labels, num_items=packed.num_targets)
        targets += output.num_targets
        output.loss.backward()
    assert targets == packed.num_targets
    for name, weight in model.named_parameters():
        assert relative_error(weight.grad, packed_gradients[name]) < 1e-5, name


def test_a_change_in_one_document_changes_no_gradient_of_another(model: Decoder) -> None:
    """With targets in the third document only, the tokens of the others must not matter to the last bit."""
    ids, labels, cu_seqlens = packed_batch()
    start, end = int(cu_seqlens[2]), int(cu_seqlens[3])
    only_third = torch.full_like(labels, -100)
    only_third[start:end] = ids[start:end]
    first = gradients(model, model(ids, labels=only_third, cu_seqlens=cu_seqlens).loss)

    changed = (ids + 1) % 97
    changed[start:end] = ids[start:end]
    second = gradients(model, model(changed, labels=only_third, cu_seqlens=cu_seqlens).loss)
    for name, gradient in first.items():
        if name != "model.embed_tokens.weight":
            assert gradient.any(), name
        assert torch.equal(second[name], gradient), name

    changed[end - 2] += 1
    third = gradients(model, model(changed % 97, labels=only_third, cu_seqlens=cu_seqlens).loss)
    assert not torch.equal(third["model.norm.weight"], first["model.norm.weight"])


def test_the_first_token_of_a_document_is_no_target(model: Decoder) -> None:
    ids, _, cu_seqlens = packed_batch()
    output = model(ids, labels=ids, cu_seqlens=cu_seqlens)
    assert output.num_targets == sum(LENGTHS) - len(LENGTHS)


def test_loss_is_a_sum_over_num_items(model: Decoder) -> None:
    ids, labels, cu_seqlens = packed_batch()
    model.requires_grad_(False)
    mean = model(ids, labels=labels, cu_seqlens=cu_seqlens)
    total = model(ids, labels=labels, cu_seqlens=cu_seqlens, num_items=1).loss
    assert float(total / mean.num_targets) == pytest.approx(float(mean.loss), rel=1e-6)
    as_tensor = model(ids, labels=labels, cu_seqlens=cu_seqlens, num_items=torch.tensor(2.0)).loss
    assert float(as_tensor) == pytest.approx(float(total / 2), rel=1e-6)


def test_a_batch_without_targets(model: Decoder) -> None:
    ids = token_ids(1, 5)
    labels = torch.full_like(ids, -100)
    with pytest.raises(ValueError, match="labels have no target"):
        model(ids, labels=labels)
    output = model(ids, labels=labels, num_items=8)
    assert (float(output.loss), output.num_targets) == (0.0, 0)
    output.loss.backward()


def test_positions_restart_in_each_document(model: Decoder) -> None:
    ids, _, cu_seqlens = packed_batch()
    restarting = torch.cat([torch.arange(length) for length in LENGTHS])
    with torch.no_grad():
        default = model(ids, cu_seqlens=cu_seqlens).logits
        given = model(ids, cu_seqlens=cu_seqlens, position_ids=restarting).logits
    assert torch.equal(given, default)


def test_a_head_with_an_adapter_gives_its_own_loss(model: Decoder) -> None:
    ids, labels, cu_seqlens = packed_batch()
    model.requires_grad_(False)
    plain = model(ids, labels=labels, cu_seqlens=cu_seqlens).loss
    model.lm_head.attach_lora(torch.randn(2, 32), torch.randn(97, 2) * 0.1, scaling=0.5)
    adapted = model(ids, labels=labels, cu_seqlens=cu_seqlens).loss
    weight = model.lm_head.weight + model.lm_head.delta_weight()
    model.lm_head.detach_lora()
    model.lm_head.set_dense(weight)
    merged = model(ids, labels=labels, cu_seqlens=cu_seqlens).loss
    assert abs(adapted - merged) < 1e-5
    assert abs(adapted - plain) > 1e-3


def test_dropout_is_the_same_in_the_second_run_of_a_layer(model: Decoder) -> None:
    model.requires_grad_(False)
    torch.manual_seed(1)
    for layer in model.model.layers:
        q_proj = layer.self_attn.q_proj
        q_proj.attach_lora(torch.randn(2, 32), torch.randn(32, 2), scaling=1.0, dropout=0.5)
    model.train()
    ids, labels, cu_seqlens = packed_batch()

    def lora_gradients(enabled: bool) -> list[Tensor]:
        model.gradient_checkpointing = enabled
        torch.manual_seed(2)
        model.zero_grad()
        model(ids, labels=labels, cu_seqlens=cu_seqlens).loss.backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]

    expected = lora_gradients(False)
    assert len(expected) == 4
    for actual, gradient in zip(lora_gradients(True), expected, strict=True):
        assert torch.equal(actual, gradient)


IDS = torch.ones(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS.float()}, "input_ids must be integers"),
        ({"input_ids": IDS[None]}, r"input_ids must be .* got shape \(1, 2, 6\)"),
        ({"input_ids": IDS[:, :0]}, "not empty"),
        ({"input_ids": IDS * 97}, r"input_ids must lie in 0\.\.96 .* got 97"),
        ({"input_ids": -IDS}, r"input_ids must lie in 0\.\.96 .* got -1"),
        ({"input_ids": IDS, "labels": IDS[:, :5]}, r"labels must have the shape of input_ids, \(2, 6\), got \(2, 5\)"),
        ({"input_ids": IDS, "labels": IDS * 97}, r"labels must lie in 0\.\.96 .* got 97"),
        ({"input_ids": IDS, "labels": IDS * -1}, r"labels must lie in 0\.\.96 .* got -1"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :5]}, "attention_mask must have the shape"),
        ({"input_ids": IDS[0], "attention_mask": IDS[0]}, "attention_mask must have the shape"),
        ({"input_ids": IDS, "attention_mask": IDS * 0}, "attention_mask row 0 has no token"),
        (
            {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 6, [1, 0, 1, 1, 1, 1]])},
            "attention_mask row 1 has padding between tokens",
        ),
        ({"input_ids": IDS, "position_ids": IDS[:, :5]}, "position_ids must have the shape"),
        ({"input_ids": IDS, "cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens must be one row"),
        ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must rise from 0 to .* 6"),
        ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([1, 6])}, "cu_seqlens must rise"),
        ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 4, 4, 6])}, "cu_seqlens must rise"),
        ({"input_ids": IDS[0], "cu_seqlens": torch.tensor([6])}, "cu_seqlens must rise"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_wrong_inputs(model: Decoder, arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**arguments)
