"""Conversations of every shape, and what of a row is learned."""

from typing import Any

from slothcore.data.masking import IGNORED_LABEL, TokenizedRow
from slothcore.data.tokenizer import Tokenizer

Chat = list[dict[str, Any]]


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def calls(*names: str, content: str | None = None) -> dict[str, Any]:
    functions = [{"name": name, "arguments": {"city": "Paris", "days": 2}} for name in names]
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": f"call{i:05}", "type": "function", "function": f} for i, f in enumerate(functions)],
    }


def result(text: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{number:05}", "content": text}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]

PLAIN: dict[str, Chat] = {
    "one turn": [user("What is the first?"), assistant("one")],
    "one turn, system": [system("Be brief."), user("Hi"), assistant("Hello there.")],
    "many turns": [user("a"), assistant("one"), user("b"), assistant("two\n\nlines of it"), user("c"), assistant("3")],
    "many turns, system": [system("Be brief."), user("a"), assistant("one"), user("b"), assistant("two, and more")],
    "other scripts": [user("Привет"), assistant("日本語 é 😀"), user("👍🏽"), assistant("😀😀 ß")],
    "the same words everywhere": [user("one"), assistant("one"), user("one"), assistant("one")],
    "words inside other words": [user("the cat sat"), assistant("cat"), user("assistant user"), assistant("user")],
    "code": [user("code?"), assistant("```python\ndef f(x):\n    return {'a': x}\n```"), user("ok"), assistant("<b>")],
    "template strings in the words": [
        user("[INST] USER: ASSISTANT: ### Response:\n {{ x }} {% for %}"),
        assistant("### Instruction:\nno. ASSISTANT: [/INST] {{ y }} {% endfor %}"),
        user("model\n"),
        assistant("assistant\nuser"),
    ],
}
SOME_WORDS = (
    *(
        "one",
        "two words",
        " lead",
        "trail ",
        "trail\n",
        "\n\nlead",
        "\r\nlines\r\n",
        "tab\tx",
        "a\n\nb",
        "x" * 300,
        "1",
    ),
    *("日本語", "😀👍🏽", "é e\u0301", "ﷺ", "\u200b", "\u00a0nbsp", "�", "user", "assistant", "model", "ASSISTANT:"),
    *("### Response:", "[/INST]", "```\ncode\n```", "{{ x }}", "{% if %}", "<b>x</b>", "</s", "<|im_end", "| pipe |"),
    *("<think>hm</think> yes", "<think>\nhm\n</think>\n\nyes", "ends with <", "end."),
)
NO_WORDS = ("", " ", "\n", "\u2028")
MARGINS: Chat = [user(" a\n"), assistant("  two \n"), user("b "), assistant("\n\nthree")]


def learned(row: TokenizedRow, tokenizer: Tokenizer) -> list[str]:
    """The text of each run of targets."""
    runs: list[list[int]] = []
    previous = IGNORED_LABEL
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (token, IGNORED_LABEL)
        if label != IGNORED_LABEL:
            if previous == IGNORED_LABEL:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def said(chat: Chat) -> list[str]:
    """The assistant's words, turn by turn."""
    return [message["content"] for message in chat if message["role"] == "assistant"]
