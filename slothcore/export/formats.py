"""What a model can be exported as: a table of formats, which the command line shows without importing torch.

A format is a row here and a module with the functions of `Writer`.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from slothcore.data.tokenizer import Tokenizer
    from slothcore.models.decoder import Decoder


class Writer(Protocol):
    """What the module of a format does. `dtype` is one of the format's own, or None where that is its default.

    Where a format `takes_base`, all but `size` also have the keyword `base`, which `merged_state` explains.
    """

    def require(self, model: "Decoder", dtype: str | None) -> None:
        """Raises: ValueError if this model cannot be written so."""

    def size(self, model: "Decoder", dtype: str | None) -> int:
        """Bytes that the files will take, but for small ones."""

    def write(self, model: "Decoder", tokenizer: "Tokenizer | None", folder: Path, dtype: str | None) -> None:
        """Fill the folder, which exists and is empty."""

    def check(self, model: "Decoder", folder: Path, dtype: str | None, *, give_up: bool) -> str:
        """Read back what was written, compare logits, and say what was found; `give_up`: the model may be emptied.

        Raises: ValueError if they are not those of the model.
        """


@dataclass(frozen=True)
class Format:
    """One way to write a model.

    Attributes:
        help: what it is, in a few words.
        module: where its `Writer` is.
        dtypes: what its numbers can be; the first is the default unless `dtype_is_kept`.
        dtype_is_kept: whether numbers stay as they are if no dtype is asked for.
        takes_base: whether an adapter is folded into base weights, which may then be the original ones.
    """

    help: str
    module: str
    dtypes: tuple[str, ...]
    dtype_is_kept: bool = False
    takes_base: bool = False

    @property
    def default_dtype(self) -> str | None:
        """The dtype where none is asked for; None: as it is."""
        return None if self.dtype_is_kept else self.dtypes[0]

    def writer(self) -> Writer:
        """Its module, imported now."""
        return cast(Writer, import_module(self.module))


FORMATS = {
    "merged": Format(
        help="one Hugging Face model, the adapter folded into its base; runs everywhere",
        module="slothcore.export.merged",
        dtypes=("bfloat16", "float16", "float32"),
        takes_base=True,
    ),
    "merged-4bit": Format(
        help="the same in NF4 as bitsandbytes stores it; a quarter of the size, quantised after merging",
        module="slothcore.export.merged_4bit",
        dtypes=("bfloat16", "float16", "float32"),
        takes_base=True,
    ),
    "adapter": Format(
        help="the adapter alone in PEFT's format, without the state of training; small, ready to upload",
        module="slothcore.export.adapter",
        dtypes=("bfloat16", "float16", "float32"),
        dtype_is_kept=True,
    ),
    "gguf": Format(
        help="one GGUF file for llama.cpp, LM Studio and others, the adapter folded in and the numbers quantised",
        module="slothcore.export.gguf",
        dtypes=("q8_0", "q6_k", "q5_k_m", "q4_k_m", "bf16", "f16", "f32"),
        takes_base=True,
    ),
    "gguf-adapter": Format(
        help="the adapter alone as a GGUF file, which llama.cpp puts on the GGUF file of its base (--lora)",
        module="slothcore.export.gguf_lora",
        dtypes=("f32", "f16", "bf16"),
    ),
    "ollama": Format(
        help="a GGUF file and the Modelfile for `ollama create`, with template, stop strings and parameters",
        module="slothcore.export.ollama",
        dtypes=("q8_0", "q6_k", "q5_k_m", "q4_k_m", "bf16", "f16", "f32"),
        takes_base=True,
    ),
}


def format_named(name: str, dtype: str | None, *, base: str = "loaded", option: str = "dtype") -> Format:
    """The format of this name; its dtype may be written in capitals, as in the names of GGUF files.

    Args:
        base: what an adapter is folded into.
        option: what the caller's dtype is called, for the message.
    Raises: ValueError for another name, a dtype that it does not have, or a base that it does not take.
    """
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    if dtype is not None and dtype.lower() not in FORMATS[name].dtypes:
        raise ValueError(
            f"{option} must be one of {', '.join(FORMATS[name].dtypes)} for the format {name}, got {dtype!r}"
        )
    if base != "loaded" and not FORMATS[name].takes_base:
        raise ValueError(
            f"base {base} is of no use to the format {name}, which does not fold the adapter into it; leave it out"
        )
    return FORMATS[name]
