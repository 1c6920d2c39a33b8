"""Chat templates: messages to text, by the Jinja template that a checkpoint ships.

A template comes from a stranger, so it runs in jinja2's immutable sandbox: no private attributes, no change to what it
is given. The environment matches the one that published templates are written for: `trim_blocks`, `lstrip_blocks`,
loop controls, `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and `{% generation %}` blocks,
which mark what the assistant says.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]

# The first is the standard one; gpt-oss and older data have the others.
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
# Its last space tells whether the template trims what it is given.
FINAL_MARK = "\N{END OF TEXT}slothcore-continues-here\N{END OF TEXT} "
# The variable that `render_generated` sets, and what then stands around each block.
MARKS_VARIABLE = "slothcore_marks_generation"
GENERATED_BEGIN, GENERATED_END = (
    "\N{START OF TEXT}slothcore-says\N{START OF TEXT}",
    "\N{END OF TEXT}slothcore-said\N{END OF TEXT}",
)


class GenerationBlock(Extension):
    """Render what stands in `{% generation %}...{% endgeneration %}`, between marks where they are asked for.

    As in transformers the block is a scope of its own: what it sets is not seen behind it.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain set)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("write"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def write(self, context: Context, caller: Macro) -> str:
        """The block's text."""
        text: str = caller()
        return f"{GENERATED_BEGIN}{text}{GENERATED_END}" if context.get(MARKS_VARIABLE) else text


class Clock:
    """Tells templates that write the day which one it is."""

    def __init__(self) -> None:
        self._held: datetime | None = None

    def now(self) -> datetime:
        """The time by which templates write."""
        return self._held or datetime.now()

    @contextmanager
    def held(self, moment: datetime) -> Iterator[None]:
        """Within, it is this time: what was written on another day is written alike."""
        before, self._held = self._held, moment
        try:
            yield
        finally:
            self._held = before


class ChatTemplate:
    """One compiled template.

    Args:
        source: the Jinja source, as in `chat_template.jinja`.
        special_tokens: names such as `bos_token` with their text, which templates may use.
        name: what a message about its syntax calls it, such as its file.
        clock: for `strftime_now`; None: one of its own.
    Raises: ValueError if the source is not valid Jinja, with the line.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        name: str = "the chat template",
        clock: Clock | None = None,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{name} is not valid Jinja: line {error.lineno}: {error.message}") from error
        except jinja2.TemplateError as error:
            raise ValueError(f"{name} is not valid Jinja: {error}") from error
        # Each rendering copies them; jinja2's chain of mappings takes three times as long to copy as a dict.
        self._template.globals = dict(self._template.globals)
        time = clock or Clock()
        self._template.globals["strftime_now"] = lambda pattern: time.now().strftime(pattern)

    @property
    def marks_generation(self) -> bool:
        """Whether the template says by itself what is the assistant's, with `{% generation %}` blocks."""
        return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source) is not None

    def render_generated(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and which characters of it stand in `{% generation %}` blocks.

        Raises: ValueError as `render` does; or if the template changes its text depending on what a block writes.
        """
        plain = self.render(messages, tools=tools)
        asked: dict[str, Any] = {MARKS_VARIABLE: True}
        marked = self.render(messages, tools=tools, **asked)
        pieces = re.split(f"({GENERATED_BEGIN}|{GENERATED_END})", marked)
        text, spans, begin = "", [], None
        for piece in pieces:
            if piece == GENERATED_BEGIN:
                begin = len(text) if begin is None else begin
            elif piece == GENERATED_END and begin is not None:
                spans.append((begin, len(text)))
                begin = None
            else:
                text += piece
        if text != plain or begin is not None:
            raise ValueError(
                "the chat template works on the text of its {% generation %} blocks, so the assistant's words cannot "
                "be told apart; set completion_only_loss to false, or move the blocks behind that work"
            )
        return text, spans

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
            messages: dicts with `role`, `content` and whatever else the template reads; a key with null counts as
                absent. Thoughts may stand under `reasoning_content`, `thinking` or `reasoning`; the template finds
                them under the names that it knows. Arguments of a tool call may be JSON text, as OpenAI writes them.
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
        conversation = [_prepared(message) for message in messages]
        if continue_final_message:
            if add_generation_prompt:
                raise ValueError(
                    "continue_final_message goes on with the last message and add_generation_prompt begins a new one; "
                    "choose one of them"
                )
            conversation = _marked(conversation)
        given = {
            **self._special_tokens,
            **variables,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(**{**given, "messages": conversation})
        except Exception as error:  # the template is a stranger's program, and may divide by zero
            try:
                # Such as DeepSeek's: it joins the arguments of a call as text, and asks whether its content is null.
                text = self._template.render(**{**given, "messages": _with_calls_as_text(conversation)})
            except Exception:
                raise ValueError(
                    f"the chat template rejects this conversation: {error}; change it, or choose another chat_template"
                ) from error
        return _before_mark(text) if continue_final_message else text


def _prepared(message: Message) -> Message:
    """The message as most templates, and transformers, expect it."""
    if any(value is None for value in message.values()):
        # Templates ask whether a key is there, and write null as "None".
        message = {key: value for key, value in message.items() if value is not None}
    # A template's `tojson` would quote a text once more.
    return _with_reasoning(_with_arguments(message, _parsed))


def _with_calls_as_text(messages: Sequence[Message]) -> list[Message]:
    """The messages as OpenAI writes them: arguments of calls are JSON text, and content that is absent is null."""
    return [
        {"content": None, **_with_arguments(message, _written)} if message.get("tool_calls") else message
        for message in messages
    ]


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    """The message with the arguments of its tool calls changed."""

    def changed(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": changed(call["function"])}
        return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [changed(call) for call in calls]} if isinstance(calls, list | tuple) else message


def _parsed(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except (json.JSONDecodeError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _written(arguments: Any) -> Any:
    return _tojson(arguments) if isinstance(arguments, Mapping) else arguments


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
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
