"""The memory plan: against what torch keeps for a backward pass, what optimizers allocate, and peaks of an H100."""

from dataclasses import replace

import pytest
import torch

import slothcore
from benchmarks.shapes import LLAMA_3_1_8B
from benchmarks.zoo_shapes import ZOO, tiny
from slothcore.layers.offload import ActivationOffload
from slothcore.lora.config import LoraConfig
from slothcore.models.families import decoder_config
from slothcore.training import memory_plan
from slothcore.training.memory import INDICES, memory_of, plan_memory
from slothcore.training.memory_plan import GAPS, WORKSPACES
from slothcore.training.optimizer_kinds import KINDS
from tests.layers.late_transfer import LateTransfer
from tests.training.tiny import random_rows, train

MODELS = {"Llama-3.1-8B": LLAMA_3_1_8B, **ZOO}
GIB = 2**30
# torch.cuda.max_memory_allocated of a step on an H100 80GB, torch 2.11: LoRA r=16 in float32 on all linears, bfloat16,
# 8-bit AdamW, gradient_checkpointing False, no decoded weights kept, no graphs, tokens in one pass. Taken when maps
# kept the normed input that they read; see `no_longer_kept`.
MEASURED = [
    ("Llama-3.1-8B", 4, 8192, 33.27),
    ("Llama-3.1-8B", 4, 512, 7.66),
    ("Llama-3.2-1B", 4, 8192, 8.73),
    ("Llama-3.2-1B", 16, 8192, 10.07),
    ("Qwen2.5-7B", 4, 8192, 32.08),
    ("Qwen2.5-7B", 16, 8192, 41.12),
    ("Gemma-2-9B", 4, 8192, 46.83),
    ("Gemma-2-9B", 16, 8192, 58.32),
    ("Phi-3.5-mini", 4, 8192, 22.81),
    ("Phi-3.5-mini", 16, 8192, 27.82),
    ("Mistral-Nemo", 4, 8192, 45.23),
    ("Mistral-Nemo", 16, 8192, 60.16),
    ("Qwen3-8B", 4, 8192, 38.14),
    ("Qwen3-8B", 16, 8192, 47.72),
    ("Gemma-3-1B", 4, 8192, 11.28),
    ("Gemma-3-1B", 16, 8192, 12.29),
    ("Qwen3-30B-A3B", 4, 8192, 49.06),
]


def configuration(name: str):
    return decoder_config(dict(MODELS[name]), name)


def tiny_of(name: str, **options):
    """A small model of this family in training mode, without an adapter."""
    # Every sixth layer of Gemma 3 sees the whole document: fewer would leave the angles of those unused.
    layers = 6 if name == "Gemma-3-1B" else 2
    return slothcore.from_config(tiny(MODELS[name]) | {"num_hidden_layers": layers}, device="cpu", **options).train()


def kept_for_backward(model, tokens: int) -> int:
    """Bytes that autograd holds after a forward pass, weights apart, each memory once."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, 250, (tokens,), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = model(ids, labels=ids).loss
    assert graph.requires_grad
    return sum(kept.values())


def predicted_kept(model, tokens: int) -> float:
    """The same by the plan: layers and angles, then the sum before the last norm, its deviations, and the gradient
    that the loss formed; token ids are kept only by an embedding that trains."""
    hidden = model.config.hidden_size * model.dtype.itemsize
    boundaries = 2 * 4
    ids = 8 * tokens if model.model.embed_tokens.weight.requires_grad else 0
    head = 4 * model.lm_head.weight.numel() if model.lm_head.weight.requires_grad else 0
    ends = tokens * (2 * hidden + 4) + boundaries + ids + head
    return memory_of(model, optim="adamw").activations(tokens) - INDICES * tokens + ends


def no_longer_kept(config, tokens: int) -> int:
    """Bytes that were in the peaks of MEASURED and are not any more: what norms gave to attention and the gated MLP.

    Two rows of a token in a layer, but one where experts read the second. In the first layer, where no gradient passes
    the norm, the embedding is kept in place of what was normed.
    """
    rows = sum(1 if config.is_sparse(index) else 2 for index in range(config.num_hidden_layers)) - 1
    return rows * tokens * config.hidden_size * 2


@pytest.mark.parametrize(("name", "bits", "tokens", "measured"), MEASURED)
def test_predictions_are_within_8_percent_of_measured_peaks(name, bits, tokens, measured) -> None:
    config = configuration(name)
    plan = plan_memory(config, bits=bits, lora=LoraConfig(r=16), optim="adamw_8bit", gradient_checkpointing=False)
    assert plan.peak(tokens) / GIB == pytest.approx(measured - no_longer_kept(config, tokens) / GIB, rel=0.08)


@pytest.mark.parametrize("tokens", [64, 96])
@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.bfloat16), (16, torch.bfloat16), (32, torch.float32)])
@pytest.mark.parametrize("mode", [False, "mlp"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_is_counted_to_the_byte(name, mode, bits, dtype, tokens) -> None:
    model = slothcore.add_lora(tiny_of(name, bits=bits, dtype=dtype), r=8, lora_alpha=16)
    model.gradient_checkpointing = mode
    assert kept_for_backward(model, tokens) == predicted_kept(model, tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*layers\.1\..*"},
        {"r": 12, "lora_alpha": 12},
        {"lora_dtype": "auto"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["embed_tokens"]},
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"use_dora": True, "target_modules": ["q_proj", "down_proj"], "lora_dtype": "auto"},
        {"use_dora": True, "target_modules": ["v_proj", "up_proj"], "bias": "all"},
        {"use_dora": True, "lora_dropout": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", [False, "mlp"])
@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Gemma-2-9B", "Qwen3-30B-A3B"])
def test_what_is_kept_follows_what_trains(name, mode, options) -> None:
    if options.get("use_dora") and name == "Qwen3-30B-A3B":
        options = {**options, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}  # no experts
    model = slothcore.add_lora(tiny_of(name, dtype=torch.bfloat16), **{"r": 8, "lora_alpha": 16, **options})
    model.gradient_checkpointing = mode
    # Gemma scales the embedding; where that trains, the factor is kept, too.
    scale = 2 if name == "Gemma-2-9B" and "embed_tokens" in options.get("modules_to_save", ()) else 0
    assert kept_for_backward(model, 64) == predicted_kept(model, 64) + scale


@pytest.mark.parametrize("mode", [False, "mlp"])
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen3-8B", "Phi-3.5-mini", "Qwen3-30B-A3B"])
def test_what_full_training_keeps(name, mode) -> None:
    model = tiny_of(name, dtype=torch.float32)
    model.gradient_checkpointing = mode
    assert kept_for_backward(model, 64) == predicted_kept(model, 64)


def test_recomputation_keeps_the_inputs_of_layers() -> None:
    model = slothcore.add_lora(tiny_of("Qwen3-8B", dtype=torch.float32), r=8)
    model.gradient_checkpointing = True
    config = model.config
    # A checkpointed layer holds the angles and the boundaries as they are, where hooks do not see them.
    unseen = 64 * config.rope.rotary_dim(config.head_dim) * 4 + 2 * 4
    assert kept_for_backward(model, 64) == predicted_kept(model, 64) - unseen


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen3-8B", "Gemma-2-9B", "Qwen3-30B-A3B"])
def test_what_goes_to_the_host_is_counted_to_the_byte(monkeypatch, name) -> None:
    smallest, tokens = 8192, 64
    monkeypatch.setattr(memory_plan, "MIN_BYTES", smallest)
    model = slothcore.add_lora(tiny_of(name, dtype=torch.bfloat16), r=8, lora_alpha=16)
    model.gradient_checkpointing = "offload"
    transfer = LateTransfer()
    model.model._offload = ActivationOffload(num_layers=len(model.model.layers), min_bytes=smallest, transfer=transfer)
    ids = torch.randint(3, 250, (tokens,), generator=torch.Generator().manual_seed(0))
    loss = model(ids, labels=ids).loss
    plan = memory_of(model, optim="adamw")
    angles = tokens * 4 * model.config.rope.rotary_dim(model.config.head_dim) // 2
    assert angles < smallest, "cosines would go to the host, too"
    assert sum(transfer.out) == plan.host(tokens) > 0
    sizes = [tensor.at(tokens) for layer in plan.layers for tensor in layer.tensors]
    large = sum(size for size in sizes if size >= smallest)
    assert plan.activations(tokens) == plan.body.at(tokens) + sum(sizes) - large
    loss.backward()
    assert transfer.faults == []


def test_offloading_takes_what_is_small_and_a_window() -> None:
    options = {"bits": 4, "lora": LoraConfig(r=16), "optim": "adamw_8bit"}
    config = configuration("Llama-3.1-8B")
    mlp, offload = (plan_memory(config, gradient_checkpointing=mode, **options) for mode in ("mlp", "offload"))
    layer = mlp.layers[1].kept.at(8192)
    assert offload.host(8192) == pytest.approx(31 * layer, rel=0.03)
    assert mlp.host(8192) == 0
    assert mlp.peak(8192) - offload.peak(8192) == pytest.approx(offload.host(8192), rel=0.02)
    # Of so few tokens, joined factors alone are worth the way: those of gate and up are 28672 by 32.
    assert offload.host(32) == 31 * 28672 * 32 * 2
    assert offload.peak(8192) < plan_memory(config, gradient_checkpointing=True, **options).peak(8192)


def test_not_keeping_gate_and_up_saves_them_for_all_layers_but_the_one_at_work() -> None:
    options = {"bits": 4, "lora": LoraConfig(r=16), "optim": "adamw_8bit"}
    config = configuration("Llama-3.1-8B")
    kept, mlp = (plan_memory(config, gradient_checkpointing=mode, **options) for mode in (False, "mlp"))
    gate_up = 8192 * 2 * config.intermediate_size * 2
    assert kept.activations(8192) - mlp.activations(8192) == config.num_hidden_layers * gate_up
    # The loss, of which the peak was, no longer has it: gate and up of the layer at work are less than its logits.
    saved = kept.peak(8192) - mlp.peak(8192)
    assert (config.num_hidden_layers - 1.5) * gate_up < saved <= config.num_hidden_layers * gate_up


def test_graphs_keep_a_pool_beside_longer_passes() -> None:
    options = {"bits": 4, "lora": LoraConfig(r=16), "optim": "adamw_8bit"}
    config = configuration("Llama-3.1-8B")
    eager, graphs = (plan_memory(config, graph_tokens=tokens, **options) for tokens in (0, 2048))
    assert eager.graph_pool(8192) == 0
    assert eager.footprint(8192, passes=2) == eager.peak(8192, passes=2)
    # All of the longest captured pass but its loss, whatever longer ones come, and gradients apart from activations.
    pool = graphs.graph_pool(8192)
    assert pool == graphs.graph_pool(2048) > graphs.graph_pool(1000) > eager.activations(1000)
    assert eager.activations(2048) + eager.gradients < pool < eager.peak(2048) - eager.static + eager.gradients + GAPS
    # Workspaces of the stream of captures, and hidden states of 2048 tokens with their gradient.
    assert graphs.workspaces == 2 * eager.workspaces == 2 * WORKSPACES
    beside = graphs.static - eager.static
    assert beside == WORKSPACES + 2 * 2048 * 4096 * 2
    assert graphs.footprint(8192) == eager.peak(8192, passes=2) + beside + pool
    # 1000 tokens are padded to 1024, and the gradients lie in their vector from the beginning.
    assert graphs.graph_pool(1000) == graphs.graph_pool(1024)
    more = graphs.peak(1000) - eager.peak(1000) - beside
    assert 0 < more <= eager.gradients + 24 * 2**17 * config.num_hidden_layers
    peaks = [graphs.footprint(tokens) for tokens in range(1, 5000, 13)]
    assert peaks == sorted(peaks), "or the search for the largest pass is none"


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Gemma-2-9B", "Qwen3-30B-A3B"])
def test_a_configuration_alone_gives_the_plan_of_the_model(name, bits) -> None:
    """The meta device quantises nothing and allocates nothing, and the plan is the same."""
    model = slothcore.add_lora(tiny_of(name, bits=bits, dtype=torch.bfloat16), r=8)
    of_model = memory_of(model, optim="adamw")
    planned = plan_memory(model.config, bits=bits, lora=LoraConfig(r=8))
    assert planned == of_model
    frozen = [p for p in model.parameters() if not p.requires_grad]
    held = {t.data_ptr(): t.nbytes for t in (*frozen, *model.buffers())}
    assert planned.weights == sum(held.values())
    assert planned.trained == planned.gradients == sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_the_state_of_adamw(tmp_path) -> None:
    trainer, _, _ = train(tmp_path, random_rows(4), max_steps=1)
    state = [value for entries in trainer.optimizer.state.values() for value in entries.values()]
    assert trainer.memory.optimizer == sum(value.nbytes for value in state)


def test_the_plan_of_each_optimizer() -> None:
    """Two moments of every weight, one, or rows and columns; what is paged is no part of the GPU's memory."""
    config = configuration("Llama-3.1-8B")
    plans = {optim: plan_memory(config, bits=4, lora=LoraConfig(r=16), optim=optim) for optim in KINDS}
    weights, tensors = plans["adamw"].trained // 4, 2 * 7 * config.num_hidden_layers
    scales = weights // 256 * 4
    state = {optim: plan.optimizer for optim, plan in plans.items()}
    assert state["adamw"] == 8 * weights + 4 * tensors
    assert state["lion"] == 4 * weights
    assert state["adamw_8bit"] == 2 * state["lion_8bit"] == 2 * (weights + scales)
    # Only what gate, up and down have of 14336 is large enough for pages: 3 of the 14 factors of a layer.
    small = config.num_hidden_layers * (9 * 16 * 4096 + 2 * 16 * 1024)
    assert state["paged_adamw"] == 8 * small
    assert state["paged_adamw_8bit"] == 2 * (small + scales)
    assert state["sgd"] == 0
    large = weights - small
    pages = {"paged_adamw": 8 * large, "paged_adamw_8bit": 2 * large}
    assert {optim: plan.host(1000) for optim, plan in plans.items()} == {optim: pages.get(optim, 0) for optim in KINDS}
    assert state["adafactor"] == 4 * config.num_hidden_layers * (9 * (16 + 4096) + 2 * (16 + 1024) + 3 * (16 + 14336))
    for optim, plan in plans.items():
        same = replace(plan, optimizer=0, update=0, pages=0.0) == replace(plans["sgd"], optimizer=0, update=0)
        assert same, optim


def test_the_largest_pass_fits_and_one_token_more_does_not() -> None:
    plan = plan_memory(configuration("Llama-3.1-8B"), bits=4, lora=LoraConfig(r=16), optim="adamw_8bit")
    for gib in (8, 24, 80):
        tokens = plan.largest_pass(gib * GIB, at_most=10**6)
        assert plan.peak(tokens, passes=2) <= gib * GIB < plan.peak(tokens + 1, passes=2)
    assert plan.largest_pass(24 * GIB, at_most=100) == 100
    assert plan.largest_pass(plan.static, at_most=100) == 0


def test_recomputation_and_a_single_pass_take_less() -> None:
    options = {"bits": 4, "lora": LoraConfig(r=16), "optim": "adamw_8bit"}
    config = configuration("Llama-3.1-8B")
    kept, recomputed = (plan_memory(config, gradient_checkpointing=on, **options) for on in (False, True))
    layers = config.num_hidden_layers
    # A layer keeps 92 KiB of a token: two rows of 8 KiB in the residual stream, 20 of heads, 56 of gate and up. Or it
    # keeps the two rows.
    saved = kept.activations(8192) - recomputed.activations(8192)
    assert saved == pytest.approx(8192 * layers * (92 - 16) * 2**10, rel=0.02)
    assert recomputed.peak(8192) < 0.4 * kept.peak(8192)
    # In the first pass the gradients of a layer appear as what it kept goes.
    assert kept.peak(8192, passes=2) - kept.peak(8192) == pytest.approx(kept.gradients * (1 - 1 / layers), rel=1e-6)
