"""Conversations for a tokenizer with a space at the beginning only: llama.cpp reads the tokenizer's own ids."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from slothcore.data.chat import ChatTemplate
from slothcore.data.tokenizer import Tokenizer
from slothcore.export.export import export_model
from slothcore.export.gguf_template import template_without_spaces
from tests.data.tiny_tokenizers import CHATML
from tests.export.gguf_models import sentencepiece_tokenizer
from tests.export.llama_cpp import LlamaCpp
from tests.export.test_gguf_vocabulary import changed, file_of, small_model

SPACED = (
    "{{ bos_token }}{%- for m in messages %}{% if m.role == 'user' %}<|im_start|> {{ m.content }}<|im_end|>"
    "{% else %}\n {{- ' ' + m.content + eos_token }}{% endif %}{% endfor %}\n"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "up",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
        },
    }
]
USER, ANSWER = {"role": "user", "content": "the king is"}, {"role": "assistant", "content": "in the other"}
ODD = {"role": "user", "content": "  two, </s> of <|im_start|> them \n"}
CONVERSATIONS = [[USER], [USER, ANSWER, ODD], [ODD, ANSWER, USER, ANSWER, USER]]


def first_only(folder: Path, template: str) -> Tokenizer:
    """As Mistral's since v0.3."""

    def change(source: dict[str, Any]) -> None:
        source["normalizer"] = None
        source["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "\N{LOWER ONE EIGHTH BLOCK}",
            "prepend_scheme": "first",
            "split": False,
        }

    def choose(config: dict[str, Any]) -> None:
        config["chat_template"] = template

    return changed(folder, sentencepiece_tokenizer, tokenizer=change, config=choose)


def assert_same_ids(server: LlamaCpp, tokenizer: Tokenizer, messages: list[dict[str, Any]], **tools: Any) -> None:
    """Of a conversation by the file's template, as llama.cpp writes and reads it."""
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **tools)
    prompt = server.ask("/apply-template", messages=messages, **tools)["prompt"]
    assert server.tokenize(prompt) == tokenizer.encode(chat, add_special_tokens=False), prompt


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=len)
def test_conversations_and_plain_texts(messages: list[dict[str, Any]], tmp_path: Path) -> None:
    tokenizer = first_only(tmp_path / "tokenizer", SPACED)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="llama.cpp")
        file = file_of(tokenizer, tmp_path / "out", 320)
    written = GGUFReader(file).fields["tokenizer.chat_template"].contents()
    begin, end = tokenizer.token_text(1), tokenizer.token_text(2)
    special = {"bos_token": begin, "eos_token": end}
    text = ChatTemplate(written, special_tokens=special).render(messages)
    expected = tokenizer.apply_chat_template(messages)
    for token in (begin, end, "<|im_start|>", "<|im_end|>"):
        expected = expected.replace(f"{token} ", token)
    assert text == expected
    with LlamaCpp(file) as server:
        assert_same_ids(server, tokenizer, messages)
        for plain in ("the king is there", "in the other", ""):
            assert server.tokenize(plain) == tokenizer.encode(plain)


@pytest.mark.parametrize("begin", ["", "\n", "  ", "\n  ", "  {# none #}", "  {% if true %}\n{% endif %}\n"], ids=repr)
@pytest.mark.parametrize(
    "end", ["", "\n", "\n\n", "{{ ' x' }}\r\n", "\n  ", "  ", "\n  {% if true %}{% endif %}"], ids=repr
)
def test_layout_is_kept(begin: str, end: str, tmp_path: Path) -> None:
    """What a reader trims where a block begins or ends a line stays trimmed, and no more is."""
    tokenizer = first_only(tmp_path, begin + SPACED.removesuffix("\n") + end)
    written = template_without_spaces(tokenizer)
    assert written is not None
    special = {"bos_token": tokenizer.token_text(1), "eos_token": tokenizer.token_text(2)}
    expected = tokenizer.apply_chat_template([USER])
    for token in (*special.values(), "<|im_start|>", "<|im_end|>"):
        expected = expected.replace(f"{token} ", token)
    assert ChatTemplate(written, special_tokens=special).render([USER]) == expected


@pytest.mark.parametrize(
    "template",
    [
        CHATML,  # a text right behind a token
        SPACED.replace("<|im_end|>", "<|im_end|> "),  # nothing behind the space
        SPACED.replace("<|im_start|> ", " <|im_start|> "),  # another token behind it
    ],
)
def test_what_llama_cpp_cannot_read_is_left_and_said(template: str, tmp_path: Path) -> None:
    tokenizer = first_only(tmp_path / "tokenizer", template)
    assert template_without_spaces(tokenizer) is None
    with pytest.warns(UserWarning, match="as if one more space began it, and this tokenizer only at the very"):
        file = file_of(tokenizer, tmp_path / "out", 320)
    assert GGUFReader(file).fields["tokenizer.chat_template"].contents() == template


def test_a_template_without_special_tokens_stays(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert template_without_spaces(first_only(tmp_path, template)) == template


def test_mistral(shared_data: Path, tmp_path: Path) -> None:
    """The published tokenizer with its own template: turns, a system text, tools, calls and their results."""
    tokenizer = Tokenizer.from_folder(shared_data / "tokenizers" / "mistral-7b-instruct-v0.3")
    function = {"name": "look", "arguments": '{"word": "king"}'}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}],
    }
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "42"}
    odd = {"role": "user", "content": "  Größe [INST] of 12 </s> them\n\n"}
    system = {"role": "system", "content": "Be brief."}
    with LlamaCpp(file_of(tokenizer, tmp_path / "out", tokenizer.vocab_size)) as server:
        for messages in ([USER], [odd, ANSWER, USER], [system, odd, ANSWER, USER, ANSWER, odd]):
            assert_same_ids(server, tokenizer, messages)
        for messages in ([USER], [USER, call, result], [USER, call, result, ANSWER, odd]):
            assert_same_ids(server, tokenizer, messages, tools=TOOLS)


def test_ollama_is_said_to_read_another_space(tmp_path: Path) -> None:
    """Its own template is Go's, and what reads it differs from version to version."""
    tokenizer = first_only(tmp_path / "tokenizer", SPACED)
    with pytest.warns(UserWarning, match="with which Ollama reads texts, puts a space behind a special token"):
        export_model(small_model(320), tokenizer, tmp_path / "out", format="ollama", check=False)
