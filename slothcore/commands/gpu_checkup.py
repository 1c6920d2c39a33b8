"""The part of `slothcore doctor` about the GPU: driver, build of torch, and kernels that really run."""

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from slothcore.commands.findings import GIB, Finding

DRIVER_FILE = Path("/proc/driver/nvidia/version")
DEVICE_FILES = ("/dev/nvidia0", "/dev/dxg")  # the second is that of Windows' subsystem for Linux
CUDA_WHEELS = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
OLDEST_CAPABILITY, BFLOAT16_CAPABILITY = (7, 5), (8, 0)
# Less than this share free means that another program has taken much.
MOSTLY_FREE = 0.8


def examine_gpu() -> Iterator[Finding]:
    """Driver, GPU, kernels, and what training will run on."""
    built = torch.version.cuda
    yield Finding("torch build", "ok", f"CUDA {built}" if built else "CPU only")
    driver = driver_version()
    present = driver is not None or any(Path(name).exists() for name in DEVICE_FILES)
    if not torch.cuda.is_available():
        yield _without_gpu(present=present, driver=driver, built=built)
        reason = "not run: a GPU is needed; on a CPU plain torch does their work"
        yield Finding("kernels", "ok", reason)
        yield Finding("8-bit AdamW", "ok", "not run: a GPU is needed; on a CPU set optim to adamw, the default")
        yield Finding("training on", "ok", "the CPU")
        return
    yield Finding("driver", "ok", driver or "version unknown")
    device = torch.device("cuda", torch.cuda.current_device())
    yield _describe(device)
    yield _run(
        "kernels", lambda: run_kernels(device), "reinstall triton as torch wants it: pip install -U torch triton"
    )
    yield _run("8-bit AdamW", lambda: run_8bit_update(device), "pip install --upgrade bitsandbytes")
    yield Finding("training on", "ok", torch.cuda.get_device_name(device))


def driver_version() -> str | None:
    """The version of NVIDIA's driver, if it is loaded."""
    if not DRIVER_FILE.is_file():
        return None
    match = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", DRIVER_FILE.read_text(encoding="utf-8", errors="replace"))
    return match[0] if match else None


def run_kernels(device: torch.device) -> str:
    """One of slothcore's kernels and an NF4 round trip, against plain torch. Raises: ValueError if they differ."""
    from slothcore.kernels import nf4, nf4_eager, rms_norm, rms_norm_eager

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 512, generator=generator), torch.randn(512, generator=generator)
    normed, *_ = rms_norm.rms_norm_forward(x.to(device), weight.to(device), eps=1e-6)
    expected, *_ = rms_norm_eager.rms_norm_forward(x, weight, eps=1e-6)
    error = (normed.cpu() - expected).abs().max().item()
    if not error < 1e-4:
        raise ValueError(f"RMSNorm is {error:.1e} away from plain torch")
    decoded = nf4.nf4_dequantize(nf4.nf4_quantize(x.to(device)), dtype=torch.float32).cpu()
    if not torch.equal(decoded, nf4_eager.nf4_dequantize(nf4_eager.nf4_quantize(x), dtype=torch.float32)):
        raise ValueError("NF4 weights do not decode as in plain torch")
    return "RMSNorm and NF4 ran and agree with plain torch"


def run_8bit_update(device: torch.device) -> str:
    """One step of 8-bit AdamW, whose first update moves each weight by the learning rate. Raises: ValueError if not."""
    from slothcore.training.adamw_8bit import AdamW8bit

    weight = torch.nn.Parameter(torch.ones(4096, device=device))
    weight.grad = torch.full_like(weight, 0.5)
    AdamW8bit([weight], lr=0.25, weight_decay=0.0).step()
    moved = (1 - weight.detach()).cpu()
    if not torch.allclose(moved, torch.full_like(moved, 0.25), rtol=0.05):
        raise ValueError(f"the update moved a weight by {moved[0].item():.3f} in place of 0.250")
    return "bitsandbytes' update ran"


def _without_gpu(*, present: bool, driver: str | None, built: str | None) -> Finding:
    """Why torch has no GPU to use; to have none at all is no problem."""
    if not present:
        return Finding("GPU", "ok", "none: training runs on the CPU")
    if built is None:
        return Finding("GPU", "problem", "there is one, but this torch is built for the CPU only", CUDA_WHEELS)
    reason = _why_not()
    if driver is None:
        return Finding("GPU", "problem", f"there is one, but no NVIDIA driver is loaded{reason}", "nvidia-smi")
    return Finding(
        "GPU",
        "problem",
        f"the driver {driver} is there, but torch (CUDA {built}) cannot use it{reason}",
        f"update the driver, or take a torch for an older CUDA; unset CUDA_VISIBLE_DEVICES; {CUDA_WHEELS}",
    )


def _why_not() -> str:
    """What CUDA itself says."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return f" ({' '.join(str(error).split())})"
    return ""


def _describe(device: torch.device) -> Finding:
    capability = torch.cuda.get_device_capability(device)
    free, total = torch.cuda.mem_get_info(device)
    text = (
        f"{torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]}, "
        f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    )
    if torch.cuda.device_count() > 1:
        text += f"; {torch.cuda.device_count()} GPUs, of which one trains"
    if capability < OLDEST_CAPABILITY:
        return Finding("GPU", "problem", f"{text}; the oldest that the kernels take is 7.5", "train with --device cpu")
    if free < MOSTLY_FREE * total:
        return Finding("GPU", "warning", f"{text}; other programs hold the rest", "nvidia-smi shows which")
    if capability < BFLOAT16_CAPABILITY:
        text += "; without bfloat16, so that it computes in float16"
    return Finding("GPU", "ok", text)


def _run(name: str, check: Callable[[], str], remedy: str) -> Finding:
    """The finding of a check that runs something; whatever it raises is what is wrong."""
    try:
        return Finding(name, "ok", check())
    except Exception as error:  # a broken installation fails in ways of its own, and the report has to go on
        reason = " ".join(str(error).split())[:300]
        return Finding(name, "problem", f"failed: {type(error).__name__}: {reason}", remedy)
