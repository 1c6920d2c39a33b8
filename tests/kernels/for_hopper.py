"""Compiles a kernel for Hopper without one, in a process of its own: Triton knows one target a process."""

import json
import os
import subprocess
import sys
from typing import Any

# `compiled` gets what a launch compiles; nothing is launched.
PREAMBLE = """
import json, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Hopper:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device=None):
        return 0

driver.set_active(Hopper())
launch, compiled, found = JITFunction.run, [], []
JITFunction.run = lambda self, *a, grid, warmup, **k: compiled.append(launch(self, *a, grid=grid, warmup=True, **k))
"""


def found_by(script: str) -> list[Any]:
    """What a script puts into `found`, a list of what JSON can hold; see `PREAMBLE` for what it has."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    source = PREAMBLE + script + "\nprint(json.dumps(found))\n"
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found
