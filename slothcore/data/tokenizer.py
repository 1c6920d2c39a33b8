"""A Hugging Face tokenizer folder, over the `tokenizers` package alone.

`tokenizer.json` is the truth about text to ids, and about the tokens added around a text: as transformers does beside
such a file, `add_bos_token` and `add_eos_token` of `tokenizer_config.json` are passed over. That file and
`special_tokens_map.json` say which tokens begin, end and pad a text, and `chat_template.jinja` how a conversation is
written.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as TokenizerCore
from torch import Tensor

from slothcore.data import special_tokens as tokens
from slothcore.data import tokenizer_files as files
from slothcore.data.chat import ChatTemplate, Clock, Message
from slothcore.data.new_tokens import check_new_tokens
from slothcore.data.templates import BUILTIN_TEMPLATES, PLAIN_TEMPLATES, control_tokens, template_source
from slothcore.data.token_ends import TokenEnds
from slothcore.data.values import whole_characters

PaddingSide = Literal["left", "right"]


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
        chat_templates: Jinja sources by name; "default" is the one for plain conversations.
        folder: where the files lie that `save` copies.
    Raises: ValueError if a special token is not in the vocabulary.
    """

    def __init__(
        self,
        core: TokenizerCore,
        *,
        config: Mapping[str, Any],
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str] | None = None,
        folder: Path,
    ) -> None:
        self._core = core
        self._folder = folder
        # A tokenizer saved after a batch call keeps its truncation, and would silently cut every text.
        core.no_truncation()
        core.no_padding()
        files.add_missing_tokens(core, files.added_tokens(folder, config), folder)
        self.bos_token_id = tokens.id_of(core, special_tokens, "bos_token", folder)
        self.eos_token_id = tokens.id_of(core, special_tokens, "eos_token", folder)
        self.pad_token_id = tokens.pad_token_id(core, special_tokens.get("pad_token"), self.eos_token_id)
        self.unk_token_id = tokens.unk_token_id(core, special_tokens.get("unk_token"), self.eos_token_id)
        self.padding_side: PaddingSide = config.get("padding_side") or "right"
        _check_side(self.padding_side, f"{folder}: padding_side")
        self._special_tokens = dict(special_tokens)
        self._chosen_template: str | None = None
        self._new_tokens: list[AddedToken] = []
        self.clock = Clock()  # of its chat templates
        self._templates = {
            name: ChatTemplate(source, special_tokens=special_tokens, clock=self.clock)
            for name, source in (chat_templates or {}).items()
        }

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
        config = files.read_json(folder / "tokenizer_config.json")
        token_map = files.read_json(folder / "special_tokens_map.json")
        special_tokens = {}
        for name in tokens.SPECIAL_TOKEN_NAMES:
            texts = (files.token_text(source.get(name), name, folder) for source in (config, token_map))
            if token := next(filter(None, texts), None):
                special_tokens[name] = token
        return cls(
            core,
            config=config,
            special_tokens=special_tokens,
            chat_templates=files.chat_templates(folder, config),
            folder=folder,
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; a model's embedding may be padded beyond it."""
        return self._core.get_vocab_size(with_added_tokens=True)

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the chat template, or None."""
        template = self._templates.get("default")
        return None if template is None else template.source

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in the text become their own ids.

        Args:
            add_special_tokens: add the begin (and end) tokens that this tokenizer adds around a text.
        """
        return self._core.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`encode` for a text that goes on: one begin token even if the text writes its own, and no added end token."""
        ids = self.single_begin(self.encode(whole_characters(text, "the prompt"), add_special_tokens))
        adds_end = add_special_tokens and self.encode("a")[-1] == self.eos_token_id
        return ids[:-1] if adds_end else ids

    def single_begin(self, ids: Sequence[int]) -> list[int]:
        """`ids` without the added begin token where the text already wrote one."""
        bos = self.bos_token_id
        return list(ids[1:] if bos is not None and list(ids[:2]) == [bos, bos] else ids)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` for many texts at once, on all cores unless `TOKENIZERS_PARALLELISM=false`."""
        return [e.ids for e in self._core.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def encode_with_ends(self, texts: Sequence[str]) -> list[tuple[list[int], Sequence[int]]]:
        """For each text the ids without added begin or end, and for each id the character behind its last one."""
        encoded = self._core.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, TokenEnds(encoding)) for encoding in encoded]

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for no text: those the vocabulary calls special, begin and end among them."""
        named = {token_id for token_id in (self.bos_token_id, self.eos_token_id) if token_id is not None}
        added = self._core.get_added_tokens_decoder()
        return frozenset(named.union(token_id for token_id, token in added.items() if token.special))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; no clean-up of spaces, which would corrupt byte-pair text."""
        return self._core.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """Id of a token given by its exact text, or None."""
        return self._core.token_to_id(token)

    def token_text(self, token_id: int) -> str | None:
        """How the vocabulary spells a token, or None if no token has this id."""
        return self._core.id_to_token(token_id)

    def add_tokens(self, new: Sequence[str], *, special: bool | None = None) -> dict[str, int]:
        """Make each of these texts one token, wherever it stands in a text; `save` writes them.

        Args:
            new: as they stand in the text; a space belongs to a token only if it is written here.
            special: whether `decode` leaves them out; None: those that look like control tokens, such as <|im_start|>.
        Returns: the ids of those that the vocabulary did not hold yet; the others stay as they are.
        Raises: ValueError for an empty text, or one that stands twice.
        """
        check_new_tokens(new)
        lacking = [text for text in new if self.token_id(text) is None]
        added = [tokens.new_token(text, special=special) for text in lacking]
        tokens.add_tokens(self._core, added)
        self._new_tokens += added
        self.__dict__.pop("special_token_ids", None)
        return {text: token_id for text in lacking if (token_id := self.token_id(text)) is not None}

    def template_for(self, tools: Sequence[Mapping[str, Any]] | None = None) -> ChatTemplate:
        """The template that writes a conversation with or without tools.

        Raises: ValueError if there is none; the message says which option helps.
        """
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise ValueError(
                f"the tokenizer in {self._folder} has no chat template; set chat_template to a built-in one "
                f"({', '.join(BUILTIN_TEMPLATES)}) or to a .jinja file (--chat-template), add a chat_template.jinja "
                "to that folder, or use plain prompts"
            )
        return template

    def use_chat_template(self, chosen: str) -> None:
        """Write every conversation by another template, and save it with the tokenizer.

        Args:
            chosen: the name of a built-in template, or the path of a `.jinja` file.
        Raises: ValueError for an unknown name, or a file that cannot be read or is not valid Jinja.
        Warns: if the vocabulary lacks tokens that the template writes: they are then spelled out as text.
        """
        source = template_source(chosen)
        name = f"the chat template {chosen}"
        template = ChatTemplate(source, special_tokens=self._special_tokens, name=name, clock=self.clock)
        self._templates, self._chosen_template = {"default": template}, source
        lacking = [token for token in control_tokens(source) if self.token_id(token) is None]
        if lacking:
            warnings.warn(
                f"{name} writes {', '.join(lacking)}, which the tokenizer in {self._folder} has no tokens for: each is "
                "spelled out as text of several tokens, which costs length; new_tokens makes each of them one, and "
                f"these templates end turns with the tokenizer's own end token: {', '.join(PLAIN_TEMPLATES)}",
                stacklevel=2,
            )

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation. Encode it with `add_special_tokens=False`: the template wrote them.

        The arguments are those of `ChatTemplate.render`. Of several named templates, "tool_use" serves where there are
        tools, "default" elsewhere.

        Raises: ValueError if there is no chat template or it rejects the conversation.
        """
        template = self.template_for(tools)
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            **variables,
        )

    def pad(
        self, rows: Sequence[Sequence[int]], *, padding_side: PaddingSide | None = None, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """A rectangle of token ids, for models that want one; slothcore itself drops the padding again.

        Args:
            rows: token ids of each row.
            padding_side: "left" or "right"; default: the tokenizer's own.
            length: width of the rectangle; default: that of the longest row.
        Returns: input_ids and attention_mask, both [rows, length] int64 on the CPU; the mask is 0 at padding.
        Raises: ValueError for another side, or if a row is longer than `length`.
        """
        side = padding_side or self.padding_side
        _check_side(side, "padding_side")
        longest = max(map(len, rows), default=0)
        width = longest if length is None else length
        if longest > width:
            raise ValueError(f"a row has {longest} tokens and does not fit into length={width}")
        ids = torch.full((len(rows), width), self.pad_token_id or 0)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for index, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[index, place] = torch.tensor(row, dtype=torch.int64)
            mask[index, place] = 1
        return ids, mask

    def to_json(self) -> str:
        """All of it that is in a `tokenizer.json`, added tokens included."""
        return self._core.to_str()

    def fingerprint(self) -> str:
        """A hash of all that decides how text and conversations become ids, the day where a template tells it."""
        sources = {name: template.source for name, template in self._templates.items()}
        today = str(self.clock.now().date()) if any("strftime_now" in s for s in sources.values()) else None
        facts = (self.to_json(), self.bos_token_id, self.eos_token_id, self._special_tokens, sources, today)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Copy the original files into the folder `path`, each under its final name only once it is complete.

        A template that `use_chat_template` chose, and tokens that `add_tokens` added, stand in the copies.
        """
        folder = Path(path).expanduser()
        files.copy_files(self._folder, folder, chat_template=self._chosen_template, new_tokens=self._new_tokens)


def _check_side(side: str, what: str) -> None:
    if side not in get_args(PaddingSide):
        raise ValueError(f"{what} must be 'left' or 'right', got {side!r}")
