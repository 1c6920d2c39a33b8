"""The decoder against transformers, from the same files: logits, loss, every gradient, greedy tokens."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from tests.models.tiny import VARIANTS, saved, tiny_llama, token_ids
from tests.numerics import relative_error

LOGITS_TOLERANCE, LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-5, 1e-4


def quantize_as_bitsandbytes(model: LlamaForCausalLM) -> None:
    """Replace the weights that transformers would quantise by what bitsandbytes decodes from their NF4 codes."""
    from bitsandbytes import functional as bnb

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            # Blocks run over the flattened weight, so its shape is free; bitsandbytes' CPU decoder misreads rows that
            # are no multiple of a block.
            blocks = module.weight.data.reshape(-1, 64)
            packed, state = bnb.quantize_4bit(blocks, blocksize=64, quant_type="nf4", compress_statistics=True)
            module.weight.data = bnb.dequantize_4bit(packed, state).view_as(module.weight)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Decoder, LlamaForCausalLM]:
    reference = tiny_llama(**request.param)
    return load_model(saved(reference, tmp_path), bits=32, device="cpu"), reference


def assert_same_logits(ours: Decoder, reference: LlamaForCausalLM, *, length: int) -> None:
    input_ids = token_ids(2, length, vocab_size=ours.config.vocab_size)
    with torch.no_grad():
        expected = reference(input_ids).logits
        actual = ours(input_ids).logits
    assert expected.std() > 0.1, "the reference says nothing"
    assert (actual - expected).abs().max() < LOGITS_TOLERANCE


def assert_same_loss(ours: Decoder, reference: LlamaForCausalLM, *, length: int = 40) -> None:
    input_ids = token_ids(2, length, vocab_size=ours.config.vocab_size)
    labels = input_ids.clone()
    labels[0, :7] = -100
    labels[1, 20:33] = -100
    with torch.no_grad():
        expected = reference(input_ids, labels=labels).loss
        actual = ours(input_ids, labels=labels)
    assert actual.logits is None
    assert actual.num_targets == (length - 7) + (length - 1 - 13)
    assert abs(actual.loss - expected) < LOSS_TOLERANCE


def assert_same_greedy_tokens(ours: Decoder, reference: LlamaForCausalLM) -> None:
    prompt = token_ids(1, 6, vocab_size=ours.config.vocab_size)
    expected = reference.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    actual = ours.generate(prompt, max_new_tokens=64, eos_token_id=(), pad_token_id=0)
    assert actual.tolist() == expected.tolist()
    assert len(set(actual[0].tolist())) > 5, "a constant answer would prove little"


def test_logits(pair: tuple[Decoder, LlamaForCausalLM]) -> None:
    # 100 tokens: far beyond the original length that the llama3 variant names.
    assert_same_logits(*pair, length=100)


def test_loss(pair: tuple[Decoder, LlamaForCausalLM]) -> None:
    assert_same_loss(*pair)


def test_greedy_tokens(pair: tuple[Decoder, LlamaForCausalLM]) -> None:
    assert_same_greedy_tokens(*pair)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_every_gradient(pair: tuple[Decoder, LlamaForCausalLM], checkpointing: bool) -> None:
    ours, reference = pair
    input_ids = token_ids(2, 30)
    labels = input_ids.masked_fill(torch.arange(30) % 7 == 3, -100)
    reference(input_ids, labels=labels).loss.backward()
    ours.gradient_checkpointing = checkpointing
    ours(input_ids, labels=labels).loss.backward()

    expected = {name: weight.grad for name, weight in reference.named_parameters()}
    actual = {name: weight.grad for name, weight in ours.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-4, f"{name} gets no gradient"
        assert relative_error(actual[name], gradient) < GRADIENT_TOLERANCE, name


def test_user_positions(pair: tuple[Decoder, LlamaForCausalLM]) -> None:
    ours, reference = pair
    input_ids = token_ids(1, 20)
    position_ids = (torch.arange(20) * 3 + 11)[None]
    with torch.no_grad():
        expected = reference(input_ids, position_ids=position_ids).logits
        actual = ours(input_ids, position_ids=position_ids).logits
        default = ours(input_ids).logits
    assert (actual - expected).abs().max() < LOGITS_TOLERANCE
    assert (actual - default).abs().max() > 100 * LOGITS_TOLERANCE


@pytest.mark.parametrize("variant", ["grouped queries", "llama3 rope", "tied head", "biases"])
def test_nf4_against_bitsandbytes(variant: str, tmp_path: Path) -> None:
    reference = tiny_llama(**VARIANTS[variant])
    folder = saved(reference, tmp_path)
    ours = load_model(folder, bits=4, device="cpu")
    quantize_as_bitsandbytes(reference)
    assert_same_logits(ours, reference, length=60)
    assert_same_loss(ours, reference)
    assert_same_greedy_tokens(ours, reference)
    unquantized = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        distance = (unquantized(token_ids(1, 9)).logits - reference(token_ids(1, 9)).logits).abs().max()
    assert distance > 100 * LOGITS_TOLERANCE, "quantising changed nothing"


@pytest.mark.parametrize("bits", [32, 4])
def test_a_trained_model(shared_data: Path, bits: int) -> None:
    folder = shared_data / "models" / "babyllama-105"
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    ours = load_model(folder, bits=bits, device="cpu")
    if bits == 4:
        quantize_as_bitsandbytes(reference)
    assert_same_logits(ours, reference, length=100)
    assert_same_loss(ours, reference)
    assert_same_greedy_tokens(ours, reference)


def test_bfloat16_is_as_near_to_float32_as_transformers(tmp_path: Path) -> None:
    reference = tiny_llama()
    folder = saved(reference, tmp_path)
    input_ids = token_ids(2, 50)
    with torch.no_grad():
        exact = reference(input_ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(input_ids).logits
        ours = load_model(folder, bits=16, dtype=torch.bfloat16, device="cpu")(input_ids).logits
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()
