"""add_lora: what trains, what it starts from, which layers, which mistakes are caught; dropout."""

from typing import Any

import pytest
import torch
from torch import Tensor

from slothcore.autograd import lora_projection
from slothcore.autograd.rms_norm import Normed
from slothcore.layers.linear import Linear
from slothcore.lora.attach import add_lora
from slothcore.lora.plan import lora_layers
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config
from tests.lora.reference import TINY, make_batch
from tests.numerics import relative_error

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny(**options: Any) -> Decoder:
    arguments = {name: options.pop(name) for name in ("bits", "dtype", "device") if name in options}
    return from_config({"model_type": "llama", **TINY, **options}, **arguments)


def trained(model: Decoder) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted(model: Decoder) -> list[str]:
    return [path for path, linear in lora_layers(model).items() if linear.lora_A is not None]


def test_a_new_adapter_changes_nothing_and_trains_alone() -> None:
    model = tiny()
    batch = make_batch(97)
    before = model(batch.input_ids).logits
    assert add_lora(model, r=4, lora_alpha=8) is model
    assert torch.equal(model(batch.input_ids).logits, before)
    expected = {
        f"model.layers.{i}.{block}.{name}.lora_{kind}"
        for i in range(2)
        for block, names in (("self_attn", PROJECTIONS[:4]), ("mlp", PROJECTIONS[4:]))
        for name in names
        for kind in "AB"
    }
    assert trained(model) == expected
    assert model.lora_config.target_modules == tuple(sorted(PROJECTIONS))
    up = model.model.layers[0].mlp.up_proj
    assert (up.lora_A.shape, up.lora_B.shape, up.lora_scaling) == ((4, 64), (176, 4), 2.0)


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("v_proj", ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]),
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (["1.mlp.up_proj", "lm_head"], ["model.layers.1.mlp.up_proj", "lm_head"]),
        (r".*\.0\.mlp\.(up|down)_proj", ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]),
    ],
)
def test_targets(target_modules: Any, expected: list[str]) -> None:
    model = add_lora(tiny(), r=2, target_modules=target_modules)
    assert adapted(model) == expected


def test_biases() -> None:
    def biases(model: Decoder) -> set[str]:
        return {name for name in trained(model) if name.endswith(".bias")}

    options = {"attention_bias": True, "mlp_bias": True}
    every = {f"{path}.bias" for path, linear in lora_layers(tiny(**options)).items() if linear.bias is not None}
    assert len(every) == 14
    assert biases(add_lora(tiny(**options), target_modules=["q_proj"])) == set()
    assert biases(add_lora(tiny(**options), target_modules=["q_proj"], bias="all")) == every
    of_targets = biases(add_lora(tiny(**options), target_modules=["q_proj"], bias="lora_only"))
    assert of_targets == {f"model.layers.{i}.self_attn.q_proj.bias" for i in range(2)}


def test_a_tied_head_is_untied_to_train_alone() -> None:
    for name, other in (("lm_head", "embed_tokens"), ("embed_tokens", "lm_head")):
        model = tiny(tie_word_embeddings=True)
        before = model.model.embed_tokens.weight.detach().clone()
        add_lora(model, r=2, modules_to_save=[name])
        assert not model.has_tied_head
        weights = {"lm_head": model.lm_head.weight, "embed_tokens": model.model.embed_tokens.weight}
        assert all(torch.equal(weight, before) for weight in weights.values())
        assert weights[name].requires_grad
        assert not weights[other].requires_grad
    assert add_lora(tiny(tie_word_embeddings=True), r=2).has_tied_head


def test_scaling() -> None:
    def scaling(**options: Any) -> float:
        return add_lora(tiny(), **options).model.layers[0].mlp.up_proj.lora_scaling

    assert scaling(r=8, lora_alpha=16) == 2.0
    assert scaling(r=16, lora_alpha=16, use_rslora=True) == 4.0


def test_factors_are_float32_unless_asked() -> None:
    for lora_dtype, expected in (
        ("float32", torch.float32),
        ("auto", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
    ):
        model = add_lora(tiny(dtype=torch.bfloat16), r=2, lora_dtype=lora_dtype)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    with pytest.raises(ValueError, match=r"lora_dtype must be one of float32, auto, bfloat16, got torch.float16"):
        add_lora(tiny(dtype=torch.bfloat16), lora_dtype=torch.float16)


def test_on_the_meta_device_nothing_is_allocated() -> None:
    model = add_lora(tiny(device="meta"), r=2)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "at least 1, got r = 0"),
        ({"r": 2.0}, "whole number of at least 1, got r = 2.0"),
        ({"r": True}, "got r = True"),
        ({"lora_alpha": 0}, "greater than 0, got lora_alpha = 0"),
        ({"lora_alpha": float("nan")}, "got lora_alpha = nan"),
        ({"lora_dropout": 1.0}, "at least 0 and below 1, got 1.0"),
        ({"lora_dropout": -0.1}, "got -0.1"),
        ({"bias": "yes"}, "bias must be one of none, all, lora_only, got 'yes'"),
        ({"init_lora_weights": "pisa"}, "init_lora_weights must be .* olora or loftq .N as in 4., got 'pisa'"),
        ({"init_lora_weights": "pissa_niter_0"}, "got 'pissa_niter_0'"),
        ({"init_lora_weights": 1}, "init_lora_weights must be .* got 1"),
        ({"init_lora_weights": "loftq"}, "loftq makes up for what NF4 loses, and the base weights have 32 bits; load"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "orthogonal needs an even rank, got 3"),
        ({"init_lora_weights": "olora", "r": 1000}, "olora finds at most rank .* got r = 1000; lower r"),
        ({"loftq_iter": 0}, "loftq_iter must be at least 1, got 0"),
        ({"init_lora_weights": "eva"}, "init_lora_weights must be .* got 'eva'"),
        ({"target_modules": []}, "target_modules is empty"),
        (
            {"target_modules": ["query"]},
            "'query' match no linear layer; known are q_proj, .*, lm_head, and 'all-linear' takes all but the head$",
        ),
        ({"target_modules": ["q_proj", "query"]}, "'query' match no linear layer"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "'embed_tokens' match no linear layer; .*; embed_tokens has no LoRA, and trains as a whole in modules_to_",
        ),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "match no linear layer"),
        ({"modules_to_save": ["head"], "target_modules": ["qkv"]}, "match no linear layer"),
        (
            {"modules_to_save": ["score"]},
            "modules_to_save 'score' matches no module; known are embed_tokens, .*lm_head",
        ),
        ({"layers_pattern": "layers"}, "layers_pattern 'layers' names the list .* give both or neither"),
        ({"lora_dtype": "float8"}, "lora_dtype must be"),
    ],
)
def test_mistakes_leave_the_model_as_it_was(options: dict[str, Any], message: str) -> None:
    model = tiny()
    names = set(dict(model.named_parameters()))
    with pytest.raises(ValueError, match=message):
        add_lora(model, **options)
    assert set(dict(model.named_parameters())) == names == trained(model)


def test_a_second_adapter_is_refused() -> None:
    model = add_lora(tiny(), r=2)
    with pytest.raises(ValueError, match="has a LoRA adapter already"):
        add_lora(model, r=2)


def test_an_nf4_layer_cannot_train_as_a_whole() -> None:
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is kept in NF4 .*; load with bits=16"):
        add_lora(tiny(bits=4), target_modules=["v_proj"], modules_to_save=["q_proj"])
    model = add_lora(tiny(bits=4), target_modules=["v_proj"], modules_to_save=["lm_head"])
    assert "lm_head.weight" in trained(model)


def test_dropout_hides_its_share_of_the_input_and_keeps_the_mean() -> None:
    """With W = 0, x = 1 and A = B = 1 an output counts the elements that its row's mask let through."""
    features, rows, probability = 256, 2000, 0.3
    linear = Linear(features, 1, dtype=torch.float32)
    linear.set_dense(torch.zeros(1, features))
    linear.attach_lora(torch.ones(1, features), torch.ones(1, 1), scaling=1.0, dropout=probability)
    kept = linear(torch.ones(rows, features)).detach() * (1 - probability)
    # Binomial(256, 0.7) a row: mean 179.2, deviation 7.33; 2000 rows narrow the mean's deviation to 0.16.
    assert abs(kept.mean() - features * (1 - probability)) < 1.0
    assert abs(kept.std() - (features * probability * (1 - probability)) ** 0.5) < 0.6
    linear.eval()
    assert torch.equal(linear(torch.ones(3, features)), torch.full((3, 1), 256.0))


def test_backward_meets_the_masks_of_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of a whole model equal those of plain torch with the very masks that forward drew."""
    torch.manual_seed(0)
    model = tiny()
    add_lora(model, r=4, lora_alpha=8, lora_dropout=0.4, init_lora_weights=False)
    model.train()
    batch = make_batch(97)

    masks: dict[int, list[Tensor]] = {}
    original = lora_projection.dropout_masks

    def recording(group: Any, like: Tensor) -> Any:
        """The same seed must give the same masks whenever it is asked."""
        drawn = list(original(group, like))
        earlier = masks.setdefault(group.seed, drawn)
        assert all(torch.equal(a, b) for a, b in zip(earlier, drawn, strict=True))
        yield from drawn

    monkeypatch.setattr(lora_projection, "dropout_masks", recording)
    loss = model(batch.input_ids, batch.labels, batch.attention_mask).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(masks) == 2 * 4  # qkv, o, gate and up, down of two layers: each drew once and replayed it since
    monkeypatch.undo()

    in_order = [mask for drawn in masks.values() for mask in drawn]
    replay(model, in_order, monkeypatch)
    model.zero_grad()
    again = model(batch.input_ids, batch.labels, batch.attention_mask).loss
    again.backward()
    assert abs(again.item() - loss.item()) < 1e-6
    for name, gradient in gradients.items():
        assert gradient.norm() > 0
        assert relative_error(dict(model.named_parameters())[name].grad, gradient) < 1e-5, name


def replay(model: Decoder, masks: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each layer compute x W^T + scaling / (1 - p) (m * x) A^T B^T in plain torch, its masks taken in order."""
    from slothcore.autograd.glu import glu
    from slothcore.layers import attention, mlp

    remaining = iter(masks)

    def plain(linear: Linear, x: Tensor) -> Tensor:
        hidden = x * next(remaining) / (1 - linear.lora_dropout)
        return x @ linear.weight.t() + linear.lora_scaling * hidden @ linear.lora_A.t() @ linear.lora_B.t()

    def together(x: Normed, linears: Any) -> Tensor:
        return torch.cat([plain(linear, x.y) for linear in linears], dim=-1)

    def gated(x: Normed, gate_up: Any, down: Linear, *, activation: Any, keep_gate_up: bool) -> Tensor:
        assert keep_gate_up
        return plain(down, glu(together(x, gate_up), activation=activation))

    monkeypatch.setattr(attention, "project_together", together)
    monkeypatch.setattr(mlp, "gated_mlp", gated)
    monkeypatch.setattr(Linear, "forward", plain)


def test_gradient_checkpointing_draws_the_same_masks() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = add_lora(tiny(), r=4, lora_dropout=0.4, init_lora_weights=False).train()
        model.gradient_checkpointing = checkpointing
        batch = make_batch(97)
        torch.manual_seed(11)
        model(batch.input_ids, batch.labels).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_no_layer_with_lora_matches(option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option} 'q_prj' matches none of the layers with LoRA, such as model"):
        add_lora(tiny(), target_modules=["q_proj"], **{option: {"q_prj": 2}})
    with pytest.raises(ValueError, match="'k_proj' matches none"):
        add_lora(tiny(), target_modules=["q_proj"], **{option: {"k_proj": 2}})
    with pytest.raises(ValueError, match=r"must be a (whole )?number"):
        add_lora(tiny(), **{option: {"q_proj": 0}})
