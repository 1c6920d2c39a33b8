"""Text in, text out, with a toy tokenizer whose every token is one word."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers

from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.chat import Chat
from slothcore.inference.generate import generate, stream
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config
from tests.data.tiny_tokenizers import write_byte_tokenizer, write_sentencepiece_tokenizer

WORDS = 30
CONFIG = {
    "model_type": "llama",
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.5,
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    core = Core(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.from_folder(tmp_path)


@pytest.fixture
def model() -> Decoder:
    return from_config(CONFIG, device="cpu").eval()


PROMPTS = ["w3 w4 w5", "w7", "w9 w1 w2 w8 w20", "w11 w12", "w13"]


def write_always(model: Decoder, written: Sequence[int]) -> list[int]:
    """Have the model write these tokens in turns. Returns: a list that grows with each; cleared, they begin anew."""
    calls: list[int] = []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        scores = hidden.new_zeros(len(hidden), model.config.vocab_size)
        scores[:, written[len(calls) % len(written)]] = 1.0
        calls.append(1)
        return scores

    model.logits = logits
    return calls


def test_texts_are_the_decoded_ids(model: Decoder, tokenizer: Tokenizer) -> None:
    texts = generate(model, tokenizer, PROMPTS, max_new_tokens=9)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer.encode(prompt)
        continued = model.generate(torch.tensor(ids), max_new_tokens=9)
        assert prompt + text == " ".join(f"w{i}" for i in continued[0].tolist())


def test_a_word_that_goes_on_with_a_prompt_keeps_its_space(tmp_path: Path) -> None:
    """Decoders as sentencepiece's leave it out where a text begins."""
    tokenizer = Tokenizer.from_folder(write_sentencepiece_tokenizer(tmp_path))
    model = from_config({**CONFIG, "vocab_size": tokenizer.vocab_size}, device="cpu").eval()
    whole = tokenizer.encode("The cat is here. So it is")
    prompt, added = "The cat", tokenizer.decode(whole)[len("The cat") :]
    written = whole[len(tokenizer.encode(prompt)) :]
    calls = write_always(model, written)
    count = {"max_new_tokens": len(written)}
    assert generate(model, tokenizer, prompt, **count) == [added] == [" is here. So it is"]
    assert "".join(stream(model, tokenizer, prompt, **count)) == added
    assert generate(model, tokenizer, prompt, add_special_tokens=False, **count) == [added[1:]], "a text of its own"
    calls.clear()
    assert generate(model, tokenizer, prompt, stop_strings=" is", **count) == [""]
    assert len(calls) == 3, "the string ends it as soon as it is there"
    calls.clear()
    chat = Chat(model, tokenizer, **count)
    assert "".join(chat.ask(prompt)) == added
    assert chat._encode(chat.messages) == whole


def test_a_prompt_begins_once_and_is_not_ended(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path, add_eos=True))
    model = from_config({**CONFIG, "vocab_size": tokenizer.vocab_size}, device="cpu").eval()
    ids = [1, *tokenizer.encode("the", add_special_tokens=False)]
    new = model.generate(torch.tensor(ids), max_new_tokens=9, eos_token_id=2)[0, len(ids) :].tolist()
    new = new[: new.index(2)] if 2 in new else new
    for prompt in ("the", "<s>the"):
        assert generate(model, tokenizer, prompt, max_new_tokens=9) == [tokenizer.decode(new)]


def test_one_prompt_may_be_a_string(model: Decoder, tokenizer: Tokenizer) -> None:
    assert generate(model, tokenizer, PROMPTS[0], max_new_tokens=4) == generate(
        model, tokenizer, PROMPTS[:1], max_new_tokens=4
    )
    assert generate(model, tokenizer, [], max_new_tokens=4) == []


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batch_size_does_not_matter(model: Decoder, tokenizer: Tokenizer, batch_size: int) -> None:
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=9, batch_size=3)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=9, batch_size=batch_size) == expected


def test_end_of_sequence_ends_a_text(model: Decoder, tokenizer: Tokenizer) -> None:
    words = generate(model, tokenizer, PROMPTS[0], max_new_tokens=9)[0].split()
    model.generation_config = {"eos_token_id": int(words[4][1:])}
    expected = words[: words.index(words[4])]
    assert generate(model, tokenizer, PROMPTS[0], max_new_tokens=9)[0].split() == expected


def test_stop_strings(model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    free = generate(model, tokenizer, PROMPTS, max_new_tokens=9)
    stops = [" ".join(free[0].split()[3:5]), free[2].split()[5]]
    expected = []
    for text in free:
        cuts = [text.index(stop) for stop in stops if stop in text]
        expected.append(text[: min(cuts)] if cuts else text)
    assert expected[0] != free[0]
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=9, stop_strings=stops) == expected

    steps = []
    monkeypatch.setattr(model, "logits", lambda hidden: steps.append(1) or Decoder.logits(model, hidden))
    assert generate(model, tokenizer, PROMPTS[0], max_new_tokens=9, stop_strings=stops[0]) == expected[:1]
    complete = free[0].index(stops[0]) + len(stops[0])
    assert len(steps) == len(free[0][:complete].split()) < 9, "generation ends when the stop string is complete"


def test_seeds(model: Decoder, tokenizer: Tokenizer) -> None:
    """A text is drawn by its own seed, whatever is drawn beside it."""

    def draw(prompts: list[str], seed: Any, batch_size: int = 2) -> list[str]:
        return generate(model, tokenizer, prompts, max_new_tokens=9, temperature=1.0, seed=seed, batch_size=batch_size)

    four = [PROMPTS[0]] * 4
    drawn = draw(four, 1)
    assert drawn == draw(four, 1, batch_size=4) == [draw(four[:1], 1 + i)[0] for i in range(4)]
    assert len(set(drawn)) > 1
    assert drawn != draw(four, 5)
    torch.manual_seed(0)
    first = draw(four, None)
    assert draw(four, None) != first
    assert draw(four, np.int64(1)) == draw(four, torch.tensor(1)) == drawn
    for wrong in (1.5, "1"):
        with pytest.raises(ValueError, match=f"seed must be a whole number, got {wrong!r}"):
            draw(four, wrong)
    torch.manual_seed(0)
    assert draw(four, None) == first


def test_wrong_arguments(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="the prompt '' has no token"):
        generate(model, tokenizer, ["w1", ""], max_new_tokens=3)
    with pytest.raises(ValueError, match=r"the prompt holds half a character \(\\udcff at position 2\)"):
        generate(model, tokenizer, "w1\udcff", max_new_tokens=3)
    with pytest.raises(ValueError, match="stop_strings must not hold an empty string"):
        generate(model, tokenizer, "w1", max_new_tokens=3, stop_strings=["", "a"])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        generate(model, tokenizer, "w1", max_new_tokens=3, batch_size=0)


@pytest.mark.parametrize("end", ["<|im_end|>", "[end]"])
def test_what_ends_a_turn_ends_a_text(tmp_path: Path, end: str) -> None:
    """A token that no file calls an end, and an end that is spelled out as text."""
    source = f"{{% for m in messages %}}[{{{{ m.role }}}}]{{{{ m.content }}}}{end}{{% endfor %}}"
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path, config={"chat_template": source}))
    model = from_config({**CONFIG, "vocab_size": tokenizer.vocab_size}, device="cpu").eval()
    written = tokenizer.encode(f"ab{end}cd", add_special_tokens=False)

    calls = []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        """Scores that make every row write the tokens above, one after the other."""
        scores = hidden.new_zeros(len(hidden), tokenizer.vocab_size)
        scores[:, written[len(calls)]] = 1.0
        calls.append(len(hidden))
        return scores

    model.logits = logits
    assert generate(model, tokenizer, ["the", "cat"]) == ["ab", "ab"]
    ending = tokenizer.encode(f"ab{end}", add_special_tokens=False)
    assert calls == [2] * len(ending), "nothing is computed behind the end"


@pytest.mark.parametrize("stop", ["<|im_start|>", ["x", "<|im_start|>"], [" <|im_start|>", "<|im_start|>"]])
def test_a_control_token_may_be_a_stop_string(tmp_path: Path, stop: str | list[str]) -> None:
    """Decoding leaves it out, so no text ever holds it."""
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path))
    model = from_config({**CONFIG, "vocab_size": tokenizer.vocab_size}, device="cpu").eval()
    written = tokenizer.encode("ab<|im_start|>cd", add_special_tokens=False)
    calls = write_always(model, written)
    assert generate(model, tokenizer, "the", max_new_tokens=len(written)) == ["abcd"]
    calls.clear()
    assert generate(model, tokenizer, "the", max_new_tokens=9, stop_strings=stop) == ["ab"]
    assert len(calls) == 3
    calls.clear()
    assert "".join(stream(model, tokenizer, "the", max_new_tokens=9, stop_strings=stop)) == "ab"
    assert len(calls) == 3
