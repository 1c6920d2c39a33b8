"""Draw docs/images/terminal.png: a real run of the shipped example, as a terminal shows it.

    python scripts/draw_terminal.py [--chromium PROGRAM] [--output PNG]

Trains the ledger example on the CPU in a pseudo terminal, takes its screen on the way and at the end, asks the result,
and has a headless Chromium draw what was on the screens. Takes a few minutes; of the checkout only the picture is
written. For Linux and macOS.
"""

import argparse
import html
import json
import os
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

ROOT = Path(__file__).resolve().parents[1]
LEDGER = ROOT / "examples" / "ledger"
COLUMNS = 112
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\r|\n|\x08|\x07|[^\x1b\r\n\x08\x07]+")
COLORS = {31: "#e5786d", 32: "#8fbf6b", 33: "#d9b25f", 34: "#7aa6da", 35: "#c397d8", 36: "#70c0b1"}
STYLE = """
body { margin: 0; background: #fff; display: inline-block; }
pre { margin: 0; padding: 18px 22px; background: #1d2127; color: #d5d9de; border-radius: 8px;
      font: 15px/1.4 "DejaVu Sans Mono", Menlo, monospace; }
pre + pre { margin-top: 14px; }
"""


class Screen:
    """What a terminal shows after all that was written to it: lines of characters, each with its colour."""

    def __init__(self) -> None:
        self.lines: list[list[tuple[str, str]]] = [[]]
        self.row = self.column = 0
        self.style = ""

    def write(self, text: str) -> None:
        """Take text with control sequences."""
        for match in CONTROL.finditer(text):
            piece = match[0]
            if match[2]:
                self._control(match[1], match[2])
            elif piece == "\r":
                self.column = 0
            elif piece == "\n":
                self._down()
            elif piece == "\x08":
                self.column = max(0, self.column - 1)
            elif piece != "\x07":
                for character in piece:
                    self._put(character)

    def html(self) -> str:
        """The lines that are there, without empty ones at the end."""
        rows = []
        for line in self.lines:
            text = "".join(
                f'<span style="{style}">{html.escape(character)}</span>' if style else html.escape(character)
                for character, style in line
            )
            rows.append(text.rstrip())
        return "\n".join(rows).rstrip()

    def _put(self, character: str) -> None:
        if self.column >= COLUMNS:
            self._down()
            self.column = 0
        line = self.lines[self.row]
        line.extend([(" ", "")] * (self.column + 1 - len(line)))
        line[self.column] = (character, self.style)
        self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])

    def _control(self, numbers: str, kind: str) -> None:
        if kind == "A":
            self.row = max(0, self.row - int(numbers or 1))
        elif kind == "K":
            del self.lines[self.row][self.column :]
        elif kind == "m":
            for number in map(int, (numbers or "0").split(";")):
                if number in COLORS:
                    self.style = f"color: {COLORS[number]}"
                else:
                    self.style = {0: "", 1: "font-weight: bold", 2: "opacity: 0.6"}.get(number, self.style)


def run(words: list[str], screen: Screen, *, cwd: Path, on_output: Callable[[str], None] = lambda text: None) -> None:
    """Run a command at a pseudo terminal, its output on `screen`, behind a line that shows it. Ends if it fails."""
    screen.write(f"\x1b[32m$\x1b[0m \x1b[1m{shlex.join(['slothcore', *words])}\x1b[0m\r\n")
    master, slave = pty.openpty()
    ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "slothcore.cli", *words]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=environment)
    os.close(slave)
    rest = b""
    while select.select([master], [], [], 600)[0]:
        try:
            received = os.read(master, 2**16)
        except OSError:  # Linux says so when the program has ended
            received = b""
        if not received:
            break
        rest += received
        # A character or control sequence may come in two parts.
        text = rest.decode("utf-8", errors="ignore") if rest[-1] < 0x80 and b"\x1b" not in rest[-8:] else ""
        if text:
            rest = b""
            screen.write(text)
            on_output(text)
    screen.write(rest.decode("utf-8", errors="replace"))
    os.close(master)
    if process.wait():
        raise SystemExit(f"{shlex.join(words)} failed:\n{re.sub('<[^>]*>', '', screen.html())}")


def session(folder: Path) -> list[str]:
    """Train and ask in `folder`; gives two screens, one of the middle of training and one of the end."""
    (folder / "examples").symlink_to(ROOT / "examples")
    sys.path.insert(0, str(LEDGER))
    from demo import write_data

    os.chdir(folder)  # where the paths of the example begin
    held_out = write_data(Path("runs/ledger/data"))
    screen, middle = Screen(), []

    def look(text: str) -> None:
        step = re.search(r"step (\d+)/500", text)
        if step and int(step[1]) > 310 and not middle:
            middle.append(screen.html())

    run(["train", "examples/ledger/train.yaml"], screen, cwd=folder, on_output=look)
    question = ["--instruction", held_out[0]["instruction"], "--input", held_out[0]["input"]]
    run(["generate", "--model", "runs/ledger/run", *question], screen, cwd=folder)
    answer = json.loads(held_out[0]["output"])
    if str(answer["price"]) not in re.sub("<[^>]*>", "", screen.html()):
        raise SystemExit("the result does not answer as it should; train again")
    return [*middle, screen.html()]


def draw(screens: list[str], output: Path, *, browser: str, folder: Path) -> None:
    """Have the browser draw the screens one below the other."""
    page = folder / "terminal.html"
    body = "".join(f"<pre>{screen}</pre>" for screen in screens)
    page.write_text(f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style><body>{body}', encoding="utf-8")
    lines = sum(screen.count("\n") + 1 for screen in screens)
    height = lines * 21 + len(screens) * 36 + (len(screens) - 1) * 14
    width = round(COLUMNS * 9.04) + 44
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
    subprocess.run(
        [browser, *flags, f"--screenshot={output.absolute()}", page.as_uri()],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=120,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", metavar="PROGRAM", help="the browser; default: one that is installed")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "terminal.png", metavar="PNG")
    arguments = parser.parse_args()
    browser = arguments.chromium or next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        parser.error(f"none of {', '.join(BROWSERS)} is installed; give one with --chromium")
    output = arguments.output.absolute()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        draw(session(folder), output, browser=browser, folder=folder)
        os.chdir(ROOT)
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
