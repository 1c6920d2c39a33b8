"""Chat templates: messages to text, by the Jinja template that a checkpoint ships.

A template comes from a stranger, so it runs in jinja2's immutable sandbox: no private attributes, no change to what it
is given. The environment matches the one that published templates are written for: `trim_blocks`, `lstrip_blocks`,
loop controls, `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and `{% generation %}` blocks
(which mark the assistant's text for others and are passed through here).
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]

# The first is the standard one; gpt-oss and older data have the others.
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
# Its last space tells whether the template trims what it is given.
FINAL_MARK = "\N{END OF TEXT}slothcore-continues-here\N{END OF TEXT} "


class GenerationBlock(Extension):
    """Accept `{% generation %}...{% endgeneration %}` and render what stands between."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template.

    Args:
        source: the Jinja source, as in `chat_template.jinja`.
        special_tokens: names such as `bos_token` with their text, which templates may use.
    Raises: ValueError if the source is not valid Jinja.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, special tokens written out.

        Args:
            messages: dicts with `role`, `content` and whatever else the template reads. Thoughts may stand under
                `reasoning_content`, `thinking` or `reasoning`; the template finds them under the names that it knows.
            add_generation_prompt: end with the header of an assistant turn, ready to be continued.
            continue_final_message: end inside the last message, right behind its content, so that a model writes on.
            tools: JSON descriptions of functions, for templates that list them.
            documents: texts to ground answers on, for templates that list them.
            variables: what else the template reads, such as Qwen3's `enable_thinking`.
        Raises: ValueError with the template's own complaint, such as roles that must alternate; or for
            `continue_final_message` if the last message has no text, the template changes it, or it stands beside
            `add_generation_prompt`.
        """
        if not messages:
            raise ValueError("the conversation has no message; give it at least one")
        conversation = [_with_reasoning(message) for message in messages]
        if continue_final_message:
            if add_generation_prompt:
                raise ValueError(
                    "continue_final_message goes on with the last message and add_generation_prompt begins a new one; "
                    "choose one of them"
                )
            conversation = _marked(conversation)
        try:
            text = self._template.render(
                **{
                    **self._special_tokens,
                    **variables,
                    "messages": conversation,
                    "tools": tools,
                    "documents": documents,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except Exception as error:  # the template is a stranger's program, and may divide by zero
            raise ValueError(f"the chat template rejects this conversation: {error}") from error
        return _before_mark(text) if continue_final_message else text


def _with_reasoning(message: Message) -> Message:
    """The message with its thoughts under every name that templates read them by: the same names as transformers."""
    thoughts = next((message[name] for name in REASONING_NAMES if message.get(name) is not None), None)
    if thoughts is None:
        return message
    return {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _marked(messages: list[Message]) -> list[Message]:
    """The conversation with a mark behind its last text."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        return [*messages[:-1], {**messages[-1], "content": content + FINAL_MARK}]
    blocks = list(content) if isinstance(content, list | tuple) else []
    for place in reversed(range(len(blocks))):
        if isinstance(blocks[place], Mapping) and isinstance(blocks[place].get("text"), str):
            blocks[place] = {**blocks[place], "text": blocks[place]["text"] + FINAL_MARK}
            return [*messages[:-1], {**messages[-1], "content": blocks}]
    raise ValueError("continue_final_message needs a last message with text in its content")


def _before_mark(text: str) -> str:
    """What stands before the mark; without the spaces that end it if the template trims its messages."""
    place = text.rfind(FINAL_MARK.strip())
    if place < 0:
        raise ValueError("continue_final_message: the chat template leaves out the end of the last message")
    return text[:place] if text.startswith(FINAL_MARK, place) else text[:place].rstrip()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
