"""`slothcore plan`: figures of the memory plan, from config.json alone, for every family."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import LLAMA_3_1_8B
from benchmarks.zoo_shapes import ZOO, tiny
from slothcore.cli import main
from slothcore.commands.planning import MODES, longest_pass, plans_of
from slothcore.lora.config import LoraConfig
from slothcore.models.families import decoder_config
from slothcore.training.config import TrainConfig
from slothcore.training.memory import plan_memory
from slothcore.training.memory_plan import MemoryPlan

MODELS = {"Llama-3.1-8B": LLAMA_3_1_8B, **ZOO}
GIB = 2**30


def write_config(folder: Path, name: str, *, small: bool = False) -> Path:
    folder.mkdir(parents=True)
    values = tiny(MODELS[name]) if small else MODELS[name]
    (folder / "config.json").write_text(json.dumps(dict(values)))
    return folder


def planned(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    assert main(["plan", "--model", str(folder), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_config(tmp_path / "llama", "Llama-3.1-8B")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("words", ["--bits 4 --optim adamw_8bit", "--bits 16 --full-finetuning"])
def test_every_family_is_planned(name, words, tmp_path, capsys) -> None:
    figures = planned(write_config(tmp_path / "model", name, small=True), capsys, *words.split())
    assert [*figures["gradient_checkpointing"]] == ["false", "mlp", "offload", "true"]
    for mode, plan in figures["gradient_checkpointing"].items():
        parts = plan["bytes"]
        assert parts["peak"] > parts["weights"] + parts["trained"] + parts["optimizer"] > 0
        assert (parts["host"] > 0) == (mode == "offload")
        longest = [*plan["longest_document"].values()]
        assert longest == sorted(longest)
        assert longest[0] > 0
    assert (figures["trained_parameters"] == figures["parameters"]) == ("--full-finetuning" in words)


def test_the_figures_are_the_memory_plans(llama, capsys) -> None:
    figures = planned(llama, capsys, "--optim", "adamw_8bit", "--r", "8", "--max-seq-length", "4096", "--gpu", "48")
    assert figures["parameters"] == 8_030_261_248
    assert figures["trained_parameters"] == 41_943_040 // 2
    assert (figures["pass_tokens"], figures["passes"], figures["gpu_bytes"]) == (8192, 4, 48 * GIB)
    config = decoder_config(dict(LLAMA_3_1_8B), "config.json")
    for mode in MODES:
        graphs = 0 if mode == "offload" else 2048
        plan = plan_memory(
            config,
            bits=4,
            lora=LoraConfig(r=8),
            optim="adamw_8bit",
            gradient_checkpointing=mode,
            graph_tokens=graphs,
        )
        found = figures["gradient_checkpointing"][str(mode).lower()]
        assert found["bytes"]["peak"] == round(plan.peak(8192, passes=4))
        assert found["bytes"]["host"] == round(plan.host(8192))
        longest = found["longest_document"]["48"]
        assert longest == found["tokens_of_a_pass"]
        assert plan.footprint(longest, passes=2) <= 0.92 * 48 * GIB < plan.footprint(longest + 1, passes=2)


@pytest.mark.parametrize(
    ("words", "has_graphs"),
    [
        ("", True),
        ("--cuda-graphs false", False),
        ("--lora-dropout 0.1", False),
        ("--modules-to-save embed_tokens", False),
        ("--modules-to-save lm_head", True),
    ],
)
def test_graphs_are_counted_where_the_run_has_them(words, has_graphs, llama, capsys) -> None:
    figures = planned(llama, capsys, *words.split())
    pools = {mode: plan["bytes"]["graphs"] for mode, plan in figures["gradient_checkpointing"].items()}
    assert {mode for mode, pool in pools.items() if pool} == ({"false", "mlp", "true"} if has_graphs else set())


def test_the_table_says_the_same(llama, capsys) -> None:
    words = ["--optim", "adamw_8bit", "--gpu", "24"]
    figures = planned(llama, capsys, *words)
    assert main(["plan", "--model", str(llama), *words]) == 0
    table = capsys.readouterr().out
    plans = figures["gradient_checkpointing"].values()

    def row(name: str) -> list[str]:
        return re.search(rf"^  {re.escape(name)} +(.*)$", table, re.MULTILINE)[1].split()

    assert row("peak of a step") == [f"{plan['bytes']['peak'] / GIB:.2f}" for plan in plans]
    assert row(" 24 GiB") == [f"{plan['longest_document']['24']:,}" for plan in plans]
    rows = [plan["tokens_of_a_pass"] // 2048 for plan in plans]
    assert row("rows of 2,048 tokens a pass") == [str(count) for count in rows]
    assert row("passes of a step") == [str(-(-8 // count)) for count in rows]
    assert "on a GPU of 24 GiB with memory_budget auto" in table
    assert max(map(len, table.splitlines()[1:])) <= 100


def test_what_does_not_fit_is_a_dash(llama, capsys) -> None:
    assert main(["plan", "--model", str(llama), "--full-finetuning", "--bits", "16", "--gpu", "8"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^ +passes of a step +- +- +- +-$", table, re.MULTILINE)
    # Weight, gradient and two moments in 16 bits make 60 GiB.
    assert re.search(r"^ +48 GiB +- +- +- +-$", table, re.MULTILINE)
    assert re.search(r"^ +80 GiB +[\d,]+ +[\d,]+ +[\d,]+ +[\d,]+$", table, re.MULTILINE)


def test_a_run_and_its_adapter_are_planned_from_their_options(llama, tmp_path, capsys) -> None:
    """The adapter's own rank counts, whatever the options say."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(TrainConfig(model=str(llama), r=4, optim="adamw_8bit").to_yaml())
    assert main(["plan", str(run / "config.yaml"), "--json"]) == 0
    by_file = json.loads(capsys.readouterr().out)
    assert main(["plan", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == by_file
    assert by_file["trained_parameters"] == 41_943_040 // 4

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    lora = LoraConfig(r=4, target_modules=("q_proj",), base_model_name_or_path=str(llama))
    (adapter / "adapter_config.json").write_text(lora.to_json())
    assert planned(adapter, capsys)["trained_parameters"] == 32 * 4 * (4096 + 4096)


def test_positions_beyond_the_models_own_are_said(tmp_path, capsys) -> None:
    longer = 2 * MODELS["Qwen2.5-7B"]["max_position_embeddings"]
    folder = write_config(tmp_path / "model", "Qwen2.5-7B", small=True)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "max_position_embeddings": longer // 2}))
    assert main(["plan", "--model", str(folder), "--max-seq-length", str(longer)]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("slothcore: note: ")
    assert "RoPE" in said.err
    assert f"documents of up to {longer:,} tokens" in said.out


def test_the_gpu_that_is_present_is_the_one_that_is_meant(llama, monkeypatch) -> None:
    config = TrainConfig(model=str(llama))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 * GIB, 40 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    plans = plans_of(config, gpu_gib=None)
    assert (plans.gpu, plans.gpu_name) == (40 * GIB, "a card")
    assert plans_of(config, gpu_gib=16).gpu == 16 * GIB


def test_no_search_is_endless() -> None:
    class Bottomless(MemoryPlan):
        def footprint(self, tokens: int, *, passes: int = 1) -> float:
            return 0.0

    assert longest_pass(object.__new__(Bottomless), 1.0) == 2**21


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "model is not set; give --model"),
        (["--model", "m", "--gpu", "0"], 2, "--gpu must be a number of GiB greater than 0, got 0.0"),
        (["--model", "m", "--gpu", "inf"], 2, "--gpu must be a number of GiB greater than 0, got inf"),
        (["--model", "m", "--gpu", "nan"], 2, "--gpu must be a number of GiB greater than 0, got nan"),
        (["--model", "m", "--gpu", "big"], 2, "argument --gpu: must be a number of GiB, as in --gpu 24, got 'big'"),
        (["--model", "m", "--gpu", "24GB"], 2, "argument --gpu: must be a number of GiB, as in --gpu 24, got '24GB'"),
        (["--model", "m", "--bits", "5"], 2, "bits must be 4 | 16 | 32, got '5'"),
        (["--model", "{llama}", "--target-modules", "q_prj"], 1, "q_prj"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(words, status, message, llama, capsys) -> None:
    assert main(["plan", *(word.replace("{llama}", str(llama)) for word in words)]) == status
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert message in errors
