"""Which adapter a run trains, from the options alone: one that begins with base weights, and one that was saved."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slothcore.loading import load
from slothcore.locating import _check_beside
from slothcore.lora.adapter_io import save_adapter
from slothcore.lora.attach import add_lora
from slothcore.run import train_from_config
from slothcore.training.config import TrainConfig
from slothcore.training.report import read_log
from tests.training.tiny import QUIET, write_model, write_records

WEIGHTS = "adapter_model.safetensors"
COMMON = {**QUIET, "device": "cpu", "r": 4, "lora_alpha": 8, "learning_rate": 5e-3, "report": False}
FROM_WEIGHTS = [
    ("pissa", {"bits": 32}),
    ("pissa", {"bits": 4}),
    ("pissa_niter_3", {"bits": 4}),
    ("olora", {"bits": 16, "lora_dtype": "auto"}),
    ("loftq", {"bits": 4, "loftq_iter": 2, "lora_dropout": 0.1}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_model(folder / "model")
    write_records(folder / "data.jsonl", 12)
    return folder


def options(folder: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    places = {"model": str(folder / "model"), "data": str(folder / "data.jsonl"), "output_dir": str(output_dir)}
    return {**COMMON, **places, **changes}


def train(values: dict[str, Any]) -> list[float]:
    """The losses of a run."""
    train_from_config(TrainConfig(**values))
    return [record["loss"] for record in read_log(Path(values["output_dir"]) / "log.jsonl") if "loss" in record]


def logits(name: Path, bits: int, dtype: str | None = None) -> torch.Tensor:
    model, _ = load(name, bits=bits, device="cpu", dtype=dtype)
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def assert_same_files(one: Path, other: Path) -> None:
    mine, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize(("init", "changes"), FROM_WEIGHTS)
def test_a_base_that_has_changed_is_made_again_to_the_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str, changes: dict[str, Any]
) -> None:
    """Straight through, and in two halves, of which the second computes no decomposition."""
    values = {"init_lora_weights": init, **changes}
    straight = train(options(folder, tmp_path / "straight", max_steps=6, save_steps=3, **values))
    train(options(folder, tmp_path / "halves", max_steps=6, save_steps=3, **values))
    resumed = options(folder, tmp_path / "halves", max_steps=6, save_steps=3, **values)

    def elsewhere(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("another machine would round otherwise")

    for name in ("linalg.svd", "linalg.qr", "svd_lowrank"):
        monkeypatch.setattr(f"torch.{name}", elsewhere)
    checkpoint = str(tmp_path / "halves" / "checkpoint-3")
    assert train({**resumed, "resume_from_checkpoint": checkpoint}) == straight
    assert_same_files(tmp_path / "straight" / "adapter", tmp_path / "halves" / "adapter")
    assert straight[-1] < straight[0]


@pytest.mark.parametrize(("init", "changes"), FROM_WEIGHTS)
def test_what_was_trained_is_what_is_loaded(
    folder: Path, tmp_path: Path, init: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    original = save_adapter

    def keeping(model: Any, path: Path) -> None:
        with torch.no_grad():
            trained.append(model.eval()(torch.arange(40)[None]).logits)
        original(model, path)

    monkeypatch.setattr("slothcore.training.weights.save_adapter", keeping)
    run = tmp_path / "run"
    train(options(folder, run, max_steps=3, init_lora_weights=init, **changes))
    loaded = logits(run, changes["bits"])
    if changes.get("lora_dtype") == "auto":
        # A loaded adapter computes in the float32 of its factors.
        assert (loaded - trained[-1]).abs().max() < 0.05 * trained[-1].abs().max()
    else:
        assert torch.equal(loaded, trained[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "olora"}, r"was begun with init_lora_weights 'pissa', and init_lora_weights is 'olora'"),
        ({"r": 8}, "was begun with r 4, and r is 8; set it back, or start a new run"),
        ({"target_modules": "q_proj"}, r"was begun with target_modules \(.*\), and target_modules is 'q_proj'"),
        ({"init_lora_weights": True}, "is of another model"),
        ({"bits": 4}, "is of another model"),
    ],
)
def test_another_beginning_is_refused_when_resuming(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    values = options(folder, tmp_path / "run", bits=32, max_steps=2, save_steps=1, init_lora_weights="pissa")
    train(values)
    resumed = {**values, "max_steps": 4, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=message):
        train({**resumed, **changes})
    assert len(train(resumed)) == 4


def test_layers_ranks_and_alphas_of_their_own(folder: Path, tmp_path: Path) -> None:
    """They are what PEFT makes of these options, the run resumes to the bit, and others go on with its adapter."""
    own = {
        "exclude_modules": "o_proj,v_proj",
        "layers_to_transform": [1],
        "rank_pattern": {"down_proj": 2, r"self_attn\.q_proj": 6},
        "alpha_pattern": {"down_proj": 1},
    }
    values = {"bits": 32, "max_steps": 4, "save_steps": 2, **own}
    train(options(folder, tmp_path / "straight", **values))
    checkpoint = str(tmp_path / "straight" / "checkpoint-2")
    train(options(folder, tmp_path / "halves", resume_from_checkpoint=checkpoint, **values))
    assert_same_files(tmp_path / "straight" / "adapter", tmp_path / "halves" / "adapter")
    factors = load_file(tmp_path / "straight" / "adapter" / WEIGHTS)
    ranks = {name.split(".")[-3]: len(factor) for name, factor in factors.items() if "lora_A" in name}
    assert ranks == {"q_proj": 6, "k_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 2}
    assert not any("layers.0." in name for name in factors)
    model, _ = load(tmp_path / "straight", bits=32, device="cpu")
    down, key = model.model.layers[1].mlp.down_proj, model.model.layers[1].self_attn.k_proj
    assert (down.lora_scaling, key.lora_scaling) == (1 / 2, 8 / 4)
    further = options(folder, tmp_path / "further", bits=32, max_steps=1, adapter=str(tmp_path / "straight"))
    assert train({**further, **own})
    with pytest.raises(ValueError, match=r"whose rank_pattern is .*, and rank_pattern is set to"):
        train({**further, "output_dir": str(tmp_path / "other"), "rank_pattern": {"down_proj": 3}})


@pytest.fixture(scope="module")
def first(folder: Path) -> Path:
    """A run whose adapter others go on with."""
    train(options(folder, folder / "first", bits=32, max_steps=3, target_modules="q_proj,down_proj", lora_dropout=0.1))
    return folder / "first"


@pytest.mark.parametrize("name", ["first", "first/adapter"])
@pytest.mark.parametrize("with_model", [True, False])
def test_a_saved_adapter_is_trained_further(
    folder: Path, first: Path, tmp_path: Path, name: str, with_model: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    values = options(folder, tmp_path / "second", bits=32, max_steps=2, adapter=str(folder / name))
    values = {name: value for name, value in values.items() if name not in ("r", "lora_alpha")}
    if not with_model:
        del values["model"]
    before = load_file(first / "adapter" / WEIGHTS)
    losses = train(values)
    assert f"training the adapter of {folder / name} further: r 4, lora_alpha 8" in capsys.readouterr().out
    after = load_file(tmp_path / "second" / "adapter" / WEIGHTS)
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before if "lora_B" in name)
    # It goes on from where the first run ended, which begins with this loss.
    assert losses[0] < train(options(folder, tmp_path / "anew", bits=32, max_steps=1))[0]
    # The result stands on its own, and may be gone on with again.
    assert logits(tmp_path / "second", 32).shape == (1, 40, 258)
    third = {**values, "output_dir": str(tmp_path / "third"), "adapter": str(tmp_path / "second")}
    assert train(third)[0] < losses[0]


def test_an_adapter_beside_weights_of_other_bits_is_said(folder: Path, first: Path, tmp_path: Path, capsys) -> None:
    for bits in (32, 4):
        train(options(folder, tmp_path / str(bits), bits=bits, max_steps=1, adapter=str(first / "adapter")))
        told = "that adapter was trained beside weights of 32 bits, and bits is 4" in capsys.readouterr().out
        assert told == (bits == 4)


def test_what_trains_further_resumes_to_the_bit(folder: Path, first: Path, tmp_path: Path) -> None:
    values = {"bits": 32, "max_steps": 4, "save_steps": 2, "adapter": str(first), "target_modules": "q_proj,down_proj"}
    straight = train(options(folder, tmp_path / "straight", **values))
    halves = options(folder, tmp_path / "halves", **values)
    train(halves)
    assert train({**halves, "resume_from_checkpoint": str(tmp_path / "halves" / "checkpoint-2")}) == straight
    assert_same_files(tmp_path / "straight" / "adapter", tmp_path / "halves" / "adapter")


def test_one_that_began_with_base_weights_goes_on_with_its_base(folder: Path, tmp_path: Path) -> None:
    """In NF4 to the bit, and what the second run saves brings it back as well."""
    train(options(folder, tmp_path / "first", bits=4, max_steps=2, init_lora_weights="pissa"))
    train(options(folder, tmp_path / "second", bits=4, max_steps=2, adapter=str(tmp_path / "first")))
    model, _ = load(tmp_path / "second", bits=4, device="cpu")
    again, _ = load(tmp_path / "first", bits=4, device="cpu")
    assert model.lora_config.init_lora_weights == "pissa"
    assert model.lora_config.r == 4
    for path, (lora_A, lora_B) in again.taken_out.items():
        assert torch.equal(lora_A, model.taken_out[path][0])
        assert torch.equal(lora_B, model.taken_out[path][1])
        assert torch.equal(model.get_submodule(path).weight, again.get_submodule(path).weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, "first comes with an adapter, whose r is 4, and r is set to 8; drop the option"),
        ({"lora_dropout": 0.2}, "whose lora_dropout is 0.1, and lora_dropout is set to 0.2"),
        ({"init_lora_weights": "pissa"}, "whose init_lora_weights is True, and init_lora_weights is set to 'pissa'"),
        ({"use_rslora": True}, "whose use_rslora is False, and use_rslora is set to True"),
        ({"full_finetuning": True}, "would be trained further, and full_finetuning trains no adapter; drop one"),
        ({"adapter": "no where"}, "the folder no where does not exist; a model on the Hub is named owner/name"),
        ({"adapter": "{folder}/model"}, "is a whole model and no adapter; give it as the model, and leave adapter out"),
        ({"model": "{folder}/first"}, "first is no base model, so the adapter .* cannot be put on it; name"),
        (
            {"output_dir": "{folder}/first", "overwrite_output_dir": True},
            "adapter .* lies in output_dir .*, where this run would replace it; choose another output_dir",
        ),
    ],
)
def test_what_does_not_go_with_a_saved_adapter(
    folder: Path, first: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    changes = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in changes.items()}
    values = options(folder, tmp_path / "run", bits=32, max_steps=1, adapter=str(first))
    with pytest.raises(ValueError, match=message):
        train({**values, **changes})
    assert (first / "adapter" / WEIGHTS).is_file()
    assert not (tmp_path / "run").exists()


def test_from_python(folder: Path, first: Path) -> None:
    """What `--adapter` does: `load` with an adapter beside the model."""
    model, tokenizer = load(folder / "model", adapter=first, bits=32, device="cpu")
    assert tokenizer is not None
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        assert torch.equal(model(torch.arange(40)[None]).logits, logits(first, 32))


def test_an_adapter_of_another_model_is_said(folder: Path, tmp_path: Path) -> None:
    model, _ = load(folder / "model", bits=32, device="cpu")
    model.name_or_path = "someone/else"
    save_adapter(add_lora(model, r=2), tmp_path)
    with pytest.warns(UserWarning, match="the adapter mine was made for someone/else, and is put on org/model$"):
        _check_beside(tmp_path, "mine", "org/model", weights=True)
    # A folder may well hold the model of that name.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder / "model", adapter=tmp_path, bits=32, device="cpu")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_lora_weights": "corda"}, r"init_lora_weights must be true, .* olora or loftq .*, got 'corda'"),
        ({"init_lora_weights": "pissa_niter_x"}, "got 'pissa_niter_x'"),
        (
            {"init_lora_weights": "loftq", "bits": 16},
            "loftq makes up for what NF4 loses, and bits is 16; set bits to 4",
        ),
        ({"loftq_iter": 2}, "loftq_iter is 2, and has no effect without init_lora_weights loftq; set that too"),
        ({"loftq_iter": 0, "init_lora_weights": "loftq"}, "loftq_iter must be at least 1, got 0"),
        ({"adapter": ""}, "adapter must not be empty"),
    ],
)
def test_options_that_say_nothing_that_can_be_done(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


def test_options_are_read_as_a_file_or_a_flag_has_them() -> None:
    for written, meant in (("true", True), ("false", False), (True, True), ("pissa_niter_4", "pissa_niter_4")):
        assert TrainConfig(init_lora_weights=written).init_lora_weights == meant
