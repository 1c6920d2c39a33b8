"""The merged model in NF4, as one of the export's formats."""

from pathlib import Path

from slothcore.data.tokenizer import Tokenizer
from slothcore.export.merged import MergedAs, compare, require, write_model
from slothcore.lora.merge import Base
from slothcore.models.decoder import Decoder
from slothcore.models.load import DTYPES
from slothcore.models.writing import nbytes_of

__all__ = ["check", "require", "size", "write"]


def size(model: Decoder, dtype: str | None) -> int:
    """Bytes of all weights."""
    assert dtype is not None
    return nbytes_of(MergedAs(DTYPES[dtype], bits=4).outline(model))


def write(
    model: Decoder, tokenizer: Tokenizer | None, folder: Path, dtype: str | None, *, base: Base = "loaded"
) -> None:
    """Fill the folder."""
    assert dtype is not None
    write_model(model, tokenizer, folder, MergedAs(DTYPES[dtype], bits=4, base=base))


def check(model: Decoder, folder: Path, dtype: str | None, *, give_up: bool, base: Base = "loaded") -> str:
    """Read the folder a block at a time; see `merged.compare`."""
    assert dtype is not None
    return compare(model, folder, MergedAs(DTYPES[dtype], bits=4, base=base))
