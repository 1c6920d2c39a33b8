"""Compiles kernels for a GPU without one, in a process of its own: Triton knows one target a process."""

import json
import os
import subprocess
import sys
from typing import Any

Capability = tuple[int, int]
HOPPER: Capability = (9, 0)

# `compiled` gets what each launch compiles and the options that it was launched with; nothing is launched.
PREAMBLE = """
import json, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CAPABILITY = {capability}

class Absent:
    def get_current_target(self):
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device=None):
        return 0

def compile_only(self, *args, grid, warmup, **options):
    kernel = launch(self, *args, grid=grid, warmup=True, **options)
    compiled.append(kernel)
    launches.append((self.fn.__name__, kernel, options))
    return kernel

driver.set_active(Absent())
launch, compiled, launches, found = JITFunction.run, [], [], []
JITFunction.run = compile_only
"""

# Tensors that have a shape and a type and say that they are on a GPU, of which the library asks what it can do. That
# has to be said before its modules take the names.
PRETENDING = """
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from slothcore.kernels import gpu

FakeTensor.data_ptr = lambda self: 2**20 + self.storage_offset() * self.element_size()
torch.Tensor.is_cuda = FakeTensor.is_cuda = property(lambda self: True)
torch.cuda.get_device_capability = gpu.device_capability = lambda device=None: CAPABILITY
gpu.is_hopper = lambda device: CAPABILITY[0] == 9
gpu.multiprocessors = lambda device: {multiprocessors}
torch.cuda.is_current_stream_capturing = lambda: False
"""


def found_by(script: str, capability: Capability = HOPPER) -> list[Any]:
    """What a script puts into `found`, a list of what JSON can hold; see `PREAMBLE` for what it has."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    source = PREAMBLE.replace("{capability}", repr(capability)) + script + "\nprint(json.dumps(found))\n"
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def found_pretending(script: str, capability: Capability, *, multiprocessors: int) -> list[Any]:
    """The same where what the script computes with fake tensors goes the way that it goes on such a GPU."""
    return found_by(PRETENDING.replace("{multiprocessors}", str(multiprocessors)) + script, capability)
