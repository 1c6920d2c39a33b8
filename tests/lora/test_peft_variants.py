"""Every way to begin and to shape an adapter against transformers + PEFT, in float32 on the CPU.

Of each: the first factors and base weights, the loss and the gradients of the first step, the logits that PEFT gives
with the adapter that is saved here, and those given here with the one that PEFT saves. DoRA has a file of its own.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slothcore.autograd import lora_projection
from slothcore.layers.linear import Linear
from slothcore.lora.adapter_io import adapter_state, load_adapter, save_adapter
from slothcore.lora.attach import add_lora
from slothcore.lora.plan import lora_layers
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from tests.lora.reference import (
    Batch,
    copy_adapter,
    load_pair,
    logits_of,
    make_batch,
    peft_parameters,
    reference_logits,
    through_bitsandbytes,
    write_tiny_llama,
)
from tests.numerics import relative_error

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

BIASED = {"attention_bias": True, "mlp_bias": True}
ALL = {"target_modules": "all-linear"}
# bitsandbytes' CPU decoder misreads rows that are not of whole blocks.
WHOLE_BLOCKS = {"intermediate_size": 192}

PATTERNS = {
    "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 8},
    "alpha_pattern": {"down_proj": 64, r"0\.self_attn\.[kv]_proj": 1},
}

SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rank-stabilised": ({}, {**ALL, "r": 8, "lora_alpha": 24, "use_rslora": True}),
    "all biases": (BIASED, {"r": 4, "lora_alpha": 8, "bias": "all", "target_modules": ["q_proj", "v_proj"]}),
    "biases of targets": (
        BIASED,
        {"r": 4, "lora_alpha": 8, "bias": "lora_only", "target_modules": ["k_proj", "up_proj"]},
    ),
    "embedding and head whole": ({}, {**ALL, "r": 4, "lora_alpha": 8, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "ranks and alphas by pattern": ({}, {**ALL, **PATTERNS, "r": 4, "lora_alpha": 8}),
    "ranks by pattern, rank-stabilised DoRA": (
        {},
        {**ALL, **PATTERNS, "r": 4, "lora_alpha": 8, "use_rslora": True, "use_dora": True},
    ),
    "some layers": (
        {},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "all but some": ({}, {**ALL, "r": 4, "lora_alpha": 8, "exclude_modules": ["o_proj", "0.mlp.up_proj"]}),
    "norms whole": ({}, {**ALL, "r": 4, "lora_alpha": 8, "modules_to_save": ["norm"]}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(tmp_path: Path, name: str) -> None:
    model_options, options = SHAPES[name]
    ours, reference = load_pair(write_tiny_llama(tmp_path / "base", **model_options))
    add_lora(ours, **options)
    theirs = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    copy_adapter(ours, theirs)
    disturb_both(ours, theirs)
    assert_same_step(ours, theirs)
    assert_each_reads_the_others(ours, theirs, tmp_path)


def test_ranks_and_alphas_that_peft_gave(tmp_path: Path) -> None:
    """They come with an adapter of PEFT, which is then trained further."""
    ours, reference = load_pair(write_tiny_llama(tmp_path / "base"))
    options = {**ALL, **PATTERNS, "r": 4, "lora_alpha": 8, "init_lora_weights": False}
    theirs = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    theirs.save_pretrained(tmp_path / "start")
    load_adapter(ours, tmp_path / "start")
    scalings = {path.rpartition("layers.")[2]: layer.lora_scaling for path, layer in lora_layers(ours).items()}
    assert (scalings["0.mlp.down_proj"], scalings["1.self_attn.q_proj"]) == (32, 1)
    assert (scalings["0.self_attn.k_proj"], scalings["1.self_attn.k_proj"]) == (0.25, 2)
    assert_same_step(ours, theirs)
    assert_each_reads_the_others(ours, theirs, tmp_path)


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probability: float, bits: int) -> None:
    """PEFT drops what our masks drop; each projection has its own mask in both."""
    ours, reference = load_pair(write_tiny_llama(tmp_path / "base", **WHOLE_BLOCKS), bits=bits)
    options = {**ALL, "r": 4, "lora_alpha": 8, "lora_dropout": probability}
    add_lora(ours, **options)
    theirs = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    copy_adapter(ours, theirs)
    disturb_both(ours, theirs)

    masks = RecordedMasks(monkeypatch, ours)
    batch = make_batch(ours.config.vocab_size)
    ours.train()
    loss = ours(batch.input_ids, batch.labels, batch.attention_mask).loss
    drawn = masks.by_path(batch)
    assert len(drawn) == 14
    loss.backward()
    kept = torch.cat([mask.flatten() for group in masks.groups for mask in group])
    assert abs(kept.mean() - (1 - probability)) < 0.02

    theirs.train()
    for path, module in theirs.named_modules():
        if path.removeprefix("base_model.model.") in drawn:
            mask = drawn[path.removeprefix("base_model.model.")]
            module.lora_dropout["default"] = Masked(mask / (1 - probability))
    expected = theirs(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert abs(loss.item() - expected.item()) < 1e-5
    expected.backward()
    assert_same_gradients(ours, theirs)
    # And the masks made a difference at all.
    with torch.no_grad():
        assert abs(ours.eval()(batch.input_ids, batch.labels, batch.attention_mask).loss - loss) > 1e-3


class Masked(nn.Module):
    """A dropout whose mask is given: [B, S, in], zero at padding."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


class RecordedMasks:
    """The dropout masks of a forward pass, each with the layer that drew it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Decoder) -> None:
        self.model = model
        self.groups: list[list[Tensor]] = []
        self.layers: list[str] = []
        draw = lora_projection.dropout_masks

        def recording(group: Any, like: Tensor) -> Iterator[Tensor | None]:
            masks = list(draw(group, like))
            self.groups.append([mask for mask in masks if mask is not None])
            return iter(masks)

        monkeypatch.setattr(lora_projection, "dropout_masks", recording)

    def by_path(self, batch: Batch) -> dict[str, Tensor]:
        """Path of each layer -> its mask as PEFT's input lies, [B, S, in]."""
        order = [path for path, layer in lora_layers(self.model).items() if layer.lora_A is not None]
        masks = [mask for group in self.groups for mask in group]
        found = {}
        for path, mask in zip(order, masks, strict=True):
            padded = torch.zeros(*batch.input_ids.shape, mask.shape[-1])
            padded[batch.attention_mask == 1] = mask
            found[path] = padded
        return found


BEGINNINGS = ["pissa", "pissa_niter_4", "olora"]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", BEGINNINGS)
def test_beginning_with_the_base_weights(tmp_path: Path, init: str, use_rslora: bool) -> None:
    ours, reference = load_pair(write_tiny_llama(tmp_path / "base"))
    options = {**ALL, "r": 8, "lora_alpha": 12, "use_rslora": use_rslora, "init_lora_weights": init}
    with one_seed_for_every_layer():
        add_lora(ours, **options)
        theirs = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    assert_same_beginning(ours, theirs)
    assert_same_step(ours, theirs)

    # PEFT's own conversion, with the factors that it began with.
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "begun")
    disturb_both(ours, theirs)
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    save_adapter(ours, tmp_path / "ours")
    batch = make_batch(ours.config.vocab_size)
    expected = logits_of(ours, batch)
    assert (reference_logits(theirs.eval(), batch) - expected).abs().max() < 1e-4
    for folder in ("ours", "converted"):
        plain = load_pair(tmp_path / "base")
        by_peft = peft.PeftModel.from_pretrained(plain[1], tmp_path / folder).eval()
        assert (reference_logits(by_peft, batch) - expected).abs().max() < 1e-4
        assert by_peft.peft_config["default"].r == 16
        load_adapter(plain[0], tmp_path / folder)
        assert (logits_of(plain[0], batch) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_peft_did_not_convert(tmp_path: Path, init: str) -> None:
    """It belongs to a base that has changed. PEFT changes it again when it loads the adapter, and so do we."""
    ours, reference = load_pair(write_tiny_llama(tmp_path / "base"))
    options = {**ALL, "r": 8, "lora_alpha": 12, "init_lora_weights": init}
    theirs = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for parameter in peft_parameters(theirs).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(ours, tmp_path / "theirs")
    batch = make_batch(ours.config.vocab_size)
    expected = reference_logits(theirs, batch)
    assert (logits_of(ours, batch) - expected).abs().max() < 1e-4
    assert_same_step(ours, theirs)
    save_adapter(ours, tmp_path / "ours")
    by_peft = peft.PeftModel.from_pretrained(load_pair(tmp_path / "base")[1], tmp_path / "ours").eval()
    assert (reference_logits(by_peft, batch) - expected).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_head_that_peft_did_not_convert(tmp_path: Path, init: str) -> None:
    """Where the embedding is the head, it has lost the same to PEFT's adapter, and no adapter says so."""
    ours, reference = load_pair(write_tiny_llama(tmp_path / "base", tie_word_embeddings=True))
    before = {name: weight.clone() for name, weight in ours.state_dict().items()}
    targets = ["q_proj", "lm_head"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, init_lora_weights=init, target_modules=targets)
    peft.get_peft_model(reference, config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=f"was begun by {init} with a part of a head that is the embedding as well"):
        load_adapter(ours, tmp_path / "theirs")
    assert all(torch.equal(weight, before[name]) for name, weight in ours.state_dict().items())


def test_gaussian_and_orthogonal(tmp_path: Path) -> None:
    """What is drawn differs from PEFT's; the step that begins with it does not."""
    for init in ("gaussian", "orthogonal"):
        ours, reference = load_pair(write_tiny_llama(tmp_path / init))
        options = {**ALL, "r": 8, "lora_alpha": 16, "init_lora_weights": init}
        add_lora(ours, **options)
        theirs = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **options))
        for name, parameter in peft_parameters(theirs).items():
            # Of every 512 values the deviation is known to a few percent.
            spread = adapter_state(ours)[name].std(), parameter.std()
            torch.testing.assert_close(*spread, rtol=0.25, atol=0)
        copy_adapter(ours, theirs)
        if init == "orthogonal":
            assert_same_step(ours, theirs)
        disturb_both(ours, theirs)
        assert_same_step(ours, theirs)
        assert_each_reads_the_others(ours, theirs, tmp_path / f"{init}-files", base=tmp_path / init)


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iterations: int) -> None:
    """PEFT computes it on a GPU alone and without double quantisation; here on the CPU, quantised as our base is."""
    pytest.importorskip("bitsandbytes")
    folder = write_tiny_llama(tmp_path / "base", **WHOLE_BLOCKS)
    ours, reference = load_model(folder, bits=4, dtype=torch.float32, device="cpu"), load_pair(folder)[1]
    add_lora(ours, **ALL, r=8, lora_alpha=8, init_lora_weights="loftq", loftq_iter=iterations)
    with monkeypatch.context() as patch:
        on_this_machine(patch)
        config = peft.LoraConfig(
            **{**ALL, "r": 8, "lora_alpha": 8, "init_lora_weights": "loftq", "task_type": "CAUSAL_LM"},
            loftq_config=peft.LoftQConfig(loftq_bits=4, loftq_iter=iterations),
        )
        theirs = peft.get_peft_model(reference, config)
    assert_same_beginning(ours, theirs)
    assert_same_step(ours, theirs)

    # One round leaves the base that anyone has who loads it in 4 bits.
    disturb_both(ours, theirs)
    save_adapter(ours, tmp_path / "ours")
    batch = make_batch(ours.config.vocab_size)
    again = load_adapter(load_model(folder, bits=4, dtype=torch.float32, device="cpu"), tmp_path / "ours")
    assert torch.equal(logits_of(again, batch), logits_of(ours, batch))
    if iterations == 1:
        quantised = load_pair(folder, bits=4)[1]
        by_peft = peft.PeftModel.from_pretrained(quantised, tmp_path / "ours").eval()
        assert (reference_logits(by_peft, batch) - logits_of(ours, batch)).abs().max() < 1e-4
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "theirs")
        again = load_adapter(load_model(folder, bits=4, dtype=torch.float32, device="cpu"), tmp_path / "theirs")
        assert (reference_logits(theirs.eval(), batch) - logits_of(again, batch)).abs().max() < 1e-4


@pytest.mark.parametrize("init", BEGINNINGS)
def test_nf4_bases(tmp_path: Path, init: str) -> None:
    """The step on a quantised residual is PEFT's on the same residual, decoded."""
    pytest.importorskip("bitsandbytes")
    folder = write_tiny_llama(tmp_path / "base", **WHOLE_BLOCKS)
    ours, reference = load_model(folder, bits=4, dtype=torch.float32, device="cpu"), load_pair(folder)[1]
    options = {**ALL, "r": 8, "lora_alpha": 16, "init_lora_weights": init}
    with one_seed_for_every_layer():
        add_lora(ours, **options)
        theirs = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for path, module in theirs.base_model.model.named_modules():
        if hasattr(module, "base_layer"):
            module.base_layer.weight.data = through_bitsandbytes(module.base_layer.weight.data)
            # A residual that rounds otherwise by a last bit may fall on the other side of a step of four bits.
            decoded = lora_layers(ours)[path].dequantized(torch.float32)
            same = torch.isclose(decoded, module.base_layer.weight, rtol=1e-4)
            assert same.float().mean() > 0.999, path
            module.base_layer.weight.data = decoded
    assert_same_step(ours, theirs)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_dora_that_begins_with_the_base_weights(tmp_path: Path, init: str) -> None:
    """The lengths of the rows belong to the sum, so they fit the original base as well."""
    ours, reference = load_pair(write_tiny_llama(tmp_path / "base"))
    options = {**ALL, "r": 8, "lora_alpha": 12, "use_dora": True, "init_lora_weights": init}
    add_lora(ours, **options)
    theirs = peft.get_peft_model(reference, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    assert_same_beginning(ours, theirs)
    disturb_both(ours, theirs)
    assert_same_step(ours, theirs)
    batch = make_batch(ours.config.vocab_size)
    expected = logits_of(ours.eval(), batch)
    save_adapter(ours, tmp_path / "ours")
    again, plain = load_pair(tmp_path / "base")
    by_peft = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    assert (reference_logits(by_peft, batch) - expected).abs().max() < 1e-4
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits_of(again, batch), expected)


def disturb_both(ours: Decoder, theirs: nn.Module) -> None:
    """Move everything that trains, in both alike, as training would."""
    generator = torch.Generator().manual_seed(5)
    state, parameters = adapter_state(ours), peft_parameters(theirs)
    assert state.keys() == parameters.keys()
    with torch.no_grad():
        for name, parameter in state.items():
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise)
            parameters[name].add_(noise)


def assert_same_beginning(ours: Decoder, theirs: nn.Module) -> None:
    """Factors and base weights; of a decomposition each component may have the other sign, in both factors at once."""
    layers = lora_layers(ours)
    adapted = {path: m for path, m in theirs.base_model.model.named_modules() if hasattr(m, "base_layer")}
    assert len(adapted) == 14
    for path, module in adapted.items():
        layer = layers[path]
        assert isinstance(layer, Linear)
        lora_A, lora_B = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
        signs = F.cosine_similarity(layer.lora_A, lora_A, dim=1).sign()
        torch.testing.assert_close(layer.lora_A.detach(), signs[:, None] * lora_A, rtol=0, atol=1e-4)
        torch.testing.assert_close(layer.lora_B.detach(), signs * lora_B, rtol=0, atol=1e-4)
        torch.testing.assert_close(layer.dequantized(torch.float32), module.base_layer.weight.data, rtol=0, atol=1e-4)
        # Now to the last bit, so that the gradients may be compared factor by factor.
        with torch.no_grad():
            lora_A.copy_(layer.lora_A)
            lora_B.copy_(layer.lora_B)


def assert_same_step(ours: Decoder, theirs: nn.Module) -> None:
    """Loss and gradients of one pass."""
    batch = make_batch(ours.config.vocab_size)
    for model in (ours, theirs):
        model.train()
        model.zero_grad()
    loss = ours(batch.input_ids, batch.labels, batch.attention_mask).loss
    expected = theirs(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert abs(loss.item() - expected.item()) < 1e-5
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)


def assert_same_gradients(ours: Decoder, theirs: nn.Module) -> None:
    state, parameters = adapter_state(ours), peft_parameters(theirs)
    assert state.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert parameter.grad.norm() > 0
        error = relative_error(state[name].grad, parameter.grad)
        assert error < 1e-4, f"{name}: relative error of the gradient {error:.2e}"


def assert_each_reads_the_others(ours: Decoder, theirs: nn.Module, folder: Path, base: Path | None = None) -> None:
    """The adapter saved here gives PEFT the same logits, and PEFT's gives them here."""
    base = base or folder / "base"
    save_adapter(ours, folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    batch = make_batch(ours.config.vocab_size)
    expected = logits_of(ours.eval(), batch)
    assert (reference_logits(theirs.eval(), batch) - expected).abs().max() < 1e-4
    again, reference = load_pair(base)
    by_peft = peft.PeftModel.from_pretrained(reference, folder / "ours").eval()
    assert (reference_logits(by_peft, batch) - expected).abs().max() < 1e-4
    load_adapter(again, folder / "theirs")
    assert (logits_of(again, batch) - expected).abs().max() < 1e-4


@contextmanager
def one_seed_for_every_layer() -> Iterator[None]:
    """Both draw for the randomised decomposition from torch's generator, but not in the same order."""
    original = torch.svd_lowrank

    def seeded(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(11)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "svd_lowrank", seeded)
        patch.setattr("peft.tuners.lora.layer.svd_lowrank", seeded)
        yield


def on_this_machine(patch: pytest.MonkeyPatch) -> None:
    """Let PEFT's LoftQ compute where no GPU is, nor scipy, which it asks for but does not use; and quantise absmax."""
    import bitsandbytes as bnb

    find_spec = importlib.util.find_spec
    patch.setattr(importlib.util, "find_spec", lambda name, *args: name == "scipy" or find_spec(name, *args))

    move = torch.Tensor.to

    def here(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        args = tuple("cpu" if arg == "cuda" else arg for arg in args)
        if options.get("device") == "cuda":
            options["device"] = "cpu"
        return move(tensor, *args, **options)

    patch.setattr(torch.Tensor, "to", here)

    class Quantised:
        """What PEFT needs of a `Params4bit`."""

        def __init__(self, data: Tensor, *, quant_type: str, **_: Any) -> None:
            self.data, self.quant_state = bnb.functional.quantize_4bit(
                data, blocksize=64, compress_statistics=True, quant_type=quant_type
            )

        def to(self, device: str) -> "Quantised":
            return self

    patch.setattr(bnb.nn, "Params4bit", Quantised)
