"""A Hugging Face tokenizer folder, over the `tokenizers` package alone.

`tokenizer.json` is the truth about text to ids, and about the tokens added around a text: as transformers does beside
such a file, `add_bos_token` and `add_eos_token` of `tokenizer_config.json` are passed over. That file and
`special_tokens_map.json` say which tokens begin, end and pad a text, and `chat_template.jinja` how a conversation is
written.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as TokenizerCore

from slothcore.data.chat import ChatTemplate, Message

# What a tokenizer folder may hold; `save` copies those that are there.
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
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
DEDICATED_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|padding|>")
UNUSED_TOKEN_MARKS = ("reserved_special_token", "placeholder", "unused")


class Tokenizer:
    """Text to token ids and back, with the ids that transformers gives for this `tokenizer.json`.

    transformers 5 takes only the vocabulary and merges from the file of a `LlamaTokenizer` (Llama 1 and 2) and puts
    spaces before text by a rule of its own. The file's rule, which holds here, is the one of transformers 4 and of
    the sentencepiece model that the weights were trained with.

    The pad token is the configured one; else a token made for it (`<|finetune_right_pad_id|>`, `<pad>`, ...); else a
    special token that the vocabulary reserves without a use; else the end-of-sequence token. It only fills
    rectangles: slothcore trains on packed rows and never computes on a pad.

    Args:
        core: the parsed `tokenizer.json`; padding and truncation that it carries are switched off.
        config: the contents of `tokenizer_config.json`.
        special_tokens: text of `bos_token`, `eos_token`, `unk_token` and `pad_token`, where they exist.
        chat_template: Jinja source, or None.
        folder: where the files lie that `save` copies.
    Raises: ValueError if a special token is not in the vocabulary.
    """

    def __init__(
        self,
        core: TokenizerCore,
        *,
        config: Mapping[str, Any],
        special_tokens: Mapping[str, str],
        chat_template: str | None = None,
        folder: Path,
    ) -> None:
        self._core = core
        self._folder = folder
        # A tokenizer saved after a batch call keeps its truncation, and would silently cut every text.
        core.no_truncation()
        core.no_padding()
        _add_missing_tokens(core, config.get("added_tokens_decoder") or {}, folder)
        self.bos_token_id = _id_of(core, special_tokens, "bos_token", folder)
        self.eos_token_id = _id_of(core, special_tokens, "eos_token", folder)
        self.pad_token_id = _pad_token_id(core, special_tokens.get("pad_token"), self.eos_token_id)
        self._template = None
        if chat_template is not None:
            self._template = ChatTemplate(chat_template, special_tokens=special_tokens)

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Read a Hugging Face folder.

        Raises: ValueError if there is no `tokenizer.json` (the message says how to make one) or a file is broken.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"no tokenizer.json in {folder}; make one with "
                f"transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
        try:
            core = TokenizerCore.from_file(str(file))
        except Exception as error:  # the Rust parser raises plain Exception for whatever it dislikes
            raise ValueError(f"{file} is not a valid tokenizer.json: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        token_map = _read_json(folder / "special_tokens_map.json")
        special_tokens = {}
        for name in SPECIAL_TOKEN_NAMES:
            token = _token_text(config.get(name), name, folder) or _token_text(token_map.get(name), name, folder)
            if token is not None:
                special_tokens[name] = token
        return cls(
            core,
            config=config,
            special_tokens=special_tokens,
            chat_template=_chat_template(folder, config),
            folder=folder,
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; a model's embedding may be padded beyond it."""
        return self._core.get_vocab_size(with_added_tokens=True)

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the chat template, or None."""
        return None if self._template is None else self._template.source

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in the text become their own ids.

        Args:
            text: any text.
            add_special_tokens: add the begin (and end) tokens that this tokenizer adds around a text.
        """
        return self._core.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`encode` for a text that goes on: one begin token even if the text writes its own, and no added end token."""
        ids = self.single_begin(self.encode(text, add_special_tokens=add_special_tokens))
        adds_end = add_special_tokens and self.encode("a")[-1] == self.eos_token_id
        return ids[:-1] if adds_end else ids

    def single_begin(self, ids: Sequence[int]) -> list[int]:
        """`ids` without the added begin token where the text already wrote one."""
        bos = self.bos_token_id
        return list(ids[1:] if bos is not None and list(ids[:2]) == [bos, bos] else ids)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` for many texts at once, on all cores unless `TOKENIZERS_PARALLELISM=false`."""
        return [e.ids for e in self._core.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; no clean-up of spaces, which would corrupt byte-pair text."""
        return self._core.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """Id of a token given by its exact text, or None."""
        return self._core.token_to_id(token)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of a conversation. Encode it with `add_special_tokens=False`: the template wrote them.

        Raises: ValueError if there is no chat template or it rejects the conversation.
        """
        if self._template is None:
            raise ValueError(
                f"the tokenizer in {self._folder} has no chat template; add a chat_template.jinja to that folder, "
                "or write the data as prompt and completion"
            )
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def save(self, path: str | Path) -> None:
        """Copy the original files into the folder `path`, each under its final name only once it is complete."""
        target = Path(path)
        target.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            source = self._folder / name
            if not source.is_file() or source.resolve() == (target / name).resolve():
                continue
            partial = target / f".{name}.partial"
            shutil.copyfile(source, partial)
            partial.replace(target / name)


def _read_json(file: Path) -> dict[str, Any]:
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


def _token_text(token: Any, name: str, folder: Path) -> str | None:
    """A special token is written as its text or as a dict with `content`."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if not (text is None or isinstance(text, str)):
        raise ValueError(f"{folder}: {name} must be a text, got {text!r}")
    return text


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja`, else the config's: one source, or a list of named ones of which `default` is taken."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not (template is None or isinstance(template, str)):
        raise ValueError(f"{folder}: chat_template must be a text, got {type(template).__name__}")
    return template


def _add_missing_tokens(core: TokenizerCore, decoder: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Add what only `tokenizer_config.json` lists, under the id that it gives."""
    for token_id, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        if core.token_to_id(token["content"]) is not None:
            continue
        flags = {k: bool(token.get(k, False)) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        core.add_tokens([AddedToken(token["content"], **flags)])
        given = core.token_to_id(token["content"])
        if given != int(token_id):
            raise ValueError(
                f"{folder}: tokenizer_config.json gives {token['content']!r} the id {token_id}, "
                f"but tokenizer.json has room for it only at {given}; the two files do not belong together"
            )


def _id_of(core: TokenizerCore, special_tokens: Mapping[str, str], name: str, folder: Path) -> int | None:
    token = special_tokens.get(name)
    if token is None:
        return None
    token_id = core.token_to_id(token)
    if token_id is None:
        raise ValueError(f"{folder}: {name} is {token!r}, which tokenizer.json does not hold")
    return token_id


def _pad_token_id(core: TokenizerCore, configured: str | None, eos_token_id: int | None) -> int | None:
    """By the order in the docstring of `Tokenizer`."""
    for token in (configured, *DEDICATED_PAD_TOKENS):
        if token is not None and (token_id := core.token_to_id(token)) is not None:
            return token_id
    for token_id, added in sorted(core.get_added_tokens_decoder().items()):
        if added.special and any(mark in added.content for mark in UNUSED_TOKEN_MARKS):
            return token_id
    return eos_token_id
