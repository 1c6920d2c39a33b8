"""The openai client against a real server on loopback: what is answered is what the model says."""

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.engine import Sampling
from slothcore.inference.generate import generate
from slothcore.serve.models import ServedModel
from slothcore.serve.replies import as_event
from slothcore.serve.requests import read_chat
from tests.data.tiny_tokenizers import write_sentencepiece_tokenizer
from tests.serve.running import ADAPTERS, BASE, Served, served

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat: 我们?"}]
NAMES = (BASE, *ADAPTERS)
PROMPTS = ["the first", "another, longer one: and on", "z"]


def expected_chat(server: Served, model: str = BASE, messages: Any = MESSAGES, **options: Any) -> str:
    text = server.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return generate(server.models[model], server.tokenizer, text, add_special_tokens=False, **options)[0]


def test_the_models_are_listed(server: Served) -> None:
    client = server.client()
    listed = client.models.list().data
    assert [model.id for model in listed] == list(NAMES)
    assert [model.parent for model in listed] == [None, BASE, BASE]
    assert {model.max_model_len for model in listed} == {300}
    assert client.models.retrieve("law").id == "law"


@pytest.mark.parametrize("model", NAMES)
def test_chat_is_what_the_model_generates(server: Served, model: str) -> None:
    reply = server.client().chat.completions.create(model=model, messages=MESSAGES, temperature=0, max_tokens=24)
    assert reply.model == model
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == expected_chat(server, model, max_new_tokens=24)
    assert reply.choices[0].finish_reason in ("stop", "length")
    prompt = server.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(server.tokenizer.encode_prompt(prompt, add_special_tokens=False))
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert 1 <= reply.usage.completion_tokens <= 24


def test_each_model_says_something_else(server: Served) -> None:
    assert len({expected_chat(server, model, max_new_tokens=24) for model in NAMES}) == len(NAMES)


@pytest.mark.parametrize("options", [{}, {"logprobs": True, "top_logprobs": 3}], ids=str)
def test_a_stream_is_the_whole_answer_in_pieces(server: Served, options: dict[str, Any]) -> None:
    asked = {"model": BASE, "messages": MESSAGES, "temperature": 0.9, "seed": 7, "max_tokens": 60, "n": 2, **options}
    whole = server.client().chat.completions.create(**asked)
    chunks = list(server.client().chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index, choice in enumerate(whole.choices):
        own = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert all(each.delta.role is None for each in own[1:])
        assert "".join(each.delta.content or "" for each in own) == choice.message.content
        assert [each.finish_reason for each in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == choice.finish_reason
        assert len(own) > 10
        if options:
            assert choice.logprobs is not None
            told = [token for each in own if each.logprobs for token in each.logprobs.content or []]
            assert told == choice.logprobs.content
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_a_seed_says_what_is_drawn(server: Served) -> None:
    client = server.client()

    def answers(seed: int | None, n: int = 1) -> list[str | None]:
        reply = client.chat.completions.create(
            model=BASE, messages=MESSAGES, temperature=1.0, top_p=0.95, seed=seed, n=n, max_tokens=20
        )
        return [choice.message.content for choice in reply.choices]

    assert answers(3) == answers(3)
    assert answers(3, n=3) == [*answers(3), *answers(4), *answers(5)]
    assert len({*answers(3), *answers(4), *answers(None), *answers(None)}) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-300},
        {"top_k": 1, "temperature": 3.0},
        {"min_p": 1.0, "temperature": 3.0},
        {"top_p": 1e-6, "temperature": 3.0},
    ],
    ids=str,
)
def test_cuts_that_leave_one_token_are_greedy(server: Served, options: dict[str, Any]) -> None:
    reply = server.client().chat.completions.create(model=BASE, messages=MESSAGES, max_tokens=20, extra_body=options)
    assert reply.choices[0].message.content == expected_chat(server, max_new_tokens=20)


def test_penalties_reach_the_engine(server: Served) -> None:
    client, asked = server.client(), {"model": BASE, "prompt": "aaaa", "temperature": 0, "max_tokens": 60}
    plain = client.completions.create(**asked).choices[0].text
    others = {
        client.completions.create(**asked, frequency_penalty=2).choices[0].text,
        client.completions.create(**asked, presence_penalty=2).choices[0].text,
        client.completions.create(**asked, extra_body={"repetition_penalty": 1.8}).choices[0].text,
    }
    assert plain not in others
    expected = generate(
        server.models[BASE], server.tokenizer, "aaaa", max_new_tokens=60, temperature=0.0, repetition_penalty=1.8
    )
    assert expected[0] in others


def test_completions_continue_texts_and_tokens(server: Served) -> None:
    client = server.client()
    expected = generate(server.models[BASE], server.tokenizer, PROMPTS, max_new_tokens=12)
    asked = {"model": BASE, "temperature": 0, "max_tokens": 12}
    together = client.completions.create(prompt=PROMPTS, **asked)
    assert [choice.text for choice in together.choices] == expected
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    ids = [server.tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    assert [choice.text for choice in client.completions.create(prompt=ids, **asked).choices] == expected
    assert client.completions.create(prompt=ids[1], **asked).choices[0].text == expected[1]
    echoed = client.completions.create(prompt=PROMPTS[:2], echo=True, n=2, **asked)
    full = [prompt + text for prompt, text in zip(PROMPTS, expected, strict=True)]
    assert [choice.text for choice in echoed.choices] == [full[0], full[0], full[1], full[1]]
    streamed = [""] * 3
    for chunk in client.completions.create(prompt=PROMPTS, echo=True, stream=True, **asked):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == full
    default = client.completions.create(model=BASE, prompt="z", temperature=0, extra_body={"ignore_eos": True})
    assert default.usage is not None
    assert default.usage.completion_tokens == 16


def test_a_word_that_goes_on_keeps_its_space(tmp_path: Path) -> None:
    """With a tokenizer whose decoder leaves out the space that begins a text."""
    tokenizer = Tokenizer.from_folder(write_sentencepiece_tokenizer(tmp_path))
    (tmp_path / "words.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer.use_chat_template(str(tmp_path / "words.jinja"))
    with served(tmp_path, tokenizer=tokenizer) as server:
        client, asked = server.client(), {"model": BASE, "temperature": 0, "max_tokens": 12}
        spaces = 0
        for prompt in (f"The {a} {b}" for a in "abcdef" for b in "tuvw"):
            ids = tokenizer.encode_prompt(prompt)
            new = server.models[BASE].generate(torch.tensor(ids), max_new_tokens=12)[0, len(ids) :].tolist()
            whole = tokenizer.decode([*ids, *new])
            plain = client.completions.create(prompt=prompt, logprobs=0, **asked).choices[0]
            assert prompt + plain.text == whole
            assert plain.logprobs is not None
            if 2 not in new:
                assert "".join(plain.logprobs.tokens or []) == plain.text
            assert client.completions.create(prompt=ids, echo=True, **asked).choices[0].text == whole
            pieces = client.completions.create(prompt=prompt, echo=True, stream=True, **asked)
            assert "".join(piece.choices[0].text for piece in pieces) == whole
            messages: Any = [{"role": "assistant", "content": prompt}]
            going_on: Any = {"extra_body": {"chat_template_kwargs": {"continue_final_message": True}}}
            chat = client.chat.completions.create(messages=messages, **going_on, **asked)
            assert chat.choices[0].message.content is not None
            text = tokenizer.encode_prompt(prompt, add_special_tokens=False)
            new = server.models[BASE].generate(torch.tensor(text), max_new_tokens=12)[0, len(text) :].tolist()
            assert prompt + chat.choices[0].message.content == tokenizer.decode([*text, *new])
            spaces += (plain.text[:1] == " ") + (chat.choices[0].message.content[:1] == " ")
        assert spaces, "no answer began with the one that is left out elsewhere"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_an_answer_and_are_not_shown(server: Served, stream: bool) -> None:
    client, asked = server.client(), {"model": BASE, "prompt": "the", "temperature": 0, "max_tokens": 120}
    text = client.completions.create(**asked).choices[0].text
    stop = text[40:43]
    assert len(stop) == 3
    expected = text[: text.index(stop)]
    if stream:
        chunks = list(client.completions.create(**asked, stop=["never this", stop], stream=True))
        shown, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        reply = client.completions.create(**asked, stop=["never this", stop])
        shown, reason = reply.choices[0].text, reply.choices[0].finish_reason
        assert reply.usage is not None
        assert reply.usage.completion_tokens < 120
    assert (shown, reason) == (expected, "stop")


def test_control_tokens_may_be_stop_strings(server: Served) -> None:
    """Ends are passed over with `ignore_eos`, but for those that the client names."""
    model = ServedModel.of(server.models[BASE], BASE, server.tokenizer)
    begin, end = (server.tokenizer.token_id(text) for text in ("<|im_start|>", "<|im_end|>"))
    for ignores, stops, expected in (
        (True, [], set()),
        (True, ["<|im_start|>", "a"], {begin}),
        (True, ["<|im_end|>"], {end}),
        (False, ["<|im_start|>"], {2, begin, end}),
        (False, ["<|im_start|> "], {2, end}),
    ):
        body = {"model": BASE, "messages": MESSAGES, "ignore_eos": ignores, "stop": stops}
        endings = model.endings(read_chat(body, Sampling()))
        assert endings.eos_ids == expected
        assert endings.stops == tuple(stops)


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\n"])
def test_an_event_is_one_line_to_every_client(mark: str) -> None:
    """Many split what they are sent where Unicode ends a line."""
    event = as_event({"text": f"a{mark}b \N{PARTY POPPER}"}).decode()
    (line,) = event.removesuffix("\n\n").splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": f"a{mark}b \N{PARTY POPPER}"}
    assert "\N{PARTY POPPER}" in line


def test_an_answer_goes_on_to_the_end_of_the_room(server: Served) -> None:
    reply = server.client().chat.completions.create(
        model=BASE, messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert reply.usage is not None
    assert reply.usage.total_tokens == 300
    assert reply.choices[0].finish_reason == "length"


def test_logprobs_are_those_of_the_model(server: Served) -> None:
    asked = {"model": "law", "temperature": 0.7, "seed": 1, "max_tokens": 30}
    chat = server.client().chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=4, **asked)
    assert chat.choices[0].logprobs is not None
    told = chat.choices[0].logprobs.content
    assert told is not None
    data = b"".join(bytes(token.bytes or ()) for token in told)
    assert data.decode(errors="replace") == chat.choices[0].message.content
    prompt = server.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    ids = server.tokenizer.encode_prompt(prompt, add_special_tokens=False)
    model = server.models["law"]
    completion = server.client().completions.create(prompt=[ids], logprobs=4, **asked)
    logprobs = completion.choices[0].logprobs
    assert completion.choices[0].text == chat.choices[0].message.content
    assert logprobs is not None
    assert logprobs.token_logprobs == [token.logprob for token in told]
    names = [token.token if bytes(token.bytes or ()) == token.token.encode() else None for token in told]
    assert [own or name for own, name in zip(names, logprobs.tokens or [], strict=True)] == logprobs.tokens
    assert None in names
    assert all(
        name or called.startswith("bytes:\\x") for name, called in zip(names, logprobs.tokens or [], strict=True)
    )
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[:2] == [0, len(told[0].token)]
    for token, alternatives in zip(told, logprobs.top_logprobs or [], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor(ids)).logits
        assert logits is not None
        exact = logits[-1].log_softmax(-1)
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(exact.topk(4).values.tolist(), abs=1e-4)
        assert sorted(alternatives.values(), reverse=True) == [other.logprob for other in token.top_logprobs]
        nearest = int((exact - token.logprob).abs().argmin())
        assert float(exact[nearest]) == pytest.approx(token.logprob, abs=1e-4)
        ids.append(nearest)


def test_a_developer_is_heard(tmp_path: Path) -> None:
    """Where the template has no word for that role; of others the client is told."""
    known = "{% if m.role in ('system', 'user') %}{{ m.role }}: {{ m.content }}\n{% endif %}"
    picky = "{% for m in messages %}" + known + "{% endfor %}"
    with served(tmp_path, chat_template=picky) as server:

        def asked(**message: Any) -> tuple[str | None, int]:
            messages: Any = [message, {"role": "user", "content": "Who?"}]
            options: Any = {
                "temperature": 0,
                "max_tokens": 12,
                "extra_body": {"chat_template_kwargs": {"tokenizer": 1}},
            }
            reply = server.client().chat.completions.create(model=BASE, messages=messages, **options)
            assert reply.usage is not None
            return reply.choices[0].message.content, reply.usage.prompt_tokens

        assert asked(role="developer", content="Be brief.") == asked(role="system", content="Be brief.")
        assert asked(role="developer", content="Be brief.") != asked(role="developer", content="")
        with pytest.raises(openai.BadRequestError, match=r"leaves out the text of messages\[0\] \(role 'usr'\)") as no:
            asked(role="usr", content="Be brief.")
        assert no.value.param == "messages"


def test_a_message_may_come_in_parts_and_be_continued(server: Served) -> None:
    client, options = server.client(), {"model": BASE, "temperature": 0, "max_tokens": 20}
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]}]
    whole = [{"role": "user", "content": "the cat"}]
    answer = client.chat.completions.create(messages=parts, **options).choices[0].message.content
    assert answer == expected_chat(server, messages=whole, max_new_tokens=20)
    begun = [*whole, {"role": "assistant", "content": "It is"}]
    text = server.tokenizer.apply_chat_template(begun, continue_final_message=True)
    expected = generate(server.models[BASE], server.tokenizer, text, add_special_tokens=False, max_new_tokens=20)[0]
    going_on = client.chat.completions.create(
        messages=begun, extra_body={"chat_template_kwargs": {"continue_final_message": True}}, **options
    )
    assert going_on.choices[0].message.content == expected


def test_many_clients_get_what_each_would_get_alone(server: Served) -> None:
    """64 at once, on all adapters, with 16 rows to share: whole and streamed, greedy and drawn."""
    client = server.async_client()
    asked: list[dict[str, Any]] = [
        {
            "model": NAMES[i % len(NAMES)],
            "messages": [{"role": "user", "content": f"{i}: {'the cat ' * (i % 9)}"}],
            "temperature": 0.8 if i % 4 == 3 else 0.0,
            "seed": i,
            "max_tokens": 10 + i % 23,
        }
        for i in range(64)
    ]

    async def ask(options: dict[str, Any], stream: bool) -> str:
        if not stream:
            reply = await client.chat.completions.create(**options)
            return reply.choices[0].message.content or ""
        chunks = await client.chat.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def ask_all() -> tuple[list[str], list[str]]:
        together = await asyncio.gather(*(ask(options, i % 2 == 0) for i, options in enumerate(asked)))
        alone = [await ask(options, False) for options in asked]
        await client.close()
        return together, alone

    together, alone = asyncio.run(ask_all())
    assert together == alone
    for options, text in zip(asked, together, strict=True):
        if not options["temperature"]:
            expected = expected_chat(
                server, options["model"], options["messages"], max_new_tokens=options["max_tokens"]
            )
            assert text == expected
    assert len(set(together)) > 50
