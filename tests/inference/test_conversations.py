"""What is said reaches the model, by whatever role it is called, or an error says what does not."""

from pathlib import Path
from typing import Any

import pytest

from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.conversations import conversation_text
from tests.data.tiny_tokenizers import CHATML, write_byte_tokenizer

# As Qwen 2.5, Phi 3 and most others: who is neither of these is not heard.
PICKY = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}[{{ m.role }}] {{ m.content | trim }}\n"
    "{% elif m.role == 'tool' %}[tool] {{ m.content | tojson }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
# As gpt-oss: tells both apart.
KNOWING = PICKY.replace("('system', ", "('system', 'developer', ")
# As SmolLM 3: a switch is taken out of what the system says.
SWITCHED = PICKY.replace("{{ m.content | trim }}", "{{ m.content | replace('/no_think', '') | trim }}")
# As early ones of Phi 3: no system.
DEAF = PICKY.replace("('system', ", "(")
USER = {"role": "user", "content": "Who?"}


def tokenizer_with(template: str, folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(write_byte_tokenizer(folder, config={"chat_template": template}))


@pytest.mark.parametrize(
    ("template", "message", "expected"),
    [
        (PICKY, {"role": "developer", "content": "Be brief."}, "[system] Be brief.\n"),
        (KNOWING, {"role": "developer", "content": "Be brief."}, "[developer] Be brief.\n"),
        (CHATML, {"role": "critic", "content": "Bad."}, "<|im_start|>critic\nBad.<|im_end|>\n"),
        (PICKY, {"role": "system", "content": "  spaces  "}, "[system] spaces\n"),
        (PICKY, {"role": "tool", "content": 'a "quoted"\nword'}, '[tool] "a \\"quoted\\"\\nword"\n'),
        (SWITCHED, {"role": "system", "content": "/no_think Be brief."}, "[system] Be brief.\n"),
        (PICKY, {"role": "usr", "content": ""}, ""),
        (PICKY, {"role": "usr", "content": None}, ""),
    ],
    ids=str,
)
def test_each_message_is_written(template: str, message: dict[str, Any], expected: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(template, tmp_path)
    behind = tokenizer.apply_chat_template([USER], add_generation_prompt=True)
    messages = [message, USER]
    assert conversation_text(tokenizer, messages) == expected + behind
    assert messages == [message, USER]


@pytest.mark.parametrize(
    ("template", "role"), [(PICKY, "usr"), (PICKY, "function"), (DEAF, "system"), (DEAF, "developer")]
)
def test_what_a_template_leaves_out_is_refused(template: str, role: str, tmp_path: Path) -> None:
    """Training refuses such a row, too."""
    shown = "system" if role == "developer" else role
    with pytest.raises(ValueError, match=rf"leaves out the text of messages\[1\] \(role '{shown}'\); take the message"):
        conversation_text(tokenizer_with(template, tmp_path), [USER, {"role": role, "content": "Be brief."}])
    with pytest.raises(ValueError, match=r"leaves out the text of messages\[1\]"):  # though its word stands there
        conversation_text(tokenizer_with(template, tmp_path), [USER, {"role": role, "content": "Who"}])


def test_what_only_one_text_may_say_is_not_left_out(tmp_path: Path) -> None:
    template = PICKY.replace("[{{ m.role }}]", "{% if m.content == 'X?' %}{{ raise_exception('X') }}{% endif %}")
    template = template.replace("{{ m.content | trim }}", "{{ m.content | length }}")
    text = conversation_text(tokenizer_with(template, tmp_path), [{"role": "system", "content": "X"}, USER])
    assert text == " 1\n 4\n[assistant] "


def test_a_message_that_calls_nothing_is_a_plain_one(tmp_path: Path) -> None:
    """As clients send back the answers that they got; templates ask whether there are calls by the name alone."""
    template = PICKY.replace(
        "{% if m.role", "{% if m.tool_calls is defined %}{{ raise_exception('no') }}{% elif m.role"
    )
    tokenizer, nothing = tokenizer_with(template, tmp_path), {"tool_calls": [], "refusal": None, "function_call": None}
    text = conversation_text(tokenizer, [USER, {"role": "assistant", "content": "I.", **nothing}, USER])
    assert text == "[user] Who?\n[assistant] I.\n[user] Who?\n[assistant] "
    with pytest.raises(ValueError, match="rejects this conversation: no"):
        conversation_text(tokenizer, [USER, {"role": "assistant", "tool_calls": [{}]}, USER])


def test_an_answer_may_lose_its_thoughts(tmp_path: Path) -> None:
    template = PICKY.replace("m.content | trim", "m.content.split('</think>')[-1] | trim")
    answer = {"role": "assistant", "content": "so what</think>"}
    text = conversation_text(tokenizer_with(template, tmp_path), [USER, answer, USER])
    assert text == "[user] Who?\n[assistant] \n[user] Who?\n[assistant] "


def test_the_caller_may_say_where_the_answer_begins(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CHATML, tmp_path)
    silent = conversation_text(tokenizer, [USER], add_generation_prompt=False)
    assert silent == tokenizer.apply_chat_template([USER])
    begun = {"role": "assistant", "content": "It is"}
    assert conversation_text(tokenizer, [USER, begun], continue_final_message=True).endswith("assistant\nIt is")
