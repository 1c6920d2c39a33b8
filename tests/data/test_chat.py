"""Chat templates: what they may use, what they may not."""

from datetime import datetime

import pytest

from slothcore.data.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "a < b & 'c'"}, {"role": "assistant", "content": "é"}]


def test_blocks_leave_no_blank_lines_and_no_indentation() -> None:
    source = "{% for m in messages %}\n    {% if loop.first %}\nfirst\n    {% endif %}\n{{ m.role }}\n{% endfor %}\n"
    assert ChatTemplate(source).render(MESSAGES) == "first\nuser\nassistant\n"


def test_json_is_not_escaped() -> None:
    template = ChatTemplate("{{ messages[0] | tojson }}{{ messages[1] | tojson(indent=1) }}")
    assert template.render(MESSAGES) == (
        '{"role": "user", "content": "a < b & \'c\'"}{\n "role": "assistant",\n "content": "é"\n}'
    )


def test_loop_controls_dates_special_tokens_and_generation_blocks() -> None:
    source = (
        "{{ bos_token }}{{ strftime_now('%Y') }}"
        "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% break %}{% endfor %}"
    )
    template = ChatTemplate(source, special_tokens={"bos_token": "<s>"})
    assert template.render(MESSAGES) == f"<s>{datetime.now().year}user"


def test_absent_tools_are_none() -> None:
    template = ChatTemplate("{% if tools is none %}none{% else %}{{ tools[0].name }}{% endif %}")
    assert template.render(MESSAGES) == "none"
    assert template.render(MESSAGES, tools=[{"name": "add"}]) == "add"


def test_templates_get_what_the_caller_adds() -> None:
    template = ChatTemplate("{{ enable_thinking }} {{ documents[0].title }} {{ add_generation_prompt }}")
    text = template.render(MESSAGES, enable_thinking=False, documents=[{"title": "T"}])
    assert text == "False T False"


def test_thoughts_are_found_under_every_name() -> None:
    template = ChatTemplate("{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}")
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert template.render([{"role": "assistant", "content": "", name: "hm"}]) == "hm|hm"


def test_a_key_with_null_is_absent() -> None:
    template = ChatTemplate("{{ messages[0].content is defined }} {{ messages[0].tool_calls is defined }}")
    assert template.render([{"role": "assistant", "content": None, "tool_calls": []}]) == "False True"


@pytest.mark.parametrize("wrapped", [True, False])
def test_arguments_of_tool_calls_may_be_json_text(wrapped: bool) -> None:
    template = ChatTemplate(
        "{% for c in messages[0].tool_calls %}{{ (c.function or c).arguments | tojson }};{% endfor %}"
    )
    arguments = ['{"a": [1]}', {"a": [1]}, "not JSON", "[1]"]
    calls = [
        {"function": {"name": "f", "arguments": a}} if wrapped else {"name": "f", "arguments": a} for a in arguments
    ]
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    assert template.render([message]) == '{"a": [1]};{"a": [1]};"not JSON";"[1]";'
    assert (calls[0]["function"] if wrapped else calls[0])["arguments"] == '{"a": [1]}', "the caller's message is kept"


def test_a_template_that_joins_arguments_as_text() -> None:
    """As DeepSeek's, which also asks whether the content of a call is null."""
    template = ChatTemplate(
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}"
        "{% endfor %}{% if m.content is not none %}{{ '|' + m.content }}{% endif %}{% endfor %}"
    )
    for arguments in ('{"a": "é"}', {"a": "é"}):
        call = {"function": {"name": "f", "arguments": arguments}}
        for message in ({"role": "assistant", "content": None, "tool_calls": [call]}, {"tool_calls": [call]}):
            assert template.render([message, MESSAGES[1]]) == 'f{"a": "é"}|é'


def test_what_stands_in_generation_blocks_is_known() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = 1 %}{{ m.content }}."
        "{% endgeneration %}{{ x is defined }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source)
    assert template.marks_generation
    assert not ChatTemplate("{{ messages }} generation").marks_generation
    text, spans = template.render_generated([*MESSAGES, *MESSAGES])
    assert text == template.render([*MESSAGES, *MESSAGES]) == "a < b & 'c'é.Falsea < b & 'c'é.False"
    assert [text[start:end] for start, end in spans] == ["é.", "é."]


def test_the_last_message_may_be_continued() -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ CONTENT }}[end]{% endfor %}"
    plain, trimming = (ChatTemplate(source.replace("CONTENT", c)) for c in ("m.content", "m.content | trim"))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So, "}]
    assert plain.render(messages, continue_final_message=True) == "[user]hi[end][assistant]So, "
    assert trimming.render(messages, continue_final_message=True) == "[user]hi[end][assistant]So,"
    assert messages[1]["content"] == "So, "
    blocks = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "look"}]}]
    template = ChatTemplate("{% for b in messages[0].content %}{{ b.text if b.text else '<image>' }}{% endfor %}.")
    assert template.render(blocks, continue_final_message=True) == "<image>look"
    with pytest.raises(ValueError, match="has no message"):
        plain.render([])
    for wrong in ([{"role": "assistant"}], [{"role": "assistant", "content": [{"type": "image"}]}]):
        with pytest.raises(ValueError, match="needs a last message with text"):
            plain.render(wrong, continue_final_message=True)
    with pytest.raises(ValueError, match="leaves out the end of the last message"):
        ChatTemplate("{{ messages[0].role }}").render(messages, continue_final_message=True)
    with pytest.raises(ValueError, match="choose one of them"):
        plain.render(messages, continue_final_message=True, add_generation_prompt=True)


def test_a_template_may_complain() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="rejects this conversation: roles must alternate"):
        template.render(MESSAGES)
    with pytest.raises(ValueError, match="rejects this conversation"):
        ChatTemplate("{{ messages[0].content + 1 }}").render(MESSAGES)
    for source in (
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ):
        with pytest.raises(ValueError, match="rejects this conversation"):
            ChatTemplate(source).render(MESSAGES)
    with pytest.raises(ValueError, match=r"^my\.jinja is not valid Jinja: line 2: Expected an expression"):
        ChatTemplate("{{ messages }}\n{% for %}", name="my.jinja")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(ValueError, match="rejects this conversation"):
        ChatTemplate(source).render(MESSAGES)
    assert MESSAGES[0]["role"] == "user"
