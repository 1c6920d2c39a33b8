"""Fixtures that every test may use.

Without a GPU the Triton kernels run in Triton's interpreter on CPU tensors. The interpreter is chosen when a kernel
is defined, so the variable is set here, before anything imports slothcore.
"""

import gc
import os
import signal

import torch

# What a script starts in the background ignores Ctrl-C, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.family_table import write_table

MEMORY_KEPT = 2**30
"""Bytes that a process may keep of a GPU between tests."""

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write_table(terminalreporter)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def room_for_other_workers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give a GPU back what a test took of it: several processes test on one, and what a cache keeps others lack."""
    yield
    if "gpu" in request.keywords and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > MEMORY_KEPT:
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def kernel_device() -> str:
    """Where a Triton kernel can run here: the GPU, or the CPU under Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `torch.empty*` return NaN (integers: the largest value), so an output that no program wrote is seen."""

    def poison(allocate):
        def allocate_poisoned(*args, **kwargs):
            result = allocate(*args, **kwargs)
            if result.is_floating_point():
                return result.fill_(float("nan"))
            return result if result.dtype == torch.bool else result.fill_(torch.iinfo(result.dtype).max)

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    original_new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(original_new_empty))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real datasets, tokenizers and a trained tiny model that lie beside the checkout; tests skip without them."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder shared/data beside the checkout is absent")
    return SHARED_DATA
