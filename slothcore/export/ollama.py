"""A GGUF file with the Modelfile from which `ollama create NAME -f Modelfile` makes a model."""

import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from slothcore.data.chat_rows import turn_end
from slothcore.data.tokenizer import Tokenizer
from slothcore.export import gguf
from slothcore.export.export import export_model
from slothcore.export.formats import format_named
from slothcore.export.gguf_template import has_space_at_beginning_only
from slothcore.export.go_template import ChatFormat, is_read
from slothcore.lora.merge import Base
from slothcore.models.decoder import Decoder

FILE = "Modelfile"
ANOTHER_DAY = datetime(2000, 2, 3)
# Ollama's parameters, and generation_config.json's names of them.
PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
}


def export_ollama(
    model: Decoder,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    quantization: str = "q8_0",
    base: Base = "loaded",
    check: bool = True,
    give_up_model: bool = False,
) -> str:
    """Write a GGUF file and a Modelfile into the new folder `path`: `export_model` with the format "ollama".

    The arguments, and what is returned and raised, are those of `export_gguf`.
    """
    format_named("ollama", quantization, option="quantization")
    options: dict[str, Any] = {"base": base, "check": check, "give_up_model": give_up_model}
    return export_model(model, tokenizer, path, format="ollama", dtype=quantization, **options)


require, size, check = gguf.require, gguf.size, gguf.check


def write(
    model: Decoder, tokenizer: Tokenizer | None, folder: Path, dtype: str | None, *, base: Base = "loaded"
) -> None:
    """Fill the folder.

    Raises: ValueError as the format gguf, or without a tokenizer.
    Warns: if the chat template cannot be written as Ollama's, or only without a system text.
    """
    if tokenizer is None:
        raise ValueError("Ollama gives texts to a model, so this one needs a tokenizer; export it with the format gguf")
    gguf.write(model, tokenizer, folder, dtype, base=base)
    chat = _chat_format(tokenizer)
    parameters = gguf.sampling_parameters(model.generation_config, PARAMETERS)
    text = modelfile(gguf.file_name(dtype), chat, stop_strings(model, tokenizer), parameters)
    (folder / FILE).write_text(text, encoding="utf-8", newline="\n")


def modelfile(file: str, chat: ChatFormat | None, stops: Sequence[str], parameters: Mapping[str, float]) -> str:
    """The text of a Modelfile, without stop strings that it cannot hold; the GGUF file names the same tokens."""
    lines = [f"FROM ./{file}"]
    if chat is not None:
        lines.append(f'TEMPLATE """{chat.go_template()}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    lines += [f"PARAMETER stop {quoted(stop)}" for stop in stops if can_be_quoted(stop)]
    return "\n".join(lines) + "\n"


def can_be_quoted(text: str) -> bool:
    """Whether a Modelfile can hold a text: it knows no escapes, and passes over signs that nobody sees."""
    return '"""' not in text and all(map(is_read, text))


def quoted(text: str) -> str:
    """A text as it stands in a Modelfile."""
    return f'"""{text}"""' if '"' in text else f'"{text}"'


def stop_strings(model: Decoder, tokenizer: Tokenizer) -> list[str]:
    """The texts that end an answer: of the tokens that do, and what the chat template writes behind one."""
    ends = [turn_end(tokenizer), tokenizer.eos_token_id, *model.eos_token_ids]
    texts = [tokenizer.token_text(end) if isinstance(end, int) else end for end in ends]
    return list(dict.fromkeys(text for text in texts if text))


def _chat_format(tokenizer: Tokenizer) -> ChatFormat | None:
    if tokenizer.chat_template is None:
        warnings.warn(
            "the tokenizer has no chat template, so the Modelfile has none: Ollama gives the model texts as they are",
            stacklevel=3,
        )
        return None
    chat = ChatFormat.of(tokenizer)
    if chat is None:
        warnings.warn(
            "the chat template is of a form that the Modelfile cannot have, so Ollama chooses one; write TEMPLATE into "
            "it yourself",
            stacklevel=3,
        )
        return None
    with tokenizer.clock.held(ANOTHER_DAY):
        writes_the_day = ChatFormat.of(tokenizer) != chat
    if writes_the_day:
        warnings.warn(
            "the chat template writes the day, which a Modelfile cannot, so this one has the day of the export for "
            "ever; write another into its TEMPLATE, or leave that line out there",
            stacklevel=3,
        )
    if has_space_at_beginning_only(tokenizer):
        warnings.warn(
            "llama.cpp, with which Ollama reads texts, puts a space behind a special token, and so does the template "
            "of the Modelfile; in conversations some ids there will differ by that space",
            stacklevel=3,
        )
    if chat.system is None:
        warnings.warn(
            "the chat template has no place for a system text, or another one than at the beginning, so the Modelfile "
            "has none",
            stacklevel=3,
        )
    return chat
