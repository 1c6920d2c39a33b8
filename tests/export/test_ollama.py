"""The Modelfile: its template writes what the chat template does, in Go, and it stops where answers end."""

import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf")

import slothcore
from slothcore.cli import main
from slothcore.data.templates import BUILTIN_TEMPLATES
from slothcore.data.tokenizer import Tokenizer
from slothcore.export.export import export_model
from slothcore.export.gguf import sampling_parameters
from slothcore.export.go_template import ChatFormat
from slothcore.export.ollama import PARAMETERS, modelfile
from tests.data.tiny_tokenizers import CHATML, CHATML_WITH_BEGIN, CHATML_WITH_CLOSING
from tests.export.gguf_models import FAMILIES, byte_level_tokenizer, load_case
from tests.export.go_text_template import execute
from tests.export.modelfile import read

WORDS = ("What is new?", "Not much.", "And {{ old }}?", 'A "quoted" answer.\n\nIn two parts.', "Thanks")
BRIEF = {"role": "system", "content": "Be brief: one line."}


def go_text(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama gives the model: all system texts are one, and in the list as well."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    listed = [{"Role": m["role"], "Content": m["content"]} for m in messages]
    return execute(template, {"System": system, "Messages": listed})


def conversations(*, system: bool) -> list[list[dict[str, str]]]:
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(WORDS)]
    found = [turns[:length] for length in (1, 3, 5)]
    return [[BRIEF, *turns] for turns in found] if system else found


def assert_alike(tokenizer: Tokenizer, chat: ChatFormat) -> None:
    """What Ollama makes of the Modelfile writes every conversation as the chat template does."""
    commands = dict(read(modelfile("model.gguf", chat, [], {})))
    template = commands["TEMPLATE"]
    begin = tokenizer.token_text(tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else ""
    adds_begin = tokenizer.encode("a")[0] == tokenizer.bos_token_id
    for system in (False, True) if chat.system else (False,):
        for messages in conversations(system=system):
            expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            found = go_text(template, messages)
            # The program adds the begin token to every text.
            assert found == (expected.removeprefix(begin or "") if adds_begin else expected)


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
@pytest.mark.filterwarnings("ignore:the chat template .* writes")
def test_every_built_in_format(name: str, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    tokenizer.use_chat_template(name)
    chat = ChatFormat.of(tokenizer)
    assert chat is not None
    # Mistral's newer ones write the system text before the last of the user's words.
    assert (chat.system is None) == (name == "mistral-v0.3")
    assert_alike(tokenizer, chat)


def test_the_templates_of_published_models(shared_data: Path) -> None:
    for folder in (shared_data / "tokenizers").iterdir():
        tokenizer = Tokenizer.from_folder(folder)
        chat = ChatFormat.of(tokenizer)
        assert chat is not None, folder
        assert (chat.system is None) == folder.name.startswith("mistral")
        assert_alike(tokenizer, chat)


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_BEGIN, CHATML_WITH_CLOSING])
def test_other_templates(template: str, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(template)
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer")
    tokenizer.use_chat_template(str(tmp_path / "own.jinja"))
    chat = ChatFormat.of(tokenizer)
    assert chat is not None
    assert_alike(tokenizer, chat)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",  # numbers its turns
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{{ raise_exception('never') }}",
    ],
)
def test_what_is_not_made_of_fixed_texts_is_left_out(template: str, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(template)
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer")
    tokenizer.use_chat_template(str(tmp_path / "own.jinja"))
    assert ChatFormat.of(tokenizer) is None
    model = load_case(FAMILIES["llama"], tmp_path / "base")
    with pytest.warns(UserWarning, match="is of a form that the Modelfile cannot have"):
        export_model(model, tokenizer, tmp_path / "out", format="ollama")
    assert "TEMPLATE" not in (tmp_path / "out" / "Modelfile").read_text()


def test_signs_that_mean_something_to_go_and_to_a_modelfile(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ '{{ \"\"\" }}' }}{{ m.content }}{% else %}"
        "[{{ m.content }}]{% endif %}{% endfor %}{% if add_generation_prompt %}[{% endif %}"
    )
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer")
    tokenizer.use_chat_template(str(tmp_path / "own.jinja"))
    chat = ChatFormat.of(tokenizer)
    assert chat is not None
    assert '"""' not in chat.go_template()
    assert_alike(tokenizer, chat)


@pytest.mark.parametrize(
    "mark",
    ["\xa0", "\u200b", "\u2028", "\U000e0041", "\x07", "\t ", "a\r\nb", "{", "{{", "}", "\\", '"', "\u2581\U0001f9a5"],
    ids=ascii,
)
def test_signs_that_ollama_does_not_see(mark: str, tmp_path: Path) -> None:
    """Around the words, where a template's own texts end."""
    turn = "{{ '<' + mark }}{{ m.content }}{{ mark + '>' + mark }}"
    (tmp_path / "own.jinja").write_text(
        f"{{% set mark = {mark!a} %}}{{% for m in messages %}}{turn}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<' + mark }}{% endif %}"
    )
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer")
    tokenizer.use_chat_template(str(tmp_path / "own.jinja"))
    chat = ChatFormat.of(tokenizer)
    assert chat is not None
    assert f">{mark}<{mark}" in chat.question
    # A brace is never beside those of an action.
    assert "{{{" not in chat.go_template()
    assert_alike(tokenizer, chat)


@pytest.mark.parametrize("stop", ["<|end|>", "two words ", "\nUser:", 'say "no"', '"', "C:\\new", "a\n\nb\t", "\u65e5"])
def test_a_stop_string_is_read_as_it_is(stop: str) -> None:
    """Its quotes have no escapes, so that a newline and a backslash stand for themselves."""
    text = modelfile("model.gguf", None, [stop, "next"], {"top_k": -1})
    assert read(text) == [("FROM", "./model.gguf"), ("top_k", "-1"), ("stop", stop), ("stop", "next")]


@pytest.mark.parametrize("stop", ["\u200bend", "\xa0", 'a"""\nb'])
def test_a_stop_string_that_a_modelfile_cannot_hold_is_left_out(stop: str) -> None:
    assert read(modelfile("model.gguf", None, [stop, "next"], {})) == [("FROM", "./model.gguf"), ("stop", "next")]


def test_the_whole_modelfile(tmp_path: Path) -> None:
    model = load_case(FAMILIES["llama"], tmp_path / "base")
    model.generation_config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 4]}
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer")
    said = slothcore.export_ollama(model, tokenizer, tmp_path / "out", quantization="q5_k_m")
    assert said.startswith("read back: the same weights")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"Modelfile", "model-Q5_K_M.gguf"}
    text = (tmp_path / "out" / "Modelfile").read_text()
    chat = ChatFormat.of(tokenizer)
    assert chat is not None
    assert text == (
        f'FROM ./model-Q5_K_M.gguf\nTEMPLATE """{chat.go_template()}"""\nPARAMETER temperature 0.6\n'
        'PARAMETER top_p 0.9\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\n'
    )
    assert re.search(r'TEMPLATE """\{\{ .* \}\}"""', text, re.DOTALL)  # no space at its edges that could be trimmed


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6}, {}),
        ({"do_sample": False, "temperature": 0.6}, {}),
        ({"do_sample": True, "top_k": -1, "top_p": None, "temperature": "hot"}, {"top_k": -1}),
        ({"do_sample": True, "top_k": 20, "repetition_penalty": 1.1}, {"top_k": 20, "repeat_penalty": 1.1}),
    ],
)
def test_parameters_are_those_of_who_samples(given: dict[str, Any], expected: dict[str, float]) -> None:
    assert sampling_parameters(given, PARAMETERS) == expected


def test_it_needs_a_tokenizer_and_says_what_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_case(FAMILIES["llama"], tmp_path / "base")
    with pytest.raises(ValueError, match="this one needs a tokenizer; export it with the format gguf"):
        export_model(model, None, tmp_path / "out", format="ollama")
    byte_level_tokenizer(tmp_path / "base")
    words = ["export", "--model", str(tmp_path / "base"), "--format", "ollama", "--output-dir", str(tmp_path / "out")]
    assert main([*words, "--device", "cpu"]) == 0
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./model-Q8_0.gguf\nTEMPLATE")


def test_a_template_that_writes_the_day(tmp_path: Path) -> None:
    """As those of Llama 3.1 and later do; in the Modelfile it stays the day on which that was written."""
    (tmp_path / "own.jinja").write_text("{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML)
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer")
    tokenizer.use_chat_template(str(tmp_path / "own.jinja"))
    model = load_case(FAMILIES["llama"], tmp_path / "base")
    with tokenizer.clock.held(datetime(2026, 5, 17)), pytest.warns(UserWarning, match="has the day of the export for"):
        export_model(model, tokenizer, tmp_path / "out", format="ollama")
    assert "Today: 17 May 2026" in (tmp_path / "out" / "Modelfile").read_text()


def test_a_model_without_a_template(tmp_path: Path) -> None:
    model = load_case(FAMILIES["llama"], tmp_path / "base")
    folder = tmp_path / "tokenizer"
    byte_level_tokenizer(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"chat_template"', '"no_template"'))
    with pytest.warns(UserWarning, match="no chat template, so the Modelfile has none"):
        export_model(model, Tokenizer.from_folder(folder), tmp_path / "out", format="ollama")
    assert (tmp_path / "out" / "Modelfile").read_text() == 'FROM ./model-Q8_0.gguf\nPARAMETER stop "</s>"\n'
