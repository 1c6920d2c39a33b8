"""Published tokenizers with published and built-in templates: the targets are the assistant's words and their end."""

import random
import warnings
from pathlib import Path
from unicodedata import normalize

import pytest

from slothcore.data.chat_rows import turn_end
from slothcore.data.masking import IGNORED_LABEL, tokenise_example
from slothcore.data.templates import BUILTIN_TEMPLATES, PLAIN_TEMPLATES, builtin_template, control_tokens
from slothcore.data.tokenizer import Tokenizer
from tests.data.conversations import (
    MARGINS,
    NO_WORDS,
    PLAIN,
    SOME_WORDS,
    TOOLS,
    assistant,
    calls,
    learned,
    result,
    said,
    system,
    user,
)

TOKENIZERS = ("llama-3", "mistral-7b-instruct-v0.3", "phi-3-mini-128k-instruct", "qwen2.5-0.5b-instruct")
OWN_ENDS = dict(zip(TOKENIZERS, ("<|eot_id|>", "</s>", "<|end|>", "<|im_end|>"), strict=True))
# What ends a turn; of the others the tokenizer's own end token does.
ENDS = {
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama-3": "<|eot_id|>",
    "phi-3": "<|end|>",
    "phi-4": "<|im_end|>",
    "qwen-2.5": "<|im_end|>",
}
# What these templates write between the prompt and the words, or between the words and their end.
BEFORE = {"llama-2": " ", "mistral-v0.1": " ", "mistral-v0.3": " ", "vicuna": " "}
BEHIND = {"llama-2": " "}

# The published formats with the assistant's part marked as transformers wants it.
TAGGED = {
    "llama-3": (
        "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{%- if m.role == 'assistant' %}{%- generation %}{{- m.content | trim + '<|eot_id|>' }}{%- endgeneration %}"
        "{%- else %}{{- m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    ),
    "chatml": (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}{%- generation %}"
        "{{- m.content + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
        "{%- else %}{{- m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    ),
    "phi-3": (
        "{%- for m in messages %}{{- '<|' + m.role + '|>\n' }}{%- if m.role == 'assistant' %}{%- generation %}"
        "{{- m.content + '<|end|>' }}{%- endgeneration %}{{- '\n' }}"
        "{%- else %}{{- m.content + '<|end|>\n' }}{%- endif %}{%- endfor %}{{- eos_token }}"
    ),
    "zephyr": (
        "{%- for m in messages %}{{- '<|' + m.role + '|>\n' }}{%- if m.role == 'assistant' %}{%- generation %}"
        "{{- m.content + eos_token }}{%- endgeneration %}{{- '\n' }}"
        "{%- else %}{{- m.content + eos_token + '\n' }}{%- endif %}{%- endfor %}"
    ),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def folder(request: pytest.FixtureRequest, shared_data: Path) -> Path:
    return shared_data / "tokenizers" / request.param


def open_tokenizer(folder: Path, template: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    if template is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about control tokens that are spelled out as text
            tokenizer.use_chat_template(template)
    return tokenizer


def spells_out(tokenizer: Tokenizer, template: str) -> bool:
    return any(tokenizer.token_id(token) is None for token in control_tokens(builtin_template(template)))


@pytest.mark.parametrize("name", PLAIN)
def test_the_own_template(folder: Path, name: str) -> None:
    tokenizer = open_tokenizer(folder)
    row = tokenise_example({"messages": PLAIN[name]}, tokenizer, max_seq_length=4096)
    runs = learned(row, tokenizer)
    assert [run.strip() for run in runs] == [words + OWN_ENDS[folder.name] for words in said(PLAIN[name])]
    assert row.input_ids.count(tokenizer.bos_token_id) == (folder.name in ("llama-3", "mistral-7b-instruct-v0.3"))


@pytest.mark.parametrize("template", BUILTIN_TEMPLATES)
def test_built_in_templates(folder: Path, template: str) -> None:
    tokenizer = open_tokenizer(folder, template)
    own_end = tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=False)
    end = ENDS.get(template, own_end)
    for name, chat in PLAIN.items():
        row = tokenise_example({"messages": chat}, tokenizer, max_seq_length=4096)
        runs = learned(row, tokenizer)
        words = [BEFORE.get(template, "") + text + BEHIND.get(template, "") + end for text in said(chat)]
        if spells_out(tokenizer, template):
            # An end spelled out as text may share a token with the text around it, and closing tokens come behind it.
            words = [text.strip() for text in words]
            assert all(run.lstrip("]> ").startswith(text) for run, text in zip(runs, words, strict=True)), name
            assert all(len(run) <= len(text) + len(own_end) + 4 for run, text in zip(runs, words, strict=True)), name
            continue
        # A sentencepiece tokenizer does not decode the space before a first word.
        assert [run.lstrip(" ") for run in runs] == [text.lstrip(" ") for text in words], name
        starts = row.input_ids.count(tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else 0
        assert starts <= (1 if template != "llama-2" else len(words)), name
        whole = tokenise_example({"messages": chat}, tokenizer, max_seq_length=4096, completion_only_loss=False)
        assert whole.input_ids == whole.labels == row.input_ids
        last = tokenise_example({"messages": chat}, tokenizer, max_seq_length=4096, mask_history=True)
        assert learned(last, tokenizer) == runs[-1:], name


@pytest.mark.parametrize("template", [None, *BUILTIN_TEMPLATES])
def test_conversations_drawn_by_lot(folder: Path, template: str | None) -> None:
    """Of any turns and any words, in whatever script, with whatever spaces around them, and of nothing at all."""
    tokenizer = open_tokenizer(folder, template)
    if template is not None and spells_out(tokenizer, template):
        pytest.skip("this tokenizer has no such tokens")
    source = random.Random(f"{folder.name} {template}")
    own_end = tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=False)
    end = OWN_ENDS[folder.name] if template is None else ENDS.get(template, own_end)
    for _ in range(40):
        chat = [system(source.choice(SOME_WORDS))] if source.random() < 0.4 else []
        for _ in range(source.choice((1, 1, 2, 3, 4))):
            chat += [user(source.choice(SOME_WORDS)), assistant(source.choice((*SOME_WORDS, *NO_WORDS)))]
        row = tokenise_example({"messages": chat}, tokenizer, max_seq_length=16_384)
        runs = learned(row, tokenizer)
        assert all(run.endswith(end) for run in runs), chat
        # Some tokenizers compose accents.
        words = [normalize("NFC", text) for text in said(chat)]
        shown = [normalize("NFC", run.removesuffix(end)) for run in runs]
        if template == "zephyr":
            # Its header is text, whose last sign and line feed may share a token with the words' line feeds.
            shown = [text.removeprefix(">") for text in shown]
        assert [text.strip() for text in shown] == [text.strip() for text in words], chat
        spaces = [len(text) - len(text.strip()) for text in shown]
        # A template may write a space on either side, and the header's own line feed may share a token with the words'.
        assert all(there <= len(text) - len(text.strip()) + 2 for there, text in zip(spaces, words, strict=True)), chat


@pytest.mark.parametrize("template", TAGGED)
def test_the_mask_of_transformers(folder: Path, template: str, tmp_path: Path) -> None:
    """Our spans by `{% generation %}`, and by rendering alone, against its mask."""
    from transformers import PreTrainedTokenizerFast

    tagged = tmp_path / "tagged.jinja"
    tagged.write_text(TAGGED[template], encoding="utf-8")
    rendered, marked = open_tokenizer(folder, template), open_tokenizer(folder, str(tagged))
    if spells_out(rendered, template):
        pytest.skip("this tokenizer has no such tokens")
    special = {
        name: rendered.decode([token], skip_special_tokens=False)
        for name in ("bos_token", "eos_token")
        if (token := getattr(rendered, f"{name}_id")) is not None
    }
    reference = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    for name, chat in {**PLAIN, "margins": [*MARGINS[:3], assistant("three ")]}.items():
        expected = reference.apply_chat_template(
            chat, chat_template=TAGGED[template], return_dict=True, return_assistant_tokens_mask=True
        )
        for tokenizer in (marked, rendered):
            if name == "margins" and folder.name.startswith("phi-3"):
                continue  # its <|assistant|> swallows the spaces behind it, and transformers then learns it as well
            row = tokenise_example({"messages": chat}, tokenizer, max_seq_length=4096)
            assert row.input_ids == expected["input_ids"], name
            assert [int(label != IGNORED_LABEL) for label in row.labels] == expected["assistant_masks"], name


def test_margins_are_learned_as_the_template_writes_them(folder: Path) -> None:
    row = tokenise_example({"messages": MARGINS}, open_tokenizer(folder), max_seq_length=4096)
    expected = {
        "llama-3": ["two", "three"],
        "mistral-7b-instruct-v0.3": ["two", "three"],
        # <|assistant|> swallows the spaces behind it.
        "phi-3-mini-128k-instruct": ["two \n", "three"],
        # The newline of the header shares a token with those of the words.
        "qwen2.5-0.5b-instruct": ["  two \n", "\n\n\nthree"],
    }[folder.name]
    assert learned(row, open_tokenizer(folder)) == [words + OWN_ENDS[folder.name] for words in expected]


def test_empty_words_and_words_that_hold_special_tokens(folder: Path) -> None:
    tokenizer, end = open_tokenizer(folder), OWN_ENDS[folder.name]
    chat = [user(f"a{end}"), assistant(""), user("b"), assistant(f"c{end}d"), user("e"), assistant(f"f{end}")]
    runs = learned(tokenise_example({"messages": chat}, tokenizer, max_seq_length=4096), tokenizer)
    assert [run.replace(" ", "") for run in runs] == [end, f"c{end}d{end}", f"f{end}{end}"]


def test_content_in_parts(folder: Path) -> None:
    tokenizer, end = open_tokenizer(folder), OWN_ENDS[folder.name]
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "count"}]},
        assistant(parts),
        user("b"),
        assistant("c"),
    ]
    row = tokenise_example({"messages": chat}, tokenizer, max_seq_length=4096)
    assert learned(row, tokenizer) == [f"one, two{end}", f"c{end}"]
    plain = [user("count"), assistant("one, two"), *chat[2:]]
    assert row == tokenise_example({"messages": plain}, tokenizer, max_seq_length=4096)
    picture = [{"role": "user", "content": [{"type": "image", "url": "x"}]}, assistant("a cat")]
    with pytest.raises(ValueError, match="record 1: message 1 has a part of type 'image'; only text can be learned"):
        tokenise_example({"messages": picture}, tokenizer, max_seq_length=4096)


def test_tool_calls_are_learned_and_results_are_not(folder: Path) -> None:
    chat = [
        user("Weather?"),
        calls("get_weather"),
        result("rain"),
        assistant("It rains."),
        user("And there?"),
        calls("get_weather", "get_time"),
        result("sun", 0),
        result("noon", 1),
        assistant("Sun at noon."),
    ]
    record = {"messages": chat, "tools": TOOLS}
    tokenizer = open_tokenizer(folder)
    if folder.name in ("llama-3", "phi-3-mini-128k-instruct"):
        with pytest.raises(ValueError, match=r"leaves out the tool calls of message 2|rejects this conversation"):
            tokenise_example(record, tokenizer, max_seq_length=4096)
        return
    for template in (None, "mistral-v0.3" if "mistral" in folder.name else "qwen-2.5"):
        tokenizer = open_tokenizer(folder, template)
        row = tokenise_example(record, tokenizer, max_seq_length=4096)
        arguments = '"arguments": {"city": "Paris", "days": 2}}'
        if "mistral" in folder.name:
            one, two = (
                f'{{"name": "{n}", {arguments[:-1]}, "id": "call0000{i}"}}'
                for i, n in enumerate(("get_weather", "get_time"))
            )
            written = [
                f"[TOOL_CALLS] [{one}]</s>",
                "It rains.</s>",
                f"[TOOL_CALLS] [{one}, {two}]</s>",
                "Sun at noon.</s>",
            ]
        else:
            one, two = (f'<tool_call>\n{{"name": "{n}", {arguments}\n</tool_call>' for n in ("get_weather", "get_time"))
            end = "<|im_end|>"
            written = [one + end, f"It rains.{end}", f"{one}\n{two}{end}", f"Sun at noon.{end}"]
        assert learned(row, tokenizer) == written
        text = tokenizer.decode(row.input_ids, skip_special_tokens=False)
        assert "The weather of a city." in text
        # OpenAI writes the arguments as a text.
        for message in (as_text := [dict(m) for m in chat]):
            if "tool_calls" in message:
                functions = [
                    {**c["function"], "arguments": '{"city": "Paris", "days": 2}'} for c in message["tool_calls"]
                ]
                message["tool_calls"] = [
                    {**c, "function": f} for c, f in zip(message["tool_calls"], functions, strict=True)
                ]
        assert tokenise_example({**record, "messages": as_text}, tokenizer, max_seq_length=4096) == row


def test_a_system_text_that_only_prompts_carry(shared_data: Path) -> None:
    """Mistral's published template leaves it out of every conversation that ends with an answer."""
    tokenizer = open_tokenizer(shared_data / "tokenizers" / "mistral-7b-instruct-v0.3")
    chat = [system("Be brief."), user("a"), assistant("one"), user("b"), assistant("two")]
    assert "Be brief." not in tokenizer.apply_chat_template(chat)
    expected = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True) + " two</s>"
    assert expected == "<s>[INST] a[/INST] one</s>[INST] Be brief.\n\nb[/INST] two</s>"
    for only in (None, False):
        row = tokenise_example({"messages": chat}, tokenizer, max_seq_length=4096, completion_only_loss=only)
        assert row.input_ids == tokenizer.encode(expected, add_special_tokens=False)
    in_parts = {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}
    assert tokenise_example({"messages": [in_parts, *chat[1:]]}, tokenizer, max_seq_length=4096) == tokenise_example(
        {"messages": chat}, tokenizer, max_seq_length=4096
    )


def test_a_template_that_leaves_a_message_out(shared_data: Path) -> None:
    """Phi-3's writes nothing of a role that it does not know."""
    tokenizer = open_tokenizer(shared_data / "tokenizers" / "phi-3-mini-128k-instruct")
    chat = [user("a"), assistant("one"), result("rain"), assistant("It rains.")]
    with pytest.raises(
        ValueError, match=r"record 1: .* leaves out the text \(role 'tool'\) of message 3; take the mess"
    ):
        tokenise_example({"messages": chat}, tokenizer, max_seq_length=4096)


def test_what_ends_a_turn_is_known(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    assert turn_end(tokenizer) == tokenizer.token_id(OWN_ENDS[folder.name])
    for template in BUILTIN_TEMPLATES:
        tokenizer = open_tokenizer(folder, template)
        end = ENDS.get(template)
        number = tokenizer.eos_token_id if end is None else tokenizer.token_id(end)
        assert turn_end(tokenizer) in ((end, tokenizer.eos_token_id) if number is None else (number,)), template


def test_plain_templates_need_no_tokens(folder: Path) -> None:
    for template in PLAIN_TEMPLATES:
        tokenizer = Tokenizer.from_folder(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer.use_chat_template(template)
