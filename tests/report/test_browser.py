"""The page in a real browser: it draws, it answers, the console is clean, it fits a phone."""

import time
from pathlib import Path

import pytest

from slothcore.report import write_report
from tests.report.made_up import add_samples, write_run
from tests.report.test_page import EVIL

BOX = "['x', 'y', 'width', 'height'].map((side) => document.querySelector('.plot svg').getBoundingClientRect()[side])"
TICKS = "[...document.querySelectorAll('[data-chart=loss] .grid text')].map((text) => text.textContent)"
TIP = "[...document.querySelectorAll('.tip')].filter((tip) => !tip.hidden).map((tip) => tip.textContent)"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("single"), steps=90)
    for step in (0, 30, 60, 90):
        add_samples(folder, {"step": step, "prompt": EVIL, "output": "word " * 60 + "x" * 300, "expected": "w" * 90})
    return write_report([folder], folder / "report.html")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compared")
    runs = [write_run(root / f"run-{i}-with-a-rather-long-name", loss=2 + i, steps=60 + 30 * i) for i in range(10)]
    return write_report(runs, root / "report.html")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["single", "compared"])
def test_it_draws_and_fits_and_complains_about_nothing(request, browser, name, width, dark) -> None:
    browser.open(request.getfixturevalue(name), width=width, dark=dark, touch=width == 390)
    paths = browser.evaluate("[...document.querySelectorAll('.curve')].map((path) => path.getAttribute('d'))")
    # Five charts; three have a raw and a smoothed line, and one has evaluations; of several runs the raw ones are left.
    assert len(paths) == (9 if name == "single" else 10 * 6)
    assert all(path.startswith("M") and path.count("L") >= 2 and "NaN" not in path for path in paths)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("window.broken") is None
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(19, 21, 24)" if dark else "rgb(247, 247, 245)")
    assert browser.complaints == []


def test_hovering_tells_the_values(browser, single) -> None:
    browser.open(single)
    x, y, width, height = browser.evaluate(BOX)
    assert browser.evaluate(TIP) == []
    browser.mouse("Moved", x + width / 2, y + height / 2)
    (text,) = browser.evaluate(TIP)
    assert text.startswith("step 4")
    assert "training1." in text
    assert "evaluation, step 301.1" in text or "evaluation, step 601.1" in text
    # All charts point at the same step.
    assert browser.evaluate("document.querySelectorAll('.cursor').length") == 5
    browser.mouse("Moved", 5, 5)
    assert browser.evaluate(TIP) == []


def test_dragging_zooms_all_charts_and_a_double_click_shows_all_again(browser, single) -> None:
    browser.open(single)
    before = browser.evaluate(TICKS)
    x, y, width, height = browser.evaluate(BOX)
    browser.mouse("Pressed", x + width * 0.4, y + height / 2)
    browser.mouse("Moved", x + width * 0.5, y + height / 2, buttons=1)
    browser.mouse("Moved", x + width * 0.6, y + height / 2, buttons=1)
    browser.mouse("Released", x + width * 0.6, y + height / 2)
    zoomed = browser.evaluate(TICKS)
    assert zoomed != before
    assert {"40", "50"} <= set(zoomed)
    assert not {"20", "60", "80"} & set(zoomed)
    assert not browser.evaluate("document.getElementById('reset').hidden")
    for clicks in (1, 2):
        browser.mouse("Pressed", x + width / 2, y + height / 2, clickCount=clicks)
        browser.mouse("Released", x + width / 2, y + height / 2, clickCount=clicks)
    assert browser.evaluate(TICKS) == before
    assert browser.evaluate("document.getElementById('reset').hidden")


def test_the_keyboard_moves_zooms_and_resets(browser, single) -> None:
    browser.open(single)
    before = browser.evaluate(TICKS)
    browser.evaluate("document.querySelector('.plot svg').focus()")
    for _ in range(3):
        browser.key("ArrowRight")
    assert browser.evaluate(TIP)[0].startswith("step 4")
    browser.key("+")
    assert browser.evaluate(TICKS) != before
    browser.key("0")
    assert browser.evaluate(TICKS) == before


def test_a_finger_asks_for_values_and_a_double_tap_shows_all(browser, single) -> None:
    browser.open(single, width=390, touch=True)
    before = browser.evaluate(TICKS)
    browser.evaluate("document.querySelector('.plot svg').scrollIntoView()")
    x, y, width, height = browser.evaluate(BOX)
    middle = y + height / 2

    def touch(kind: str, *places: float) -> None:
        points = [{"x": place, "y": middle} for place in places]
        browser.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)

    touch("touchStart", x + width * 0.3)
    assert browser.evaluate(TIP)[0].startswith("step ")
    for share in (0.35, 0.45, 0.6):
        touch("touchMove", x + width * share)
    touch("touchEnd")
    assert browser.evaluate(TICKS) != before
    for _ in range(2):
        touch("touchStart", x + width / 2)
        touch("touchEnd")
    assert browser.evaluate(TICKS) == before


def test_the_axis_and_the_scale_can_be_switched_and_outlive_a_reload(browser, single) -> None:
    browser.open(single)
    before = browser.evaluate(TICKS)
    browser.evaluate("document.querySelector('[data-axis=tokens]').click()")
    assert any(tick.endswith("k") for tick in browser.evaluate(TICKS))
    browser.evaluate("document.querySelector('[data-log=loss]').click()")
    switched = browser.evaluate(TICKS)
    browser.reload()
    assert browser.evaluate(TICKS) == switched != before
    assert browser.complaints == []


def test_a_run_can_be_hidden(browser, compared) -> None:
    browser.open(compared)
    browser.evaluate("document.querySelector('[data-run=\"3\"]').click()")
    assert browser.evaluate("document.querySelectorAll('.curve').length") == 9 * 6


def test_options_at_their_defaults_can_be_hidden(browser, single) -> None:
    visible = "[...document.querySelectorAll('#configuration dt')].filter((e) => e.checkVisibility()).length"
    browser.open(single)
    assert browser.evaluate(visible) == 3
    browser.evaluate("document.querySelector('[data-only-changed]').click()")
    assert browser.evaluate(visible) == 1


def test_only_a_run_under_way_offers_to_reload(browser, single, tmp_path) -> None:
    browser.open(single)
    assert browser.evaluate("document.getElementById('reload')") is None
    folder = write_run(tmp_path, status="running")
    browser.open(write_report([folder], tmp_path / "report.html"))
    assert "ago: reload" in browser.evaluate("document.getElementById('reload').textContent")
    assert browser.evaluate("document.querySelector('meta[http-equiv=refresh]')") is None


CLOCK = """
(() => {
  const [today, now, ticks] = [Date.now, performance.now.bind(performance), []];
  let later = 0;
  Date.now = () => today() + 1000 * later;
  performance.now = () => now() + 1000 * later;
  window.setInterval = (tick) => ticks.push(tick);
  window.pass = (seconds) => {
    later += seconds;
    window.old = true;
    ticks.forEach((tick) => tick());
  };
})()
"""


def test_a_run_under_way_is_reloaded_but_not_under_ones_hands(browser, single, tmp_path) -> None:
    clock = browser.call("Page.addScriptToEvaluateOnNewDocument", source=CLOCK)["identifier"]

    def reloads_after(seconds: int) -> bool:
        """Let the page's clock run on; what was set in its window is gone with a reload."""
        browser.evaluate(f"pass({seconds})")
        for _ in range(10):
            time.sleep(0.1)
            if browser.evaluate("document.readyState === 'complete' && window.old === undefined"):
                return True
        return False

    try:
        browser.open(single)
        assert not reloads_after(100)
        browser.open(write_report([write_run(tmp_path, status="running")], tmp_path / "report.html"))
        assert not reloads_after(20)
        assert reloads_after(20)
        browser.evaluate("document.querySelector('.plot svg').focus()")
        browser.key("ArrowRight")
        assert not reloads_after(100)
        browser.evaluate("document.activeElement.blur()")
        assert reloads_after(5)
        # Nothing was written for a quarter of an hour: the run is over, or dead.
        assert not reloads_after(1000)
        assert browser.evaluate("document.getElementById('reload').textContent").startswith("no word for 16:")
        assert browser.complaints == []
    finally:
        browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=clock)


def test_an_empty_run_draws_nothing_and_complains_about_nothing(browser, tmp_path) -> None:
    (tmp_path / "log.jsonl").write_text("")
    browser.open(write_report([tmp_path], tmp_path / "report.html"))
    assert "nothing to draw" in browser.evaluate("document.body.innerText")
    assert browser.complaints == []
