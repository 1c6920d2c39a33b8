"""What the model said: read as it grows, shown by step and by run, with the best evaluation and the early end."""

import math
from pathlib import Path

import pytest

from slothcore.report import write_report
from slothcore.report.sample_log import SampleLog
from slothcore.report.samples import MOST_COLUMNS
from slothcore.report.saved_run import SavedRun
from tests.report.made_up import add_lines, add_samples, write_run
from tests.report.test_page import page_of


def said(step: int, prompt: str = "Who wrote Faust?", **more: object) -> dict:
    return {"step": step, "prompt": prompt, "output": f"answer {step}", **more}


def evaluated(step: int, loss: float) -> dict:
    return {"step": step, "eval_loss": loss, "eval_perplexity": math.exp(loss)}


def test_prompts_are_rows_and_steps_are_columns(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    for step in (0, 20):
        add_samples(folder, said(step, expected="Goethe"), {"step": step, "prompt": "Hi", "output": " \n"})
    text = page_of(folder).text
    assert "Prompt step 0 step 20 best expected Who wrote Faust? answer 0 answer 20 Goethe" in text
    assert "Goethe Hi (nothing) (nothing) \u2013" in text


def test_of_many_samplings_the_first_the_best_and_the_newest_are_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    add_samples(folder, *(said(step) for step in range(0, 61, 10)))
    text = page_of(folder).text
    # The lowest evaluation of the made-up run is its first, at step 20.
    assert MOST_COLUMNS == 4
    assert "Prompt step 0 step 20 best step 50 step 60 Who wrote Faust? answer 0 answer 20 answer 50 answer 60" in text
    assert "Of 7 times 4 are shown; all are in samples.jsonl." in text


def test_a_prompt_that_was_not_asked_every_time_is_said_to_be(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    add_samples(folder, said(0), said(10), said(10, "New?"))
    assert "New? not asked answer 10" in page_of(folder).text


def test_runs_are_compared_at_the_step_that_their_result_is_of(tmp_path: Path) -> None:
    saved = write_run(tmp_path / "saved", best_step=20, best_is_saved=True)
    plain = write_run(tmp_path / "plain", best_step=20, best_is_saved=False)
    silent = write_run(tmp_path / "silent")
    for folder in (saved, plain):
        add_samples(folder, *(said(step) for step in (0, 20, 40)))
    add_samples(plain, said(40, "Only here?"))
    text = page_of(saved, silent, plain).text
    assert "Prompt saved step 20 plain step 40 Who wrote Faust? answer 20 answer 40" in text
    assert "Only here? not asked answer 40" in text


def test_it_is_read_as_it_grows(tmp_path: Path) -> None:
    log = SampleLog(tmp_path / "samples.jsonl")
    log.update()
    assert log.outputs == {}
    add_samples(tmp_path, said(0), '{"step": 1, "prompt": "Who')
    log.update()
    assert log.outputs == {0: {"Who wrote Faust?": "answer 0"}}
    add_samples(tmp_path, '?", "output": "I"}\n', "broken\n", '{"step": 2, "prompt": 3, "output": "a"}\n', said(5))
    log.update()
    assert sorted(log.outputs) == [0, 1, 5]
    # Rewound, as by a resumed run.
    (tmp_path / "samples.jsonl").unlink()
    add_samples(tmp_path, said(0))
    log.update()
    assert sorted(log.outputs) == [0]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({}, None),
        ({90: 1.0}, None),
        ({0: 0.5, 90: 1.0}, None),  # before training is nothing that a run came to
        ({0: 0.5, 30: 2.0, 60: 1.0, 90: 1.0}, 60),
    ],
)
def test_the_best_evaluation(tmp_path: Path, losses: dict[int, float], best: int | None) -> None:
    add_lines(tmp_path, {"step": 1, "loss": 3.0}, *(evaluated(step, loss) for step, loss in losses.items()))
    run = SavedRun(tmp_path)
    assert run.best_step == best
    page = page_of(tmp_path)
    series = page.data["runs"][0]["series"]
    assert series.get("eval_best") == (None if best is None else [[best], [losses[best]]])
    assert ("60 best" in page.text) == (best is not None)
    assert ("best, step 60" in page.text) == (best is not None)


def test_an_early_end_and_the_saved_step_are_said(tmp_path: Path) -> None:
    notes = {"best_step": 20, "best_is_saved": True, "early_stop": "early stopping after step 60: 2 evaluations"}
    text = page_of(write_run(tmp_path, **notes)).text
    assert "Early stopping after step 60: 2 evaluations. The result is that of step 20, whose evaluation was" in text
    assert "best, step 20, saved" in text


@pytest.mark.parametrize("notes", [{"early_stop": 3}, {"best_step": "x", "best_is_saved": True}, {"best_is_saved": 1}])
def test_damaged_notes_say_nothing(tmp_path: Path, notes: dict) -> None:
    text = page_of(write_run(tmp_path, **notes)).text
    assert "arly stopping" not in text
    assert "The result is" not in text
    assert "saved" not in text


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    folders = []
    for name in ("one", "two"):
        folder = write_run(root / name, steps=90)
        for step in (0, 30, 60, 90):
            add_samples(folder, said(step, expected="Goethe"), said(step, "w" * 200, output="word " * 300))
        folders.append(folder)
    return folders


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_table_fits_a_desktop_and_becomes_cards_on_a_phone(browser, runs, number, width) -> None:
    page = write_report(runs[:number], runs[0] / f"{number}.html")
    browser.open(page, width=width, touch=width == 390)
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    table = "document.querySelector('.samples')"
    assert browser.evaluate(f"getComputedStyle({table}.tHead).display") == (
        "none" if width == 390 else "table-header-group"
    )
    assert browser.evaluate(f"{table}.parentElement.scrollWidth <= {table}.parentElement.clientWidth")
    cell = f"{table}.querySelector('td')"
    label = browser.evaluate(f"getComputedStyle({cell}, '::before').content")
    expected = '"step 0"' if number == 1 else '"one, step 90"'
    assert label == (expected if width == 390 else "none")
    # Nothing lies outside of its cell, however long a word is.
    cells = f"[...{table}.querySelectorAll('td, tbody th')]"
    assert browser.evaluate(f"{cells}.every((cell) => cell.scrollWidth <= cell.clientWidth + 1)")
    last = browser.evaluate(f"{cells}.at(-1).getBoundingClientRect().right")
    assert last <= width


def test_a_ring_marks_the_best_evaluation_and_does_not_move_the_scale(browser, runs) -> None:
    browser.open(write_report(runs[:1], runs[0] / "ring.html"))
    rings = "[...document.querySelectorAll('circle.best')].map((c) => [c.getAttribute('cx'), c.getAttribute('cy')])"
    dots = "[...document.querySelectorAll('circle.dots')].map((c) => [c.getAttribute('cx'), c.getAttribute('cy')])"
    (ring,) = browser.evaluate(rings)
    assert ring == browser.evaluate(dots)[0]
    assert browser.evaluate("getComputedStyle(document.querySelector('circle.best')).fill") == "none"
    legend = browser.evaluate("document.querySelector('[data-chart=loss] .legend').textContent")
    assert legend == "trainingsmoothedevaluationbest evaluation"
