"""Built-in templates: the same text as the published ones, or as their descriptions show; names, files, tokens."""

import json
import re
import warnings
from pathlib import Path

import pytest

from slothcore.data import templates
from slothcore.data.chat import ChatTemplate
from slothcore.data.templates import (
    BUILTIN_TEMPLATES,
    PLAIN_TEMPLATES,
    builtin_template,
    control_tokens,
    template_source,
)
from slothcore.data.tokenizer import Tokenizer
from tests.data.conversations import MARGINS, PLAIN, TOOLS, assistant, calls, result, system, user
from tests.data.tiny_tokenizers import CHATML, write_byte_tokenizer

CHAT = [system("Be brief."), user("Hi"), assistant("Hello."), user("Bye"), assistant("See you.")]
QUESTION = CHAT[:4]
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# A system text, two turns, the second of them to be answered, as the formats' public descriptions write it.
WRITTEN = {
    "alpaca": (
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.</s>\n\n### Instruction:\nBye\n\n### Response:\n"
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    ),
    "gemma": (
        "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    ),
    "llama-2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s><s>[INST] Bye [/INST]",
    "llama-3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral-v0.1": "<s> [INST] Be brief.\n\nHi [/INST] Hello.</s> [INST] Bye [/INST]",
    "mistral-v0.3": "<s>[INST] Hi[/INST] Hello.</s>[INST] Be brief.\n\nBye[/INST]",
    "phi-3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n"
    ),
    "phi-4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Hello.<|im_end|><|im_start|>user<|im_sep|>Bye<|im_end|>"
        "<|im_start|>assistant<|im_sep|>"
    ),
    "qwen-2.5": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    ),
    "vicuna": "<s>Be brief. USER: Hi ASSISTANT: Hello.</s>USER: Bye ASSISTANT:",
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello.</s>\n<|user|>\nBye</s>\n<|assistant|>\n"
    ),
}
# The published tokenizer that has the same template.
PUBLISHED = {
    "llama-3": "llama-3",
    "mistral-v0.3": "mistral-7b-instruct-v0.3",
    "phi-3": "phi-3-mini-128k-instruct",
    "qwen-2.5": "qwen2.5-0.5b-instruct",
}


def template(name: str) -> ChatTemplate:
    return ChatTemplate(builtin_template(name), special_tokens={"bos_token": "<s>", "eos_token": "</s>"}, name=name)


def test_every_file_is_listed_and_states_source_and_tokens() -> None:
    folder = Path(templates.__file__).parent
    assert sorted(file.stem for file in folder.glob("*.jinja")) == list(BUILTIN_TEMPLATES) == list(WRITTEN)
    assert set(PLAIN_TEMPLATES) == {name for name in BUILTIN_TEMPLATES if not control_tokens(builtin_template(name))}
    for name in BUILTIN_TEMPLATES:
        source = builtin_template(name)
        assert re.match(r"\{#- .+\nSource: .+", source), name
        text = template(name).render(QUESTION, add_generation_prompt=True)
        for token in control_tokens(source):
            assert token in text or "TOOL" in token, f"{name} states {token}"
        for token in re.findall(r"<\|\w+\|>|<\w+_of_turn>", text):
            assert token in control_tokens(source) or name in PLAIN_TEMPLATES, f"{name} does not state {token}"


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_the_text_of_the_public_description(name: str) -> None:
    assert template(name).render(QUESTION, add_generation_prompt=True) == WRITTEN[name]
    # What is trained on begins with what is asked.
    assert template(name).render(CHAT).startswith(WRITTEN[name]) or name == "vicuna"
    assert template(name).render(CHAT[1:2]).count("Be brief.") == 0


def test_system_texts_that_formats_bring_along() -> None:
    assert template("vicuna").render(CHAT[1:3]) == f"<s>{VICUNA_SYSTEM} USER: Hi ASSISTANT: Hello.</s>"
    assert template("alpaca").render(CHAT[1:2], add_generation_prompt=True) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nHi\n\n### Response:\n"
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_text_of_the_published_template(shared_data: Path, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = shared_data / "tokenizers" / PUBLISHED[name]
    ours, published = Tokenizer.from_folder(folder), Tokenizer.from_folder(folder)
    ours.use_chat_template(name)
    special = {
        token: published.decode([getattr(published, f"{token}_id")], skip_special_tokens=False)
        for token in ("bos_token", "eos_token")
        if getattr(published, f"{token}_id") is not None
    }
    reference = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    chats = [(chat, None) for chat in (*PLAIN.values(), MARGINS)]
    chats += [(chat[:-1], None) for chat, _ in chats]
    if name in ("mistral-v0.3", "qwen-2.5"):
        called = [
            user("Weather?"),
            calls("get_weather", "get_time"),
            result("rain"),
            result("noon", 1),
            assistant("Ok."),
        ]
        chats += [(called[:count], TOOLS) for count in (1, 2, 4, 5)]
        chats += [([system("Be brief."), *called[:1]], TOOLS)]
    if name == "qwen-2.5":
        chats += [([system("S"), user("W?"), calls("get_time", content="Let me see."), result("x")], None)]
    for chat, tools in chats:
        if name == "mistral-v0.3" and chat[0]["role"] == "system" and chat[-1]["role"] != "user":
            continue  # the published one drops the system text where an answer follows; ours keeps it
        for prompt in (False, True):
            expected = reference.apply_chat_template(
                chat, tools=tools, chat_template=published.chat_template, tokenize=False, add_generation_prompt=prompt
            )
            assert ours.apply_chat_template(chat, prompt, tools=tools) == expected


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_roles_that_a_format_does_not_know_are_refused_or_written(name: str) -> None:
    chat = [user("a"), assistant("b"), {"role": "narrator", "content": "THE WORDS"}]
    try:
        assert "THE WORDS" in template(name).render(chat)
    except ValueError as error:
        assert "rejects this conversation" in str(error)  # noqa: PT017 (either is right)


def test_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unknown chat template 'chatlm' \(did you mean chatml\?\); built in are alpaca, "
    ):
        template_source("chatlm")
    with pytest.raises(ValueError, match=r"or leave it out for the model's own$"):
        template_source("tokenizer_default")
    with pytest.raises(
        ValueError, match=r"absent\.jinja does not exist; give the path of a \.jinja file, or one of alp"
    ):
        template_source(str(tmp_path / "absent.jinja"))
    file = tmp_path / "own.jinja"
    file.write_text(" \n")
    with pytest.raises(ValueError, match=r"own\.jinja is empty"):
        template_source(file)
    file.write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=r"own\.jinja is not UTF-8 \(byte 1\)"):
        template_source(file)
    with pytest.raises(ValueError, match=r"cannot be read: Is a directory"):
        template_source(str(tmp_path))
    file.write_text("{% for m in messages %}\n{{ m.content }}\n{% endif %}\n")
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match=rf"the chat template {file} is not valid Jinja: line 3: .*endif"):
        tokenizer.use_chat_template(str(file))
    with pytest.raises(ValueError, match="has no chat template; set chat_template to a built-in one"):
        tokenizer.apply_chat_template(CHAT)


def test_tokens_that_are_lacking_are_named(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "tokenizer"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.use_chat_template("chatml")  # it has these
    with pytest.warns(UserWarning, match=r"llama-3 writes <\|start_header_id\|>, .* spelled out as text .* alpaca, "):
        tokenizer.use_chat_template("llama-3")
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}<|im_start|>{{ m.content }}<|mine|>{% endfor %}")
    with pytest.warns(UserWarning, match=r"own\.jinja writes <\|mine\|>, which"):
        tokenizer.use_chat_template(str(own))


def test_the_chosen_template_is_saved(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
    folder = write_byte_tokenizer(tmp_path / "a", config={"chat_template": named})
    tokenizer = Tokenizer.from_folder(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    tokenizer.use_chat_template("zephyr")
    assert tokenizer.chat_template == builtin_template("zephyr")
    tokenizer.save(tmp_path / "b")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    expected = tokenizer.apply_chat_template(CHAT)
    assert expected == template("zephyr").render(CHAT)
    saved = Tokenizer.from_folder(tmp_path / "b")
    assert saved.apply_chat_template(CHAT) == expected
    assert saved.apply_chat_template(CHAT, tools=TOOLS) == expected
    for other in (tmp_path / "b", tmp_path / "c"):
        saved.save(other)
        assert AutoTokenizer.from_pretrained(other).apply_chat_template(CHAT, tokenize=False) == expected
    assert "chat_template" not in json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
