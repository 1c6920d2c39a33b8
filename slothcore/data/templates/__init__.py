"""Chat templates that come with the package, for tokenizers without one and for formats of one's own choice.

Each `.jinja` file begins with a comment: where the format is described in public, and which control tokens it writes.
"""

import difflib
import re
from importlib.resources import files
from pathlib import Path

BUILTIN_TEMPLATES = (
    "alpaca",
    "chatml",
    "gemma",
    "llama-2",
    "llama-3",
    "mistral-v0.1",
    "mistral-v0.3",
    "phi-3",
    "phi-4",
    "qwen-2.5",
    "vicuna",
    "zephyr",
)
# Those that write no control tokens but a tokenizer's own begin and end: they suit every tokenizer.
PLAIN_TEMPLATES = ("alpaca", "llama-2", "mistral-v0.1", "vicuna", "zephyr")
_STATED_TOKENS = re.compile(r"^Control tokens: (.*)$", re.MULTILINE)
_LOOKS_LIKE_A_TOKEN = re.compile(r"<\|\w+\|>|<(?:start|end)_of_turn>|\[/?(?:INST|TOOL_CALLS)\]")


def builtin_template(name: str) -> str:
    """The Jinja source of a built-in template.

    Raises: ValueError naming the known ones.
    """
    if name not in BUILTIN_TEMPLATES:
        near = difflib.get_close_matches(name, BUILTIN_TEMPLATES, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"unknown chat template {name!r}{meant}; built in are {', '.join(BUILTIN_TEMPLATES)}; "
            "or give the path of a .jinja file, or leave it out for the model's own"
        )
    return (files(__package__) / f"{name}.jinja").read_text(encoding="utf-8")


def names_template_file(chosen: str | Path) -> bool:
    """Whether a `chat_template` option means a file, and not a built-in template."""
    file = Path(chosen)
    return str(chosen) not in BUILTIN_TEMPLATES and (file.suffix in (".jinja", ".jinja2", ".j2") or file.exists())


def template_source(chosen: str | Path) -> str:
    """The Jinja source that a `chat_template` option stands for: a built-in name, or the path of a file.

    Raises: ValueError for an unknown name, or a file that is absent, empty or not UTF-8.
    """
    if not names_template_file(chosen):
        return builtin_template(str(chosen))
    file = Path(chosen)
    try:
        source = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"the chat template {file} does not exist; give the path of a .jinja file, or one of "
            f"{', '.join(BUILTIN_TEMPLATES)}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"the chat template {file} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"the chat template {file} cannot be read: {error.strerror}") from None
    if not source.strip():
        raise ValueError(f"the chat template {file} is empty; write a Jinja template into it")
    return source


def control_tokens(source: str) -> list[str]:
    """What a template writes that should be single tokens: as its first comment states, else what looks like one."""
    stated = _STATED_TOKENS.search(source)
    if stated is None:
        return list(dict.fromkeys(_LOOKS_LIKE_A_TOKEN.findall(source)))
    return [] if stated[1].startswith("none") else stated[1].split()
