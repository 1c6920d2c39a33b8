"""The benchmark of preparing data: what it prints, and that it ends with 1 if it took too much memory."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "prepare_data.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [["--chat"], []])
def test_rate_and_memory_are_said(kind: list[str], tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--rows", "12000", *kind, "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("12,000 rows, ")
    for line, attempt in zip(lines[1:], ("first time", "from the cache"), strict=True):
        assert re.match(rf"{attempt}: checked in .* s, tokenised in .* rows/s, .* tokens/s at \d+ tokens a row", line)
        free, peak = re.search(r"\(([\d.]+)% free\).*peak memory ([\d,]+) MB", line).groups()
        assert float(free) < 2
        # A thirtieth of what a million rows may take beyond an empty process.
        before = int(re.search(r"memory before: (\d+) MB", lines[0])[1])
        assert int(peak.replace(",", "")) - before < 200
    assert ("messages" in (tmp_path / "rows.jsonl").read_text()) == bool(kind)
    done = subprocess.run([*command[:3], "200", "--limit", "10"], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"peak memory \d+ MB is over the limit of 10 MB\n", done.stderr)
