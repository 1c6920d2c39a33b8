"""The page of a run: what it says, that no text of the user becomes markup, that it is replaced in one stroke."""

import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from slothcore.report import page as page_module
from slothcore.report import write_report
from slothcore.report.page import SECONDS_BETWEEN, TIMES_BETWEEN, LivePage
from slothcore.report.saved_run import SavedRun
from slothcore.report.writing import replace_text
from tests.report.made_up import add_lines, add_samples, made_up_notes, write_run

EVIL = "</script><script>window.broken=1</script><img src=x onerror=broken()>\"'&\u2028"


class Page(HTMLParser):
    """The visible text, the tags and the data of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "elements are closed in the order in which they were opened"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict[str, Any]:
        found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', self.source, re.DOTALL)
        assert found
        return json.loads(found.group(1))


def page_of(*runs: Path) -> Page:
    return Page(write_report(runs, runs[0] / "page.html"))


def test_it_tells_what_the_run_was(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path / "runs" / "first")).text
    for expected in (
        "runs/first finished",
        "babyllama \u00b7 LoRA r 32, 4 bits \u00b7 20 k of 1 M weights trained \u00b7 NVIDIA H100",
        "2023-11-14 22:13 to 23:13 UTC",
        "Evaluation loss 1.1 best, step 20",
        "Tokens seen 60 k 1 epochs",
        "Training time 12 s step 60 / 60",
        "Peak memory 10 GiB GPU",
        "11 GiB predicted at the peak, 10 GiB used (-9.1%).",
        f"data/train.jsonl training 1,234 2 KiB {'ab' * 32}",
        "1,234 documents in 100 rows, 45,678 tokens, 50% of them learned. Length: median 37, longest 59.",
        "30 to 39 tokens: 800",
        "1 of 3 options differ from their defaults",
        "r 32 default: 16",
        "triton 3.6.0",
        "CUDA 12.8",
    ):
        assert expected in text


def test_only_what_differs_from_its_default_is_marked(tmp_path: Path) -> None:
    source = page_of(write_run(tmp_path)).source
    assert re.findall(r'<div class="changed"><dt>(.*?)</dt>', source) == ["r"]


def test_the_curves_are_those_of_the_log(tmp_path: Path) -> None:
    data = page_of(write_run(tmp_path)).data
    series = data["runs"][0]["series"]
    assert set(series) == {
        *("loss", "loss_smooth", "eval_loss", "eval_best", "learning_rate", "grad_norm"),
        *("grad_norm_smooth", "tokens_per_second", "tokens_per_second_smooth", "memory_gib"),
    }
    assert series["eval_loss"][0] == [20, 40, 60]
    assert series["eval_best"] == [[20], [series["eval_loss"][1][0]]]
    assert series["learning_rate"][1][29] == pytest.approx(1e-4)
    assert [chart["name"] for chart in data["charts"]] == [
        *("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib")
    ]


@pytest.mark.parametrize(("loss", "expected"), [(3.0, False), (300.0, True)])
def test_a_loss_that_falls_far_is_drawn_logarithmically(tmp_path: Path, loss: float, expected: bool) -> None:
    assert page_of(write_run(tmp_path, loss=loss)).data["charts"][0]["log"] is expected


def test_it_loads_nothing_and_runs_only_its_own_script(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path))
    assert not any({"src", "href", "srcset", "style"} & attributes.keys() for _, attributes in page.tags)
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert not re.search(r"@import|url\((?!#)|innerHTML|insertAdjacent|outerHTML|document\.write|eval\(", page.source)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert re.fullmatch(r"default-src 'none'; script-src 'sha256-[\w+/=]+'; style-src 'sha256-[\w+/=]+'", policy or "")


def test_texts_of_the_user_never_become_markup(tmp_path: Path) -> None:
    notes = made_up_notes()
    notes["model"]["name"] = notes["machine"]["device"] = notes["error"] = EVIL
    notes["machine"][EVIL] = notes["versions"][EVIL] = EVIL
    notes["files"] = [{"path": EVIL, "use": EVIL, "sha256": EVIL, "rows": EVIL, "bytes": EVIL}]
    notes["rows"] = {EVIL: notes["rows"]["training"]}
    notes["options"] = [{"name": EVIL, "value": EVIL, "default": "", "group": EVIL}]
    notes["memory"]["parts"] = {EVIL: 5.0}
    notes["status"] = "failed"
    notes["early_stop"] = EVIL
    folders = [write_run(tmp_path / name / "<!--<script>&<i onclick=broken()>x", **notes) for name in ("a", "b")]
    tags = []
    for runs in (folders[:1], folders):
        for folder in runs:
            add_samples(folder, {"step": 9, "prompt": EVIL, "output": EVIL, "expected": EVIL})
        page = page_of(*runs)
        assert "window.broken=1" in page.text
        tags.append([tag for tag, _ in page.tags])
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert tags[-1].count("script") == 2
        assert "img" not in tags[-1]
        payload = page.source.partition('id="report-data">')[2].partition("</script>")[0]
        assert not set("<>&\u2028") & set(payload)
    assert page.data["runs"][0]["name"].endswith("<!--<script>&<i onclick=broken()>x")


def test_a_lone_surrogate_does_not_break_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    add_samples(folder, '{"step": 9, "prompt": "\\ud800", "output": "fine"}\n')
    assert "fine" in page_of(folder).text


@pytest.mark.parametrize(
    "notes", ["", "{", "[]", "3", '{"options": 3, "files": [1], "rows": {"training": 2}, "memory": {"parts": {}}}']
)
def test_damaged_notes_leave_the_curves(tmp_path: Path, notes: str) -> None:
    folder = write_run(tmp_path)
    (folder / "run.json").write_text(notes)
    page = page_of(folder)
    assert len(page.data["runs"][0]["series"]["loss"][0]) == 60
    assert "Last" not in page.text


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of keys and indices to everything in nested lists and mappings."""
    for key, inside in (
        value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    ):
        yield (*place, key)
        yield from places(inside, (*place, key))


@pytest.mark.parametrize("wrong", [None, "x", -1, [None], {"a": 1}])
def test_no_value_in_the_notes_can_break_the_page(tmp_path: Path, wrong: object) -> None:
    write_run(tmp_path)
    for place in places(made_up_notes()):
        notes: Any = made_up_notes()
        inner = notes
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = wrong
        (tmp_path / "run.json").write_text(json.dumps(notes))
        assert "Curves" in page_module.page([SavedRun(tmp_path)])


def test_an_older_run_without_notes_shows_its_options(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "run.json").unlink()
    (folder / "config.yaml").write_text("model: models/tiny\nlearning_rate: 0.001\nbits: 4\n")
    text = page_of(folder).text
    assert "learning_rate 0.001" in text
    assert "default" not in text


@pytest.mark.parametrize("content", ["", "not JSON\n"])
def test_a_run_without_steps_says_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "log.jsonl").write_text(content)
    page = page_of(tmp_path)
    assert "The log has no training step yet" in page.text
    assert page.data["charts"] == []
    assert ("1 of 1 lines of the log could not be read" in page.text) is bool(content)


def test_a_failed_run_says_why_and_one_cut_off_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path, status="failed", error="the loss is no longer finite")
    add_lines(folder, '{"step": 61, "lo')
    text = page_of(folder).text
    assert "The run failed: the loss is no longer finite" in text
    assert "The last line of the log was not finished" in text


def test_thinning_is_said(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path, steps=9000)).text
    assert "Of 9,000 points 2,000 are drawn: all lows and highs of a stretch are among them." in text
    assert "lows and highs" not in page_of(write_run(tmp_path, steps=900)).text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run was given"):
        write_report([], tmp_path / "x.html")
    with pytest.raises(FileNotFoundError, match="the run folder nowhere does not exist"):
        write_report([Path("nowhere")], tmp_path / "x.html")
    with pytest.raises(ValueError, match=r"is no run: it holds neither log.jsonl nor config.yaml"):
        write_report([tmp_path], tmp_path / "x.html")
    assert not list(tmp_path.iterdir())


def test_the_file_is_replaced_in_one_stroke(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "page.html"
    target.write_text("before")
    seen = []
    original = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(target.read_text()), original(a, b)))
    replace_text(target, "after")
    assert (seen, target.read_text(), [p.name for p in tmp_path.iterdir()]) == (["before"], "after", ["page.html"])

    def fail(source: Path, destination: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"page\.html cannot be written \(.*No space left.*\); make room"):
        replace_text(target, "third")

    def forbid(source: Path, destination: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", forbid)
    with pytest.raises(
        OSError, match=r"page\.html cannot be written \(.*denied\); choose a folder that may be written"
    ):
        replace_text(target, "third")
    assert (target.read_text(), [p.name for p in tmp_path.iterdir()]) == ("after", ["page.html"])


def test_a_page_that_the_disk_does_not_take_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    run, place = write_run(tmp_path), tmp_path / "page.html"

    def fail(source: Path, destination: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=rf"^{re.escape(str(place))} cannot be written \(.*No space left.*\); make room"):
        write_report([run], place)


def test_a_page_that_would_lie_nowhere_is_one_sentence(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for place, message in (
        (tmp_path, "the page .* is a folder; name a file in it, such as .*report.html"),
        (tmp_path / "absent" / "page.html", "the page .* would lie in .*absent, which is no folder; make it, or name"),
    ):
        with pytest.raises(ValueError, match=message):
            write_report([run], place)
    assert not (tmp_path / "absent").exists()


def test_a_page_is_not_drawn_more_often_than_it_may(tmp_path: Path, monkeypatch) -> None:
    """A line every second for an hour, and drawing takes half a second: 2% of the time at most."""
    folder, drawn, now = write_run(tmp_path, status="running"), [], [0.0]
    original = page_module.page

    def slow(runs):
        drawn.append(now[0])
        now[0] += 0.5
        return original(runs)

    monkeypatch.setattr(page_module, "page", slow)
    live = LivePage(folder, clock=lambda: now[0])
    while now[0] < 3600:
        live.refresh()
        now[0] += 1
    assert min(b - a for a, b in pairwise(drawn)) >= max(SECONDS_BETWEEN, TIMES_BETWEEN * 0.5)
    assert len(drawn) * 0.5 <= 0.02 * 3600 + 0.5
    live.refresh(now=True)
    assert drawn[-1] == pytest.approx(now[0] - 0.5)


def test_a_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    """What is drawn, and with it the time and the size, does not grow with the log."""
    sizes = [len(page_of(write_run(tmp_path, steps=steps)).source) for steps in (10_000, 30_000)]
    assert sizes[1] < 1.1 * sizes[0] < 500_000
