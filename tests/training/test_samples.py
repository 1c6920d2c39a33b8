"""Samples during training: asked as the data ask, greedy, written down, and without a trace in the training itself."""

import json
from pathlib import Path

import pytest
import torch

from slothcore.data.formats import alpaca_prompt
from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.generate import generate
from slothcore.run import open_result, train_from_config
from slothcore.training import samples as samples_module
from slothcore.training.config import TrainConfig
from slothcore.training.report import read_log, rewind_log
from slothcore.training.sample_prompts import read_questions
from slothcore.training.trainer import SFTTrainer
from tests.training.tiny import QUIET, random_rows, tiny_model, write_model, write_records, write_tokenizer

CLOCK = {"elapsed", "tokens_per_second", "host_memory_gib"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    write_model(folder / "model")
    write_records(folder / "data.jsonl")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder / "model")
    tokenizer.use_chat_template("vicuna")
    return tokenizer


def run(folder: Path, output: str, **changes):
    options = {
        "model": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "device": "cpu",
        "bits": 32,
        "r": 4,
        "lora_dropout": 0.1,
        "output_dir": str(folder / output),
        "max_seq_length": 128,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_steps": 3,
        "plot": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        **changes,
    }
    return train_from_config(TrainConfig(**options))


def lines(path: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in read_log(path)]


def test_training_is_the_same_to_the_last_bit_with_samples_and_without(folder) -> None:
    """Dropout draws numbers in every step, so a single draw of the samples would show."""
    without = run(folder, "without")
    with_samples = run(folder, "with", sample_prompts=["Add 1 and 2.", "Say"], sample_steps=1, sample_max_new_tokens=5)
    for part in ("adapter", "checkpoint-3", "checkpoint-6"):
        for file in sorted((folder / "without" / part).glob("*.safetensors")):
            assert file.read_bytes() == (folder / "with" / part / file.name).read_bytes(), (part, file.name)
    assert lines(folder / "without" / "log.jsonl") == lines(folder / "with" / "log.jsonl")
    assert with_samples.train_loss == without.train_loss
    assert not (folder / "without" / "samples.jsonl").exists()
    assert [line["step"] for line in read_log(folder / "with" / "samples.jsonl")] == [n for n in range(7) for _ in "ab"]


def test_drawing_numbers_while_asking_changes_nothing_either(folder, monkeypatch) -> None:
    """What stands around the answers is what keeps the generators, whatever answers."""
    run(folder, "quiet")

    def noisy(model, tokenizer, prompts, **options) -> list[str]:
        torch.rand(17)
        return ["noise" for _ in prompts]

    monkeypatch.setattr(samples_module, "generate", noisy)
    run(folder, "noisy", sample_prompts="Hi", sample_steps=1)
    weights = [folder / name / "adapter" / "adapter_model.safetensors" for name in ("quiet", "noisy")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.usefixtures("graphs")
def test_graphs_are_replayed_as_without_samples(tmp_path, graphs) -> None:
    counts, weights = [], []
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path / "tokenizer"))
    for number, options in enumerate(({}, {"sample_prompts": "abc", "sample_steps": 1, "sample_max_new_tokens": 3})):
        config = TrainConfig(
            output_dir=str(tmp_path / str(number)),
            max_steps=6,
            max_seq_length=64,
            learning_rate=1e-2,
            **QUIET,
            **options,
        )
        trainer = SFTTrainer(tiny_model(), tokenizer, random_rows(8), config=config)
        trainer.replays_graphs = True
        trainer.train()
        counts.append((graphs[-1].captures, graphs[-1].replays, graphs[-1].padded))
        weights.append(trainer.parameters)
    assert counts[0] == counts[1]
    assert counts[0][1] > 0
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_the_answers_are_those_of_the_weights_of_their_step(folder) -> None:
    run(folder, "steps", sample_prompts=["Add 1 and 2."], sample_steps=3, sample_max_new_tokens=6)
    said = {line["step"]: line["output"] for line in read_log(folder / "steps" / "samples.jsonl")}
    assert list(said) == [0, 3, 6]
    for step, where in ((0, folder / "model"), (3, folder / "steps" / "checkpoint-3"), (6, folder / "steps")):
        model, tokenizer = open_result(str(where), bits=32, device="cpu")
        assert generate(model, tokenizer, "Add 1 and 2.", max_new_tokens=6) == [said[step]], step


def test_without_a_number_of_steps_samples_come_with_each_evaluation(folder) -> None:
    options = {"eval_data": str(folder / "data.jsonl"), "eval_steps": 4, "sample_max_new_tokens": 2}
    run(folder, "evaluated", sample_prompts=["Hi"], **options)
    assert [line["step"] for line in read_log(folder / "evaluated" / "samples.jsonl")] == [0, 4, 6]
    run(folder, "not evaluated", sample_prompts=["Hi"], sample_max_new_tokens=2)
    assert [line["step"] for line in read_log(folder / "not evaluated" / "samples.jsonl")] == [0, 6]


def test_a_resumed_run_asks_no_step_twice(folder) -> None:
    options = {"sample_prompts": ["Add 3 and 8."], "sample_steps": 2, "sample_max_new_tokens": 5}
    run(folder, "whole", **options)
    run(folder, "halves", **{**options, "max_steps": 5})
    run(folder, "halves", **options, resume_from_checkpoint=str(folder / "halves" / "checkpoint-3"))
    assert (folder / "halves" / "samples.jsonl").read_text() == (folder / "whole" / "samples.jsonl").read_text()


def test_every_character_survives_resuming(tmp_path) -> None:
    said = [{"step": n, "output": "\u2028 \u0085 \x0c \u00e9 \u4e16 line\nline"} for n in (0, 5)]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in said), encoding="utf-8")
    before = path.read_text(encoding="utf-8")
    rewind_log(path, path, 5)
    assert path.read_text(encoding="utf-8") == before
    rewind_log(path, path, 4)
    assert read_log(path) == said[:1]


def test_what_is_said_is_short(folder, capsys) -> None:
    prompts = [f"Number {n}, " + "and a long story " * 4 for n in range(6)]
    run(folder, "said", sample_prompts=prompts, sample_max_new_tokens=2, max_steps=1)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 0:")]
    assert len(said) == 5
    assert said[0].startswith("step 0: 'Number 0, and a long story and a long story")
    assert all(len(line) < 180 for line in said)
    assert said[4] == f"step 0: 2 more samples in {folder / 'said' / 'samples.jsonl'}"
    assert len(read_log(folder / "said" / "samples.jsonl")) == 12


ASKED = [
    # A text is asked in the layout of the data.
    ({"prompt": "a", "completion": "b"}, "Hi", "Hi", "Hi", False),
    ({"instruction": "a", "output": "b"}, "Hi", "Hi", alpaca_prompt("Hi"), False),
    ({"question": "a", "answer": "b"}, "Hi", "Hi", alpaca_prompt("Hi"), False),
    ({"text": "a"}, "Hi", "Hi", "Hi", False),
    (CHAT, "Hi", "Hi", "chat", True),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "Hi", "Hi", "chat", True),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "Hi", "Hi", "Hi", False),
]


@pytest.mark.parametrize(("record", "asked", "prompt", "text", "by_template"), ASKED)
def test_a_text_is_asked_as_the_data_ask(tokenizer, record, asked, prompt, text, by_template) -> None:
    (question,) = read_questions(TrainConfig(sample_prompts=asked), tokenizer, record)
    if text == "chat":
        messages = [{"role": "user", "content": asked}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert (question.prompt, question.text, question.by_template) == (prompt, text, by_template)
    assert question.expected is None


RECORDS = [
    ({"prompt": "Hi"}, "Hi", "Hi", None),
    ({"prompt": "Hi", "completion": " yes "}, "Hi", "Hi", "yes"),
    ({"prompt": "Hi", "response": "yes"}, "Hi", alpaca_prompt("Hi"), "yes"),
    ({"instruction": "Add", "input": "1, 2"}, "Add\n1, 2", alpaca_prompt("Add", "1, 2"), None),
    ({"instruction": "Add", "input": "", "output": "3"}, "Add", alpaca_prompt("Add"), "3"),
    ({"question": "Who?", "answer": "I"}, "Who?", alpaca_prompt("Who?"), "I"),
    ({"input": "Hi", "output": "yes"}, "Hi", alpaca_prompt("Hi"), "yes"),
    ({"text": "Once upon"}, "Once upon", "Once upon", None),
    (CHAT, "Hi", "chat", "Hello"),
    ({"messages": CHAT["messages"][:1]}, "Hi", "chat", None),
    ({"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}, "Hi", "chat", "Hello"),
    # As a CSV file holds them.
    (
        {"prompt": json.dumps(CHAT["messages"][:1]), "completion": json.dumps(CHAT["messages"][1:])},
        "Hi",
        "chat",
        "Hello",
    ),
    ({"conversations": [{"from": "human", "value": "Hi"}]}, "Hi", "chat", None),
]


@pytest.mark.parametrize(("record", "prompt", "text", "expected"), RECORDS)
def test_records_of_every_layout_are_asked(tmp_path, tokenizer, record, prompt, text, expected) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (question,) = read_questions(TrainConfig(sample_prompts=str(path)), tokenizer, None)
    if text == "chat":
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert (question.prompt, question.text, question.expected) == (prompt, text, expected)


def test_a_conversation_is_asked_up_to_its_last_answer(tmp_path, tokenizer) -> None:
    turns = [*CHAT["messages"], {"role": "user", "content": "More"}, {"role": "assistant", "content": "Less"}]
    path = tmp_path / "prompts.jsonl"
    records = (
        {"messages": turns, "system": "Be brief."},
        {"prompt": turns[:3], "completion": turns[3:], "system": "Be brief."},
    )
    path.write_text("\n".join(map(json.dumps, records)))
    question, again = read_questions(TrainConfig(sample_prompts=str(path)), tokenizer, None)
    assert again == question
    asked = [{"role": "system", "content": "Be brief."}, *turns[:3]]
    assert question.text == tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    assert question.prompt == "system: Be brief.\nuser: Hi\nassistant: Hello\nuser: More"
    assert question.expected == "Less"


def test_own_columns_are_asked_by_their_template(tmp_path, tokenizer) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"city": "Oslo"}\n{"city": "Rome", "country": "Italy"}\n')
    config = TrainConfig(
        sample_prompts=[str(path), "Paris lies in"],
        prompt_template="{city} lies in",
        completion_template=" {country}",
    )
    questions = read_questions(config, tokenizer, {"city": "Bern", "country": "Switzerland"})
    assert [(q.text, q.expected) for q in questions] == [
        ("Oslo lies in", None),
        ("Rome lies in", "Italy"),
        ("Paris lies in", None),
    ]


def test_texts_and_files_may_stand_together(tmp_path, tokenizer) -> None:
    (tmp_path / "few.txt").write_text("\ufeffOne\n\n  Two\n", encoding="utf-8")
    config = TrainConfig(sample_prompts=["Zero", str(tmp_path / "few.txt"), "What is in notes.txt"])
    questions = read_questions(config, tokenizer, {"text": "a"})
    assert [question.text for question in questions] == ["Zero", "One", "  Two", "What is in notes.txt"]


WRONG = [
    ("absent.txt", None, "sample_prompts names the file .*absent.txt, which does not exist; correct the path"),
    ("rows.csv", "prompt\na\n", "sample_prompts names the file .*rows.csv; prompts are read from a .txt or a .jsonl"),
    ("empty.txt", "\n \n", "the file .*empty.txt of sample_prompts is empty; write one prompt on each line"),
    ("latin.txt", b"caf\xe9", "the file .*latin.txt of sample_prompts is not UTF-8; save it as UTF-8"),
    ("half.jsonl", '{"prompt": "a"\n', "half.jsonl, line 1: not valid JSON"),
    ("list.jsonl", "[1]\n", "list.jsonl, line 1.* object"),
    ("other.jsonl", '{"title": "a"}\n', "line 1 has the fields 'title', and a sample prompt needs one of messages"),
    ("answer.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}\n', "is an answer alone"),
    ("number.jsonl", '{"instruction": ["a"]}\n', "'instruction' must be text, got list"),
    ("many.txt", "a\n" * 101, "sample_prompts holds 101 prompts, .* choose at most 100 of them"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_what_cannot_be_asked_is_one_sentence(tmp_path, tokenizer, name, content, message) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_questions(TrainConfig(sample_prompts=str(path)), tokenizer, None)
    assert "\n" not in str(caught.value)


def test_half_a_character_is_not_asked(tokenizer) -> None:
    """As a shell hands on bytes that are not UTF-8."""
    with pytest.raises(ValueError, match=r"sample_prompts holds half a character \(\\udcff at position 2\); repair"):
        read_questions(TrainConfig(sample_prompts=["a \udcff"]), tokenizer, None)


def test_prompts_are_checked_before_anything_is_written(folder) -> None:
    with pytest.raises(
        ValueError, match=r"has 149 tokens, and max_seq_length 128 leaves 64 beside sample_max_new_tokens 64"
    ):
        run(folder, "long", sample_prompts=["x" * 149])
    with pytest.raises(FileNotFoundError, match="sample_prompts names the file"):
        run(folder, "long", sample_prompts="absent.txt")
    assert not (folder / "long").exists()


def test_conversations_need_a_template(folder, tmp_path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps(CHAT) + "\n")
    with pytest.raises(ValueError, match="has no chat template; set chat_template to a built-in one"):
        run(folder, "plain", sample_prompts=str(tmp_path / "chat.jsonl"))


def test_rows_that_are_tokenised_already_need_a_tokenizer_for_samples(tmp_path) -> None:
    config = TrainConfig(output_dir=str(tmp_path / "run"), sample_prompts="Hi", max_seq_length=64)
    with pytest.raises(ValueError, match="sample_prompts is set, and there is no tokenizer to read them; give one"):
        SFTTrainer(tiny_model(), None, random_rows(4), config=config)


def test_a_generator_of_records_is_asked_in_its_layout(tmp_path) -> None:
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path / "tokenizer"))
    records = ({"instruction": f"Say {n}", "output": str(n)} for n in range(4))
    config = TrainConfig(
        output_dir=str(tmp_path / "run"), sample_prompts="Hi", max_seq_length=256, max_steps=1, **QUIET
    )
    model = tiny_model(max_position_embeddings=512)
    trainer = SFTTrainer(model, tokenizer, records, config=config)
    assert [question.text for question in trainer.samples.questions] == [alpaca_prompt("Hi")]
    assert len(trainer.train_rows) == 4


def test_samples_that_do_not_fit_end_the_samples_and_not_the_run(folder, monkeypatch, capsys) -> None:
    calls = []

    def full(*arguments, **options):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(samples_module, "generate", full)
    assert run(folder, "full", sample_prompts=["Hi"], sample_steps=1).steps == 6
    assert len(calls) == 1
    assert "the samples do not fit into the GPU's memory, so there will be none; lower" in capsys.readouterr().out
