"""Mixtral and Qwen3-MoE beyond what every family is tested for: sizes, configurations, files, the auxiliary loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from slothcore.layers.experts import ExpertLinear
from slothcore.layers.moe import SparseMoe
from slothcore.models.checkpoint import save_pretrained
from slothcore.models.families import decoder_config
from slothcore.models.load import from_config, load_model
from tests.models.zoo import FAMILIES_TINY, Variant, saved, through_nf4, tiny_model, token_ids
from tests.numerics import relative_error

VARIANTS = [*FAMILIES_TINY["mixtral"], *FAMILIES_TINY["qwen3_moe"]]

# As their authors published them, the keys that say nothing left out.
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED: list[tuple[dict[str, Any], type[PreTrainedConfig], int]] = [
    (MIXTRAL_8X7B, MixtralConfig, 46_702_792_704),
    (QWEN3_30B_A3B, Qwen3MoeConfig, 30_532_122_624),
]


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


@pytest.mark.parametrize(("values", "config_class", "published"), PUBLISHED, ids=["Mixtral 8x7B", "Qwen3 30B-A3B"])
def test_number_of_weights(values: dict[str, Any], config_class: type[PreTrainedConfig], published: int) -> None:
    ours = from_config(values, device="meta", dtype=torch.bfloat16)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config_class(**values))
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters()) == published


def test_configurations() -> None:
    mixtral = decoder_config(MIXTRAL_8X7B)
    assert mixtral.moe is not None
    assert mixtral.moe.intermediate_size == mixtral.intermediate_size == 14336
    assert mixtral.moe.normalize_weights
    assert (mixtral.moe.block_name, mixtral.moe.expert_names) == ("block_sparse_moe", ("w1", "w3", "w2"))
    assert (mixtral.moe.aux_loss_coef, mixtral.moe.use_aux_loss) == (0.02, False)
    assert mixtral.layer_windows is None
    assert not mixtral.qk_norm

    qwen = decoder_config(QWEN3_30B_A3B)
    assert qwen.moe is not None
    assert (qwen.moe.num_experts, qwen.moe.experts_per_token, qwen.moe.intermediate_size) == (128, 8, 768)
    assert qwen.qk_norm
    assert qwen.layer_windows is None
    sparse = decoder_config({**QWEN3_30B_A3B, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert sparse.moe is not None
    assert sparse.moe.layers == (False, True, False, False, False, True)
    dense = decoder_config({**QWEN3_30B_A3B, "num_hidden_layers": 2, "mlp_only_layers": [0, 1]})
    assert dense.moe is None
    sliding = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
    assert decoder_config({**QWEN3_30B_A3B, **sliding}).layer_windows == (5,) * 48


@pytest.mark.parametrize(
    ("values", "change", "message"),
    [
        (MIXTRAL_8X7B, {"router_jitter_noise": 0.1}, r"router_jitter_noise = 0\.1 is not supported"),
        (MIXTRAL_8X7B, {"num_local_experts": None}, "lacks the key 'num_local_experts'"),
        (MIXTRAL_8X7B, {"num_experts": 4}, "num_local_experts = 8 and num_experts = 4 contradict each other"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": 9}, r"num_experts_per_tok must lie in 1\.\.8 .*, got 9"),
        (MIXTRAL_8X7B, {"shared_expert_intermediate_size": 7}, "'shared_expert_intermediate_size' .*not supported"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1, got 0"),
        (
            QWEN3_30B_A3B,
            {"use_sliding_window": True, "sliding_window": 4096},
            "max_window_layers = 48 with use_sliding_window is not supported",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(values: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_config({**values, **change})


def test_fused_files(variant: Variant, tmp_path: Path) -> None:
    """What transformers writes when it keeps its own layout of the experts gives the same model."""
    reference = tiny_model(variant)
    original = load_model(saved(reference, tmp_path / "original"), bits=32, device="cpu").state_dict()
    folder = saved(reference, tmp_path / "fused", save_original_format=False, max_shard_size="20KB")
    assert "mlp.experts.gate_up_proj" in (folder / "model.safetensors.index.json").read_text()
    fused = load_model(folder, bits=32, device="cpu").state_dict()
    assert fused.keys() == original.keys()
    for name, weight in original.items():
        assert torch.equal(fused[name], weight), name


def test_fused_files_of_other_experts_are_refused(tmp_path: Path) -> None:
    reference = tiny_model(VARIANTS[0])
    saved(reference, tmp_path, save_original_format=False)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_local_experts": 4', '"num_local_experts": 3'))
    with pytest.raises(ValueError, match=r"experts\.\w+ has shape \[4, \d+, \d+\], but config.json asks for 3 experts"):
        load_model(tmp_path, bits=32, device="cpu")


def test_what_is_saved_is_what_transformers_saves(variant: Variant, tmp_path: Path) -> None:
    """By name and value, and transformers reads it back to equal logits."""
    reference = tiny_model(variant)
    ours = load_model(saved(reference, tmp_path / "theirs"), bits=32, device="cpu")
    save_pretrained(ours.state_dict().items(), tmp_path / "ours", hf_config=ours.hf_config)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    for (name, weight), (name_back, weight_back) in zip(
        reference.state_dict().items(), back.state_dict().items(), strict=True
    ):
        assert name == name_back
        assert torch.equal(weight, weight_back), name


def test_each_expert_is_quantised_alone(tmp_path: Path) -> None:
    reference = tiny_model(VARIANTS[2])
    ours = load_model(saved(reference, tmp_path), bits=4, device="cpu")
    dense = load_model(tmp_path, bits=32, device="cpu").state_dict()
    stacks = {name: module for name, module in ours.named_modules() if isinstance(module, ExpertLinear)}
    assert len(stacks) == 2 * 3, "two of three layers are sparse"
    for path, stack in stacks.items():
        assert stack.is_nf4
        head, _, name = path.rpartition(".")
        for index in range(stack.num_experts):
            expected = through_nf4(dense[f"{head}.{index}.{name}.weight"])
            assert torch.equal(stack.dequantized_expert(index, torch.float32), expected)
    routers = [module.gate for module in ours.modules() if isinstance(module, SparseMoe)]
    assert all(router.weight.dtype == torch.float32 and not router.weight.requires_grad for router in routers)


def test_auxiliary_loss_of_a_padded_batch(tmp_path: Path) -> None:
    """Padding is neither routed nor counted; the weight of the loss follows the share of targets."""
    variant = VARIANTS[0]
    reference = tiny_model(variant)
    ours = load_model(saved(reference, tmp_path), bits=32, device="cpu")
    input_ids = token_ids(2, 23)
    mask = torch.ones_like(input_ids)
    mask[1, 14:] = 0
    labels = input_ids.masked_fill(mask == 0, -100)
    expected = reference(input_ids, attention_mask=mask, labels=labels)
    bare = reference(input_ids, attention_mask=mask, labels=labels, output_router_logits=False)
    actual = ours(input_ids, attention_mask=mask, labels=labels)
    assert abs(actual.loss - expected.loss) < 1e-5
    auxiliary = 0.5 * expected.aux_loss
    assert abs(expected.loss - bare.loss) > 0.1
    # Half of a step: both losses count half.
    half = ours(input_ids, attention_mask=mask, labels=labels, num_items=2 * actual.num_targets)
    assert abs(half.loss - (bare.loss + auxiliary) / 2) < 1e-5
    expected.loss.backward()
    actual.loss.backward()
    router = reference.model.layers[0].mlp.gate.weight.grad
    assert relative_error(ours.model.layers[0].block_sparse_moe.gate.weight.grad, router) < 1e-4


def test_greedy_tokens_of_a_batch(variant: Variant, tmp_path: Path) -> None:
    """Prompts of different lengths, padded on the left, each answered as if it were alone."""
    reference = tiny_model(variant)
    ours = load_model(saved(reference, tmp_path), bits=32, device="cpu")
    prompts = [token_ids(1, length, seed=length) for length in (9, 4)]
    batch = torch.zeros(2, 9, dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, 9 - prompt.shape[1] :] = prompt
        mask[row, 9 - prompt.shape[1] :] = 1
    answers = ours.generate(batch, attention_mask=mask, max_new_tokens=64, eos_token_id=(), pad_token_id=0)[:, 9:]
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = reference.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert answer.tolist() == expected[0, prompt.shape[1] :].tolist()
        assert len(set(answer.tolist())) > 3, "a constant answer would prove little"


@pytest.mark.parametrize("bits", [32, 4])
def test_from_config(bits: int) -> None:
    """Random experts, each drawn and quantised on its own; the same seed gives the same model."""
    values = {**MIXTRAL_8X7B, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 97}
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(from_config({**values, "num_attention_heads": 4, "num_key_value_heads": 2}, bits=bits))
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    gate = models[0].model.layers[0].block_sparse_moe.experts.w1
    assert gate.is_nf4 is (bits == 4)
    assert 0.019 < gate.dequantized(torch.float32).std() < 0.021
    with torch.no_grad():
        assert models[0].eval()(token_ids(1, 20)).logits.isfinite().all()
