"""Every format under a kill and on a full disk: nothing has the final name, and what is said is one sentence.

A limit on the size of files stands for both: the system sends a signal to whoever writes beyond it, which ends the
process in the middle of a file; where the signal is ignored, the write fails as on a full disk. A disk that is full for
real is a small one in memory, where this process may mount one.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slothcore.export.formats import FORMATS
from slothcore.loading import load
from slothcore.lora.adapter_io import save_adapter
from slothcore.lora.attach import add_lora
from tests.lora.reference import randomise_zero_factors
from tests.training.tiny import write_model

ROOT = Path(__file__).resolve().parents[2]
# Less than the smallest file of weights, more than any small file beside.
LIMIT = 12_000
EXPORT = """
import json, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from slothcore.export.export import export_model
from slothcore.export.formats import FORMATS
from slothcore.loading import load

run, folder, *formats = sys.argv[1:]
model, tokenizer = load(run, device="cpu")
said = {}
for name in formats:
    try:
        said[name] = export_model(model, tokenizer, Path(folder) / name, format=name)
    except (ValueError, OSError) as error:
        said[name] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter."""
    folder = tmp_path_factory.mktemp("failures")
    model, _ = load(write_model(folder / "base"), bits=4, device="cpu")
    randomise_zero_factors(add_lora(model, r=8))
    save_adapter(model, folder / "adapter")
    return folder / "adapter"


def exporting(run: Path, folder: Path, formats: Any, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """Export into `folder`, a folder for each format, in a process that `prelude` spoils."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", prelude + EXPORT, str(run), str(folder), *formats]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def limited(action: str) -> str:
    return (
        f"import resource, signal\nresource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, {LIMIT}))\n"
        f"signal.signal(signal.SIGXFSZ, signal.{action})\n"
    )


@pytest.mark.parametrize("format", FORMATS)
def test_a_kill_in_the_middle_of_a_file(format: str, run: Path, tmp_path: Path) -> None:
    """What is left has another name, and the next export clears it away."""
    killed = exporting(run, tmp_path, [format], limited("SIG_DFL"))
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr
    assert [path.name for path in tmp_path.iterdir()] == [f".{format}.partial"]
    left = [file.stat().st_size for file in (tmp_path / f".{format}.partial").iterdir()]
    assert left
    assert max(left) <= LIMIT
    done = exporting(run, tmp_path, [format])
    assert json.loads(done.stdout)[format].startswith("read back"), done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [format]


def test_a_kill_before_the_folder_gets_its_name(run: Path, tmp_path: Path) -> None:
    """Everything is written then, and still nothing has the final name."""
    kill = (
        "import os, signal\nimport slothcore.export.merged as merged\n"
        "merged.check = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert exporting(run, tmp_path, ["merged"], kill).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".merged.partial"]
    assert (tmp_path / ".merged.partial" / "model.safetensors").is_file()


def assert_refused(said: dict[str, str], folder: Path) -> None:
    assert said.keys() == FORMATS.keys()
    for format, text in said.items():
        assert text.startswith(f"OSError: {folder / format} cannot be written ("), text
        assert text.endswith("); make room, or check the disk")
        assert "\n" not in text


def test_a_disk_that_takes_no_more(run: Path, tmp_path: Path) -> None:
    done = exporting(run, tmp_path, FORMATS, limited("SIG_IGN"))
    assert_refused(json.loads(done.stdout), tmp_path)
    assert list(tmp_path.iterdir()) == []
    # And on the command line.
    words = ["export", "--model", str(run), "--format", "adapter", "--output-dir", str(tmp_path / "out")]
    code = f"{limited('SIG_IGN')}import sys\nfrom slothcore.cli import main\nsys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1
    assert f"{tmp_path / 'out'} cannot be written (" in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full(run: Path, tmp_path: Path) -> None:
    """One that says beforehand how little it has, and one that was filled by somebody else meanwhile."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "--user", "--map-root-user", "--mount"]
    mounted = f"mount -t tmpfs -o size=48k none {disk}"
    if not shutil.which("unshare") or subprocess.run([*mount, "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("this process may not mount a disk in memory")
    (tmp_path / "export.py").write_text(EXPORT)
    lie = "import shutil\nfrom collections import namedtuple\nusage = namedtuple('usage', 'total used free')\n"
    lie += "shutil.disk_usage = lambda path: usage(2**40, 0, 2**40)\n"
    (tmp_path / "filled.py").write_text(lie + EXPORT)
    arguments = " ".join(map(str, (run, disk, *FORMATS)))
    script = f"{mounted}; cd {ROOT}"
    for program in ("export", "filled"):
        script += f"; PYTHONPATH={ROOT} {sys.executable} {tmp_path / program}.py {arguments}; ls -A {disk}"
    done = subprocess.run([*mount, "sh", "-c", script], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done  # and nothing is left, which `ls` would say
    for format, text in json.loads(lines[0]).items():
        assert text.startswith(f"ValueError: {disk / format} will take"), text
    filled = json.loads(lines[1])
    assert_refused(filled, disk)
    assert "No space left on device" in filled["merged"]
