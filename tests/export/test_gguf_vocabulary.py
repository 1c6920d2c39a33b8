"""Vocabularies with holes, padding and added tokens, and odd texts in the keys: llama.cpp loads and says the same."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("xllamacpp")

from gguf import GGUFReader

import slothcore
from slothcore.data.tokenizer import Tokenizer
from slothcore.export.export import export_model
from slothcore.export.gguf_tokenizer import metadata
from slothcore.loading import load
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config
from tests.export.gguf_models import FAMILIES, adapted, byte_level_tokenizer, load_case, sentencepiece_tokenizer
from tests.export.llama_cpp import LlamaCpp
from tests.export.test_gguf_llama_cpp import ERROR, logprobs, own_greedy, own_logprobs
from tests.training.tiny import CONFIG

pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer")
TEXT = "The king<|tool|>is in\n<x> the <|im_end|>other<|tool|>"


def changed(folder: Path, make: Callable[[Path], Tokenizer], **files: Callable[[dict[str, Any]], None]) -> Tokenizer:
    """A tokenizer of that kind, with other values in tokenizer.json (`tokenizer`) or its configuration (`config`)."""
    make(folder)
    for name, change in files.items():
        file = folder / {"tokenizer": "tokenizer.json", "config": "tokenizer_config.json"}[name]
        values = json.loads(file.read_text(encoding="utf-8"))
        change(values)
        file.write_text(json.dumps(values), encoding="utf-8")
    return Tokenizer.from_folder(folder)


def added(text: str, index: int, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": text, **plain, **flags}


def small_model(vocab_size: int) -> Decoder:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "tie_word_embeddings": True}
    return from_config({**CONFIG, **sizes, "vocab_size": vocab_size}, device="cpu")


def file_of(tokenizer: Tokenizer, folder: Path, vocab_size: int, **attributes: Any) -> Path:
    model = small_model(vocab_size)
    for name, value in attributes.items():
        setattr(model, name, value)
    export_model(model, tokenizer, folder, format="gguf", dtype="f16", check=False)
    return folder / "model-F16.gguf"


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_added_tokens_out_of_order_with_holes_between(make: Callable[[Path], Tokenizer], tmp_path: Path) -> None:
    """And a padded vocabulary, one of whose tokens is called as the padding would be."""

    def add(source: dict[str, Any]) -> None:
        source["added_tokens"] = [added("<|tool|>", 345), *source["added_tokens"]]
        source["added_tokens"] += [added("<x>", 331, special=False), added("[PAD350]", 340), added("[[PAD351]]", 341)]
        source["added_tokens"] += [added("[PAD351]", 342)]

    tokenizer = changed(tmp_path / "tokenizer", make, tokenizer=add)
    size = 360
    file = file_of(tokenizer, tmp_path / "out", size)
    fields = GGUFReader(file).fields
    names, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    assert len(set(names)) == len(names) == len(types) == size
    ids = [tokenizer.token_id(text) for text in ("<|tool|>", "<x>", "[PAD350]", "[PAD351]")]
    assert [(names[i], types[i]) for i in ids if i is not None] == [
        ("<|tool|>", 3),
        ("<x>", 4),
        ("[PAD350]", 3),
        ("[PAD351]", 3),
    ]
    assert types[359] == 5
    with LlamaCpp(file) as server:
        for text in (TEXT, "is it[PAD350]?", "[PAD351]"):
            assert server.tokenize(text) == tokenizer.encode(text)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_look_beside_them(flag: str, tmp_path: Path) -> None:
    """They do so in llama.cpp for Phi-3 alone; elsewhere it is said."""

    def add(source: dict[str, Any]) -> None:
        source["added_tokens"].append(added("<|tool|>", 320, **{flag: True}))

    tokenizer = changed(tmp_path / "tokenizer", byte_level_tokenizer, tokenizer=add)
    with pytest.warns(UserWarning, match=r"finds a token such as '<\|tool\|>' wherever it stands and leaves the"):
        metadata(tokenizer, 321)


@pytest.mark.parametrize("dtype", ["q8_0", "q4_k_m", "f16"])
@pytest.mark.parametrize("size", [1e-7, 1e-9, 0.0])
def test_weights_that_are_next_to_nothing(size: float, dtype: str, tmp_path: Path) -> None:
    """As of a layer that was added and has not been trained: what float16 makes of them is no mistake."""
    model = load_case(FAMILIES["llama"], tmp_path / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= size
        model.model.layers[1].self_attn.o_proj.weight *= size
    assert export_model(model, None, tmp_path / "out", format="gguf", dtype=dtype).startswith("read back")


def test_special_tokens_beyond_the_embedding(tmp_path: Path) -> None:
    """A pad token that somebody has added without a row for it."""

    def add(source: dict[str, Any]) -> None:
        source["added_tokens"] += [added("<pad>", 400), added("<unk2>", 401)]
        source["model"]["vocab"]["<unk2>"] = 401
        source["model"]["unk_token"] = "<unk2>"

    def name(config: dict[str, Any]) -> None:
        config["pad_token"] = "<pad>"

    tokenizer = changed(tmp_path / "tokenizer", sentencepiece_tokenizer, tokenizer=add, config=name)
    assert (tokenizer.pad_token_id or 0) >= 320
    keys = metadata(tokenizer, 320)
    assert not keys.keys() & {"tokenizer.ggml.padding_token_id", "tokenizer.ggml.unknown_token_id"}
    with LlamaCpp(file_of(tokenizer, tmp_path / "out", 320)) as server:
        assert server.tokenize("the king is there") == tokenizer.encode("the king is there")


@pytest.mark.parametrize(
    "generation", [{"top_k": -1}, {"top_k": 0, "temperature": 1}, {"temperature": "0.7", "top_p": None, "min_p": True}]
)
def test_odd_parameters_of_sampling(generation: Mapping[str, Any], tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer")
    file = file_of(tokenizer, tmp_path / "out", 320, generation_config={"do_sample": True, **generation})
    found = {name: field.contents() for name, field in GGUFReader(file).fields.items() if ".sampling." in name}
    kept = {name: value for name, value in generation.items() if type(value) in (int, float)}
    names = {"general.sampling.temp": "temperature", "general.sampling.top_k": "top_k"}
    assert {names[name]: value for name, value in found.items()} == kept
    with LlamaCpp(file) as server:
        assert server.tokenize("the king") == tokenizer.encode("the king")


def test_names_and_templates_in_every_script(tmp_path: Path) -> None:
    template = "{% for m in messages %}«{{ m.role }}» {{ m.content }}\u2028\U0001f9a5\n{% endfor %}"

    def change(config: dict[str, Any]) -> None:
        config["chat_template"] = template

    tokenizer = changed(tmp_path / "tokenizer", byte_level_tokenizer, config=change)
    file = file_of(tokenizer, tmp_path / "Modèle 日本 \U0001f9a5", 320, name_or_path="jemand/Größe-日本")
    fields = GGUFReader(file).fields
    assert fields["general.name"].contents() == "Größe-日本"
    assert fields["tokenizer.chat_template"].contents() == template
    messages = [{"role": "user", "content": "naïve"}]
    with LlamaCpp(file) as server:
        written = server.ask("/apply-template", messages=messages)["prompt"]
    assert written.strip() == tokenizer.apply_chat_template(messages).strip()


def test_new_tokens_and_trained_tables(tmp_path: Path) -> None:
    """A vocabulary that has grown, with a head that left the embedding: reloaded, merged and exported."""
    base = tmp_path / "base"
    load_case(FAMILIES["llama"], base)
    sentencepiece_tokenizer(base)
    model, tokenizer = load(base, bits=32, device="cpu")
    assert tokenizer is not None
    slothcore.add_tokens(model, tokenizer, ["<|tool|>", "<x>"])
    adapted(model, modules_to_save=["embed_tokens", "lm_head"])
    with torch.no_grad():
        model.lm_head.weight += 0.02 * torch.randn_like(model.lm_head.weight)
    model.eval()
    ids = tokenizer.encode("The king<|tool|> is in<x>")
    assert max(ids) >= 320
    size = model.config.vocab_size
    export_model(model, tokenizer, tmp_path / "gguf", format="gguf", dtype="f32")
    export_model(model, tokenizer, tmp_path / "merged", dtype="float32")
    shutil.rmtree(base)
    with LlamaCpp(tmp_path / "gguf" / "model-F32.gguf") as server:
        assert server.tokenize("The king<|tool|> is in<x>") == ids
        assert (logprobs(server, ids, size) - own_logprobs(model, ids)[-1]).abs().max() < ERROR
        assert server.greedy(ids, 12) == own_greedy(model, ids, 12, (2, 4))
    again, its_tokenizer = load(tmp_path / "merged", bits=32, device="cpu")
    assert its_tokenizer is not None
    assert its_tokenizer.encode("The king<|tool|> is in<x>") == ids
    torch.testing.assert_close(own_logprobs(again, ids), own_logprobs(model, ids), rtol=1e-4, atol=1e-4)
