"""LoRA on experts: gradients against plain torch, files that PEFT reads and writes, merging."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from slothcore.export.merged import save_merged
from slothcore.layers.experts import ExpertLinear
from slothcore.lora.adapter_io import adapter_state, load_adapter, save_adapter
from slothcore.lora.attach import add_lora
from slothcore.lora.config import LoraConfig
from slothcore.lora.plan import AdapterPlan, lora_layers
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from tests.models.zoo import (
    EXPERTS,
    FAMILIES_TINY,
    LONG,
    Variant,
    quantize_as_bitsandbytes,
    saved,
    tiny_model,
    token_ids,
)
from tests.numerics import relative_error

VARIANTS = [*FAMILIES_TINY["mixtral"], *FAMILIES_TINY["qwen3_moe"]]
TOLERANCE = 1e-4


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


def base(variant: Variant, folder: Path, *, bits: int = 32) -> Decoder:
    return load_model(saved(tiny_model(variant), folder), bits=bits, device="cpu")


def adapted(variant: Variant, folder: Path, *, bits: int = 32, **options: Any) -> Decoder:
    """With a random adapter."""
    torch.manual_seed(11)
    model = add_lora(base(variant, folder, bits=bits), **{"r": 4, "lora_alpha": 6, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.1)
    return model.eval()


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(2, LONG)).logits


def assert_same_logits(ours: Decoder, theirs: torch.nn.Module) -> None:
    assert (logits_of(ours) - logits_of(theirs)).abs().max() < TOLERANCE


def in_plain_torch(reference: PreTrainedModel, ours: Decoder, factors: dict[str, tuple[Tensor, Tensor]]) -> dict:
    """transformers' weights with W + scaling * B A in the places of the adapter."""
    weights = {name: weight.detach() for name, weight in reference.named_parameters()}
    deltas = {path: lora_layers(ours)[path].lora_scaling * B @ A for path, (A, B) in factors.items()}
    block, (gate, up, down) = EXPERTS[ours.config.model_type]
    for path in deltas:
        if f".{block}.experts." not in path:
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + deltas[path]
        elif path.endswith(f".{gate}"):
            ours_experts = path.removesuffix(f".{gate}")
            theirs = ours_experts.replace(f".{block}.", ".mlp.")
            gate_up = torch.cat([deltas[path], deltas[f"{ours_experts}.{up}"]], dim=1)
            weights[f"{theirs}.gate_up_proj"] = weights[f"{theirs}.gate_up_proj"] + gate_up
            weights[f"{theirs}.down_proj"] = weights[f"{theirs}.down_proj"] + deltas[f"{ours_experts}.{down}"]
    return weights


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_gradients(variant: Variant, bits: int, checkpointing: bool, tmp_path: Path) -> None:
    """Of every factor, attention's and each expert's; the loss beside them, balance included where it is on."""
    ours = adapted(variant, tmp_path, bits=bits)
    reference = tiny_model(variant)
    if bits == 4:
        quantize_as_bitsandbytes(reference)
    factors = {
        path: (layer.lora_A.detach().clone().requires_grad_(), layer.lora_B.detach().clone().requires_grad_())
        for path, layer in lora_layers(ours).items()
        if layer.lora_A is not None
    }
    input_ids = token_ids(2, LONG)
    inputs = {"input_ids": input_ids, "labels": input_ids.masked_fill(torch.arange(LONG) % 7 == 3, -100)}
    expected = functional_call(reference, in_plain_torch(reference, ours, factors), kwargs=inputs).loss
    expected.backward()
    ours.gradient_checkpointing = checkpointing
    loss = ours(**inputs).loss
    assert abs(loss - expected) < 1e-5
    loss.backward()
    layers = lora_layers(ours)
    assert sum(isinstance(layers[path], ExpertLinear) for path in factors) == 3 * sum(ours.config.moe.layers)
    for path, (lora_A, lora_B) in factors.items():
        assert lora_A.grad.norm() > 1e-5, f"{path} gets no gradient"
        assert relative_error(layers[path].lora_A.grad, lora_A.grad) < TOLERANCE, path
        assert relative_error(layers[path].lora_B.grad, lora_B.grad) < TOLERANCE, path
    frozen = [name for name, weight in ours.named_parameters() if weight.grad is not None and "lora" not in name]
    assert frozen == []


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [32, 4])
def test_gradients_on_a_gpu(variant: Variant, bits: int, tmp_path: Path) -> None:
    """As on the CPU, up to the order of float32 sums."""
    on_cpu = adapted(variant, tmp_path / "base", bits=bits)
    save_adapter(on_cpu, tmp_path / "adapter")
    on_gpu = load_model(tmp_path / "base", bits=bits, dtype=torch.float32, device="cuda")
    load_adapter(on_gpu, tmp_path / "adapter")
    input_ids = token_ids(2, LONG)
    losses = [model(input_ids, labels=input_ids).loss for model in (on_cpu, on_gpu)]
    assert abs(losses[0] - losses[1].cpu()) < 1e-4
    for loss in losses:
        loss.backward()
    expected = {name: parameter.grad for name, parameter in on_cpu.named_parameters() if parameter.requires_grad}
    actual = {name: parameter.grad for name, parameter in on_gpu.named_parameters() if parameter.requires_grad}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) < 1e-3, name


@pytest.mark.gpu
def test_a_bfloat16_step_on_a_gpu(variant: Variant, tmp_path: Path) -> None:
    """QLoRA as users run it: a finite loss near that in float32, and a gradient for every factor."""
    on_cpu = adapted(variant, tmp_path / "base", bits=4)
    save_adapter(on_cpu, tmp_path / "adapter")
    on_gpu = load_model(tmp_path / "base", bits=4, dtype=torch.bfloat16, device="cuda")
    load_adapter(on_gpu, tmp_path / "adapter")
    on_gpu.gradient_checkpointing = True
    input_ids = token_ids(2, LONG)
    loss = on_gpu(input_ids, labels=input_ids).loss
    with torch.no_grad():
        assert abs(loss.item() / on_cpu(input_ids, labels=input_ids).loss.item() - 1) < 0.05
    loss.backward()
    for name, parameter in on_gpu.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_dropout_is_drawn_again_when_recomputed(tmp_path: Path) -> None:
    ours = adapted(VARIANTS[0], tmp_path, lora_dropout=0.4, target_modules=["w1", "w2", "w3"]).train()
    gradients = []
    for checkpointing in (False, True):
        ours.zero_grad()
        ours.gradient_checkpointing = checkpointing
        torch.manual_seed(2)
        ours(token_ids(1, LONG), labels=token_ids(1, LONG)).loss.backward()
        gradients.append([p.grad.clone() for p in ours.parameters() if p.requires_grad])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-5, atol=1e-8)
    ours.zero_grad()
    torch.manual_seed(3)
    ours(token_ids(1, LONG), labels=token_ids(1, LONG)).loss.backward()
    other = [p.grad for p in ours.parameters() if p.requires_grad]
    assert all(relative_error(a, b) > 0.01 for a, b in zip(other, gradients[0], strict=True)), "nothing was dropped"


def test_targets(tmp_path: Path) -> None:
    """Names stand for experts as for linears; the router and the head are no targets of "all-linear"."""
    folder = saved(tiny_model(VARIANTS[0]), tmp_path)

    def targets(**options: Any) -> set[str]:
        model = add_lora(load_model(folder, bits=32, device="cpu"), r=2, **options)
        return {
            path.partition(".layers.1.")[2] for path, layer in lora_layers(model).items() if layer.lora_A is not None
        }

    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    experts = {f"block_sparse_moe.experts.{name}" for name in ("w1", "w2", "w3")}
    assert targets() - {""} == attention | experts
    assert targets(target_modules=["q_proj", "w2"]) - {""} == {"self_attn.q_proj", "block_sparse_moe.experts.w2"}
    by_expression = targets(target_modules=r".*\.layers\.1\.block_sparse_moe\.experts\.\d\.w[13]")
    assert by_expression == experts - {"block_sparse_moe.experts.w2"}


def test_ranks_and_scaling(tmp_path: Path) -> None:
    model = base(VARIANTS[0], tmp_path)
    config = LoraConfig(r=4, lora_alpha=8, rank_pattern={"w2": 2}, alpha_pattern={r".*\.layers\.1\..*\.w1": 3})
    targets = AdapterPlan.of(model, config).targets
    in_layer = {
        layer: {path.rpartition(".")[2]: target for path, target in targets.items() if f".layers.{layer}." in path}
        for layer in (0, 1)
    }
    assert in_layer[0]["w1"].shape_A == (4, 4, 32)
    assert in_layer[0]["w2"].shape_B == (4, 32, 2)
    assert (in_layer[0]["w1"].scaling, in_layer[1]["w1"].scaling, in_layer[0]["w2"].scaling) == (2.0, 0.75, 4.0)

    with pytest.raises(
        ValueError, match=r"rank_pattern and alpha_pattern tell .*experts\.0\.w3 and other experts .*apart"
    ):
        AdapterPlan.of(model, LoraConfig(rank_pattern={r"experts\.1\.w3": 2}))
    with pytest.raises(
        ValueError, match=r"take some experts of a layer and leave .*experts\.2\.w1; .*all of them or none"
    ):
        AdapterPlan.of(model, LoraConfig(target_modules=r".*experts\.[013]\.w1"))
    for name in ("experts", "block_sparse_moe", "w1"):
        with pytest.raises(ValueError, match=f"modules_to_save '{name}': .* has experts"):
            AdapterPlan.of(model, LoraConfig(modules_to_save=(name,), target_modules=("q_proj",)))


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_first_factors(init: bool | str, tmp_path: Path) -> None:
    """Each expert's are drawn as those of a linear layer of its size."""
    torch.manual_seed(0)
    model = add_lora(base(VARIANTS[0], tmp_path), r=16, target_modules=["w1"], init_lora_weights=init)
    layer = model.model.layers[0].block_sparse_moe.experts.w1
    for lora_A, lora_B in zip(layer.lora_A, layer.lora_B, strict=True):
        if init == "gaussian":
            assert lora_A.std().item() == pytest.approx(1 / 16, rel=0.15)
        else:
            assert 0.95 / 32**0.5 < lora_A.abs().max() <= 1 / 32**0.5
        if init is False:
            assert 0.95 / 16**0.5 < lora_B.abs().max() <= 1 / 16**0.5
        else:
            assert not lora_B.any()
    assert not torch.equal(layer.lora_A[0], layer.lora_A[1])


def test_round_trip(variant: Variant, tmp_path: Path) -> None:
    """Saved and loaded: the same factors, and no file is written anew by a second save."""
    first = adapted(variant, tmp_path / "base")
    save_adapter(first, tmp_path / "adapter")
    second = load_adapter(load_model(tmp_path / "base", bits=32, device="cpu"), tmp_path / "adapter")
    mine, yours = adapter_state(first), adapter_state(second)
    assert mine.keys() == yours.keys()
    assert all(torch.equal(mine[name], yours[name]) for name in mine)
    assert torch.equal(logits_of(first), logits_of(second))
    save_adapter(second, tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


OPTIONS = {
    "all linears": {},
    "experts only": {"target_modules": "EXPERTS"},
    "rank-stabilised": {"use_rslora": True},
    "begun with orthogonal factors": {"init_lora_weights": "orthogonal"},
    "begun with gaussian factors": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("family", EXPERTS)
def test_peft_reads_ours(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    variant = all_sparse(family)
    if "target_modules" in options:
        options = {"target_modules": EXPERTS[family][1]}
    ours = adapted(variant, tmp_path / "base", **options)
    save_adapter(ours, tmp_path / "adapter")
    reference = tiny_model(variant)
    alone = logits_of(reference)
    theirs = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    assert_same_logits(ours, theirs)
    assert (logits_of(ours) - alone).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("family", EXPERTS)
def test_we_read_what_peft_made_of_ours(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT loads an adapter of experts as one of fused experts of twice the rank, and saves that."""
    variant = all_sparse(family)
    if "target_modules" in options:
        options = {"target_modules": EXPERTS[family][1]}
    ours = adapted(variant, tmp_path / "base", **options)
    save_adapter(ours, tmp_path / "adapter")
    PeftModel.from_pretrained(tiny_model(variant), tmp_path / "adapter").save_pretrained(tmp_path / "fused")
    assert "target_parameters" in (tmp_path / "fused" / "adapter_config.json").read_text()
    again = load_adapter(load_model(tmp_path / "base", bits=32, device="cpu"), tmp_path / "fused")
    assert (logits_of(again) - logits_of(ours)).abs().max() < TOLERANCE
    gate = again.get_submodule(f"model.layers.1.{EXPERTS[family][0]}.experts.{EXPERTS[family][1][0]}")
    assert gate.lora_A.shape[1] == 8


DENSE = {
    "all linears": {},
    "rank-stabilised": {"use_rslora": True},
    "no experts": {"target_modules": ["q_proj", "layers.{dense}.mlp.gate_proj", "layers.{dense}.mlp.down_proj"]},
    "nothing else": {"target_modules": ["layers.{dense}.mlp.up_proj"]},
    "an expression": {"target_modules": r".*\.(o_proj|(gate|up|down)_proj)"},
    "ranks of their own": {
        "rank_pattern": {r"layers\.{dense}\.mlp\.gate_proj": 2, r"layers\.{dense}\.mlp\.up_proj": 7, "o_proj": 3},
        "alpha_pattern": {r"layers\.{dense}\.mlp\.up_proj": 5},
    },
    "ranks of their own, rank-stabilised": {
        "use_rslora": True,
        "rank_pattern": {r"layers\.{dense}\.mlp\.gate_proj": 2, r"experts\..*\.down_proj": 7, "o_proj": 3},
        "alpha_pattern": {r"layers\.{dense}\.mlp\.up_proj": 5, "(gate|up)_proj": 9},
    },
    "ranks of base weights": {
        "init_lora_weights": "pissa",
        "use_rslora": True,
        "rank_pattern": {"down_proj|o_proj": 2},
    },
    "dropout": {"lora_dropout": 0.3},
    "of base weights": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("options", DENSE.values(), ids=DENSE.keys())
@pytest.mark.parametrize("mixed", FAMILIES_TINY["qwen3_moe"], ids=str)
def test_peft_reads_ours_with_dense_layers(mixed: Variant, options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT would take their projections, called as those of experts, for these; also what it saves then."""
    sparse = base(mixed, tmp_path / "base").config.moe.layers
    options = json.loads(json.dumps(options).replace("{dense}", str(sparse.index(False))))
    ours = adapted(mixed, tmp_path / "base", **options)
    save_adapter(ours, tmp_path / "adapter")
    reference = tiny_model(mixed)
    alone = logits_of(reference)
    theirs = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    assert_same_logits(ours, theirs)
    assert (logits_of(ours) - alone).abs().max() > 100 * TOLERANCE
    again = load_adapter(load_model(tmp_path / "base", bits=32, device="cpu"), tmp_path / "adapter")
    assert again.lora_config == ours.lora_config
    assert (logits_of(again) - logits_of(ours)).abs().max() < TOLERANCE
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_adapter(load_model(tmp_path / "base", bits=32, device="cpu"), tmp_path / "theirs")
    assert (logits_of(back) - logits_of(ours)).abs().max() < TOLERANCE
    save_adapter(back, tmp_path / "once more")
    last = PeftModel.from_pretrained(tiny_model(mixed), tmp_path / "once more").eval()
    assert_same_logits(ours, last)


def test_dora_of_dense_layers_beside_experts_warns(tmp_path: Path) -> None:
    """PEFT has none for parameters; the adapter is ours to read."""
    mixed = FAMILIES_TINY["qwen3_moe"][0]
    ours = adapted(mixed, tmp_path / "base", use_dora=True, target_modules=["q_proj", "layers.1.mlp.gate_proj"])
    with pytest.warns(UserWarning, match=r"PEFT has no DoRA for model\.layers\.1\.mlp\.gate_proj\.weight"):
        save_adapter(ours, tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not work with use_dora"):
        PeftModel.from_pretrained(tiny_model(mixed), tmp_path / "adapter")
    again = load_adapter(load_model(tmp_path / "base", bits=32, device="cpu"), tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(ours))


def test_dropout_of_experts_does_not_keep_peft_from_reading(tmp_path: Path) -> None:
    """PEFT refuses dropout of parameters, and without training there is none; here it stays."""
    variant = VARIANTS[0]
    ours = adapted(variant, tmp_path / "base", lora_dropout=0.3)
    save_adapter(ours, tmp_path / "adapter")
    assert_same_logits(ours, PeftModel.from_pretrained(tiny_model(variant), tmp_path / "adapter").eval())
    again = load_adapter(load_model(tmp_path / "base", bits=32, device="cpu"), tmp_path / "adapter")
    assert again.lora_config == ours.lora_config


FUSED = {
    "both": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "gate and up": {"target_parameters": ["experts.gate_up_proj"]},
    "down": {"target_parameters": ["down_proj"]},
    "nothing else": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": []},
    "ranks of their own": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {".*gate_up_proj": 5},
    },
    "no layer beside them": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "exclude_modules": ["self_attn.q_proj", "o_proj"],
    },
    "some layers": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "layers_to_transform": [1],
        "exclude_modules": r".*(o_proj|experts.*)",
        "rank_pattern": {"experts.down_proj": 2, "q_proj": 5},
    },
    "rank-stabilised": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "use_rslora": True,
        "rank_pattern": {"experts.down_proj": 2, "q_proj": 5},
        "alpha_pattern": {".*gate_up_proj": 5},
    },
}


@pytest.mark.parametrize("options", FUSED.values(), ids=FUSED.keys())
def test_adapters_of_fused_experts(variant: Variant, options: dict[str, Any], tmp_path: Path) -> None:
    """Trained by PEFT on transformers' own stacks, where gate and up share A; also where some layers are dense."""
    reference = saved_reference(variant, tmp_path / "base")
    options = {"target_modules": ["q_proj", "o_proj"], **options}
    config = PeftConfig(r=3, lora_alpha=4, task_type="CAUSAL_LM", **options)
    theirs = get_peft_model(reference, config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "base", bits=32, device="cpu")
    before = logits_of(ours)
    load_adapter(ours, tmp_path / "adapter")
    assert_same_logits(ours, theirs)
    assert (logits_of(ours) - before).abs().max() > 100 * TOLERANCE
    save_adapter(ours, tmp_path / "ours")
    again = load_adapter(load_model(tmp_path / "base", bits=32, device="cpu"), tmp_path / "ours")
    assert torch.equal(logits_of(again), logits_of(ours))
    if "down" in str(options["target_parameters"]):  # PEFT looks for gate and up where they lie beneath down's adapter
        back = PeftModel.from_pretrained(tiny_model(variant), tmp_path / "ours").eval()
        assert_same_logits(ours, back)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_parameters": ["gate.weight"]},
            "'gate.weight' are no fused experts of this model but its routers, which cannot have LoRA",
        ),
        ({"target_parameters": ["layers.1.mlp.experts.down_proj"]}, "adapt down_proj in some layers only"),
        (
            {"target_parameters": ["down_proj"], "rank_pattern": {"layers.0.mlp.experts.down_proj": 2}},
            "tell layers of experts apart",
        ),
    ],
)
def test_other_parameters_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    reference = saved_reference(VARIANTS[0], tmp_path / "base")
    config = PeftConfig(**{"r": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})
    get_peft_model(reference, config).save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "base", bits=32, device="cpu")
    with pytest.raises(ValueError, match=message):
        load_adapter(ours, tmp_path / "adapter")
    assert ours.lora_config is None


def test_an_expression_beside_fused_experts_is_refused(tmp_path: Path) -> None:
    reference = saved_reference(VARIANTS[0], tmp_path / "base")
    config = PeftConfig(r=3, target_modules=["q_proj"], target_parameters=["down_proj"], task_type="CAUSAL_LM")
    get_peft_model(reference, config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": r".*\.q_proj"}))
    with pytest.raises(ValueError, match=r"target_parameters beside the expression .* write its names as a list"):
        load_adapter(load_model(tmp_path / "base", bits=32, device="cpu"), tmp_path / "adapter")


def test_fused_experts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Another number of experts, and a model that has none."""
    reference = saved_reference(VARIANTS[0], tmp_path / "base")
    config = PeftConfig(r=3, target_modules=["q_proj"], target_parameters=["down_proj"], task_type="CAUSAL_LM")
    get_peft_model(reference, config).save_pretrained(tmp_path / "adapter")
    other = base(VARIANTS[1], tmp_path / "other")
    with pytest.raises(ValueError, match=r"lora_A.weight has the shape \(12, 48\), but this model needs \(15, 48\)"):
        load_adapter(other, tmp_path / "adapter")
    dense = base(FAMILIES_TINY["llama"][0], tmp_path / "dense")
    with pytest.raises(ValueError, match="target_parameters 'down_proj' are no fused experts of this model"):
        load_adapter(dense, tmp_path / "adapter")


@pytest.mark.parametrize("family", EXPERTS)
def test_a_trained_router(family: str, tmp_path: Path) -> None:
    """In `modules_to_save` it trains as a whole; PEFT, and we again, read it back."""
    variant = all_sparse(family)
    ours = adapted(variant, tmp_path / "base", modules_to_save=["gate"], target_modules=["q_proj"])
    trained = [name for name, weight in ours.named_parameters() if weight.requires_grad and "lora" not in name]
    assert trained == [name for name, _ in ours.named_parameters() if name.endswith(".gate.weight")] != []
    with torch.no_grad():
        for name in trained:
            ours.get_parameter(name).add_(torch.randn_like(ours.get_parameter(name)))
    save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny_model(variant), tmp_path / "adapter").eval()
    assert_same_logits(ours, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    for adapter in ("adapter", "theirs"):
        again = load_adapter(load_model(tmp_path / "base", bits=32, device="cpu"), tmp_path / adapter)
        assert torch.equal(logits_of(again), logits_of(ours))


@pytest.mark.parametrize("bits", [32, 4])
def test_save_merged(variant: Variant, bits: int, tmp_path: Path) -> None:
    ours = adapted(variant, tmp_path / "base", bits=bits)
    save_merged(ours, None, tmp_path / "merged", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    assert_same_logits(ours, theirs)
    again = load_model(tmp_path / "merged", bits=32, device="cpu")
    assert (logits_of(again) - logits_of(ours)).abs().max() < TOLERANCE


def all_sparse(family: str) -> Variant:
    """A variant without dense layers, whose projections PEFT's conversion would take for those of experts."""
    variant = FAMILIES_TINY[family][0]
    options = {name: value for name, value in variant.options.items() if name != "mlp_only_layers"}
    return Variant(family, variant.name, variant.config_class, options)


def saved_reference(variant: Variant, folder: Path) -> PreTrainedModel:
    reference = tiny_model(variant)
    saved(reference, folder)
    return reference
