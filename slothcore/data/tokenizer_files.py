"""The files of a tokenizer folder beside `tokenizer.json`: what they say, and copying them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What a tokenizer folder may hold.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
ADDITIONAL_TEMPLATES = "additional_chat_templates"


def copy_files(source: Path, target: Path) -> None:
    """Copy what is there of a tokenizer's files into the folder `target`, each under its name once it is complete."""
    templates = source.glob(f"{ADDITIONAL_TEMPLATES}/*.jinja")
    for name in (*TOKENIZER_FILES, *(str(file.relative_to(source)) for file in templates)):
        original, copy = source / name, target / name
        if not original.is_file() or original.resolve() == copy.resolve():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(f".{copy.name}.partial")
        shutil.copyfile(original, partial)
        partial.replace(copy)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or nothing if the file is absent."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value


def token_text(token: Any, name: str, folder: Path) -> str | None:
    """A special token is written as its text or as a dict with `content`."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if not (text is None or isinstance(text, str)):
        raise ValueError(f"{folder}: {name} must be a text, got {text!r}")
    return text


def chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Jinja sources by name: those in files before those in the configuration.

    `chat_template.jinja` is the default one; others lie in `additional_chat_templates` or are listed by name in the
    configuration.
    """
    given = config.get("chat_template")
    if isinstance(given, list):
        try:
            templates = {entry["name"]: entry["template"] for entry in given}
        except (KeyError, TypeError):
            raise ValueError(f"{folder}: chat_template must list pairs of name and template") from None
    else:
        templates = {} if given is None else {"default": given}
    file = folder / "chat_template.jinja"
    if file.is_file():
        templates["default"] = file.read_text(encoding="utf-8")
    for file in sorted((folder / ADDITIONAL_TEMPLATES).glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    for template in templates.values():
        if not isinstance(template, str):
            raise ValueError(f"{folder}: chat_template must be a text, got {type(template).__name__}")
    return templates


def added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Tokens listed beside `tokenizer.json`: id -> `content` and flags.

    `added_tokens_decoder` of the configuration has both; the older `added_tokens.json` has texts and ids alone.
    Raises: ValueError if an entry is no token.
    """
    found: dict[int, Mapping[str, Any]] = {}
    older = read_json(folder / "added_tokens.json")
    try:
        found.update((int(token_id), {"content": text}) for text, token_id in older.items())
        found.update((int(key), dict(token)) for key, token in (config.get("added_tokens_decoder") or {}).items())
        if not all(isinstance(token["content"], str) for token in found.values()):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{folder}: added_tokens_decoder and added_tokens.json must give tokens ids") from None
    return found
