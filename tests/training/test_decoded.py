"""Weights kept decoded: how many layers the budget gives, that the model's bits stay, and what has copies at all."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import slothcore
from benchmarks.shapes import LLAMA_3_1_8B
from benchmarks.zoo_shapes import ZOO, tiny
from slothcore.kernels.nf4_tensor import decoded_together
from slothcore.layers.linear import Linear
from slothcore.lora.config import LoraConfig
from slothcore.models.families import decoder_config
from slothcore.training.decoded import LARGEST_MEAN, choose_decoded_layers, keep_decoded_layers
from slothcore.training.memory import memory_of, plan_memory
from slothcore.training.micro_batches import GIB, PassSample

MODELS = {"Llama-3.1-8B": LLAMA_3_1_8B, **ZOO}
OPTIONS = {"bits": 4, "lora": LoraConfig(r=16), "optim": "adamw_8bit"}
LAYER = 2 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
"""Bytes of an 8B layer's weights in bfloat16."""


def llama_plan():
    return plan_memory(decoder_config(dict(LLAMA_3_1_8B), "Llama-3.1-8B"), **OPTIONS)


def passes(tokens: int, mean: float | None = None) -> PassSample:
    return PassSample(tokens, tokens if mean is None else mean, fewest=1, most=1)


def small(name: str, **options):
    model = slothcore.from_config(tiny(MODELS[name]), device="cpu", **{"bits": 4, "dtype": torch.float32, **options})
    return slothcore.add_lora(model.train(), r=8, lora_alpha=16)


def copies(model) -> dict[str, Tensor]:
    """The decoded copies of a model by the name of their layer."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and m.is_nf4}
    return {n: m.base_weight().decoded for n, m in linears.items() if m.base_weight().decoded is not None}


def test_the_copies_of_an_8b_model_take_13_gib() -> None:
    plan = llama_plan()
    assert plan.decoded == 0
    assert plan.keeping_decoded(32).decoded == 32 * LAYER
    assert plan.keeping_decoded(32).decoded / GIB == pytest.approx(13.0, abs=0.01)


@pytest.mark.parametrize("layers", [0, 1, 17, 32])
def test_copies_get_what_the_passes_leave_free(layers, capsys) -> None:
    plan = llama_plan()
    limit = plan.keeping_decoded(layers).footprint(950)
    assert choose_decoded_layers(plan, limit, passes(950)) == layers
    said = capsys.readouterr().out
    if layers:
        assert f"memory: decoded weights of {layers} of 32 layers kept, {layers * LAYER / GIB:.2f} GiB; " in said
        assert choose_decoded_layers(plan, limit - 1, passes(950)) == layers - 1
    else:
        assert said == "memory: no decoded weights kept; those of a layer take 0.41 GiB, 0.00 are left\n"
    # A plan that counts copies already comes to the same choice.
    assert choose_decoded_layers(plan.keeping_decoded(5), limit, passes(950)) == layers


def test_the_largest_pass_decides_what_is_free() -> None:
    plan = llama_plan()
    limit = plan.keeping_decoded(32).footprint(512)
    few = choose_decoded_layers(plan, limit, passes(4096, mean=512))
    assert few < choose_decoded_layers(plan, limit, passes(512)) == 32
    assert plan.keeping_decoded(few).footprint(4096) <= limit or few == 0


def test_many_tokens_in_a_pass_keep_nothing_and_say_why(capsys) -> None:
    plan = llama_plan()
    assert choose_decoded_layers(plan, 1000 * GIB, passes(8192)) == 0
    assert "no decoded weights kept; with 8,192 tokens in a pass they save no time" in capsys.readouterr().out
    assert choose_decoded_layers(plan, 1000 * GIB, passes(8192, mean=LARGEST_MEAN)) == 32


def test_nothing_is_kept_and_said_where_there_is_no_budget_or_no_nf4(capsys) -> None:
    assert choose_decoded_layers(llama_plan(), None, passes(512)) == 0
    dense = plan_memory(decoder_config(dict(LLAMA_3_1_8B), "Llama-3.1-8B"), **OPTIONS | {"bits": 16})
    assert choose_decoded_layers(dense, 1000 * GIB, passes(512)) == 0
    assert capsys.readouterr().out == ""


def test_a_layer_with_copies_needs_no_scratch() -> None:
    """At few tokens the scratch of gate and up is the largest moment, until no layer is left that needs it."""
    plan = llama_plan()
    peaks = [plan.keeping_decoded(count).peak(64, passes=2) for count in range(33)]
    grown = [after - before for before, after in pairwise(peaks)]
    assert grown[:31] == pytest.approx([LAYER] * 31, abs=2**20)
    scratch = 2 * 2 * 4096 * 14336
    assert LAYER - scratch <= grown[31] < LAYER - scratch / 2


@pytest.mark.parametrize("name", MODELS)
def test_the_first_layers_get_copies_of_what_the_plan_counts(name) -> None:
    model = small(name)
    plan = memory_of(model, optim="adamw")
    keep_decoded_layers(model, 1)
    held = copies(model)
    assert held
    assert all(path.startswith("model.layers.0.") for path in held)
    assert sum(copy.nbytes for copy in held.values()) == plan.keeping_decoded(1).decoded
    assert {copy.dtype for copy in held.values()} == {model.dtype}
    attention = model.model.layers[0].self_attn
    if hasattr(attention, "q_proj"):
        group = [getattr(attention, f"{which}_proj").base_weight() for which in "qkv"]
        assert decoded_together(group, model.dtype).shape[0] == sum(weight.shape[0] for weight in group)
    keep_decoded_layers(model, 2)
    assert {path for path in held if copies(model)[path] is not held[path]} == set(), "made anew without a reason"
    assert sum(copy.nbytes for copy in copies(model).values()) == plan.keeping_decoded(2).decoded
    keep_decoded_layers(model, 0)
    assert copies(model) == {}


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Gemma-2-9B", "Phi-3.5-mini", "Qwen3-30B-A3B"])
def test_a_step_has_the_same_bits_with_copies(name) -> None:
    model = small(name)
    ids = torch.randint(3, 250, (64,), generator=torch.Generator().manual_seed(0))
    results = []
    for count in (0, 1, 2):
        keep_decoded_layers(model, count)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_forward_and_backward_read_the_copies() -> None:
    """Zeros in them show it: then a token's logits depend on it alone, and gradients skip the branches."""
    model = small("Llama-3.1-8B")
    ids = torch.tensor([5, 7, 9, 5])
    different, _ = logits_and_gradients(model, ids, between=lambda: None)
    assert not torch.equal(different[0], different[3])
    _, expected = logits_and_gradients(model, ids, between=lambda: None)
    keep_decoded_layers(model, 2)

    def zero() -> None:
        for copy in copies(model).values():
            copy.zero_()

    _, of_zeros = logits_and_gradients(model, ids, between=zero)
    same, _ = logits_and_gradients(model, ids, between=zero)
    assert torch.equal(same[0], same[3])
    # The last map's gradient comes through no weight of a layer; all others do.
    last = "model.layers.1.mlp.down_proj.lora_B"
    assert torch.equal(of_zeros.pop(last), expected.pop(last))
    for name, gradient in expected.items():
        assert not gradient.any() or not torch.equal(gradient, of_zeros[name]), name


def logits_and_gradients(model, ids, *, between):
    """Of a forward and a backward pass, with something done between the two."""
    model.zero_grad()
    logits = model(ids).logits
    between()
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_copies_are_no_part_of_what_is_saved() -> None:
    model = small("Llama-3.1-8B")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keep_decoded_layers(model, 2)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model.load_state_dict(before)
    assert copies(model) == {}
