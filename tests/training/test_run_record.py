"""run.json and report.html: what a training leaves for people, whatever becomes of it."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from slothcore.report import page as page_module
from slothcore.run import train_from_config
from slothcore.training import run_facts, run_record
from slothcore.training.batches import RowSet
from slothcore.training.config import TrainConfig
from slothcore.training.memory import memory_of
from slothcore.training.micro_batches import compare
from slothcore.training.optimizer_step import OptimizerStep
from slothcore.training.run_facts import file_facts, model_facts, option_facts, row_facts
from slothcore.training.run_record import RunRecord
from tests.training.tiny import QUIET, random_rows, tiny_model, train, write_model, write_records


def notes_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_a_run_notes_what_it_was_made_of(tmp_path) -> None:
    write_model(tmp_path / "model")
    data = write_records(tmp_path / "data.jsonl", 12)
    out = tmp_path / "run"
    options = {"model": str(tmp_path / "model"), "data": str(data), "device": "cpu", "max_seq_length": 128}
    config = TrainConfig(**options, output_dir=str(out), max_steps=2, eval_fraction=0.25, token="secret", **QUIET)
    train_from_config(config)
    notes = notes_of(out)
    assert notes["status"] == "finished"
    assert notes["started"] <= notes["ended"]
    assert notes["files"] == [
        {
            "path": str(data),
            "use": "training",
            "bytes": data.stat().st_size,
            "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
            "rows": 12,
        }
    ]
    assert {use: rows["documents"] for use, rows in notes["rows"].items()} == {"training": 9, "evaluation": 3}
    assert {"slothcore", "python", "torch", "tokenizers", "numpy"} <= notes["versions"].keys()
    assert notes["model"]["name"] == options["model"]
    options_noted = {option["name"]: (option["value"], option["default"]) for option in notes["options"]}
    assert options_noted["max_steps"] == (2, -1)
    assert options_noted["learning_rate"] == (2e-4, 2e-4)
    for name in ("run.json", "report.html", "config.yaml"):
        assert "secret" not in (out / name).read_text()
    assert "finished" in (out / "report.html").read_text()


def test_options_stand_group_by_group_each_once() -> None:
    facts = option_facts(TrainConfig(r=4))
    groups = [fact["group"] for fact in facts]
    assert len(dict.fromkeys(groups)) == 1 + sum(a != b for a, b in pairwise(groups))
    assert sorted(fact["name"] for fact in facts) == sorted(TrainConfig().to_dict())
    assert [fact["name"] for fact in facts if fact["value"] != fact["default"]] == ["r"]


@pytest.mark.parametrize("bits", [32, 4])
def test_weights_are_counted_packed_or_not(bits) -> None:
    dense = tiny_model(bits=32)
    everything = sum(p.numel() for p in dense.parameters())
    facts = model_facts(tiny_model(bits=bits), None)
    assert facts["weights"] == everything
    assert facts["trained"] == sum(p.numel() for p in dense.parameters() if p.requires_grad)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_rows_are_lines_that_are_not_blank(tmp_path, monkeypatch, chunk) -> None:
    monkeypatch.setattr(run_facts, "CHUNK", chunk)
    for content, rows in (
        (b"", 0),
        (b"\n\n", 0),
        (b"{}", 1),
        (b'{"a": 1}\n\n  \n{"a": 22222222}\n{}', 3),
        (b"\n{}\n", 1),
    ):
        path = tmp_path / "data.jsonl"
        path.write_bytes(content)
        (facts,) = file_facts(TrainConfig(data=str(path)))
        assert facts["rows"] == rows
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()


def test_files_of_a_folder_and_of_evaluation_are_noted(tmp_path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("b.csv", "a.jsonl"):
        (folder / name).write_text("{}\n")
    facts = file_facts(TrainConfig(data=str(folder), eval_data="someone/something"))
    assert [(fact["path"], fact["use"]) for fact in facts] == [
        (str(folder / "a.jsonl"), "training"),
        (str(folder / "b.csv"), "training"),
        ("someone/something", "evaluation"),
    ]
    assert "rows" not in facts[1]
    assert facts[2].keys() == {"path", "use"}


@pytest.mark.parametrize("longest", [5, 43, 44, 45, 400])
def test_the_histogram_counts_every_document_once(longest) -> None:
    rows = random_rows(200, longest=longest)
    facts = row_facts(RowSet(rows, capacity=512))
    lengths = [len(row.input_ids) for row in rows]
    assert sum(facts["counts"]) == facts["documents"] == 200
    assert len(facts["counts"]) <= run_facts.HISTOGRAM_BARS
    for (low, high), number in zip(pairwise(facts["edges"]), facts["counts"], strict=True):
        assert number == sum(low <= length < high for length in lengths)
    assert facts["tokens"] == sum(lengths)
    assert facts["targets"] == sum(row.num_targets for row in rows)
    assert facts["rows"] < 200


def test_a_run_is_shown_while_it_runs(tmp_path, monkeypatch) -> None:
    seen = []
    original = OptimizerStep.run

    def watched(self, *arguments):
        path = tmp_path / "report.html"
        seen.append((notes_of(tmp_path)["status"], path.is_file() and ">running<" in path.read_text()))
        return original(self, *arguments)

    monkeypatch.setattr(OptimizerStep, "run", watched)
    train(tmp_path, random_rows(8), max_steps=3)
    # Drawn with the first line of the log, and not again so soon.
    assert seen == [("running", False), ("running", True), ("running", True)]
    assert ">finished<" in (tmp_path / "report.html").read_text()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("no <luck>"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_run_that_ends_early_says_how(tmp_path, monkeypatch, error, status) -> None:
    original, steps = OptimizerStep.run, []

    def ended(self, *arguments):
        steps.append(1)
        if len(steps) == 3:
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(OptimizerStep, "run", ended)
    with pytest.raises(type(error)):
        train(tmp_path, random_rows(8), max_steps=5)
    assert notes_of(tmp_path)["status"] == status
    page = (tmp_path / "report.html").read_text()
    assert f">{status}<" in page
    assert ("The run failed: no &lt;luck&gt;" in page) is (status == "failed")


def test_without_report_there_are_notes_and_no_page(tmp_path, capsys) -> None:
    train(tmp_path, random_rows(4), max_steps=1, report=False)
    assert notes_of(tmp_path)["status"] == "finished"
    assert not (tmp_path / "report.html").exists()
    assert "drawn" not in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["the disk", "the page"])
def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys, broken) -> None:
    def fail(*arguments) -> None:
        raise OSError(28, "No space left on device") if broken == "the disk" else KeyError("a mistake of ours")

    if broken == "the disk":
        monkeypatch.setattr(run_record, "replace_text", fail)
        monkeypatch.setattr(page_module, "replace_text", fail)
    else:
        monkeypatch.setattr(page_module, "page", fail)
    _, result, log = train(tmp_path, random_rows(8), max_steps=3)
    assert result.steps == len(log) == 3
    said = capsys.readouterr().out
    assert said.count("the report is not written any more") == 1
    assert "drawn" not in said


def test_prediction_and_outcome_of_memory_are_noted(tmp_path) -> None:
    plan = memory_of(tiny_model(), optim="adamw")
    record = RunRecord(tmp_path, {}, page=None)
    said = record.memory_used(plan, tokens=64, passes=2, actual=12345)
    assert said == compare(plan, tokens=64, passes=2, actual=12345)
    record.end("finished")
    memory = notes_of(tmp_path)["memory"]
    assert (memory["predicted"], memory["actual"]) == (plan.peak(64, passes=2), 12345)
    assert memory["parts"]["weights"] == plan.weights + plan.trained
    assert memory["parts"]["activations"] == plan.activations(64)


@pytest.mark.gpu
def test_a_run_on_a_gpu_notes_its_memory(tmp_path) -> None:
    train(tmp_path, random_rows(8), tiny_model().to("cuda"), max_steps=2)
    notes = notes_of(tmp_path)
    assert notes["memory"]["actual"] > 0
    assert notes["memory"]["predicted"] > 0
    assert notes["machine"]["device"] == torch.cuda.get_device_name()
    page = (tmp_path / "report.html").read_text()
    assert "predicted at the peak" in page
    assert '"memory_gib"' in page
