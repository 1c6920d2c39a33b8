"""The assistant's turns in templates of every kind, found by rendering."""

import pytest

from slothcore.data.chat import ChatTemplate
from slothcore.data.spans import TurnFinder
from tests.data.conversations import assistant, calls, result, system, user
from tests.data.tiny_tokenizers import CHATML

CHAT = [system("s"), user("a"), assistant("one"), user("b"), assistant("two")]
# As Qwen3: looks at the user's text, keeps the thoughts behind the last question only, and opens none of its own.
QWEN3 = """
{%- set ns = namespace(last=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
            {%- set ns.last = loop.index0 %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set thoughts, words = '', m.content or '' %}
        {%- if m.reasoning_content is string %}
            {%- set thoughts = m.reasoning_content %}
        {%- elif '</think>' in words %}
            {%- set thoughts = words.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set words = words.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thoughts.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + words.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + words }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n<tool_call>' + call.function | tojson + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# As DeepSeek-R1: no thoughts at all, and prompts that open them.
DEEPSEEK = """
{%- for m in messages %}
    {%- if m.role == 'assistant' %}{{- '<A>' + m.content.split('</think>')[-1] + '<E>' }}
    {%- else %}{{- '<U>' + m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<A><think>\\n' }}{%- endif %}"""


def turns(source: str, messages: list, tools: list | None = None) -> list[str]:
    """What each turn says, its closing included."""
    text, found = TurnFinder(ChatTemplate(source)).find(messages, tools)
    assert text == ChatTemplate(source).render(messages, tools=tools)
    return [text[turn.start : turn.end] for turn in found]


def test_thoughts_of_earlier_turns_are_dropped() -> None:
    chat = [user("a"), assistant("<think>\nhm\n</think>\n\none"), user("b"), assistant("<think>\nso\n</think>\n\ntwo")]
    assert turns(QWEN3, chat) == ["one<|im_end|>\n", "<think>\nso\n</think>\n\ntwo<|im_end|>\n"]
    apart = [user("a"), {**assistant("one"), "reasoning": "hm"}, user("b"), {**assistant("two"), "thinking": "so"}]
    assert turns(QWEN3, apart) == turns(QWEN3, chat)
    # Without thoughts the template writes an empty place for them, which the model has to write too.
    assert turns(QWEN3, CHAT) == ["one<|im_end|>\n", "<think>\n\n</think>\n\ntwo<|im_end|>\n"]


def test_a_template_that_looks_at_the_users_text() -> None:
    response = user("<tool_response>\nrain\n</tool_response>")
    chat = [user("w"), {**calls("f"), "reasoning_content": "hm"}, response, assistant("It rains.")]
    call = '<think>\nhm\n</think>\n\n\n<tool_call>{"name": "f", "arguments": {"city": "Paris", "days": 2}}</tool_call>'
    expected = [f"{call}<|im_end|>\n", "<think>\n\n</think>\n\nIt rains.<|im_end|>\n"]
    assert turns(QWEN3, chat) == expected
    assert turns(QWEN3, [*chat[:2], result("rain"), chat[3]]) == expected


def test_prompts_that_open_thoughts_which_turns_do_not_have() -> None:
    chat = [user("a"), assistant("<think>\nhm\n</think>\n\none"), user("b"), assistant("two")]
    assert turns(DEEPSEEK, chat) == ["one<E>", "two<E>"]


def test_a_template_that_looks_at_the_assistants_first_letters() -> None:
    source = CHATML.replace(
        "{{ message.content }}", "{{ '[' if message.content.startswith('one') }}{{ message.content }}"
    )
    assert turns(source, CHAT) == ["[one<|im_end|>\n", "two<|im_end|>\n"]


def test_the_first_message_may_be_the_assistants() -> None:
    assert turns(CHATML, [assistant("one"), user("a"), assistant("two")]) == ["one<|im_end|>\n", "two<|im_end|>\n"]
    assert turns(CHATML, [assistant("one"), assistant("two")]) == ["one<|im_end|>\n", "two<|im_end|>\n"]


def test_characters_for_private_use_in_the_text() -> None:
    chat = [user("\U000f0000\U000f0005"), assistant("a\U000f0000"), user("b"), assistant("\U0010fffd")]
    with pytest.raises(ValueError, match="characters of both of Unicode's planes for private use"):
        turns(CHATML, chat)
    assert turns(CHATML, [*chat[:3], assistant("c")]) == ["a\U000f0000<|im_end|>\n", "c<|im_end|>\n"]


def test_templates_that_cannot_be_understood_are_refused_with_the_remedy() -> None:
    for changed in ("message.content | length", "message.content[::-1][:2] ~ message.content | length"):
        with pytest.raises(ValueError, match=r"does more with the assistant's text .* \{% generation %\}"):
            turns(CHATML.replace("message.content", changed), CHAT)
    with pytest.raises(ValueError, match=r"leaves out the text \(role 'assistant'\) of message 3"):
        turns("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}", CHAT)
    with pytest.raises(ValueError, match="leaves out the tool calls of message 2"):
        turns(CHATML, [user("a"), calls("f", content="Let me see."), result("x"), assistant("y")])


def test_blocks_that_mark_the_assistants_part() -> None:
    source = (
        "{% macro say(m) %}{% generation %}{{ m.content }}.{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}<A>{{ say(m) }}<E>{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    assert turns(source, CHAT) == ["one.", "two."]
    assert turns(source.replace("{% generation %}", "{%- generation -%}"), CHAT) == ["one.", "two."]
    # Blocks are believed even where nothing could be found by rendering.
    assert turns(source.replace("m.content }}.", "m.content | length }}."), CHAT) == ["3.", "3."]
    with pytest.raises(ValueError, match=r"works on the text of its \{% generation %\} blocks"):
        turns(source.replace("{{ say(m) }}", "{{ say(m) | length }}"), CHAT)


def test_a_long_conversation_takes_few_renderings(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = []
    original = ChatTemplate.render

    def counted(self: ChatTemplate, messages: list, **options: object) -> str:
        rendered.append(len(messages))
        return original(self, messages, **options)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    finder = TurnFinder(ChatTemplate(CHATML))
    chat = [turn for i in range(300) for turn in (user(f"question {i}"), assistant(f"answer {i}"))]
    _, found = finder.find(chat)
    assert len(found) == 300
    assert len(rendered) == 4, "whole and marked; one header; one closing"
    rendered.clear()
    finder.find([user("again"), assistant("yes"), user("b"), assistant("c")])
    assert rendered == [4, 4], "what the template writes between turns is known by now"
