"""Every family against transformers, from the same files: logits, loss, every gradient, greedy tokens."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import slothcore
from slothcore.layers.norm import RMSNorm
from slothcore.models.decoder import Decoder
from tests.models.zoo import (
    ALL_VARIANTS,
    LONG,
    SHORT,
    Variant,
    gradients_by_our_names,
    quantize_as_bitsandbytes,
    saved,
    tiny_model,
    token_ids,
)
from tests.numerics import relative_error

LOGITS_TOLERANCE, LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-5, 1e-4
Pair = tuple[Decoder, PreTrainedModel]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*belong to no text model"),
    pytest.mark.filterwarnings("ignore:.*has no tokenizer.json"),
    pytest.mark.filterwarnings("ignore:generation goes beyond"),
]


@pytest.fixture(params=ALL_VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


@pytest.fixture
def pair(variant: Variant, tmp_path: Path) -> Pair:
    reference = tiny_model(variant)
    ours, _ = slothcore.load(saved(reference, tmp_path), bits=32, device="cpu")
    return ours, reference


def logits_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids).logits


def assert_same_logits(ours: nn.Module, reference: nn.Module) -> None:
    """At lengths before and beyond the windows and every RoPE's original length."""
    for length in (SHORT, LONG):
        input_ids = token_ids(2, length)
        expected = logits_of(reference, input_ids)
        assert expected.std() > 0.1, "the reference says nothing"
        assert (logits_of(ours, input_ids) - expected).abs().max() < LOGITS_TOLERANCE, f"at length {length}"


def test_logits(variant: Variant, pair: Pair) -> None:
    assert_same_logits(*pair)


def test_shards(variant: Variant, pair: Pair, tmp_path: Path) -> None:
    ours, reference = pair
    folder = saved(reference, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    sharded = slothcore.load(folder, bits=32, device="cpu")[0].state_dict()
    assert sharded.keys() == ours.state_dict().keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(sharded[name], weight), name


def test_loss(variant: Variant, pair: Pair) -> None:
    ours, reference = pair
    input_ids = token_ids(2, LONG)
    labels = input_ids.clone()
    labels[0, :7] = -100
    labels[1, 20:53] = -100
    with torch.no_grad():
        expected, actual = reference(input_ids, labels=labels).loss, ours(input_ids, labels=labels)
    assert actual.logits is None
    assert actual.num_targets == (LONG - 7) + (LONG - 1 - 33)
    assert abs(actual.loss - expected) < LOSS_TOLERANCE


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_gradients(variant: Variant, pair: Pair, checkpointing: bool) -> None:
    """Of every weight, when all of them train."""
    ours, reference = pair
    input_ids = token_ids(2, LONG)
    labels = input_ids.masked_fill(torch.arange(LONG) % 7 == 3, -100)
    reference(input_ids, labels=labels).loss.backward()
    ours.gradient_checkpointing = checkpointing
    ours(input_ids, labels=labels).loss.backward()
    expected = gradients_by_our_names(reference)
    actual = {name: weight.grad for name, weight in ours.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-5, f"{name} gets no gradient"
        assert relative_error(actual[name], gradient) < GRADIENT_TOLERANCE, name


def test_greedy_tokens(variant: Variant, pair: Pair) -> None:
    """64 tokens with a cache of keys and values; and what reads them again without a cache agrees."""
    ours, reference = pair
    prompt = token_ids(1, 6)
    expected = reference.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    actual = ours.generate(prompt, max_new_tokens=64, eos_token_id=(), pad_token_id=0)
    assert actual.tolist() == expected.tolist()
    assert len(set(actual[0].tolist())) > 5, "a constant answer would prove little"
    if not ours.config.rope.depends_on_length:
        assert logits_of(ours, actual)[:, 5:-1].argmax(-1).tolist() == actual[:, 6:].tolist()


@pytest.mark.parametrize("variant", [variant for variant in ALL_VARIANTS if variant.off], ids=str)
def test_switches_matter(variant: Variant, pair: Pair) -> None:
    """With the variant's switches off the same weights give other logits, so the comparison above can fail."""
    ours, _ = pair
    for field, value in variant.off.items():
        assert getattr(ours.config, field) != value, f"{field} is off already"
        without = Decoder(replace(ours.config, **{field: value})).eval()
        without.load_state_dict(ours.state_dict(), strict=False)
        distance = (logits_of(without, token_ids(1, LONG)) - logits_of(ours, token_ids(1, LONG))).abs().max()
        assert distance > 100 * LOGITS_TOLERANCE, field


def test_packed_documents(variant: Variant, pair: Pair) -> None:
    """Each document of a packed stream is what it is alone to transformers, whatever its neighbours' lengths."""
    ours, reference = pair
    documents = [token_ids(length, seed=length) for length in (SHORT, LONG, 1, SHORT + 3)]
    cu_seqlens = torch.tensor([0, *(len(document) for document in documents)]).cumsum(0)
    with torch.no_grad():
        packed = ours(torch.cat(documents), cu_seqlens=cu_seqlens).logits
    for document, actual in zip(documents, packed.split([len(d) for d in documents]), strict=True):
        assert (actual - logits_of(reference, document[None])[0]).abs().max() < LOGITS_TOLERANCE


def test_nf4(variant: Variant, pair: Pair, tmp_path: Path) -> None:
    """Quantised while it is read: as transformers with the values that bitsandbytes decodes."""
    _, reference = pair
    before = logits_of(reference, token_ids(1, SHORT))
    quantize_as_bitsandbytes(reference)
    assert_same_logits(slothcore.load(tmp_path, bits=4, device="cpu")[0], reference)
    assert (logits_of(reference, token_ids(1, SHORT)) - before).abs().max() > 100 * LOGITS_TOLERANCE


def test_bfloat16(variant: Variant, pair: Pair, tmp_path: Path) -> None:
    """As near to float32 as transformers is in bfloat16."""
    _, reference = pair
    input_ids = token_ids(4, LONG)
    exact = logits_of(reference, input_ids)
    ours = logits_of(slothcore.load(tmp_path, bits=16, dtype=torch.bfloat16, device="cpu")[0], input_ids)
    theirs = logits_of(reference.bfloat16(), input_ids)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


def test_rounding(variant: Variant, pair: Pair, tmp_path: Path) -> None:
    """In bfloat16 every norm and the scaled embedding round where those of transformers do, to the bit."""
    _, reference = pair
    ours, _ = slothcore.load(tmp_path, bits=16, dtype=torch.bfloat16, device="cpu")
    theirs = reference.bfloat16().get_decoder()
    norms = {name: module for name, module in ours.model.named_modules() if isinstance(module, RMSNorm)}
    assert len(norms) > 2 * ours.config.num_hidden_layers
    for name, norm in norms.items():
        x = torch.randn(200, len(norm.weight), dtype=torch.bfloat16)
        with torch.no_grad():
            expected = theirs.get_submodule(name)(x)
            assert torch.equal(norm(x).y, expected), name
            norm.cast_before_weight = not norm.cast_before_weight
            assert not torch.equal(norm(x).y, expected), f"{name}: the order of rounding does not show"
    input_ids = token_ids(30)
    scale = 1.0 if ours.model.embedding_scale is None else ours.model.embedding_scale
    assert torch.equal(ours.model.embed_tokens(input_ids) * scale, theirs.get_input_embeddings()(input_ids))


@pytest.mark.gpu
def test_gpu(variant: Variant, pair: Pair, tmp_path: Path) -> None:
    """The kernels with every combination of switches: logits and all gradients in float32 are those of the CPU."""
    on_cpu, _ = pair
    on_gpu, _ = slothcore.load(tmp_path, bits=32, device="cuda")
    input_ids = token_ids(2, LONG)
    expected = logits_of(on_cpu, input_ids)
    assert relative_error(logits_of(on_gpu, input_ids).cpu(), expected) < 1e-4
    for model in (on_cpu, on_gpu):
        model(input_ids, labels=input_ids).loss.backward()
    gradients = dict(on_gpu.named_parameters())
    for name, weight in on_cpu.named_parameters():
        assert relative_error(gradients[name].grad.cpu(), weight.grad) < 1e-3, name
