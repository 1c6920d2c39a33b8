"""Training the embedding and the head on raw text: saved, killed, resumed and merged, it is the uninterrupted run."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import slothcore
from slothcore.cli import main
from slothcore.data.tokenizer import Tokenizer
from slothcore.models.decoder import Decoder
from slothcore.run import train_from_config
from slothcore.training.config import TrainConfig
from slothcore.training.report import read_log
from tests.training.test_resume import KILLED_IN_STEP_18
from tests.training.tiny import write_model

ROOT = Path(__file__).resolve().parents[2]
CLOCK = {"elapsed", "tokens_per_second", "host_memory_gib"}
TABLES = "model.embed_tokens.weight", "lm_head.weight"
NEW = ("<|note|>", "axolotl")
BOTH = ("embed_tokens", "lm_head")
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # What the model is, and how it is trained.
    "float32": ({}, {"bits": 32}),
    "nf4": ({}, {"bits": 4, "lora_dropout": 0.1}),
    "nf4, tied": ({"tie_word_embeddings": True}, {"bits": 4}),
    "bfloat16": ({}, {"bits": 16, "dtype": "bfloat16"}),
    "padded": ({"vocab_size": 320}, {"bits": 32}),
    "embedding alone": ({}, {"bits": 32, "modules_to_save": ("embed_tokens",)}),
    "neither": ({}, {"bits": 32, "modules_to_save": (), "embedding_learning_rate": None}),
    "all weights, tied": (
        {"tie_word_embeddings": True},
        {"bits": 32, "full_finetuning": True, "modules_to_save": ()},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("continued")
    lines = [f"<|note|> {i} axolotl{'s' * (i % 2)} swim in the lake, {i * 7 % 11} sleep." for i in range(60)]
    (folder / "corpus.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return folder


def options(folder: Path, kind: str, output: str, **changes: Any) -> dict[str, Any]:
    changed, options = KINDS[kind]
    model = folder / f"model {sorted(changed.items())}"
    if not model.exists():
        write_model(model, **changed)
    return {
        "model": str(model),
        "data": str(folder / "corpus.txt"),
        "output_dir": str(folder / output),
        "device": "cpu",
        "max_seq_length": 64,
        "packing": True,
        "new_tokens": NEW,
        "r": 4,
        "modules_to_save": BOTH,
        "learning_rate": 2e-3,
        "embedding_learning_rate": 4e-4,
        "weight_decay": 0.01,
        "max_steps": 8,
        "logging_steps": 1,
        "save_steps": 4,
        "gradient_accumulation_steps": 2,
        "plot": False,
        "report": False,
        "disable_tqdm": True,
        **options,
        **changes,
    }


def logits(model: Decoder, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        scores = model.eval()(torch.tensor([ids])).logits
    assert scores is not None
    return scores[0]


def digests(path: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.iterdir() if f.name != "state.json"}


def losses(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in read_log(run / "log.jsonl")]


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_loaded_and_merged_it_is_the_uninterrupted_run(folder, kind, monkeypatch) -> None:
    kept: dict[str, Any] = {}
    monkeypatch.setattr("slothcore.run.SFTTrainer", keeping(kept))
    straight, resumed = folder / f"{kind} straight", folder / f"{kind} resumed"
    train_from_config(TrainConfig(**options(folder, kind, straight.name)))
    model, tokenizer = kept["model"], kept["tokenizer"]
    result = straight / ("model" if KINDS[kind][1].get("full_finetuning") else "adapter")
    assert (result / "tokenizer.json").read_bytes() == (straight / "checkpoint-4" / "tokenizer.json").read_bytes()

    # Resumed by another process's eyes: only the checkpoint is there.
    resumed.mkdir()
    for name in ("log.jsonl", "config.yaml"):
        shutil.copy(straight / name, resumed / name)
    shutil.copytree(straight / "checkpoint-4", resumed / "checkpoint-4")
    train_from_config(TrainConfig(**options(folder, kind, resumed.name, resume_from_checkpoint="latest")))
    for part in ("checkpoint-8", result.name):
        assert digests(straight / part) == digests(resumed / part), part
    assert losses(straight) == losses(resumed)
    assert losses(straight)[-1]["loss"] < losses(straight)[0]["loss"] - 0.1

    # Loaded from the run's folder: all of the model, to the bit.
    trained = KINDS[kind][1]
    again, their_tokenizer = slothcore.load(
        straight, bits=trained["bits"], dtype=trained.get("dtype", "float32"), device="cpu"
    )
    ids = tokenizer.encode("<|note|> an axolotl sleeps")
    assert {tokenizer.token_id(token) for token in NEW} <= set(ids)
    assert their_tokenizer.encode("<|note|> an axolotl sleeps") == ids
    assert torch.equal(logits(model, ids), logits(again, ids))

    # Merged, in float32: the tables are the trained ones, and logits the same up to the sums.
    if kind == "all weights, tied":
        assert again.has_tied_head
        return
    slothcore.save_merged(again, their_tokenizer, folder / f"{kind} merged", dtype=torch.float32)
    merged, _ = slothcore.load(folder / f"{kind} merged", bits=32, device="cpu")
    weights = dict(again.named_parameters(remove_duplicate=False))
    for name, weight in merged.named_parameters(remove_duplicate=False):
        if name in TABLES:
            assert torch.equal(weight, weights[name].float())
    tolerance = 0.1 if trained.get("dtype") == "bfloat16" else 1e-4
    assert (logits(merged, ids) - logits(again, ids)).abs().max() < tolerance


def keeping(kept: dict[str, Any]):
    """The trainer, whose model and tokenizer stay reachable for the test."""

    class Keeping(slothcore.SFTTrainer):
        def __init__(self, model, tokenizer, *arguments: Any) -> None:
            kept.update(model=model, tokenizer=tokenizer)
            super().__init__(model, tokenizer, *arguments)

    return Keeping


def test_killed_by_the_system_and_resumed(folder) -> None:
    """As a user has it: two processes, the first of which nobody lets clean up."""

    def train(output: str, *more: str, program: tuple[str, ...] = (str(ROOT / "scripts" / "train.py"),)) -> int:
        values = options(folder, "nf4, tied", output, max_steps=20, save_steps=8, packing=False)
        words = [str(word) for name, value in values.items() for word in (f"--{name}", *as_words(value))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, *program, *words, *more], cwd=ROOT, env=environment).returncode

    straight, killed = folder / "straight", folder / "killed"
    assert train(straight.name) == 0
    assert train(killed.name, program=("-c", KILLED_IN_STEP_18)) == -signal.SIGKILL
    assert sorted(path.name for path in killed.glob("checkpoint-*")) == ["checkpoint-16", "checkpoint-8"]
    assert read_log(killed / "log.jsonl")[-1]["step"] == 17
    assert train(killed.name, "--resume-from-checkpoint", "latest") == 0
    for part in ("checkpoint-16", "checkpoint-20", "adapter"):
        assert digests(straight / part) == digests(killed / part), part
    assert losses(straight) == losses(killed)


def as_words(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_what_trains_and_at_which_rate(folder, capsys) -> None:
    """Factors at learning_rate, both tables at their own; the log says what was added and what is shared."""
    values = options(folder, "nf4, tied", "rates", max_steps=1)
    result = train_from_config(TrainConfig(**values))
    said = capsys.readouterr().out
    assert "added 2 tokens: '<|note|>', 'axolotl'; the vocabulary grows from 258 to 260 rows" in said
    assert "start at the mean of the others" in said
    assert "embed_tokens and lm_head shared one weight; each trains a copy of its own" in said
    assert "learning rates: 0.002, 0.0004 for embed_tokens and lm_head" in said
    assert "will not learn" not in said
    saved = load_file(result.path / "adapter_model.safetensors")
    config = json.loads((result.path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [*BOTH]
    base = load_file(folder / Path(values["model"]).name / "model.safetensors")[TABLES[0]]
    for name in TABLES:
        table = saved[f"base_model.model.{name}"]
        assert table.shape == (260, 64)
        moved = (table[:258] - base).abs().max()
        # AdamW's first step moves each weight by its rate, or by less where a gradient is as small as epsilon.
        assert moved == pytest.approx(4e-4, rel=0.05)
        assert (table[258:] - base.mean(0)).abs().max() == pytest.approx(4e-4, rel=0.05)


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ((), "will not learn to read or write the new tokens, whose rows in embed_tokens and lm_head stay at the mean"),
        (("embed_tokens",), "will not learn to write the new tokens, whose rows in lm_head stay at the mean; name lm_"),
        (("lm_head",), "will not learn to read the new tokens, whose rows in embed_tokens stay at the mean"),
    ],
)
def test_new_tokens_that_will_not_be_learned_are_said(folder, capsys, saved, words) -> None:
    values = options(folder, "float32", "note", max_steps=1, modules_to_save=saved, overwrite_output_dir=True)
    train_from_config(TrainConfig(**{**values, "embedding_learning_rate": None}))
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("alone", BOTH)
def test_one_of_two_tables_that_are_shared(folder, capsys, alone) -> None:
    """As in PEFT: it trains a copy, the other stays; and a sentence."""
    left = next(name for name in BOTH if name != alone)
    values = options(folder, "nf4, tied", f"one {alone}", max_steps=1, modules_to_save=(alone,), new_tokens=())
    result = train_from_config(TrainConfig(**values))
    said = " ".join(capsys.readouterr().out.split())
    assert f"{alone} trains a copy of its own, and {left} stays as it was: name {left} in modules_to_save" in said
    tables = [name for name in load_file(result.path / "adapter_model.safetensors") if "lora" not in name]
    assert len(tables) == 1
    assert alone in tables[0]


def test_known_tokens_are_noted_and_a_run_goes_on_from_a_run(folder, capsys) -> None:
    """A second run on the result of the first: its tokens are there, and more can be added."""
    first = train_from_config(TrainConfig(**options(folder, "float32", "first", max_steps=2)))
    values = options(folder, "float32", "second", max_steps=2, new_tokens=("axolotl", "lake"))
    values = {name: value for name, value in values.items() if name not in ("r", "modules_to_save")}
    capsys.readouterr()
    result = train_from_config(TrainConfig(**{**values, "model": str(folder / "first")}))
    said = capsys.readouterr().out
    assert "'axolotl' (259) of new_tokens is in the vocabulary already, and stays as it is" in said
    assert "added 1 token: 'lake'; the vocabulary grows from 260 to 261 rows" in said
    before, after = (load_file(run.path / "adapter_model.safetensors") for run in (first, result))
    for name in TABLES:
        old, new = before[f"base_model.model.{name}"], after[f"base_model.model.{name}"]
        assert new.shape == (261, 64)
        assert 0 < (new[:260] - old).abs().max() < 1e-3
    assert Tokenizer.from_folder(result.path).token_id("lake") == 260
    again, tokenizer = slothcore.load(folder / "second", bits=32, device="cpu")
    assert again.config.vocab_size == tokenizer.vocab_size == 261


@pytest.mark.parametrize(("lora_dtype", "dtype"), [("float32", torch.float32), ("auto", torch.bfloat16)])
def test_small_updates_of_16_bit_tables_are_kept_in_float32(folder, lora_dtype, dtype) -> None:
    """At a rate of 1e-6 no update reaches half the last bit of a weight of 0.08; summed in float32 they do."""
    values = options(folder, "bfloat16", f"small {lora_dtype}", embedding_learning_rate=1e-6, lora_dtype=lora_dtype)
    result = train_from_config(TrainConfig(**{**values, "lr_scheduler_type": "constant", "weight_decay": 0.0}))
    tables = load_file(result.path / "adapter_model.safetensors")
    base = load_file(Path(values["model"]) / "model.safetensors")
    for name in TABLES:
        table, before = tables[f"base_model.model.{name}"][:258], base[name].bfloat16()
        assert table.dtype == dtype
        moved = table.float() != before.float()
        if dtype == torch.float32:
            # In the embedding, of the rows whose tokens the corpus has.
            assert moved[moved.any(dim=1)].float().mean() > 0.99
            assert moved.any(dim=1).sum() > (20 if name == TABLES[0] else 257)
        else:
            assert not moved[before.abs() > 0.01].any(), "or this test shows nothing"


def test_a_template_of_marks_that_the_base_lacks(folder, capsys) -> None:
    """ChatML without its marks: a sentence; with them as new tokens none, and answers that end with one."""
    data = folder / "chat.jsonl"
    turns = [{"role": "user", "content": "Which wind?"}, {"role": "assistant", "content": "North."}]
    data.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    flags = ["--model", options(folder, "float32", "chat")["model"], "--data", str(data), "--chat-template", "chatml"]
    flags += ["--bits", "32", "--device", "cpu", "--learning-rate", "5e-3", "--output-dir"]
    marks = ["--new-tokens", "<|im_start|>", "<|im_end|>", "--modules-to-save", *BOTH]
    assert main(["train", *flags, str(folder / "pieces"), "--max-steps", "1"]) == 0
    shown = capsys.readouterr()
    said = " ".join((shown.out + shown.err).split())
    assert "chatml writes <|im_start|>, <|im_end|>, which the tokenizer in" in said
    assert "new_tokens makes each of them one" in said
    assert main(["train", *flags, str(folder / "whole"), "--max-steps", "60", *marks]) == 0
    shown = capsys.readouterr()
    assert "has no tokens for" not in shown.out + shown.err
    assert main(["generate", "--model", str(folder / "whole"), "--chat", "--prompt", "Which wind?"]) == 0
    assert capsys.readouterr().out.strip() == "North."


def test_a_wrong_list_of_tokens_is_one_sentence() -> None:
    for values, message in (
        ({"new_tokens": ["a", ""]}, "new_tokens must be texts with at least one visible character, got ''"),
        ({"new_tokens": ["a", "a"]}, "new_tokens names 'a' twice; name each token once"),
        ({"new_tokens": "a"}, "new_tokens must be a list of names, got 'a'"),
        ({"special_tokens": ["a"]}, "did you mean 'new_tokens'?"),
    ):
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            TrainConfig.from_dict(values)
