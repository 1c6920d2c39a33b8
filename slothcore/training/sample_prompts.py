"""What a run asks its model as it trains: texts and records of any layout, written as the data would write them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from slothcore.data.columns import ColumnTemplates
from slothcore.data.conversations import parsed_messages, read_messages, read_tools
from slothcore.data.formats import INSTRUCTIONS, ChatExample, alpaca_prompt, format_example, plain_record
from slothcore.data.masking import TokenizedRow
from slothcore.data.preferences import ANSWERS, CONVERSATIONS
from slothcore.data.readers import read_records
from slothcore.data.tokenizer import Tokenizer
from slothcore.data.values import field_names, whole_characters
from slothcore.training.config import TrainConfig

PROMPT_FILES = (".txt", ".jsonl")
# More than one reads, and a data file given by mistake.
MOST_QUESTIONS = 100


@dataclass(frozen=True)
class Question:
    """One prompt.

    Attributes:
        prompt: in words, for people.
        text: what the model continues.
        by_template: whether a chat template wrote it, with its begin token.
        expected: the answer that stood beside it.
    """

    prompt: str
    text: str
    by_template: bool = False
    expected: str | None = None


def read_questions(config: TrainConfig, tokenizer: Tokenizer, first_record: Any) -> list[Question]:
    """The questions that `sample_prompts` holds.

    Args:
        tokenizer: with the chat template that the data are written by.
        first_record: of the training data; a text is asked in its layout. A tokenised row has none.
    Raises: ValueError or FileNotFoundError, with file and line, for what cannot be asked.
    """
    layout = _layout(config, first_record)
    questions = [
        _from_text(value, layout, tokenizer)
        if isinstance(value, str)
        else _from_record(value, where, config, tokenizer)
        for where, value in _asked(config)
    ]
    for question in questions:
        whole_characters(question.text, "a text of sample_prompts")
        if not tokenizer.encode_prompt(question.text, add_special_tokens=not question.by_template):
            raise ValueError(f"the sample prompt {question.prompt!r} has no token; give it some text")
    return questions


def check_prompt_files(config: TrainConfig) -> None:
    """Read the files of `sample_prompts`, before a model is loaded. Raises as `read_questions` does."""
    _asked(config)


def _asked(config: TrainConfig) -> list[tuple[str, Any]]:
    """All texts and records that `sample_prompts` holds, each with its place."""
    asked = config.sample_prompts
    entries = [*chain.from_iterable(map(_entries, [asked] if isinstance(asked, str) else asked or ()))]
    if len(entries) > MOST_QUESTIONS:
        raise ValueError(
            f"sample_prompts holds {len(entries):,} prompts, and all are answered at each sampling; "
            f"choose at most {MOST_QUESTIONS} of them"
        )
    return entries


def _entries(entry: str) -> Iterator[tuple[str, Any]]:
    """Texts and records, each with its place, that one entry of `sample_prompts` stands for."""
    path = Path(entry)
    if not entry.lower().endswith(PROMPT_FILES) or "\n" in entry:
        if path.suffix and "\n" not in entry and _is_file(path):
            raise ValueError(f"sample_prompts names the file {path}; prompts are read from a .txt or a .jsonl file")
        yield "sample_prompts", entry
        return
    if not path.is_file():
        if any(character.isspace() for character in entry):
            yield "sample_prompts", entry  # a sentence may end in the name of a file
            return
        raise FileNotFoundError(f"sample_prompts names the file {path}, which does not exist; correct the path")
    found = False
    for where, value in _lines(path) if path.suffix.lower() == ".txt" else read_records(path):
        if isinstance(value, ValueError):
            raise value
        found = True
        yield where, value
    if not found:
        raise ValueError(f"the file {path} of sample_prompts is empty; write one prompt on each line")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a text may be too long for a name
        return False


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"the file {path} of sample_prompts is not UTF-8; save it as UTF-8") from error
    yield from ((f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())


def _layout(config: TrainConfig, record: Any) -> str | None:
    """How the training data ask: "chat", "alpaca", or None where a prompt stands for itself."""
    if config.completion_template is not None or isinstance(record, TokenizedRow) or not isinstance(record, Mapping):
        return None
    name, plain = plain_record(record, format=config.format, text_field=config.text_field)
    if name in CONVERSATIONS or (name == "prompt" and isinstance(plain.get("prompt"), list)):
        return "chat"
    return "alpaca" if name in INSTRUCTIONS else None


def _from_text(text: str, layout: str | None, tokenizer: Tokenizer) -> Question:
    if layout == "chat":
        return _from_messages(({"role": "user", "content": text},), None, tokenizer)
    return Question(prompt=text, text=alpaca_prompt(text) if layout == "alpaca" else text)


def _from_record(record: Any, where: str, config: TrainConfig, tokenizer: Tokenizer) -> Question:
    """A record of the data, with or without its answer, which is what is expected."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a sample prompt must be a text or an object, got {type(record).__name__}")
    if config.completion_template is not None:
        return _from_columns(record, where, config)
    name = next((name for name in CONVERSATIONS if name in record), None)
    written = record[name] if name is not None else parsed_messages(record.get("prompt"))
    if name is not None or isinstance(written, list):
        if name is None:
            written = [*written, *(parsed_messages(record.get("completion")) or ())]
        system = record.get("system") or record.get("system_prompt")
        messages = read_messages(written, where=where, system=system)
        return _from_messages(messages, read_tools(record.get("tools"), where), tokenizer)
    question = next((field for field in ANSWERS if field in record), None)
    if question is None:
        if config.text_field in record:
            return _from_text(str(record[config.text_field]), None, tokenizer)
        raise ValueError(
            f"{where} has the fields {field_names(record)}, and a sample prompt needs one of "
            f"{', '.join([*CONVERSATIONS, *ANSWERS, config.text_field])}; rename the field that holds the question"
        )
    answered = any(field in record for field in ("output", "completion", "response", "answer"))
    example = format_example(record if answered else {**record, ANSWERS[question]: ""}, where=where)
    assert not isinstance(example, ChatExample)
    words = [str(record[field]) for field in (question, "input", "context") if record.get(field)]
    return Question("\n".join(dict.fromkeys(words)), example.prompt, expected=example.completion.strip() or None)


def _from_columns(record: Mapping[str, Any], where: str, config: TrainConfig) -> Question:
    """Own columns: the answer's may be absent."""
    assert config.completion_template is not None
    templates = ColumnTemplates(config.completion_template, config.prompt_template or "")
    prompt = templates.prompt_of(record, where)
    try:
        _, completion = templates.fill(record, where)
    except ValueError:
        completion = ""
    return Question(prompt.strip(), prompt, expected=completion.strip() or None)


def _from_messages(messages: tuple[Any, ...], tools: Any, tokenizer: Tokenizer) -> Question:
    """A conversation up to its last answer, which is what is expected."""
    expected = None
    if messages[-1]["role"] == "assistant":
        messages, expected = messages[:-1], _words(messages[-1])
    if not messages:
        raise ValueError(f"a sample prompt is an answer alone ({expected!r}); put the user's turn before it")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools)
    spoken = [f"{message['role']}: {_words(message)}" for message in messages]
    shown = _words(messages[0]) if len(messages) == 1 else "\n".join(spoken)
    return Question(shown, text, by_template=True, expected=expected)


def _words(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
