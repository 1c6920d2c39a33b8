"""Adapters as GGUF files: on the GGUF file of their base, llama.cpp says what the merged model says."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("xllamacpp")

from gguf import GGUFReader

from slothcore.data.tokenizer import Tokenizer
from slothcore.export import gguf_lora
from slothcore.export.export import export_model
from slothcore.export.gguf_quantize import quantize
from slothcore.lora.attach import add_lora
from slothcore.models.load import load_model
from tests.export.gguf_models import CASES, FAMILIES, VOCAB_SIZE, Case, adapted, load_case, sentencepiece_tokenizer
from tests.export.llama_cpp import LlamaCpp
from tests.models.zoo import token_ids

pytestmark = pytest.mark.filterwarnings("ignore:llama.cpp", "ignore:.*belong to no text model", "ignore:.*tokenizer")
LLAMA = FAMILIES["llama"]
GELU_ERROR, ERROR = 5e-3, 5e-5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return sentencepiece_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def on_its_base(base: Path, folder: Path, tokenizer: Tokenizer, ids: list[int], **options: Any) -> torch.Tensor:
    """What llama.cpp says with the adapter in `folder` on a GGUF file of `base`, [V]."""
    plain = load_model(base, bits=32, device="cpu", progress=False)
    export_model(plain, tokenizer, folder / "plain", format="gguf", dtype="f32")
    with LlamaCpp(folder / "plain" / "model-F32.gguf", adapter=folder / "adapter" / "adapter-F32.gguf") as server:
        found = server.logprobs(ids, VOCAB_SIZE)
    return torch.tensor([found[token] for token in range(VOCAB_SIZE)])


@torch.no_grad()
def own(model: Any, ids: list[int]) -> torch.Tensor:
    return model.eval()(torch.tensor(ids)).logits[-1].float().log_softmax(-1)


@pytest.mark.parametrize("case", FAMILIES.values(), ids=str)
def test_the_adapter_on_its_base_is_the_merged_model(case: Case, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """In every family, on every linear layer, experts too."""
    model = adapted(load_case(case, tmp_path / "base"))
    said = export_model(model, tokenizer, tmp_path / "adapter", format="gguf-adapter")
    assert said.startswith("read back in the place of the model's own: the same logits")
    ids = token_ids(case.lengths[-1], vocab_size=VOCAB_SIZE).tolist()
    found = on_its_base(tmp_path / "base", tmp_path, tokenizer, ids)
    largest = GELU_ERROR if case.base.family.startswith("gemma") else ERROR
    assert (found - own(model, ids)).abs().max() < largest
    export_model(model, tokenizer, tmp_path / "merged", format="gguf", dtype="f32")
    with LlamaCpp(tmp_path / "merged" / "model-F32.gguf") as server:
        merged = server.logprobs(ids, VOCAB_SIZE)
    assert max(abs(merged[token] - found[token]) for token in merged) < largest


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"up_proj": 3}},
        {"target_modules": ["q_proj", "lm_head"]},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_every_kind_of_scaling(options: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """One alpha stands for all layers; an adapter that began with a part of the base is one for the whole base."""
    base = load_case(LLAMA, tmp_path / "base")
    model = add_lora(base, r=4, lora_alpha=8, **options) if "init_lora_weights" in options else adapted(base, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter *= 1.1  # or what PiSSA takes out would be what it puts in
    export_model(model, None, tmp_path / "adapter", format="gguf-adapter")
    ids = token_ids(40, vocab_size=VOCAB_SIZE).tolist()
    found = on_its_base(tmp_path / "base", tmp_path, tokenizer, ids)
    assert (found - own(model, ids)).abs().max() < ERROR


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_file_holds_the_factors_and_alpha(dtype: str, tmp_path: Path) -> None:
    model = adapted(load_case(LLAMA, tmp_path / "base"))
    export_model(model, None, tmp_path / "adapter", format="gguf-adapter", dtype=dtype)
    reader = GGUFReader(tmp_path / "adapter" / f"adapter-{dtype.upper()}.gguf")
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
    assert reader.fields["general.type"].contents() == "adapter"
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {dtype.upper()}
    stored = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert gguf_lora.size(model, dtype) == stored
    names = {str(tensor.name) for tensor in reader.tensors}
    assert names >= {"blk.0.attn_q.weight.lora_a", "blk.1.ffn_down.weight.lora_b"}
    assert len(names) == 2 * 7 * model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "trained biases"),
        ({"target_modules": ["lm_head"]}, "a LoRA term of a head that is the embedding"),
        (None, "the model has no LoRA adapter"),
    ],
)
def test_what_is_more_than_two_factors_is_refused(options: Any, what: str, tmp_path: Path) -> None:
    index = {"trained biases": "biases", "a LoRA term of a head that is the embedding": "tied-head"}.get(what)
    case = next(case for case in CASES if case.name == index) if index else LLAMA
    model = load_case(case, tmp_path / "base")
    if options is not None:
        adapted(model, **options)
    with pytest.raises(ValueError, match=what):
        export_model(model, None, tmp_path / "out", format="gguf-adapter")
    assert not (tmp_path / "out").exists()


def test_a_factor_that_is_another_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(load_case(LLAMA, tmp_path / "base"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    monkeypatch.setattr(gguf_lora, "quantize", lambda factor, kind: quantize(factor * 1.05, kind))
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.weight\.lora_a of the GGUF file is not what the model has"):
        export_model(model, None, tmp_path / "out", format="gguf-adapter")
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
