"""Conversations: each turn is what a fresh model would say to the whole of it, and costs only what is new."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import slothcore
from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.chat import Chat
from slothcore.inference.endings import Endings
from slothcore.inference.generate import generate, stream
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config
from tests.data.tiny_tokenizers import CHATML, CHATML_THINKING, CHATML_WITH_BEGIN, write_byte_tokenizer

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "max_position_embeddings": 300,
    "eos_token_id": 2,
}
QUESTIONS = ["the cat?", "an answer: 我们", "again"]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Decoder, Tokenizer]]:
    def make(template: str | None = CHATML, **changes: Any) -> tuple[Decoder, Tokenizer]:
        config = {} if template is None else {"chat_template": template}
        tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "tokenizer", config=config))
        import torch

        torch.manual_seed(5)
        return from_config({**CONFIG, "vocab_size": tokenizer.vocab_size, **changes}, device="cpu").eval(), tokenizer

    return make


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 40, "seed": 3}], ids=str)
def test_streamed_text_is_generated_text(make, options: dict[str, Any]) -> None:
    model, tokenizer = make()
    for prompt in QUESTIONS:
        pieces = list(stream(model, tokenizer, prompt, max_new_tokens=40, **options))
        assert "".join(pieces) == generate(model, tokenizer, prompt, max_new_tokens=40, **options)[0]
        assert len(pieces) > 3
    assert slothcore.stream is stream
    with pytest.raises(ValueError, match="has no token"):
        stream(model, Tokenizer.from_folder(write_byte_tokenizer(tokenizer._folder, add_bos=False)), "")
    with pytest.raises(ValueError, match="stop_strings must not hold an empty string"):
        stream(model, tokenizer, "a", stop_strings="")


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_BEGIN, CHATML_THINKING])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_each_turn_is_the_answer_to_the_whole_conversation(make, template: str, system: str | None) -> None:
    model, tokenizer = make(template)
    options = {"max_new_tokens": 20, "temperature": 0.8, "min_p": 0.02}
    chat = Chat(model, tokenizer, system=system, seed=11, **options)
    messages = [{"role": "system", "content": system}] if system else []
    for turn, question in enumerate(QUESTIONS):
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        alone = generate(model, tokenizer, prompt, add_special_tokens=False, seed=11 + turn, **options)[0]
        assert "".join(chat.ask(question)) == alone
        messages.append({"role": "assistant", "content": alone})
        assert chat.messages == messages
    assert len(set(chat.cache.ids)) > 5


def test_only_what_is_new_is_read(make) -> None:
    model, tokenizer = make()
    question = "the first question, which is a long one " * 3
    chat = Chat(model, tokenizer, max_new_tokens=20)
    list(chat.ask(question))
    read = chat.cache.tokens_read
    assert read == len(chat.cache.ids) > 100
    list(chat.ask("b"))
    # The first answer at most (its text may be spelled by other tokens), the second question, header and answer.
    assert chat.cache.tokens_read - read < 100
    # All of it, where nothing may be kept.
    fresh = Chat(model, tokenizer, max_new_tokens=20)
    fresh.messages = chat.messages[:2]
    list(fresh.ask("b"))
    assert fresh.cache.ids == chat.cache.ids
    assert fresh.cache.tokens_read > 150


def test_a_beginning_that_changed_is_read_anew(make) -> None:
    model, tokenizer = make()
    chat = Chat(model, tokenizer, max_new_tokens=8)
    list(chat.ask("one"))
    chat.messages[0]["content"] = "two"
    prompt = tokenizer.apply_chat_template([*chat.messages, {"role": "user", "content": "x"}], True)
    expected = generate(model, tokenizer, prompt, max_new_tokens=8, add_special_tokens=False)[0]
    assert "".join(chat.ask("x")) == expected


def test_what_was_said_before_a_stop_counts(make) -> None:
    model, tokenizer = make()
    chat = Chat(model, tokenizer, max_new_tokens=30)
    whole = "".join(Chat(model, tokenizer, max_new_tokens=30).ask("go on"))
    pieces = chat.ask("go on")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert whole.startswith(said)
    assert [m["content"] for m in chat.messages] == ["go on", said]
    chat.reset()
    chat.ask("never begun").close()
    assert chat.messages == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_goes_wrong_leaves_the_conversation_whole(make, error: type[BaseException]) -> None:
    model, tokenizer = make()
    chat = Chat(model, tokenizer, max_new_tokens=30)
    whole = "".join(chat.ask("go on"))
    chat.reset()
    calls = []

    def failing(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 15:
            raise error

    handle = model.model.layers[1].register_forward_pre_hook(failing)
    given: list[str] = []
    with pytest.raises(error):
        given.extend(chat.ask("go on"))
    said = "".join(given)
    handle.remove()
    expected = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": said}]
    assert said
    assert chat.messages == (expected if error is KeyboardInterrupt else [])
    chat.reset()
    assert "".join(chat.ask("go on")) == whole


def test_an_answer_says_whether_it_was_cut_short(make) -> None:
    model, tokenizer = make()
    chat = Chat(model, tokenizer, max_new_tokens=5)
    text = "".join(chat.ask("go on"))
    assert chat.cut_short
    stopped = Chat(model, tokenizer, max_new_tokens=5, stop_strings=[text[2:4]])
    assert text.startswith("".join(stopped.ask("go on")))
    assert not stopped.cut_short


def test_ends_that_the_embedding_does_not_have_are_passed_over(make) -> None:
    model, tokenizer = make()
    expected = "".join(Chat(model, tokenizer, max_new_tokens=9).ask("go on"))
    model.generation_config = {"eos_token_id": [2, tokenizer.vocab_size, -1]}
    assert "".join(Chat(model, tokenizer, max_new_tokens=9).ask("go on")) == expected
    assert generate(model, tokenizer, "go on", max_new_tokens=9)


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>", "[end]"])
def test_every_kind_of_end_ends_an_answer(make, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template's token, the model's, and an end that the template spells out as text."""
    model, tokenizer = make(CHATML.replace("<|im_end|>", end) if end == "[end]" else CHATML)
    chat = Chat(model, tokenizer)
    tokens = iter([*tokenizer.encode(f"the cat{end}an", add_special_tokens=False), 0])
    monkeypatch.setattr(model, "stream", lambda ids, **options: tokens)
    assert "".join(chat.ask("who?")) == "the cat"
    assert chat.messages[-1]["content"] == "the cat"
    assert not chat.cut_short
    assert len(list(tokens)) >= 2, "nothing is taken behind the end"


def test_the_system_message_can_change(make) -> None:
    model, tokenizer = make()
    chat = Chat(model, tokenizer, system="one", max_new_tokens=3)
    list(chat.ask("x"))
    assert chat.system == "one"
    chat.reset("two")
    assert chat.messages == [{"role": "system", "content": "two"}]
    chat.reset()
    assert (chat.messages, chat.system) == ([], None)


def test_a_template_that_takes_no_system_message_says_so(make) -> None:
    model, tokenizer = make("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}")
    with pytest.raises(ValueError, match="the chat template rejects this conversation: no system role"):
        Chat(model, tokenizer, system="x")
    chat = Chat(model, tokenizer)
    with pytest.raises(ValueError, match="no system role"):
        chat.reset("x")
    assert chat.messages == []
    model, tokenizer = make("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match=r"leaves out the text of messages\[0\] \(role 'system'\)"):
        Chat(model, tokenizer, system="x")


def test_without_a_template_the_text_goes_on(make) -> None:
    model, tokenizer = make(None)
    chat = Chat(model, tokenizer, max_new_tokens=6)
    assert not chat.has_template
    first = "".join(chat.ask("the cat "))
    assert first == generate(model, tokenizer, "the cat ", max_new_tokens=6)[0]
    text = f"the cat {first}"
    text += "" if text[-1].isspace() else "\n"
    assert "".join(chat.ask("and")) == generate(model, tokenizer, f"{text}and", max_new_tokens=6)[0]
    with pytest.raises(ValueError, match="has no chat template, which would say where a system message stands"):
        chat.reset("Be brief.")
    assert len(chat.messages) == 4


@pytest.mark.parametrize(("positions", "longest"), [(64, 32), (1023, 511), (1024, 512), (4096, 512)])
def test_an_answer_that_nobody_bounds_leaves_room(make, positions: int, longest: int) -> None:
    assert Chat(*make(max_position_embeddings=positions)).max_new_tokens == longest
    assert Chat(*make(max_position_embeddings=positions), max_new_tokens=700).max_new_tokens == 700


def test_a_full_conversation_says_so(make) -> None:
    model, tokenizer = make(max_position_embeddings=64)
    chat = Chat(model, tokenizer, max_new_tokens=3)
    chat.endings = Endings(frozenset(), ())
    list(chat.ask("the"))
    assert (chat.cut_short, chat.is_full) == (True, False)
    chat.max_new_tokens = 500
    list(chat.ask("cat"))
    assert (chat.cut_short, chat.is_full) == (True, True)
    chat.reset()
    assert (chat.cut_short, chat.is_full) == (False, False)


def test_a_conversation_ends_at_the_models_positions(make) -> None:
    model, tokenizer = make(max_position_embeddings=64)
    chat = Chat(model, tokenizer, max_new_tokens=500)
    list(chat.ask("the"))
    assert len(chat.cache.ids) <= 64, "no answer goes beyond them"
    assert chat.cut_short == chat.is_full
    before = list(chat.messages)
    with pytest.raises(ValueError, match=r"has \d+ tokens now, and the model was made for 64 with its answer"):
        chat.ask("x" * 64)
    assert chat.messages == before
