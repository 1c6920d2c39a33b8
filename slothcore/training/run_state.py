"""Checkpoints of a run: safetensors and JSON, written beside and renamed, so that none is ever half there.

checkpoint-N/
    adapter_*               the adapter in PEFT's format; or the whole model, a Hugging Face folder
    optimizer.safetensors   "<parameter>/<entry>" -> tensor
    rng.safetensors         torch's generator states: cpu, and cuda where there is one
    state.json              the rest: step, log window, configuration, fingerprints
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from slothcore.models.checkpoint import save_tensors

STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng.safetensors"
SAMPLES_PER_WEIGHT = 1024


@dataclass
class RunState:
    """Where a run stands after `step` optimizer steps. Everything but the tensors of a checkpoint."""

    model_fingerprint: str
    data_fingerprint: str
    config: dict[str, Any]
    step: int = 0
    epoch: int = 0
    position: int = 0  # optimizer steps of this epoch already done
    tokens: int = 0  # tokens seen since step 0
    window_steps: int = 0  # steps since the last line of the log
    window_loss: float = 0.0  # their losses, summed
    window_skipped: int = 0  # how many of them were skipped, in float16
    logged_loss: float = 0.0  # losses of all steps before the window, summed
    elapsed: float = 0.0  # seconds of training
    token_budget: int | None = None  # tokens of a pass that rows are merged up to; None: without memory_budget
    decoded_layers: int | None = None  # layers that keep decoded weights
    graphs_given_up: bool = False  # for want of memory
    eval_fingerprint: str | None = None  # of what the evaluations were of
    best_step: int | None = None  # of the evaluation with the lowest loss
    best_eval_loss: float | None = None
    evaluations_without_improvement: int = 0  # until now, in a row; for early stopping
    wandb_id: str | None = None  # of the run that its lines go to
    rows_made: str | None = None  # when; chat templates may write the day
    optimizer_values: dict[str, dict[str, Any]] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    output_dir: Path,
    state: RunState,
    *,
    optimizer_tensors: dict[str, Tensor],
    device: torch.device,
    save_weights: Callable[[Path], object],
) -> Path:
    """Write `output_dir/checkpoint-<step>` in one stroke and give its path.

    Args:
        save_weights: called with a folder, writes the adapter or the model into it.
    Raises: OSError if the disk is full or fails; the checkpoints that there are stay.
    """

    def write(folder: Path) -> None:
        save_weights(folder)
        save_tensors(optimizer_tensors, folder / OPTIMIZER_FILE)
        save_tensors(generator_states(device), folder / RNG_FILE)
        (folder / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")

    return write_folder(checkpoint_of(output_dir, state.step), write)


def checkpoint_of(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, if there is one."""
    return output_dir / f"checkpoint-{step}"


def write_folder(target: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a folder beside `target`, then put it in its place, whatever was there before.

    Raises: OSError if anything cannot be written; `target` is then what it was.
    """
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for file in temporary.iterdir():
            _flush_to_disk(file)
    except (OSError, SafetensorError) as error:
        # On a full disk the part that fits would stand in the way of whatever is tried next.
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{target} cannot be written ({error}); make room, or check the disk") from error
    former = _set_aside(target)
    os.replace(temporary, target)
    shutil.rmtree(former, ignore_errors=True)
    return target


def read_state(checkpoint: Path) -> RunState:
    """The state of a checkpoint folder.

    Raises: FileNotFoundError if there is no such checkpoint, ValueError if its state cannot be read.
    """
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{checkpoint} is no checkpoint of a run: it has no {STATE_FILE}")
    try:
        return RunState(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; resume from another checkpoint") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint, on the host. Raises ValueError if the file is absent or damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; resume from another checkpoint") from error


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / STATE_FILE).is_file():
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found)]


def find_checkpoint(resume_from: str, output_dir: Path) -> Path:
    """The checkpoint that `resume_from` names: a folder, a run's folder, or "latest" in `output_dir`.

    Raises: FileNotFoundError if there is none.
    """
    if resume_from == "latest":
        folder = output_dir
    else:
        folder = Path(resume_from)
        if not folder.is_dir():
            there = checkpoints(folder.parent) or checkpoints(output_dir)
            names = ", ".join(path.name for path in there)
            hint = f"; {there[0].parent} has {names}" if there else ""
            raise FileNotFoundError(f"the checkpoint folder {folder} does not exist{hint}")
        if (folder / STATE_FILE).is_file():
            return folder
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(
            f"{folder} has no checkpoint to resume from; to start anew, leave out resume_from_checkpoint "
            "and set overwrite_output_dir"
        )
    return found[-1]


def keep_newest(output_dir: Path, limit: int | None, *, best: Path | None = None) -> None:
    """Delete all but the `limit` newest checkpoints, and `best`; None keeps all."""
    if limit is not None:
        for path in checkpoints(output_dir)[:-limit]:
            if path != best:
                remove_folder(path)


def remove_partial(output_dir: Path) -> None:
    """Delete what a killed process left half written."""
    for pattern in (".*.partial", ".*.doomed"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a half-deleted one is never taken for whole."""
    shutil.rmtree(_set_aside(path), ignore_errors=True)


def _set_aside(path: Path) -> Path:
    """Move a folder, if it is there, to where `remove_partial` finds it, and give that place."""
    doomed = path.with_name(f".{path.name}.doomed")
    shutil.rmtree(doomed, ignore_errors=True)
    if path.exists():
        os.replace(path, doomed)
    return doomed


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """States of torch's default generators: the CPU's, and that of `device` if it is a GPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `generator_states` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def model_fingerprint(model: nn.Module) -> str:
    """A hash that tells models apart: names, shapes and dtypes of all state, and samples of what is frozen.

    The values of trainable weights are left out: they change, and a checkpoint brings them along.
    """
    digest = hashlib.sha256()
    # Experts lie in their state as windows into one parameter, which need a gradient as it does where grad is enabled.
    with torch.enable_grad():
        state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}\n".encode())
        if not tensor.requires_grad and tensor.numel():
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLES_PER_WEIGHT)].to("cpu").contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _flush_to_disk(path: Path) -> None:
    """A rename survives a power cut; what was renamed must, too."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
