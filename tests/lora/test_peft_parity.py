"""Loss and every gradient of an adapter against transformers + PEFT, in float32 on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from slothcore.lora.adapter_io import adapter_state
from slothcore.lora.attach import add_lora
from slothcore.models.decoder import Decoder
from tests.lora.reference import (
    copy_adapter,
    load_pair,
    logits_of,
    make_batch,
    peft_parameters,
    randomise_zero_factors,
    reference_logits,
    write_tiny_llama,
)
from tests.numerics import relative_error

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

# Scaled within the 19 tokens of the batch.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all linears": ({}, {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
    "all linears, tied head": ({"tie_word_embeddings": True}, {"r": 8, "target_modules": "all-linear"}),
    "llama3 rope": ({"rope_parameters": LLAMA3_ROPE}, {"r": 8, "target_modules": "all-linear"}),
    "linear rope": ({"rope_parameters": LINEAR_ROPE}, {"r": 4, "target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "q and v only": ({}, {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}),
    "mlp only": ({}, {"r": 4, "target_modules": ["gate_proj", "down_proj"]}),
    "one layer by expression": ({}, {"r": 4, "target_modules": r".*\.1\.self_attn\.[qkvo]_proj"}),
    "head": ({}, {"r": 4, "target_modules": ["o_proj", "lm_head"]}),
    "rank-stabilised": ({}, {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"}),
    "DoRA": ({}, {"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": "all-linear"}),
    "DoRA, rank-stabilised, frozen biases": (
        {"attention_bias": True, "mlp_bias": True},
        {"r": 8, "use_dora": True, "use_rslora": True, "target_modules": "all-linear"},
    ),
    "DoRA, biases of targets": (
        {"attention_bias": True, "mlp_bias": True},
        {"r": 4, "use_dora": True, "bias": "lora_only", "target_modules": ["q_proj", "gate_proj", "down_proj"]},
    ),
    "DoRA of the head": ({}, {"r": 4, "use_dora": True, "target_modules": ["o_proj", "lm_head"]}),
    "DoRA, head trained whole": (
        {"tie_word_embeddings": True},
        {"r": 4, "use_dora": True, "modules_to_save": ["lm_head"], "target_modules": ["k_proj", "up_proj"]},
    ),
    "frozen biases": ({"attention_bias": True, "mlp_bias": True}, {"r": 4, "target_modules": "all-linear"}),
    "all biases": (
        {"attention_bias": True, "mlp_bias": True},
        {"r": 4, "bias": "all", "target_modules": ["q_proj", "v_proj"]},
    ),
    "biases of targets": (
        {"attention_bias": True, "mlp_bias": True},
        {"r": 4, "bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
    ),
    "head trained whole": ({}, {"r": 4, "modules_to_save": ["lm_head"], "target_modules": "all-linear"}),
    "tied head trained whole": (
        {"tie_word_embeddings": True},
        {"r": 4, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    ),
    "tied embedding trained whole": (
        {"tie_word_embeddings": True},
        {"r": 4, "modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    ),
    "norms and one linear trained whole": (
        {},
        {"r": 4, "modules_to_save": ["norm", "o_proj"], "target_modules": ["q_proj", "o_proj"]},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_tiny_llama(tmp_path: Path, name: str) -> None:
    model_options, options = CASES[name]
    compare(*load_pair(write_tiny_llama(tmp_path, **model_options)), options)


@pytest.mark.parametrize(
    "name",
    [
        *("all linears, tied head", "llama3 rope", "all biases", "head trained whole", "rank-stabilised"),
        *("DoRA", "DoRA, rank-stabilised, frozen biases", "DoRA, biases of targets"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_tiny_llama_in_nf4(tmp_path: Path, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    model_options, options = CASES[name]
    ours, reference = load_pair(write_tiny_llama(tmp_path, **model_options), bits=4)
    assert ours.model.layers[0].self_attn.q_proj.is_nf4
    compare(ours, reference, options)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("bits", [32, 4])
def test_a_trained_model(shared_data: Path, bits: int, use_dora: bool) -> None:
    ours, reference = load_pair(shared_data / "models" / "babyllama-105", bits=bits)
    compare(ours, reference, {"r": 8, "lora_alpha": 16, "use_dora": use_dora, "target_modules": "all-linear"})


def compare(ours: Decoder, reference: Any, options: dict[str, Any]) -> None:
    """The same adapter on both: what trains, the logits, the loss and each gradient."""
    add_lora(ours, init_lora_weights=False, **{"lora_alpha": 8, **options})
    randomise_zero_factors(ours)
    peft_model = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    copy_adapter(ours, peft_model)
    batch = make_batch(ours.config.vocab_size)
    assert (logits_of(ours, batch) - reference_logits(peft_model, batch)).abs().max() < 1e-4

    ours.train()
    peft_model.train()
    loss = ours(batch.input_ids, batch.labels, batch.attention_mask).loss
    expected = peft_model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert abs(loss.item() - expected.item()) < 1e-5
    loss.backward()
    expected.backward()

    trained = adapter_state(ours)
    for name, parameter in peft_parameters(peft_model).items():
        assert parameter.grad.norm() > 0
        assert trained[name].grad.shape == parameter.grad.shape
        error = relative_error(trained[name].grad, parameter.grad)
        assert error < 1e-4, f"{name}: relative error of the gradient {error:.2e}"
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


@pytest.mark.parametrize("use_dora", [False, True])
def test_three_optimizer_steps_stay_together(tmp_path: Path, use_dora: bool) -> None:
    """A first step from B = 0, then two from what it made."""
    ours, reference = load_pair(write_tiny_llama(tmp_path))
    options = {"r": 4, "lora_alpha": 8, "use_dora": use_dora, "target_modules": "all-linear"}
    add_lora(ours, **options)
    peft_model = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    theirs = {name: parameter.clone() for name, parameter in peft_parameters(peft_model).items()}
    for name, tensor in adapter_state(ours).items():
        if "magnitude" in name:
            torch.testing.assert_close(tensor, theirs[name], msg="magnitudes begin elsewhere")
    copy_adapter(ours, peft_model)
    batch = make_batch(ours.config.vocab_size)
    ours.train()
    peft_model.train()
    steps = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (ours, peft_model)]
    for _ in range(3):
        losses = [
            ours(batch.input_ids, batch.labels, batch.attention_mask).loss,
            peft_model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss,
        ]
        assert abs(losses[0].item() - losses[1].item()) < 1e-4
        for loss, optimizer in zip(losses, steps, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_the_first_factors_come_from_the_same_distributions(tmp_path: Path) -> None:
    """Deviation of A and B, and their largest values, for each way to begin."""
    folder = write_tiny_llama(tmp_path, hidden_size=256, num_attention_heads=4, intermediate_size=512)
    for init in (True, False, "gaussian"):
        ours, reference = load_pair(folder)
        add_lora(ours, r=32, target_modules="all-linear", init_lora_weights=init)
        peft_model = peft.get_peft_model(
            reference, peft.LoraConfig(r=32, target_modules="all-linear", init_lora_weights=init)
        )
        theirs = peft_parameters(peft_model)
        # The largest of normal values varies from draw to draw; that of uniform ones is the end of their range.
        statistics = (
            (torch.std, lambda p: p.abs().mean()) if init == "gaussian" else (torch.std, lambda p: p.abs().max())
        )
        for name, parameter in adapter_state(ours).items():
            for statistic in statistics:
                # B is zero in both, or both agree within sampling error.
                torch.testing.assert_close(statistic(parameter), statistic(theirs[name]), rtol=0.08, atol=0)
