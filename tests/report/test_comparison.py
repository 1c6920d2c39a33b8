"""Several runs on one page: their curves, their outcomes, what differs."""

from pathlib import Path

from slothcore.report.saved_run import SavedRun, name_apart
from tests.report.made_up import made_up_notes, write_run
from tests.report.test_page import page_of


def with_options(**values) -> dict:
    options = [{"name": n, "value": v, "default": None, "group": "LoRA"} for n, v in values.items()]
    return {**made_up_notes(), "options": options}


def test_runs_lie_over_each_other_with_their_names(tmp_path: Path) -> None:
    page = page_of(*(write_run(tmp_path / name, loss=loss) for name, loss in (("r8", 3.0), ("r16", 4.0))))
    assert [run["name"] for run in page.data["runs"]] == ["r8", "r16"]
    assert page.data["runs"][0]["series"]["loss"] != page.data["runs"][1]["series"]["loss"]
    assert "2 runs" in page.text
    assert "Run Status Steps Last loss Best evaluation Tokens/s Tokens Time Peak memory r8 finished 60" in page.text


def test_only_options_that_differ_are_listed(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", **with_options(output_dir="a", r=8, seed=1, packing=True, only_in_a="x")),
        write_run(tmp_path / "b", **with_options(output_dir="b", r=16, seed=1, packing=1)),
    ]
    table = page_of(*runs).text.partition("Differences")[2].partition("Loss")[0]
    # 1 and true are equal in Python, and not the same option.
    assert table.startswith(
        " What is the same in all runs is left out. Options a b r 8 16 packing true 1 only_in_a x \u2013"
    )
    assert "seed" not in table
    assert "output_dir" not in table
    assert "Versions" not in table


def test_other_data_and_versions_are_listed(tmp_path: Path) -> None:
    other = made_up_notes()
    other["files"][0]["sha256"] = "cd" * 32
    other["versions"]["torch"] = "2.13.0"
    text = page_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", **other)).text
    assert "Data a b train.jsonl (training) abababababab cdcdcdcdcdcd" in text
    assert "Versions a b torch 2.11.0 2.13.0" in text


def test_equal_runs_are_said_to_be_equal(tmp_path: Path) -> None:
    assert "All options, data and versions are the same." in page_of(
        write_run(tmp_path / "a"), write_run(tmp_path / "b")
    ).text  # fmt: skip


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [SavedRun(write_run(tmp_path / path)) for path in ("x/1/run", "y/1/run", "y/2/run")]
    name_apart(runs)
    assert [run.name for run in runs] == ["x/1/run", "y/1/run", "y/2/run"]
    # The same run twice cannot be told apart, and is shown twice.
    name_apart([runs[0], runs[0]])
    assert runs[0].name == "run"
