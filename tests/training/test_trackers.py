"""TensorBoard and Weights & Biases hear what the log says, only where they are asked, and never end a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slothcore.run import train_from_config
from slothcore.training import trackers as trackers_module
from slothcore.training.config import TrainConfig
from slothcore.training.optimizer_step import OptimizerStep
from slothcore.training.report import read_log
from slothcore.training.run_state import read_state
from slothcore.training.trackers import check_trackers
from tests.training.tiny import random_rows, train, write_model, write_records

ROOT = Path(__file__).resolve().parents[2]

# Keeps in calls.jsonl, in the folder that it is given, what it is told.
STAND_IN = """
import json, os

class Table:
    def __init__(self, columns, data):
        self.content = {"columns": columns, "data": data}

class Run:
    def __init__(self, **options):
        self.folder, self.id = options["dir"], options["id"] or "made-up-id"
        self.note("init", {k: v for k, v in options.items() if k != "config"} | {"seed": options["config"]["seed"]})

    def note(self, name, value):
        with open(os.path.join(self.folder, "calls.jsonl"), "a") as file:
            file.write(json.dumps([name, value], default=lambda table: table.content) + "\\n")

    def define_metric(self, name, **options):
        self.note("define_metric", [name, options])

    def log(self, values):
        if os.environ.get("WANDB_FAILS"):
            raise OSError("no network")
        self.note("log", values)

    def finish(self, exit_code):
        self.note("finish", exit_code)

def init(**options):
    if os.environ.get("WANDB_LOGGED_OUT"):
        raise RuntimeError("No API key configured.\\nUse `wandb login`")
    return Run(**options)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trackers")
    write_model(folder / "model")
    write_records(folder / "data.jsonl")
    return folder


@pytest.fixture
def wandb(tmp_path, monkeypatch) -> None:
    """A module of that name which notes what it is told."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    yield
    sys.modules.pop("wandb", None)


def options(folder: Path, output: Path, **changes) -> TrainConfig:
    return TrainConfig(
        **{
            "model": str(folder / "model"),
            "data": str(folder / "data.jsonl"),
            "device": "cpu",
            "bits": 32,
            "output_dir": str(output),
            "max_seq_length": 128,
            "max_steps": 4,
            "logging_steps": 2,
            "save_steps": 2,
            "eval_fraction": 0.2,
            "eval_steps": 2,
            "sample_prompts": ["Add <1> and 2."],
            "sample_max_new_tokens": 3,
            "plot": False,
            "disable_tqdm": True,
            **changes,
        }
    )


def calls(output: Path) -> list:
    return [json.loads(line) for line in (output / "calls.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("wandb")
def test_wandb_is_told_each_line_of_the_log_and_each_sample(folder, tmp_path) -> None:
    out = tmp_path / "run"
    train_from_config(options(folder, out, report_to="wandb", seed=7))
    told = calls(out)
    first = {"project": "slothcore", "name": "run", "dir": str(out), "id": None, "resume": "allow", "seed": 7}
    assert told[0] == ["init", first]
    assert ["define_metric", ["*", {"step_metric": "train/global_step", "step_sync": True}]] in told
    logged = [values for name, values in told if name == "log"]
    figures = [values for values in logged if "samples" not in values]
    records = read_log(out / "log.jsonl")
    assert len(figures) == len(records) == 4
    for values, record in zip(figures, records, strict=True):
        assert values["train/global_step"] == record["step"]
        for name, value in record.items():
            if name != "step":
                key = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
                assert values[key] == value
    tables = [values for values in logged if "samples" in values]
    said = read_log(out / "samples.jsonl")
    assert [[values["train/global_step"], values["samples"]["data"]] for values in tables] == [
        [line["step"], [[line["step"], line["prompt"], line["output"]]]] for line in said
    ]
    assert told[-1] == ["finish", 0]


@pytest.mark.usefixtures("wandb")
def test_a_resumed_run_goes_on_with_its_run_of_wandb(folder, tmp_path) -> None:
    out = tmp_path / "run"
    train_from_config(options(folder, out, report_to="wandb"))
    assert read_state(out / "checkpoint-4").wandb_id == "made-up-id"
    config = options(folder, out, report_to="wandb", max_steps=6, run_name="mine", resume_from_checkpoint="latest")
    train_from_config(config)
    begun = [values for name, values in calls(out) if name == "init"]
    assert [values["id"] for values in begun] == [None, "made-up-id"]
    assert begun[1]["name"] == "mine"
    other = options(
        folder, tmp_path / "other", report_to="wandb", max_steps=6, resume_from_checkpoint=str(out / "checkpoint-2")
    )
    train_from_config(other)
    assert calls(tmp_path / "other")[0][1]["id"] is None


@pytest.mark.usefixtures("wandb")
def test_files_lie_in_logging_dir(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "rivers")
    config = options(folder, tmp_path / "run", report_to=["wandb"], logging_dir=str(tmp_path / "elsewhere"))
    train_from_config(config)
    assert calls(tmp_path / "elsewhere")[0][1]["project"] == "rivers"


@pytest.mark.usefixtures("wandb")
def test_a_run_that_fails_is_said_to_have(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(OptimizerStep, "run", lambda *_: (_ for _ in ()).throw(ValueError("no loss")))
    with pytest.raises(ValueError, match="no loss"):
        train_from_config(options(folder, tmp_path / "run", report_to="wandb"))
    assert calls(tmp_path / "run")[-1] == ["finish", 1]


@pytest.mark.usefixtures("wandb")
def test_what_goes_wrong_there_does_not_end_the_run(folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WANDB_FAILS", "1")
    result = train_from_config(options(folder, tmp_path / "run", report_to="wandb"))
    assert result.steps == 4
    said = capsys.readouterr().out
    assert said.count("note: wandb is told nothing any more (no network); training goes on") == 1
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.usefixtures("wandb")
def test_what_cannot_be_started_is_a_note_and_costs_no_run(folder, tmp_path, monkeypatch, capsys) -> None:
    """By then the run has claimed its folder, and what lay there before is gone."""
    monkeypatch.setenv("WANDB_LOGGED_OUT", "1")
    assert train_from_config(options(folder, tmp_path / "run", report_to="wandb")).steps == 4
    said = " ".join(capsys.readouterr().out.split())
    note = "note: wandb cannot be started (No API key configured. Use `wandb login`); training goes on without it; "
    assert f"{note}next time run wandb login, or set WANDB_MODE=offline" in said


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_said_before_anything_is_loaded(tmp_path, monkeypatch, name) -> None:
    monkeypatch.setattr(trackers_module, "find_spec", lambda _: None)
    message = f"report_to names {name}, which is not installed: pip install {name}, or leave it out"
    with pytest.raises(ValueError, match=message):
        train_from_config(
            TrainConfig(model="absent", data="absent.jsonl", output_dir=str(tmp_path / "run"), report_to=name)
        )
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", random_rows(4), report_to=name)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_its_name_is_no_package(tmp_path, monkeypatch) -> None:
    """Where wandb ran before, it left a folder that Python would import as an empty package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="wandb, which is not installed"):
        check_trackers(["wandb"])


def test_nothing_is_imported_unless_it_is_asked_for(folder, tmp_path) -> None:
    program = (
        "import sys; from slothcore.run import train_from_config; from slothcore.training.config import TrainConfig; "
        f"train_from_config(TrainConfig.from_yaml({str(tmp_path / 'run.yaml')!r})); "
        "names = ('tensorboard', 'torch.utils.tensorboard', 'wandb'); "
        "print('loaded:', [name for name in names if name in sys.modules])"
    )
    (tmp_path / "run.yaml").write_text(options(folder, tmp_path / "run").to_yaml())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_tensorboard_shows_the_log_and_hides_what_was_done_again(folder, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    train_from_config(options(folder, out, report_to="tensorboard", max_steps=6))
    # Once more from step 2: the steps from 3 on are written a second time.
    config = options(
        folder, out, report_to="tensorboard", max_steps=8, resume_from_checkpoint=str(out / "checkpoint-2")
    )
    train_from_config(config)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    records = read_log(out / "log.jsonl")
    for name, key in (("train/loss", "loss"), ("train/learning_rate", "learning_rate"), ("eval/loss", "eval_loss")):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        written = [(record["step"], pytest.approx(record[key], rel=1e-6)) for record in records if key in record]
        assert shown == written, name
    assert "train/step" not in events.Tags()["scalars"]
    texts = [
        (event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors("samples/text_summary")
    ]
    said = read_log(out / "samples.jsonl")
    # TensorBoard keeps texts that were written twice.
    assert sorted({step for step, _ in texts}) == [line["step"] for line in said] == [0, 2, 4, 6, 8]
    assert all("Add &lt;1&gt; and 2." in text for _, text in texts)
    (config_text,) = events.Tensors("config/text_summary")
    assert b"    seed: 42" in config_text.tensor_proto.string_val[0]
