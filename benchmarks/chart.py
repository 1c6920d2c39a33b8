"""Tokens/s of a training step by case, system and way, as bars.

    python benchmarks/chart.py benchmarks/results/nvidia-h100-80gb-hbm3.csv [--commit 852963c2db]

draws the last figure of every system, case and way that landed with one commit, beside the CSV; `run.py` does so for
its own commit when it ends.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import compare
from benchmarks.shapes import step_name

COLOURS = {"slothcore": "#12805c", "unsloth": "#3f78b5", "liger": "#c29a2f", "transformers": "#858b95"}
OTHER_COLOUR = "#555555"
WEIGHTS = {"4": "NF4", "16": "bfloat16", "32": "float32"}
WAYS = {"no": "", "yes": "recompute", "mlp": "recompute gate and up", "offload": "offload"}
INCHES_A_BAR = 0.29
INCHES_A_PANEL = 0.52
INCHES_OF_TITLE = 1.0
WITHOUT_MATPLOTLIB = "no chart: matplotlib is not installed; pip install 'slothcore[plots]'"
Figure = Mapping[str, Any]


def draw(figures: Sequence[Figure], path: Path, *, title: str) -> str:
    """Write a PNG with a panel for each step, every panel with its own scale from zero, fastest first.

    Args:
        figures: rows of the CSV; those with the same step and weights are drawn below each other.
    Returns: what became of it, to print.
    """
    try:
        from matplotlib.figure import Figure as Canvas
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.patches import Patch
    except ImportError:
        return WITHOUT_MATPLOTLIB
    if not figures:
        return "no chart: there is no figure to draw"
    panels: dict[str, list[Figure]] = {}
    for figure in figures:
        panels.setdefault(panel_title(figure), []).append(figure)
    heights = [INCHES_A_BAR * len(panel) + INCHES_A_PANEL for panel in panels.values()]
    spacing = ConstrainedLayoutEngine(h_pad=0.06, hspace=0.04)
    canvas = Canvas(figsize=(9, INCHES_OF_TITLE + sum(heights)), layout=spacing)
    canvas.suptitle(title, fontsize=11, x=0.012, ha="left")
    axes = canvas.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, (name, panel) in zip(axes[:, 0], panels.items(), strict=True):
        panel.sort(key=lambda figure: -float(figure["tokens_per_second"]))
        values = [float(figure["tokens_per_second"]) for figure in panel]
        bars = axis.barh(range(len(panel)), values, height=0.78, color=[colour_of(figure) for figure in panel])
        axis.bar_label(bars, labels=[value_label(figure, panel[0]) for figure in panel], padding=4, fontsize=9)
        axis.set_yticks(range(len(panel)), [bar_label(figure) for figure in panel], fontsize=9)
        axis.invert_yaxis()
        axis.set_ylim(len(panel) - 0.5, -0.5)
        axis.set_xlim(0, 1.34 * max(values))
        axis.set_xticks([])
        axis.tick_params(left=False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.spines["left"].set_color("#b5b5b5")
        axis.set_title(name, loc="left", fontsize=10, fontweight="bold")
    systems = [name for name in COLOURS if any(figure["system"] == name for figure in figures)]
    canvas.legend(
        handles=[Patch(color=COLOURS[name], label=name) for name in systems],
        loc="outside lower left",
        ncols=len(systems),
        fontsize=9,
        frameon=False,
    )
    canvas.savefig(path, dpi=150)
    return f"drew {path}"


def setting(figure: Figure, name: str) -> str:
    """One of a row's settings, "" where it has none of this name."""
    return dict(item.split("=") for item in figure["settings"].split()).get(name, "")


def panel_title(figure: Figure) -> str:
    """The step, in words."""
    step = step_name(figure["case"])
    rows, _, length = step.partition("x")
    tokens = "8 sequences of Alpaca's lengths" if step == "alpaca" else f"{rows} x {length} tokens"
    return f"{tokens}, {WEIGHTS[setting(figure, 'bits')]}: tokens/s (GiB)"


def bar_label(figure: Figure) -> str:
    """Whose bar it is, and how it was run."""
    parts = [figure["system"]]
    if size := figure["case"].partition("/")[2]:
        parts.append(f"{size} at a time")
    if way := WAYS[setting(figure, "recompute")]:
        parts.append(way)
    if setting(figure, "decoded"):
        parts.append("decoded weights kept")
    if setting(figure, "graphs"):
        parts.append("no graphs")
    return ", ".join(parts)


def value_label(figure: Figure, fastest: Figure) -> str:
    """The figure, its memory, and how many times slower than the fastest of its panel it is."""
    speed, peak = float(figure["tokens_per_second"]), figure.get("peak_gib")
    ratio = float(fastest["tokens_per_second"]) / speed
    parts = [f"{speed:,.0f}", f"({float(peak):.1f} GiB)" if peak else "", f"1/{ratio:.1f}" if ratio >= 1.05 else ""]
    return "  ".join(part for part in parts if part)


def colour_of(figure: Figure) -> str:
    return COLOURS.get(figure["system"], OTHER_COLOUR)


def of_commit(figures: list[dict[str, str]], commit: str | None, *, tiny: bool = False) -> list[dict[str, str]]:
    """The last step of every system, case and setting that landed with a commit; None: with the last commit.

    Steps that only one system ran, as the growth of slothcore alone, are left out where others were compared.
    """
    steps = [
        figure
        for figure in figures
        if figure["benchmark"] == "step"
        and setting(figure, "tiny") == str(tiny)
        and (commit is None or figure["commit"] == commit)
    ]
    last = {compare.kind(figure): figure for figure in steps if figure["commit"] == steps[-1]["commit"]}
    systems: dict[str, set[str]] = {}
    for figure in last.values():
        systems.setdefault(panel_title(figure), set()).add(figure["system"])
    compared = [figure for figure in last.values() if len(systems[panel_title(figure)]) > 1]
    return compared or list(last.values())


def draw_commit(csv_path: Path, commit: str | None, *, tiny: bool = False) -> str:
    """Draw what landed in a CSV with a commit. Returns: what became of it, to print."""
    figures = of_commit(compare.read([csv_path]), commit, tiny=tiny)
    return draw(figures, path_beside(csv_path), title=title_of(figures[0]) if figures else "")


def title_of(figure: Figure) -> str:
    """What holds for all bars."""
    model = "a tiny Llama" if setting(figure, "tiny") == "True" else "Llama-3.1-8B's shape"
    return (
        f"One LoRA training step: {model}, {setting(figure, 'layers')} layers, r={setting(figure, 'r')} on all seven "
        f"linears\n{figure['gpu']}, {figure['date']}, {figure['commit']}; 1/N: N times slower than the fastest"
    )


def path_beside(csv_path: Path) -> Path:
    return csv_path.with_name(f"{csv_path.stem}-step.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--commit", help="default: that of the last step in the file")
    args = parser.parse_args(argv)
    if not of_commit(compare.read([args.csv]), args.commit):
        parser.error(f"{args.csv} has no step" + (f" of {args.commit}" if args.commit else ""))
    print(draw_commit(args.csv, args.commit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
