"""`slothcore.export_model`: a model as files for others, complete and checked, or none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slothcore.data.tokenizer import Tokenizer
from slothcore.export.formats import Writer, format_named
from slothcore.export.new_folder import new_folder, place_of, require_new, require_room
from slothcore.export.self_check import require_finite
from slothcore.lora.merge import Base
from slothcore.models.decoder import Decoder


def export_model(
    model: Decoder,
    tokenizer: Tokenizer | None,
    path: str | Path,
    *,
    format: str = "merged",
    dtype: str | None = None,
    base: Base = "loaded",
    check: bool = True,
    give_up_model: bool = False,
) -> str:
    """Write a model, or its adapter, into the new folder `path`.

    The folder appears under its name when all of it is on the disk, and what was written was read back and gives the
    logits of the model.

    Args:
        format: one of `FORMATS`, such as "merged" (a Hugging Face model, the adapter folded in) or "adapter" (PEFT's).
        dtype: "bfloat16", "float16" or "float32"; default: bfloat16 for merged, as it is for an adapter.
        base: what an adapter is folded into: "loaded", the weights that it was trained beside, NF4 ones as they decode;
            or "original", those of the model's folder before anything was quantised.
        check: read back what was written. An adapter's check loads its base once more.
        give_up_model: the model is not needed any more, and its memory may be freed before that; it is of no use then.
    Returns: what the check found, in a few words.
    Raises: ValueError, before anything is written, for a format, dtype, model or path that do not go together, a model
        whose logits are not finite, or too little room; if the GPU has none for a weight, or what was written does not
        give the model's logits. OSError if the disk fails.
    """
    target = place_of(path)
    try:
        job = ExportJob.of(model, format, dtype, base)
        require_new(target)
        require_room(target, job.writer.size(model, job.dtype))
        with new_folder(target) as building:
            job.writer.write(model, tokenizer, building, job.dtype, **job.options)
            if not check:
                return "not read back"
            return job.writer.check(model, building, job.dtype, give_up=give_up_model, **job.options)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the GPU's memory is full, so {target} was not written; free some of it, or load the model with "
            "--device cpu (device='cpu')"
        ) from error


@dataclass(frozen=True)
class ExportJob:
    """What is to be written, once it is known that it can be.

    Attributes:
        writer: of the format.
        dtype: of its numbers; None: as they are.
        options: what else the writer is told.
    """

    writer: Writer
    dtype: str | None
    options: dict[str, Any]

    @classmethod
    def of(cls, model: Decoder, format: str, dtype: str | None, base: Base) -> "ExportJob":
        """Raises: ValueError for a format, dtype, base or model that do not go together, or a model that diverged."""
        chosen = format_named(format, dtype, base=base)
        job = cls(
            chosen.writer(),
            dtype.lower() if dtype else chosen.default_dtype,
            {"base": base} if chosen.takes_base else {},
        )
        job.writer.require(model, job.dtype, **job.options)
        require_finite(model)
        return job
