"""The files of a tokenizer folder beside `tokenizer.json`: what they say, and copying them."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as TokenizerCore

from slothcore.data.special_tokens import add_tokens

CONFIG_FILE, TEMPLATE_FILE, ADDED_FILE = "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"
# What a tokenizer folder may hold.
TOKENIZER_FILES = (
    "tokenizer.json",
    CONFIG_FILE,
    "special_tokens_map.json",
    TEMPLATE_FILE,
    ADDED_FILE,
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
ADDITIONAL_TEMPLATES = "additional_chat_templates"


def copy_files(
    source: Path, target: Path, *, chat_template: str | None = None, new_tokens: Sequence[AddedToken] = ()
) -> None:
    """Copy what is there of a tokenizer's files into the folder `target`, each under its name once it is complete.

    `chat_template`, the source of another template, is written in place of all that the folder has.

    Raises: ValueError if the source has no tokenizer any more.
    """
    if not (source / "tokenizer.json").is_file():
        raise ValueError(f"{source} has lost its tokenizer.json since the tokenizer was loaded; load it again")
    enlarged = _with_tokens(source, new_tokens) if new_tokens else {}
    replaced = chat_template is not None
    templates = [] if replaced else source.glob(f"{ADDITIONAL_TEMPLATES}/*.jinja")
    for name in (*TOKENIZER_FILES, *(str(file.relative_to(source)) for file in templates)):
        original, copy = source / name, target / name
        if not original.is_file() or original.resolve() == copy.resolve() or (replaced and name == TEMPLATE_FILE):
            continue
        with _complete(copy) as partial:
            shutil.copyfile(original, partial)
    for name, text in enlarged.items():
        _write(target / name, text)
    if chat_template is not None:
        _write(target / TEMPLATE_FILE, chat_template)
        config = read_json(target / CONFIG_FILE)
        if config.pop("chat_template", None) is not None:
            _write(target / CONFIG_FILE, _as_text(config))


def _with_tokens(source: Path, new_tokens: Sequence[AddedToken]) -> dict[str, str]:
    """The files of a tokenizer that list its tokens, by name, with more of them.

    transformers takes the added tokens of some models from `tokenizer_config.json` and not from `tokenizer.json`; there
    and in `added_tokens.json` they are listed where others are already.
    """
    core = TokenizerCore.from_file(str(source / "tokenizer.json"))
    config, older = read_json(source / CONFIG_FILE), read_json(source / ADDED_FILE)
    add_missing_tokens(core, added_tokens(source, config), source)
    add_tokens(core, new_tokens)
    texts = {"tokenizer.json": core.to_str(pretty=True)}
    listed = config.get("added_tokens_decoder") or {}
    if listed:
        flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        more = {
            str(core.token_to_id(token.content)): {name: getattr(token, name) for name in flags} for token in new_tokens
        }
        texts[CONFIG_FILE] = _as_text({**config, "added_tokens_decoder": {**listed, **more}})
    if older:
        texts[ADDED_FILE] = _as_text({**older, **{t.content: core.token_to_id(t.content) for t in new_tokens}})
    return texts


def _as_text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _write(file: Path, text: str) -> None:
    with _complete(file) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def _complete(file: Path) -> Iterator[Path]:
    """Another name to write a file under, which becomes `file` once it is written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    yield partial
    partial.replace(file)


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
    file = folder / TEMPLATE_FILE
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
    older = read_json(folder / ADDED_FILE)
    try:
        found.update((int(token_id), {"content": text}) for text, token_id in older.items())
        found.update((int(key), dict(token)) for key, token in (config.get("added_tokens_decoder") or {}).items())
        if not all(isinstance(token["content"], str) for token in found.values()):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{folder}: added_tokens_decoder and added_tokens.json must give tokens ids") from None
    return found


def add_missing_tokens(core: TokenizerCore, tokens: Mapping[int, Mapping[str, Any]], folder: Path) -> None:
    """Add what only the files beside `tokenizer.json` list, under the ids that they give."""
    for token_id, token in sorted(tokens.items()):
        if core.token_to_id(token["content"]) is not None:
            continue
        flags = {k: bool(token.get(k, False)) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        core.add_tokens([AddedToken(token["content"], **flags)])
        given = core.token_to_id(token["content"])
        if given != token_id:
            raise ValueError(
                f"{folder}: tokenizer_config.json or added_tokens.json gives {token['content']!r} the id {token_id}, "
                f"but tokenizer.json has room for it only at {given}; the files do not belong together"
            )
