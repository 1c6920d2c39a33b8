"""LoRA on every family against transformers + PEFT: gradients, and adapters handed over in both directions."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from slothcore.lora.adapter_io import adapter_state, load_adapter, save_adapter
from slothcore.lora.attach import add_lora
from slothcore.models.checkpoint import save_pretrained
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from tests.lora.reference import peft_parameters
from tests.models.zoo import ALL_VARIANTS, LONG, Variant, quantize_as_bitsandbytes, saved, tiny_model, token_ids
from tests.numerics import relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*belong to no text model"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
LOGITS_TOLERANCE, LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-5, 1e-4


@pytest.fixture(params=ALL_VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


def text_model(variant: Variant, folder: Path) -> PreTrainedModel:
    """The reference that is in the folder afterwards: a text model, also of a multimodal variant.

    The latter is written by slothcore from what it read, since PEFT's names of a multimodal model's modules are others.
    """
    reference = tiny_model(variant)
    saved(reference, folder)
    if not variant.is_multimodal:
        return reference
    ours = load_model(folder, bits=32, device="cpu")
    save_pretrained(ours.state_dict().items(), folder, hf_config=ours.hf_config)
    text = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert type(text).__name__ == "Gemma3ForCausalLM"
    assert torch.equal(text(token_ids(1, 9)).logits, reference(token_ids(1, 9)).logits)
    return text


def with_peft(reference: PreTrainedModel, variant: Variant) -> PeftModel:
    """A PEFT adapter on the family's own target names, whose every factor is random."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(variant.target_modules), task_type="CAUSAL_LM")
    model = get_peft_model(reference, config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in peft_parameters(model).values():
            parameter.normal_(0.0, 0.2, generator=generator)
    return model


def assert_same_logits(ours: Decoder, reference: nn.Module) -> None:
    with torch.no_grad():
        expected = reference(input_ids=token_ids(2, LONG)).logits
        assert (ours(token_ids(2, LONG)).logits - expected).abs().max() < LOGITS_TOLERANCE


@pytest.mark.parametrize("bits", [32, 4])
def test_lora_gradients(variant: Variant, bits: int, tmp_path: Path) -> None:
    """Of every factor, the loss beside them; on 4 bits PEFT's base has the values that bitsandbytes decodes."""
    reference = text_model(variant, tmp_path / "base")
    if bits == 4:
        quantize_as_bitsandbytes(reference)
    peft_model = with_peft(reference, variant)
    peft_model.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "base", bits=bits, device="cpu")
    load_adapter(ours, tmp_path / "adapter")

    input_ids = token_ids(2, LONG)
    labels = input_ids.masked_fill(torch.arange(LONG) % 7 == 3, -100)
    expected_loss, loss = peft_model(input_ids=input_ids, labels=labels).loss, ours(input_ids, labels=labels).loss
    assert abs(loss - expected_loss) < LOSS_TOLERANCE
    expected_loss.backward()
    loss.backward()
    expected, actual = peft_parameters(peft_model), adapter_state(ours)
    assert actual.keys() == expected.keys()
    targets = ours.config.num_hidden_layers * len(variant.target_modules)
    assert len(expected) == 2 * targets, "PEFT took other modules than the variant means"
    for name, parameter in expected.items():
        assert parameter.grad.norm() > 1e-6, f"{name} gets no gradient"
        assert relative_error(actual[name].grad, parameter.grad) < GRADIENT_TOLERANCE, name


def test_adapter_of_peft(variant: Variant, tmp_path: Path) -> None:
    """Saved by PEFT, loaded by slothcore: the same logits, which the base alone does not give."""
    peft_model = with_peft(text_model(variant, tmp_path / "base"), variant)
    peft_model.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "base", bits=32, device="cpu")
    with torch.no_grad():
        base = ours(token_ids(2, LONG)).logits
    load_adapter(ours, tmp_path / "adapter")
    assert_same_logits(ours, peft_model)
    with torch.no_grad():
        assert (ours(token_ids(2, LONG)).logits - base).abs().max() > 100 * LOGITS_TOLERANCE


def test_adapter_for_peft(variant: Variant, tmp_path: Path) -> None:
    """Added and saved by slothcore to all linears, which are those that PEFT's users name, and loaded by PEFT.

    PEFT turns the adapters of experts into others; they have tests of their own.
    """
    reference = text_model(variant, tmp_path / "base")
    ours = load_model(tmp_path / "base", bits=32, device="cpu")
    targets = variant.target_modules if variant.has_experts else "all-linear"
    add_lora(ours, r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    assert set(variant.target_modules) <= {name.split(".")[-3] for name in adapter_state(ours)}
    save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(reference, str(tmp_path / "adapter"), is_trainable=True).eval()
    assert peft_parameters(theirs).keys() == adapter_state(ours).keys()
    assert_same_logits(ours.eval(), theirs)
