"""Rows for new tokens: where they start, beside transformers' resizing, and that nothing else moves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slothcore.kernels import nf4_eager
from slothcore.lora.attach import add_lora
from slothcore.models.checkpoint import save_pretrained
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config, load_model
from slothcore.models.vocabulary import mean_row, resize_vocabulary, start_rows, vocabulary_tables
from tests.models.tiny import saved, tiny_llama, token_ids

TABLES = "model.embed_tokens.weight", "lm_head.weight"
OLD, NEW = 97, 101
GEMMA2 = {
    "model_type": "gemma2",
    "vocab_size": OLD,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "query_pre_attn_scalar": 8,
    "final_logit_softcapping": 5.0,
    "initializer_range": 0.3,
}


def table(model: nn.Module, name: str) -> torch.Tensor:
    return dict(model.named_parameters(remove_duplicate=False))[name].detach()


def untied(**options: Any) -> Decoder:
    torch.manual_seed(3)
    return from_config({**GEMMA2, "tie_word_embeddings": False, **options}, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_those_of_transformers_but_for_its_noise(tmp_path: Path, tied: bool) -> None:
    reference = tiny_llama(tie_word_embeddings=tied)
    ours = load_model(saved(reference, tmp_path), bits=32, device="cpu")
    assert start_rows(ours, range(OLD, NEW)) == NEW - OLD
    spread = {name: table(reference, name).std().item() for name in TABLES}
    reference.resize_token_embeddings(NEW)
    for name in TABLES:
        mine, theirs = table(ours, name), table(reference, name)
        assert mine.shape == theirs.shape == (NEW, 32)
        assert torch.equal(mine[:OLD], theirs[:OLD])
        # Their noise has a deviation of sqrt(1e-9) times that of the rows.
        assert (mine[OLD:] - theirs[OLD:]).abs().max() < 6 * 1e-9**0.5 * spread[name]
    assert ours.has_tied_head == tied
    assert ours.config.vocab_size == ours.hf_config["vocab_size"] == ours.lm_head.out_features == NEW
    assert ours.model.embed_tokens.num_embeddings == NEW
    assert ours.new_token_ids == tuple(range(OLD, NEW))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [32, 4])
def test_old_tokens_are_scored_as_before(tmp_path: Path, bits: int, tied: bool) -> None:
    """Of a Gemma 2, whose embedding is scaled and whose scores are capped: to the last bit."""
    source = untied(tie_word_embeddings=tied)
    save_pretrained(source.state_dict().items(), tmp_path, hf_config=source.hf_config)
    model = load_model(tmp_path, bits=bits, dtype=torch.float32, device="cpu")
    ids = token_ids(1, 12)
    with torch.no_grad():
        before = model(ids).logits
        start_rows(model, range(OLD, NEW))
        after = model(ids).logits
        assert after.shape[-1] == NEW
        assert (after[..., :OLD] - before).abs().max() <= 1e-6
        # An average row scores as the average of the scores does, before the cap.
        uncapped = 5.0 * torch.atanh(before.double() / 5.0)
        mean = 5.0 * torch.tanh(uncapped.mean(-1, keepdim=True) / 5.0)
        assert (after[..., OLD:].double() - mean).abs().max() < 1e-4
        # And it is read as the average token is: the scale is applied to it as to any row.
        read = model.model.embed_tokens(torch.tensor([OLD]))
    assert torch.allclose(read[0], table(source, TABLES[0]).mean(0), atol=1e-6)


def test_a_padded_vocabulary_has_room(tmp_path: Path) -> None:
    """Rows that no token had are started like new ones; the tables stay, and the mean is that of the rows in use."""
    ours = untied()
    before = {name: table(ours, name).clone() for name in TABLES}
    assert start_rows(ours, [90, 91]) == 0
    assert ours.config.vocab_size == OLD
    for name in TABLES:
        after = table(ours, name)
        assert torch.equal(after[[*range(90), *range(92, OLD)]], before[name][[*range(90), *range(92, OLD)]])
        assert torch.allclose(after[90:92], before[name][:90].mean(0).expand(2, -1), atol=1e-7)
    assert ours.vocabulary_changed
    # Some in the padding and some behind it.
    assert start_rows(ours, [95, 96, 97, 98]) == 2
    for name in TABLES:
        assert torch.allclose(table(ours, name)[95:], table(ours, name)[:95].mean(0).expand(4, -1), atol=1e-7)
    assert ours.new_token_ids == (90, 91, 95, 96, 97, 98)


def test_the_mean_is_summed_in_float64_part_by_part() -> None:
    rows = 1e-3 + 1e-6 * torch.randn(9001, 3)
    assert torch.allclose(mean_row(rows), rows.double().mean(0), rtol=1e-12, atol=0)
    rows = rows.bfloat16()
    assert torch.allclose(mean_row(rows), rows.double().mean(0), rtol=1e-12, atol=0)
    assert mean_row(torch.empty(0, 3)).tolist() == [0, 0, 0]


def test_a_head_in_nf4_becomes_dense() -> None:
    """Nothing loads a head so, but one may be put there; it keeps the values that it computed with."""
    model = untied(hidden_size=64)
    model.lm_head.set_nf4(nf4_eager.nf4_quantize(model.lm_head.weight.detach()))
    decoded = model.lm_head.dequantized(torch.float32)
    start_rows(model, [OLD])
    assert not model.lm_head.is_nf4
    assert not model.lm_head.weight.requires_grad
    assert torch.equal(model.lm_head.weight[:OLD], decoded)
    assert torch.allclose(model.lm_head.weight[OLD], decoded.mean(0), atol=1e-7)
    assert vocabulary_tables(model) == TABLES


def test_what_trains_goes_on_training() -> None:
    model = add_lora(untied(), r=2, modules_to_save=["embed_tokens"])
    start_rows(model, [OLD])
    assert model.model.embed_tokens.weight.requires_grad
    assert not model.lm_head.weight.requires_grad
    ids = torch.tensor([[OLD, 1, 2]])
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[OLD].abs().max() > 0


def test_what_cannot_be_is_refused() -> None:
    model = untied()
    with pytest.raises(ValueError, match="has 97 rows and cannot shrink to 96"):
        resize_vocabulary(model, 96)
    add_lora(model, r=2, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="LoRA term of the old size; add tokens before add_lora"):
        start_rows(model, [OLD])
    assert table(model, TABLES[0]).shape[0] == OLD


def test_a_whole_model_is_saved_with_its_rows(tmp_path: Path) -> None:
    model = load_model(saved(tiny_llama(tie_word_embeddings=True), tmp_path / "base"), bits=32, device="cpu")
    start_rows(model, [OLD, OLD + 1])
    save_pretrained(model.state_dict().items(), tmp_path / "grown", hf_config=model.hf_config)
    again = load_model(tmp_path / "grown", bits=32, device="cpu")
    assert again.config.vocab_size == OLD + 2
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype=torch.float32)
    assert torch.equal(theirs.get_output_embeddings().weight, model.lm_head.weight)
