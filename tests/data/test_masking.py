"""Rows and labels: what is learned, one begin and one end, what is cut and counted."""

from pathlib import Path

import pytest

from slothcore.data.formats import ALPACA_PROMPT
from slothcore.data.masking import IGNORED_LABEL, TokenizedRow, tokenise_dataset, tokenise_example
from slothcore.data.tokenizer import Tokenizer
from tests.data.conversations import learned
from tests.data.tiny_tokenizers import (
    CHATML,
    CHATML_THINKING,
    CHATML_WITH_BEGIN,
    CHATML_WITH_CLOSING,
    write_byte_tokenizer,
    write_sentencepiece_tokenizer,
)

BOS, EOS, IM_START, IM_END = 1, 2, 3, 4
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the first"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "the second"},
    {"role": "assistant", "content": " two "},
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "bytes"))


def chat_tokenizer(folder: Path, template: str) -> Tokenizer:
    return Tokenizer.from_folder(write_byte_tokenizer(folder, config={"chat_template": template}))


def test_a_text_is_learned_whole_and_ends(tokenizer: Tokenizer) -> None:
    row = tokenise_example({"text": "the cat"}, tokenizer, max_seq_length=100)
    assert row.input_ids == row.labels
    assert row.input_ids[0] == BOS
    assert row.input_ids[-1] == EOS
    assert row.input_ids.count(BOS) == row.input_ids.count(EOS) == 1
    assert tokenizer.decode(row.input_ids) == "the cat"
    assert row.num_targets == len(row.input_ids) - 1


def test_ends_that_the_text_writes_are_not_doubled(tokenizer: Tokenizer) -> None:
    written = tokenise_example({"text": "<s>the cat</s>"}, tokenizer, max_seq_length=100)
    assert written == tokenise_example({"text": "the cat"}, tokenizer, max_seq_length=100)
    row = tokenise_example({"prompt": "<s>Q", "completion": "A</s>"}, tokenizer, max_seq_length=100)
    assert row == tokenise_example({"prompt": "Q", "completion": "A"}, tokenizer, max_seq_length=100)


def test_a_tokenizer_that_adds_its_own_end(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path, add_eos=True))
    assert tokenizer.encode("Q")[-1] == EOS
    row = tokenise_example({"prompt": "Q", "completion": "A"}, tokenizer, max_seq_length=100)
    assert row.input_ids.count(EOS) == 1
    assert learned(row, tokenizer) == ["A</s>"]


def test_without_begin_and_end_tokens_none_are_added(tmp_path: Path) -> None:
    folder = write_byte_tokenizer(tmp_path, add_bos=False, config={"bos_token": None, "eos_token": None})
    tokenizer = Tokenizer.from_folder(folder)
    row = tokenise_example({"text": "the cat"}, tokenizer, max_seq_length=100)
    assert row.input_ids == row.labels == tokenizer.encode("the cat")


def test_a_prompt_is_not_learned(tokenizer: Tokenizer) -> None:
    record = {"instruction": "Say the.", "output": "the"}
    row = tokenise_example(record, tokenizer, max_seq_length=1000)
    assert learned(row, tokenizer) == ["the</s>"]
    assert tokenizer.decode(row.input_ids) == ALPACA_PROMPT.format(instruction="Say the.") + "the"
    whole = tokenise_example(record, tokenizer, max_seq_length=1000, completion_only_loss=False)
    assert whole == TokenizedRow(row.input_ids, row.input_ids)


def test_a_token_across_the_boundary_is_learned(tokenizer: Tokenizer) -> None:
    """': ' is one token here, so the prompt ends inside it."""
    row = tokenise_example({"prompt": "Q:", "completion": " the"}, tokenizer, max_seq_length=100)
    assert learned(row, tokenizer) == [": the</s>"]


def test_a_completion_gets_no_space_from_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_sentencepiece_tokenizer(tmp_path))
    row = tokenise_example({"prompt": "What is 2?\n", "completion": "Two"}, tokenizer, max_seq_length=100)
    assert tokenizer.decode(row.input_ids) == "What is 2?\nTwo"
    assert [label for label in row.labels if label != IGNORED_LABEL] == [tokenizer.token_id(t) for t in "Two"] + [EOS]


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_BEGIN])
def test_the_assistants_turns_are_learned(tmp_path: Path, template: str) -> None:
    tokenizer = chat_tokenizer(tmp_path, template)
    row = tokenise_example({"messages": CHAT}, tokenizer, max_seq_length=1000)
    assert learned(row, tokenizer) == ["one<|im_end|>", " two <|im_end|>"]
    # The tokenizer adds a begin token to plain text, but a conversation has exactly those of its template.
    assert row.input_ids.count(BOS) == template.count("bos_token")
    assert tokenizer.decode(row.input_ids, skip_special_tokens=False) == tokenizer.apply_chat_template(CHAT)
    whole = tokenise_example({"messages": CHAT}, tokenizer, max_seq_length=1000, completion_only_loss=False)
    assert whole == TokenizedRow(row.input_ids, row.input_ids)


def test_sharegpt_gives_the_same_row(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, CHATML)
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": speakers[m["role"]], "value": m["content"]} for m in CHAT]
    given = tokenise_example({"conversations": turns}, tokenizer, max_seq_length=1000)
    assert given == tokenise_example({"messages": CHAT}, tokenizer, max_seq_length=1000)


def test_a_closing_of_the_conversation_is_not_learned(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, CHATML_WITH_CLOSING)
    row = tokenise_example({"messages": CHAT}, tokenizer, max_seq_length=1000)
    assert learned(row, tokenizer) == ["one<|im_end|>", " two <|im_end|>"]


def test_a_token_that_closes_calls_does_not_end_the_turn(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.tool_calls %}>{{ m.tool_calls[0].function.name }}<|im_end|></s>{% else %}"
        "{{ '>' if m.role == 'assistant' }}{{ m.content }}{{ '</s>' if m.role == 'assistant' else '' }}{% endif %}"
        "{% endfor %}{{ '>' if add_generation_prompt }}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    chat = [CHAT[1], call, {"role": "tool", "content": "rain"}, CHAT[2]]
    row = tokenise_example({"messages": chat}, chat_tokenizer(tmp_path, template), max_seq_length=1000)
    assert learned(row, chat_tokenizer(tmp_path, template)) == ["f<|im_end|></s>", "one</s>"]


def test_an_assistant_may_begin(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, CHATML)
    row = tokenise_example({"messages": CHAT[2:]}, tokenizer, max_seq_length=1000)
    assert learned(row, tokenizer) == ["one<|im_end|>", " two <|im_end|>"]


def test_a_template_that_drops_earlier_thoughts(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, CHATML_THINKING)
    thinking = [dict(m, content=f"<think>hm</think>{m['content']}") if m["role"] == "assistant" else m for m in CHAT]
    row = tokenise_example({"messages": thinking}, tokenizer, max_seq_length=1000)
    assert learned(row, tokenizer) == ["one<|im_end|>", "<think>hm</think> two <|im_end|>"]
    assert tokenizer.decode(row.input_ids, skip_special_tokens=False) == tokenizer.apply_chat_template(thinking)


def test_a_template_that_changes_the_text(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, CHATML.replace("message.content", "message.content | upper"))
    row = tokenise_example({"messages": CHAT}, tokenizer, max_seq_length=1000)
    assert learned(row, tokenizer) == ["ONE<|im_end|>", " TWO <|im_end|>"]


def test_a_conversation_without_a_template(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"record 1: .*has no chat template; set chat_template to a built-in one"):
        tokenise_example({"messages": CHAT}, tokenizer, max_seq_length=1000)


def test_the_last_turn_alone(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, CHATML)
    row = tokenise_example({"messages": CHAT}, tokenizer, max_seq_length=1000, mask_history=True)
    assert learned(row, tokenizer) == [" two <|im_end|>"]
    every = tokenise_example({"messages": CHAT}, tokenizer, max_seq_length=1000)
    assert row.input_ids == every.input_ids
    # A text has no history.
    text = {"prompt": "Q", "completion": "A"}
    given = tokenise_example(text, tokenizer, max_seq_length=100, mask_history=True)
    assert given == tokenise_example(text, tokenizer, max_seq_length=100)
    with pytest.raises(ValueError, match="mask_history learns the last answer only and completion_only_loss: false"):
        tokenise_dataset([text], tokenizer, max_seq_length=100, mask_history=True, completion_only_loss=False)


def test_a_row_without_targets_is_shown_with_the_reason(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, CHATML)
    asked = {"messages": [*CHAT[:2], {"role": "user", "content": "x" * 1000}]}
    with pytest.raises(ValueError) as caught:
        tokenise_dataset([{"messages": CHAT}, asked], tokenizer, max_seq_length=2000)
    message = str(caught.value)
    assert message.startswith(
        "record 2: nothing of it is learned, because it has no assistant's turn (roles: system, user, user); "
        "take the record out, or set on_bad_row to skip. The row is: '<|im_start|>system"
    )
    assert "xxx ... xxx" in message
    assert len(message) < 650
    rows, stats = tokenise_dataset(
        [asked, {"messages": CHAT}, {"txt": "a"}], tokenizer, max_seq_length=2000, on_bad_row="skip"
    )
    assert (len(rows), stats.dropped_without_target, stats.skipped) == (1, 1, 1)
    assert stats.describe(9).endswith(" learned; 1 dropped, having no token to learn; 1 wrong one skipped")
    assert stats.first_skipped is not None
    assert stats.first_skipped.startswith("record 1: nothing of it is learned, because it has no assistant")
    silent = chat_tokenizer(tmp_path / "b", "{% for m in messages %}{% generation %}{% endgeneration %}.{% endfor %}")
    with pytest.raises(ValueError, match="because the chat template writes nothing that the assistant says"):
        tokenise_example({"messages": CHAT}, silent, max_seq_length=2000)
    plain = Tokenizer.from_folder(
        write_byte_tokenizer(tmp_path / "c", config={"bos_token": None, "eos_token": None}, add_bos=False)
    )
    with pytest.raises(ValueError, match="because its completion is empty"):
        tokenise_example({"prompt": "Q", "completion": ""}, plain, max_seq_length=2000)


def test_long_rows_are_truncated_or_dropped_and_counted(tokenizer: Tokenizer) -> None:
    records = [{"text": "xyz"}, {"text": "x" * 8}, {"text": "x" * 100}, {"prompt": "x" * 50, "completion": "y"}]
    rows, stats = tokenise_dataset(records, tokenizer, max_seq_length=10)
    assert [len(row.input_ids) for row in rows] == [5, 10, 10]
    assert rows[2].input_ids[-1] != EOS
    assert (stats.records, stats.rows, stats.tokens, stats.targets) == (4, 3, 25, 22)
    assert (stats.truncated, stats.dropped_overlength, stats.dropped_without_target) == (2, 0, 1)
    assert stats.describe(10) == (
        "4 records gave 3 rows with 25 tokens, 22 of them learned; 2 truncated to 10 tokens; "
        "1 dropped, having no token to learn"
    )
    # The row is not shown: what is to be learned stands beyond what fits.
    assert stats.first_skipped == (
        "record 4: nothing of it is learned, because the first word to learn is token 52, and max_seq_length is 10; "
        "raise max_seq_length, or shorten what stands before it"
    )
    rows, stats = tokenise_dataset(records, tokenizer, max_seq_length=10, overlength="drop")
    assert [len(row.input_ids) for row in rows] == [5, 10]
    assert (stats.truncated, stats.dropped_overlength, stats.dropped_without_target) == (0, 2, 0)
    assert stats.describe(10).endswith("; 2 longer than 10 tokens dropped")


def test_running_text_is_cut_into_rows_and_each_token_learned_once(tokenizer: Tokenizer) -> None:
    text = "".join(chr(ord("a") + i * i % 26) for i in range(1000))
    for length in (2, 3, 10, 1001, 1002, 2000):
        rows, stats = tokenise_dataset([{"document": text}], tokenizer, max_seq_length=length, overlength="drop")
        assert max(len(row.input_ids) for row in rows) <= length
        targets = [label for row in rows for label in row.labels[1:]]
        assert [rows[0].input_ids[0], *targets] == [*tokenizer.encode(text), EOS]
        assert stats.truncated == stats.dropped_overlength == stats.dropped_without_target == 0
    with pytest.raises(ValueError, match=r"fills .* rows"):
        tokenise_example({"document": text}, tokenizer, max_seq_length=10)


def test_nothing_left_is_refused_with_an_example(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"no row is left \(3 records .* left out: record 1: .* is token 52, and"):
        tokenise_dataset([{"prompt": "x" * 50, "completion": "y"}] * 3, tokenizer, max_seq_length=10)
    with pytest.raises(ValueError, match="all 2 records are longer than max_seq_length = 5 tokens"):
        tokenise_dataset([{"text": "x" * 50}] * 2, tokenizer, max_seq_length=5, overlength="drop")
    with pytest.raises(ValueError, match="the dataset has no records"):
        tokenise_dataset([], tokenizer, max_seq_length=5)


def test_bad_arguments(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="max_seq_length must be at least 2, got 1"):
        tokenise_dataset([{"text": "a"}], tokenizer, max_seq_length=1)
    with pytest.raises(ValueError, match="overlength must be 'truncate' or 'drop', got 'split'"):
        tokenise_dataset([{"text": "a"}], tokenizer, max_seq_length=8, overlength="split")
    with pytest.raises(ValueError, match="on_bad_row must be 'error' or 'skip', got 'stop'"):
        tokenise_dataset([{"text": "a"}], tokenizer, max_seq_length=8, on_bad_row="stop")
    with pytest.raises(ValueError, match="record 1002 has the fields 'txt'"):
        tokenise_dataset([{"text": "a"}] * 1001 + [{"txt": "a"}], tokenizer, max_seq_length=8)


def test_published_conversations(shared_data: Path) -> None:
    from slothcore.data.files import load_dataset

    tokenizer = Tokenizer.from_folder(shared_data / "tokenizers" / "llama-3")
    records = load_dataset(shared_data / "datasets" / "oasst_100_sharegpt.json")
    rows, stats = tokenise_dataset(records, tokenizer, max_seq_length=512)
    assert stats.rows + stats.dropped_without_target == len(records)
    assert 0 < stats.targets < stats.tokens
    assert all(len(row.input_ids) == len(row.labels) <= 512 for row in rows)
