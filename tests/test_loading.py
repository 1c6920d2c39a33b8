"""`slothcore.load`: model and tokenizer together, and an adapter on its base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from slothcore import loading, locating
from slothcore.cli import main
from slothcore.loading import load
from slothcore.lora.adapter_io import load_adapter, save_adapter
from slothcore.lora.attach import add_lora
from slothcore.models.decoder import Decoder
from tests.models.tiny import SIZES, saved, tiny_llama, token_ids
from tests.training.tiny import write_model, write_records, write_tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `adapter`, which names its base as "model": by no absolute path."""
    folder = tmp_path_factory.mktemp("pair")
    write_model(folder / "model")
    model, _ = load(folder / "model", bits=32, device="cpu")
    add_lora(model, r=4, init_lora_weights=False)
    save_adapter(model, folder / "adapter")
    name_base(folder / "adapter", "../model")
    return folder


@pytest.fixture
def here(pair: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(pair, tmp_path / "pair")


def name_base(adapter: Path, base: str | None, **further: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base, **further}))


@torch.no_grad()
def logits(model: Decoder) -> torch.Tensor:
    return model(torch.arange(1, 20)[None]).logits


def test_model_and_tokenizer(shared_data: Path) -> None:
    model, tokenizer = load(shared_data / "models" / "babyllama-105", bits=32, device="cpu")
    assert tokenizer is not None
    assert model.config.vocab_size == 105
    assert model.max_seq_length == 256
    ids = tokenizer.encode("Once upon a time")
    assert 1 < len(ids) <= 105


def test_without_a_tokenizer(tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path)
    with pytest.warns(UserWarning, match="has no tokenizer.json, so load returns None"):
        model, tokenizer = load(folder, device="cpu")
    assert tokenizer is None
    assert model.bits == 4


def test_wrong_options_are_said_before_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HfApi, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match="bits must be one of 4, 16, 32, got 3"):
        load("org/name", bits=3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("", {}, "the name of the model is empty; give a folder, or a Hub name"),
        ("org/name", {"max_seq_length": "2048"}, "max_seq_length must be a whole number of at least 1, got '2048'"),
        ("org/name", {"max_seq_length": 2048.0}, "max_seq_length must be a whole number of at least 1, got 2048.0"),
        ("org/name", {"max_seq_length": 0}, "max_seq_length must be a whole number of at least 1, got 0"),
        ("https://huggingface.co/org/name/tree/main", {}, "is an address; give the repository's name, org/name$"),
        ("one/two/three", {}, "the folder one/two/three does not exist; a model on the Hub is named owner/name"),
    ],
)
def test_what_can_be_no_model(monkeypatch: pytest.MonkeyPatch, name: str, options: dict, message: str) -> None:
    monkeypatch.setattr(HfApi, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match=message):
        load(name, device="cpu", **options)


def test_a_broken_tokenizer_is_said_before_the_weights_are_read(tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load(folder, device="cpu")
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="does not exist"):
        load(folder, device="cpu")


def test_options_reach_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tiny_llama(), tmp_path)
    asked: dict[str, Any] = {}

    def load_model(folder: Path, **options: Any) -> None:
        asked.update(options, folder=folder)
        raise ValueError("enough")

    monkeypatch.setattr(loading, "load_model", load_model)
    with pytest.raises(ValueError, match="enough"):
        load(folder, bits=16, device="cpu", max_seq_length=900, rope_scaling="yarn", progress=False)
    expected = {"bits": 16, "dtype": None, "device": "cpu", "max_seq_length": 900, "rope_scaling": "yarn"}
    assert asked == {**expected, "folder": folder, "progress": False}


def test_an_adapter_finds_its_base_beside_itself(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair.parent)
    model, tokenizer = load(pair / "adapter", bits=32, device="cpu")
    base, _ = load(pair / "model", bits=32, device="cpu")
    plain = logits(base)
    assert torch.equal(logits(model), logits(load_adapter(base, pair / "adapter").eval()))
    assert not torch.equal(logits(model), plain)
    assert tokenizer is not None
    assert not model.training
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_a_base_where_the_program_runs_comes_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name_base(here / "adapter", "model")
    write_model(here / "adapter" / "model", seed=1)
    for start, expected in ((here, here / "model"), (here / "model", here / "adapter" / "model")):
        monkeypatch.chdir(start)
        model, _ = load(here / "adapter", bits=32, device="cpu")
        assert Path(model.name_or_path).resolve() == expected
        base, _ = load(expected, bits=32, device="cpu")
        assert torch.equal(model.model.norm.weight, base.model.norm.weight)
        assert torch.equal(model.lm_head.weight, base.lm_head.weight)


def test_an_adapters_own_tokenizer_comes_first(here: Path) -> None:
    adapter = write_tokenizer(here / "adapter")
    (adapter / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    _, tokenizer = load(adapter, bits=32, device="cpu")
    _, of_the_base = load(here / "model", bits=32, device="cpu")
    assert tokenizer is not None
    assert of_the_base is not None
    assert (tokenizer.eos_token_id, of_the_base.eos_token_id) == (256, 257)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "does not say its base model; fill in base_model_name_or_path"),
        ("", "does not say its base model; fill in base_model_name_or_path"),
        ("./gone", "the base model of the adapter .*adapter cannot be had: the folder ./gone does not exist"),
        ("../adapter", "was trained on .*, which is an adapter itself; merge that into its base"),
        ("../empty", "empty is not a model folder: it has no config.json"),
        ("../wide", r"lora_A.weight has the shape .* but this model needs .*; it was made for \.\./wide"),
    ],
)
def test_an_adapter_whose_base_is_no_use(here: Path, base: str | None, message: str) -> None:
    (here / "empty").mkdir()
    write_model(here / "wide", hidden_size=32, head_dim=16)
    name_base(here / "adapter", base)
    with pytest.raises(ValueError, match=message):
        load(here / "adapter", bits=32, device="cpu")


def test_an_adapter_that_is_no_use_is_said_before_its_base_is_looked_for(here: Path) -> None:
    name_base(here / "adapter", "./gone", layer_replication=[[0, 1]])
    with pytest.raises(ValueError, match=r"layer_replication = .* is not supported"):
        load(here / "adapter", device="cpu")
    name_base(here / "adapter", "./gone", layer_replication=None)
    (here / "adapter" / "adapter_model.safetensors").rename(here / "adapter" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors; adapter_model.bin is pickled"):
        load(here / "adapter", device="cpu")


def train(model: Path, run: Path, **options: Any) -> Path:
    """A run of one step; gives its folder."""
    data = write_records(run.parent / "data.jsonl", 4)
    flags = {"model": model, "data": data, "output-dir": run, "bits": 32, "device": "cpu", "max-steps": 1, **options}
    words = (str(word) for name, value in flags.items() for word in (f"--{name}", value))
    assert main(["train", *words, "--plot", "false", "--disable-tqdm"]) == 0
    return run


def test_scaled_positions_are_a_line_of_the_run(
    here: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """And none of the answer's."""
    notice = "note: RoPE scaling (yarn, factor 2) takes the model from 128 positions to 256\n"
    run = train(here / "model", here / "run", **{"max-seq-length": 256, "rope-scaling": "yarn", "r": 2})
    assert capfd.readouterr().out.startswith(notice)
    flags = ["--model", str(run), "--device", "cpu", "--prompt", "Add", "--max-new-tokens", "1"]
    assert main(["generate", *flags]) == 0
    out, err = capfd.readouterr()
    assert "RoPE" not in out
    assert err.endswith(f"slothcore: {notice}")
    assert main(["generate", *flags[:-1], "260"]) == 0
    assert "slothcore: note: generation goes beyond the 256 positions" in capfd.readouterr().err
    assert main(["merge", *flags[:4], "--output-dir", str(here / "merged")]) == 0
    assert f"slothcore: {notice}" in capfd.readouterr().err
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


@pytest.mark.filterwarnings("ignore:RoPE scaling")
def test_a_run_is_its_result_on_the_base_as_it_was_trained(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer rows than the model's own stretch its angles; whoever loads the result must get the same ones."""
    run = train(here / "model", here / "run", **{"max-seq-length": 256, "rope-scaling": "yarn", "r": 2})
    asked: list[dict[str, Any]] = []
    read = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda folder, **o: asked.append(o) or read(folder, **o))
    models = [load(path, bits=32, device="cpu")[0] for path in (run, run / "adapter", run / "checkpoint-1")]
    assert {(options["max_seq_length"], options["rope_scaling"]) for options in asked} == {(256, "yarn")}
    assert [model.max_seq_length for model in models] == [256] * 3
    assert torch.equal(logits(models[0]), logits(models[1]))
    unstretched, _ = load(here / "model", bits=32, device="cpu")
    assert not torch.equal(logits(models[0]), logits(load_adapter(unstretched, run / "adapter").eval()))

    longer, _ = load(run, bits=32, device="cpu", max_seq_length=512)
    assert longer.max_seq_length == 512
    # A run that goes on with that adapter on shorter rows has the same base.
    again = train(run, here / "again", **{"max-seq-length": 64})
    asked.clear()
    load(again, bits=32, device="cpu")
    assert (asked[0]["max_seq_length"], asked[0]["rope_scaling"]) == (256, "yarn")


@pytest.mark.parametrize(
    ("trained", "asked", "expected"),
    [
        ({"bits": 16, "dtype": "float16"}, {}, (16, torch.float16)),
        ({"bits": 16, "dtype": "float16"}, {"bits": 32}, (32, torch.float32)),
        ({"bits": 16}, {"dtype": "float16"}, (16, torch.float16)),
        ({"bits": 4}, {}, (4, torch.float32)),
    ],
)
def test_a_run_is_read_with_the_bits_that_it_was_trained_with(here: Path, trained, asked, expected) -> None:
    run = train(here / "model", here / "run", r=2, **trained)
    for options in ({"name_or_path": run}, {"name_or_path": here / "model", "adapter": run / "checkpoint-1"}):
        model, _ = load(**options, device="cpu", **asked)
        assert (model.bits, model.dtype) == expected
    assert load(here / "model", device="cpu")[0].bits == 4


def test_a_run_needs_no_more_of_the_run_before_than_its_options(here: Path, monkeypatch) -> None:
    """Which may have been deleted but for these, or for good and have left it its name."""
    monkeypatch.chdir(here)
    first = train(here / "model", Path("first"), r=2, **{"max-seq-length": 64})
    train(first, Path("second"))
    expected = logits(load("second", bits=32, device="cpu")[0])
    for place in ("adapter", "checkpoint-1"):
        shutil.rmtree(first / place)
    assert torch.equal(logits(load("second", bits=32, device="cpu")[0]), expected)
    shutil.rmtree(first)
    Path("second").rename("first")
    assert torch.equal(logits(load("first", bits=32, device="cpu")[0]), expected)


def test_a_run_that_has_gone_on_says_what_is_used(here: Path) -> None:
    run = train(here / "model", here / "run", r=2)
    shutil.rmtree(run / "adapter")
    for options in ({"name_or_path": run}, {"name_or_path": here / "model", "adapter": run}):
        with pytest.warns(UserWarning, match=r"run has no result yet; \S+checkpoint-1 is used") as caught:
            load(**options, bits=32, device="cpu")
        assert (len(caught), caught[0].filename) == (1, __file__)


def test_a_result_does_not_replace_the_run_that_it_goes_on_with(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(here / "model", here / "run", r=2)
    words = ["--model", run, "--data", here / "data.jsonl", "--output-dir", run, "--overwrite-output-dir"]
    assert main(["train", *map(str, words)]) == 1
    assert "lies in output_dir" in capsys.readouterr().err
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("of_the_run", "asked", "expected"), [("v1", None, "v1"), ("v1", "v2", "v2"), (None, None, "v0")]
)
def test_the_revision_of_the_base(here: Path, monkeypatch, of_the_run, asked, expected) -> None:
    """The caller's, else the one in the adapter's configuration, else the run's."""
    run = train(here / "model", here / "run", r=2)
    name_base(run / "adapter", "org/base", **({} if of_the_run else {"revision": "v0"}))
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "model": "org/base", "revision": of_the_run}))
    revisions = {}
    folder_of = locating.model_folder

    def model_folder(name: str, *, revision: str | None, **options: Any) -> Path:
        revisions[name] = revision
        return here / "model" if name == "org/base" else folder_of(name, revision=revision, **options)

    monkeypatch.setattr(locating, "model_folder", model_folder)
    load(run, bits=32, device="cpu", revision=asked)
    assert revisions["org/base"] == expected


def test_an_adapter_names_the_base_and_its_revision_as_they_were_loaded(here: Path, monkeypatch) -> None:
    folder_of = locating.model_folder
    monkeypatch.setattr(
        locating, "model_folder", lambda name, **o: here / "model" if name == "org/base" else folder_of(name, **o)
    )

    def written(model: Decoder, name: str) -> tuple[str, str | None]:
        save_adapter(model, here / name / "elsewhere")
        values = json.loads((here / name / "elsewhere" / "adapter_config.json").read_text())
        return values["base_model_name_or_path"], values["revision"]

    model, _ = load("org/base", bits=32, device="cpu", revision="v1")
    assert written(add_lora(model, r=2), "new") == ("org/base", "v1")
    assert PeftConfig.from_pretrained(here / "new" / "elsewhere").revision == "v1"
    again, _ = load(here / "new" / "elsewhere", bits=32, device="cpu")
    assert (again.revision, written(again, "again")) == ("v1", ("org/base", "v1"))
    moved, _ = load(here / "new" / "elsewhere", bits=32, device="cpu", revision="v2")
    assert written(moved, "moved") == ("org/base", "v2")
    # A path from the adapter's folder leads nowhere from another's, and a folder has no revisions.
    beside, _ = load(here / "adapter", bits=32, device="cpu", revision="v2")
    assert written(beside, "beside") == (str(here / "adapter" / "../model"), None)


def test_an_adapter_may_lie_in_its_bases_folder(here: Path) -> None:
    expected, _ = load(here / "adapter", bits=32, device="cpu")
    for file in (here / "adapter").iterdir():
        file.rename(here / "model" / file.name)
    name_base(here / "model", str(here / "model"))
    model, _ = load(here / "model", bits=32, device="cpu")
    assert torch.equal(logits(model), logits(expected))


def test_a_config_of_another_program_beside_an_adapter_is_no_runs(here: Path) -> None:
    (here / "config.yaml").write_text("trainer: somebody else's\n")
    model, _ = load(here / "adapter", bits=32, device="cpu")
    assert model.lora_config is not None


def test_pefts_adapter_on_a_base_quantised_by_its_publisher(tmp_path: Path) -> None:
    """As most QLoRA adapters on the Hub are: made by PEFT on a base of bitsandbytes' 4 bits."""
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128}
    tiny_llama(**sizes).save_pretrained(tmp_path / "dense")
    base = LlamaForCausalLM.from_pretrained(
        tmp_path / "dense",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        attn_implementation="eager",
    )
    base.save_pretrained(tmp_path / "tiny-bnb-4bit")
    options = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    # In eval mode bitsandbytes would repack its weights for the CPU's matrix instructions.
    reference = get_peft_model(base, options).train()
    reference.save_pretrained(tmp_path / "adapter")
    name_base(write_tokenizer(tmp_path / "adapter"), "../tiny-bnb-4bit")

    model, _ = load(tmp_path / "adapter", bits=4, device="cpu")
    ids = token_ids(1, 30)
    with torch.no_grad():
        expected, actual = reference(ids).logits, model(ids).logits
    assert (actual - expected).abs().max() < 1e-4
    assert model.model.layers[0].self_attn.k_proj.is_nf4
    assert model.lora_config.r == 4
