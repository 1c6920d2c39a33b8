"""One block of the decoder: what it keeps for the backward pass, and what it does not compute there."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, Phi3Config, Qwen3Config

import slothcore
from slothcore.autograd.rms_norm import Normed
from slothcore.layers.norm import RMSNorm
from slothcore.models import decoder_layer
from slothcore.models.decoder import Decoder
from tests.autograd.test_lora_memory import ProducedShapes
from tests.models.tiny import SIZES

# Widths that are all different: a shape then says what a tensor is.
WIDTHS = SIZES | {"hidden_size": 40, "intermediate_size": 56, "head_dim": 24, "pad_token_id": 0}
HIDDEN, TWICE_INNER, QKV, MIXED = 40, 112, 8 * 24, 4 * 24
CONFIGS = {"llama": LlamaConfig, "gemma2": Gemma2Config, "qwen3": Qwen3Config, "phi3": Phi3Config}
FAMILIES = pytest.mark.parametrize("family", CONFIGS)
TOKENS = 19


def model_of(family: str, *, dropout: float = 0.0, **options) -> Decoder:
    """Random weights, the norms' too, with an adapter on every linear map."""
    torch.manual_seed(0)
    # Phi-3 has no heads of their own width.
    widths = WIDTHS if family != "phi3" else WIDTHS | {"hidden_size": MIXED}
    model = slothcore.from_config(CONFIGS[family](**(widths | options)).to_dict(), device="cpu", dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.normal_(module.weight)
    return slothcore.add_lora(model, r=8, lora_dropout=dropout, init_lora_weights=False).train()


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """What autograd keeps of the forward passes inside."""
    tensors: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        yield tensors


def loss_of(model: Decoder) -> Tensor:
    ids = torch.randint(97, (TOKENS,), generator=torch.Generator().manual_seed(5))
    return model(ids, labels=ids).loss


@FAMILIES
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_no_output_of_a_norm_is_kept(family: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The projections keep the residual stream instead, which the norms keep anyway."""
    model = model_of(family, dropout=dropout)
    normed: list[Normed] = []

    def record(module: RMSNorm, inputs: tuple[Tensor, ...], output: Normed) -> None:
        normed.append(output)

    def recording(*args, **kwargs) -> Normed:
        normed.append(original(*args, **kwargs))
        return normed[-1]

    original = decoder_layer.norm_add_norm
    monkeypatch.setattr(decoder_layer, "norm_add_norm", recording)
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(record)
        layer.post_attention_layernorm.register_forward_hook(record)
    with kept() as tensors:
        loss_of(model)
    assert len(normed) == 2 * len(model.model.layers)
    memory = {t.untyped_storage().data_ptr() for t in tensors}
    for norm in normed:
        assert norm.h.untyped_storage().data_ptr() in memory
        assert norm.y.untyped_storage().data_ptr() not in memory


@FAMILIES
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gate_and_up_can_be_multiplied_again(family: str, dropout: float) -> None:
    """Loss and gradients keep their bits; gate and up are not kept."""
    model = model_of(family, dropout=dropout)
    results = []
    for keep in (True, False):
        for layer in model.model.layers:
            layer.keep_gate_up = keep
        model.zero_grad()
        torch.manual_seed(1)
        with kept() as tensors:
            loss = loss_of(model)
        assert any(t.shape == (TOKENS, TWICE_INNER) for t in tensors) == keep
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trainable"])
def test_the_first_layer_forms_no_gradient_for_a_frozen_embedding(trains: bool) -> None:
    """dX of q, k and v of the first layer is a product as large as theirs."""
    model = model_of("llama", num_hidden_layers=1)
    model.model.embed_tokens.weight.requires_grad_(trains)
    loss = loss_of(model)
    with ProducedShapes() as products:
        loss.backward()
    # One product for each map, and one for their LoRA term.
    of_gate_and_up, of_q_k_and_v = 3, 4
    assert products.shapes.count((TOKENS, HIDDEN)) == of_gate_and_up + (of_q_k_and_v if trains else 0)


def test_parts_work_without_the_norm_that_made_their_input() -> None:
    """A plain tensor is taken too, and gives the same."""
    model = model_of("llama")
    layer = model.model.layers[0]
    normed = layer.post_attention_layernorm(torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN))
    assert torch.equal(layer.mlp(normed), layer.mlp(normed.y))
