"""Several adapters over one base: each computes what it does alone, in any order, and without one the base is back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slothcore.layers.known_norms import KnownNorms
from slothcore.lora.adapter_io import load_adapter, save_adapter
from slothcore.lora.attach import add_lora
from slothcore.lora.several import SeveralAdapters
from slothcore.lora.stored_adapter import WEIGHTS_FILE
from slothcore.models.decoder import Decoder
from slothcore.models.engine import Engine
from slothcore.models.load import from_config, load_model
from slothcore.models.requests import Request
from slothcore.models.vocabulary import start_rows
from tests.lora.reference import randomise_zero_factors, write_tiny_llama
from tests.models.engines import tokens_of
from tests.models.graph_models import as_function

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 8, 9]])
BIASED = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
# What stands side by side: the base's own switches, and the options of each adapter.
CASES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "ranks, targets, scalings": (
        {},
        {
            "wide": {"r": 12, "lora_alpha": 5},
            "narrow": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
            "head": {"r": 5, "target_modules": ["lm_head", "up_proj"]},
        },
    ),
    "biases": (
        BIASED,
        {
            "of targets": {"r": 4, "bias": "lora_only", "target_modules": ["q_proj"]},
            "all": {"r": 2, "bias": "all"},
            "none": {"r": 4},
        },
    ),
    "trained modules of a tied model": (
        TIED,
        {
            "head": {"r": 4, "modules_to_save": ["lm_head"]},
            "embedding and norms": {"r": 4, "modules_to_save": ["embed_tokens", "norm"]},
            "plain": {"r": 4},
        },
    ),
    "DoRA beside LoRA": (
        {},
        {
            "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj", "lm_head"]},
            "lora": {"r": 9, "lora_alpha": 3},
            "other dora": {"r": 2, "use_dora": True},
        },
    ),
    "DoRA where another trains the whole weight": (
        TIED,
        {
            "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "lm_head"]},
            "head": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        },
    ),
}


def saved(base: Path, folder: Path, seed: int, *, bits: int = 32, **options: Any) -> Path:
    """An adapter with random values in everything that trains."""
    torch.manual_seed(seed)
    model = load_model(base, bits=bits, dtype=torch.float32, device="cpu")
    add_lora(model, **options)
    randomise_zero_factors(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and "lora_B" not in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter)).add_(0.05 * torch.randn_like(parameter))
    save_adapter(model, folder)
    return folder


def logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        result = model.eval()(IDS).logits
    assert result is not None
    return result


def alone(base: Path, folder: Path | None, **options: Any) -> Tensor:
    model = load_model(base, device="cpu", **options)
    return logits(model if folder is None else load_adapter(model, folder))


@pytest.mark.parametrize("options", [{"bits": 32}, {"bits": 4, "dtype": torch.float32}, {"bits": 16}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_each_is_what_it_is_alone(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    switches, adapters = CASES[case]
    base = write_tiny_llama(tmp_path / "base", **switches)
    folders = {
        name: saved(base, tmp_path / name, seed, **each) for seed, (name, each) in enumerate(adapters.items(), 1)
    }
    expected = {name: alone(base, folder, **options) for name, folder in {None: None, **folders}.items()}
    model = load_model(base, device="cpu", **options)
    several = SeveralAdapters(model, folders)
    rounding = 0.03 if options["bits"] == 16 else 1e-4
    addresses = {name: p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False)}
    for name in (None, *folders, None, *reversed(folders), *folders, None):
        several.use(name)
        assert several.current == name
        difference = (logits(model) - expected[name]).abs().max()
        assert difference <= rounding * expected[name].abs().max(), f"{name}: {difference}"
    assert torch.equal(logits(model), expected[None])
    assert addresses == {name: p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False)}
    for one in folders:
        assert (expected[one] - expected[None]).abs().max() > 10 * rounding, (
            "an adapter that changes nothing shows nothing"
        )
    assert several.names == tuple(folders)
    assert None in several
    assert "another" not in several
    with pytest.raises(ValueError, match="there is no adapter 'another'; known are"):
        several.use("another")


def test_norms_that_were_vouched_for_change_with_the_adapter(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base")
    folders = {
        "dora": saved(base, tmp_path / "dora", 1, r=4, use_dora=True),
        "lora": saved(base, tmp_path / "l", 2, r=4),
    }
    expected = {name: alone(base, folder, bits=32) for name, folder in folders.items()}
    model = load_model(base, bits=32, device="cpu")
    several = SeveralAdapters(model, folders)
    norms = KnownNorms()
    norms.compute(model.modules(), model.dtype)
    for name in ("dora", "lora", "dora"):
        several.use(name)
        torch.testing.assert_close(logits(model), expected[name], rtol=1e-4, atol=1e-4)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [4, 32])
def test_the_engine_gives_each_what_it_says_alone(bits: int, device: str, tmp_path: Path) -> None:
    """Requests for all of them side by side, by recorded steps: on a GPU CUDA graphs, whose addresses must stay."""
    base = write_tiny_llama(tmp_path / "base", max_position_embeddings=256)
    options = {"bits": bits, "dtype": torch.float32, "device": device}
    folders = {
        "plain": saved(base, tmp_path / "plain", 1, r=12, lora_alpha=30),
        "dora": saved(base, tmp_path / "dora", 2, r=3, use_dora=True, target_modules=["q_proj", "up_proj"]),
        "head": saved(base, tmp_path / "head", 3, r=4, modules_to_save=["lm_head"]),
    }
    names = [None, *folders]
    prompts = [[(7 * i + 3 * j) % 90 + 3 for j in range(1 + 5 * i)] for i in range(12)]
    expected = {}
    for name in names:
        model = load_model(base, **options)
        if name is not None:
            load_adapter(model, folders[name]).eval()
        requests = [Request(prompt_ids=prompt, max_new_tokens=40) for prompt in prompts[names.index(name) :: 4]]
        expected[name] = tokens_of(Engine(model, capacity=256, graphs=False), requests)
    model = load_model(base, **options)
    several = SeveralAdapters(model, folders)
    requests = [
        Request(prompt_ids=prompt, max_new_tokens=40, adapter=names[index % 4]) for index, prompt in enumerate(prompts)
    ]
    recorder = as_function if device == "cpu" else None
    engine = Engine(model, capacity=256, adapters=several, recorder=recorder, max_rows=9)
    for _ in range(2):  # and again, with what was recorded then
        several.use("dora")
        together = tokens_of(engine, requests)
        assert [together[index::4] for index in range(4)] == list(expected.values())
    assert engine.steps.replays > engine.steps.eager
    assert len({str(tokens) for tokens in expected.values()}) == 4


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_the_base_has_room_for(tied: bool, tmp_path: Path) -> None:
    """Rows of a padded vocabulary: a head that is the embedding gets them as well, and the base has its own again."""
    base = write_tiny_llama(tmp_path / "base", tie_word_embeddings=tied)
    model = load_model(base, bits=32, device="cpu")
    with torch.no_grad():
        start_rows(model, [14, 15])
        add_lora(model, r=3)
        randomise_zero_factors(model)
    save_adapter(model, tmp_path / "tokens")
    folders = {"tokens": tmp_path / "tokens", "plain": saved(base, tmp_path / "plain", 2, r=4)}
    expected = {name: alone(base, folder, bits=32) for name, folder in {None: None, **folders}.items()}
    torch.testing.assert_close(expected["tokens"], logits(model))
    opened = load_model(base, bits=32, device="cpu")
    several = SeveralAdapters(opened, folders)
    for name in ("tokens", "plain", None, "tokens"):
        several.use(name)
        torch.testing.assert_close(logits(opened), expected[name], rtol=1e-4, atol=1e-4)


def test_experts(tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.3,
    }

    def base() -> Decoder:
        torch.manual_seed(1)
        return from_config(config, device="cpu")

    expected, folders = {None: logits(base())}, {}
    for seed, (name, options) in enumerate({"a": {"r": 3, "lora_alpha": 4}, "b": {"r": 5}}.items()):
        model = base()
        torch.manual_seed(seed)
        add_lora(model, modules_to_save=["gate"] if name == "b" else (), **options)
        randomise_zero_factors(model)
        save_adapter(model, tmp_path / name)
        expected[name], folders[name] = logits(model), tmp_path / name
    model = base()
    several = SeveralAdapters(model, folders)
    for name in ("a", None, "b", "a", None):
        several.use(name)
        torch.testing.assert_close(logits(model), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 32])
def test_one_that_began_with_base_weights_stands_on_the_unchanged_ones(bits: int, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base")
    folders = {
        "pissa": saved(base, tmp_path / "pissa", 1, bits=bits, r=4, init_lora_weights="pissa"),
        "plain": saved(base, tmp_path / "plain", 2, bits=bits, r=4),
    }
    expected = {name: alone(base, folder, bits=32) for name, folder in {None: None, **folders}.items()}
    model = load_model(base, bits=bits, dtype=torch.float32, device="cpu")
    if bits == 4:
        with pytest.warns(UserWarning, match="differs from what was trained by what quantising loses"):
            several = SeveralAdapters(model, folders)
    else:
        several = SeveralAdapters(model, folders)
        for name in ("pissa", "plain", None, "pissa"):
            several.use(name)
            torch.testing.assert_close(logits(model), expected[name], rtol=1e-3, atol=1e-3)
    assert not model.taken_out


def test_what_needs_a_model_to_itself_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base")
    grown = load_model(base, bits=32, device="cpu")
    start_rows(grown, [grown.config.vocab_size])
    save_adapter(add_lora(grown, r=2), tmp_path / "grown")
    plain = saved(base, tmp_path / "plain", 1, r=4)
    unconverted = saved(base, tmp_path / "olora", 1, r=4)
    text = (
        (unconverted / "adapter_config.json")
        .read_text()
        .replace('"init_lora_weights": true', '"init_lora_weights": "olora"')
    )
    (unconverted / "adapter_config.json").write_text(text)
    broken = saved(base, tmp_path / "broken", 1, r=4)
    (broken / WEIGHTS_FILE).write_bytes(b"no")
    model = load_model(base, bits=32, device="cpu")
    before = logits(model)
    for folder, message in (
        (tmp_path / "grown", "brings tokens of its own, 98 in all where the base has 97"),
        (unconverted, "belongs to base weights that olora has changed"),
        (broken, "truncated or damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            SeveralAdapters(model, {"plain": plain, "other": folder})
    assert torch.equal(logits(model), before)
    assert all(p.requires_grad for p in model.parameters())
    SeveralAdapters(model, {"plain": plain})
    with pytest.raises(ValueError, match="has a LoRA adapter already"):
        SeveralAdapters(load_adapter(load_model(base, bits=32, device="cpu"), plain), {"plain": plain})
