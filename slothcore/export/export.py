"""`slothcore.export_model`: a model as files for others, complete and checked, or none."""

from pathlib import Path

from slothcore.data.tokenizer import Tokenizer
from slothcore.export.formats import format_named
from slothcore.export.new_folder import new_folder, require_new, require_room
from slothcore.models.decoder import Decoder


def export_model(
    model: Decoder,
    tokenizer: Tokenizer | None,
    path: str | Path,
    *,
    format: str = "merged",
    dtype: str | None = None,
    check: bool = True,
    give_up_model: bool = False,
) -> str:
    """Write a model, or its adapter, into the new folder `path`.

    The folder appears under its name when all of it is on the disk, and what was written was read back and gives the
    logits of the model.

    Args:
        format: "merged" (a Hugging Face model, the adapter folded in) or "adapter" (PEFT's format).
        dtype: "bfloat16", "float16" or "float32"; default: bfloat16 for merged, as it is for an adapter.
        check: read back what was written. An adapter's check loads its base once more.
        give_up_model: the model is not needed any more, and its memory may be freed before that; it is of no use then.
    Returns: what the check found, in a few words.
    Raises: ValueError, before anything is written, for a format, dtype, model or path that do not go together, or too
        little room; if what was written does not give the model's logits. OSError if the disk fails.
    """
    chosen = format_named(format, dtype)
    dtype = dtype or chosen.default_dtype
    target = Path(path).expanduser()
    writer = chosen.writer()
    require_new(target)
    writer.require(model, dtype)
    require_room(target, writer.size(model, dtype))
    with new_folder(target) as building:
        writer.write(model, tokenizer, building, dtype)
        return writer.check(model, building, dtype, give_up=give_up_model) if check else "not read back"
