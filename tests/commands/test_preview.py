"""`slothcore preview`: what it shows is what the model is trained on, and neither weights nor a GPU are needed."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer as TokenizerCore
from tokenizers import decoders, models

from slothcore.cli import main
from slothcore.commands.preview import prepare, read_tokenizer
from slothcore.commands.row_lengths import describe_packing, histogram
from slothcore.commands.rows import Ink, show_document
from slothcore.data.masking import IGNORED_LABEL
from slothcore.data.tokenizer import Tokenizer
from slothcore.lora.adapter_io import save_adapter
from slothcore.lora.attach import add_lora
from slothcore.models.load import load_model
from slothcore.run import train_from_config
from slothcore.training.config import TrainConfig
from slothcore.training.trainer import SFTTrainer
from tests.training.tiny import write_model, write_records, write_tokenizer

PLAIN, COLORED = Ink(colors=False), Ink(colors=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data, and a model without its weights."""
    write_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    write_records(tmp_path / "data.jsonl", 9)
    return tmp_path


def preview(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    flags = ["--model", str(folder / "model"), "--data", str(folder / "data.jsonl")]
    assert main(["preview", *flags, *words]) == 0
    return capsys.readouterr().out


def test_every_row_is_shown_with_its_answer_marked(folder, capsys) -> None:
    output = preview(folder, capsys, "--rows", "9")
    for line in (folder / "data.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert f"{record['prompt']}[[{record['completion']}</s>]]" in output
    assert re.findall(r"row (\d) of 9: \d+ tokens, \d+ learned\n", output) == [*"123456789"]


def test_targets_are_marked_even_where_everything_is_learned(folder, capsys) -> None:
    output = preview(folder, capsys, "--rows", "9", "--completion-only-loss", "false")
    first = json.loads((folder / "data.jsonl").read_text().splitlines()[0])
    # Nothing predicts the first token.
    assert f"\n{first['prompt'][0]}[[{first['prompt'][1:]}{first['completion']}</s>]]\n" in output


def test_the_seed_chooses_the_rows(folder, capsys) -> None:
    shown = [preview(folder, capsys, "--rows", "3", "--seed", seed) for seed in "1123"]
    assert shown[0] == shown[1]
    assert len(set(shown)) == 3
    assert "[[" not in preview(folder, capsys, "--rows", "0")


def test_what_is_cut_and_what_is_dropped_is_said(folder, capsys) -> None:
    cut = preview(folder, capsys, "--max-seq-length", "20", "--rows", "9")
    assert re.search(r"\d truncated to 20 tokens", cut)
    assert "20 tokens, the longest allowed" in cut
    assert re.search(r"[1-9] of \d documents are as long as max_seq_length \(20\) allows", cut)
    assert "documents of up to 128 tokens, rows of up to 20\n" in cut
    assert "RoPE" not in capsys.readouterr().err
    dropped = preview(folder, capsys, "--max-seq-length", "20", "--overlength", "drop")
    assert re.search(r"\d longer than 20 tokens dropped", dropped)


def test_packed_rows_are_shown_document_by_document(folder, capsys) -> None:
    output = preview(folder, capsys, "--packing", "--max-seq-length", "64", "--rows", "99")
    found = re.findall(r"row \d+ of (\d+): (\d+) tokens in (\d+) document", output)
    assert sum(int(documents) for _, _, documents in found) == 9
    assert all(int(rows) == len(found) and int(tokens) <= 64 for rows, tokens, _ in found)
    assert output.count("-- document") == 9
    empty = 1 - sum(int(tokens) for _, tokens, _ in found) / (64 * len(found))
    assert f"9 documents in {len(found)} rows of 64 tokens, {9 / len(found):.1f} a row, {empty:.1%}" in output


def test_the_preview_is_what_the_trainer_trains_on(tmp_path, monkeypatch) -> None:
    """Token by token, and the resolved length of a row."""
    write_model(tmp_path / "model")
    write_records(tmp_path / "data.jsonl", 9)
    config = TrainConfig(
        model=str(tmp_path / "model"), data=str(tmp_path / "data.jsonl"), output_dir=str(tmp_path / "run"), device="cpu"
    )
    made: list[SFTTrainer] = []

    def stop(self: SFTTrainer) -> None:
        made.append(self)
        raise InterruptedError

    monkeypatch.setattr(SFTTrainer, "train", stop)
    with pytest.raises(InterruptedError):
        train_from_config(config)
    tokenizer, resolved = read_tokenizer(config)
    rows, evaluation = prepare(resolved, tokenizer)
    assert evaluation is None
    assert resolved.max_seq_length == made[0].config.max_seq_length == 128
    assert rows.fingerprint() == made[0].train_rows.fingerprint()


def test_an_adapter_is_previewed_with_the_tokenizer_of_its_base(tmp_path, capsys) -> None:
    model = load_model(write_model(tmp_path / "base"), bits=32, device="cpu", progress=False)
    model.name_or_path = str(tmp_path / "base")
    save_adapter(add_lora(model, r=2), tmp_path / "model")
    write_records(tmp_path / "data.jsonl", 3)
    (tmp_path / "model" / "adapter_model.safetensors").unlink()
    assert "[[0</s>]]" in preview(tmp_path, capsys, "--rows", "3")


CONVERSATION = {
    "messages": [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b."},
        {"role": "user", "content": "c?"},
        {"role": "assistant", "content": "d."},
    ]
}


@pytest.mark.parametrize(
    ("records", "words", "expected"),
    [
        ([CONVERSATION], "--max-seq-length 256", "USER: a? ASSISTANT:[[ b.</s>]]USER: c? ASSISTANT:[[ d.</s>]]"),
        (
            [CONVERSATION],
            "--max-seq-length 256 --mask-history",
            "USER: a? ASSISTANT: b.</s>USER: c? ASSISTANT:[[ d.</s>]]",
        ),
        (
            [CONVERSATION],
            "--chat-template zephyr",
            "<|user|>\na?</s>\n<|assistant|>\n[[b.</s>]]\n<|user|>\nc?</s>\n<|assistant|>\n[[d.</s>]]",
        ),
        ([CONVERSATION], "--chat-template {folder}/own.jinja", "a?[[b.]]c?[[d.]]"),
        ([{"q": "1+1", "a": 2}], "--prompt-template {q}= --completion-template {a}", "1+1=[[2</s>]]"),
        ([{"text": "abc"}, {"text": 7}], "--on-bad-row skip", "a[[bc</s>]]"),
    ],
)
def test_every_option_of_the_data_reaches_the_rows(records, words, expected, folder, capsys) -> None:
    (folder / "own.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert expected in preview(folder, capsys, *words.replace("{folder}", str(folder)).split())


def test_a_template_that_no_record_is_written_by_is_said(folder, capsys) -> None:
    """Prompts are taken as they are; other libraries put them into the template."""
    note = "training: no record is a conversation, so chat_template writes none of them; slothcore.standardize makes"
    (folder / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert note in preview(folder, capsys, "--chat-template", "zephyr")
    assert note not in preview(folder, capsys)
    (folder / "data.jsonl").write_text(json.dumps(CONVERSATION) + "\n")
    assert note not in preview(folder, capsys, "--chat-template", "zephyr")


def test_weights_repeat_the_rows_of_a_file(folder, capsys) -> None:
    for name in "ab":
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name * 3}) + "\n")
    files = [str(folder / f"{name}.jsonl") for name in "ab"]
    output = preview(folder, capsys, "--data", *files, "--data-weights", "1", "3", "--rows", "4")
    assert output.count("a[[aa</s>]]") == 1
    assert output.count("b[[bb</s>]]") == 3


def test_colours_are_for_terminals(folder, capsys, monkeypatch) -> None:
    """Outside of one, with --no-color and with NO_COLOR, there are marks instead."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033" not in preview(folder, capsys)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    in_color = preview(folder, capsys)
    assert "\033[32m" in in_color
    assert "[[" not in in_color
    assert "[[" in preview(folder, capsys, "--no-color")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[" in preview(folder, capsys)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(write_tokenizer(tmp_path / "tokenizer"))


def test_special_tokens_have_a_colour_of_their_own(tokenizer) -> None:
    ids = tokenizer.encode("ab</s>")
    shown = show_document(ids, [IGNORED_LABEL, ids[1], ids[2]], tokenizer, COLORED)
    assert shown == "a\033[32mb\033[0m\033[2;32m</s>\033[0m"


def test_a_lone_space_is_not_special(tmp_path) -> None:
    """Tokenizers of the sentencepiece kind drop a space at the beginning of what they decode."""
    core = TokenizerCore(models.BPE(vocab={"\u2581": 0, "a": 1, "</s>": 2}, merges=[]))
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(["</s>"])
    core.save(str(tmp_path / "tokenizer.json"))
    spaced = Tokenizer.from_folder(tmp_path)
    assert show_document([1, 0, 1, 2], [IGNORED_LABEL] * 4, spaced, COLORED) == "a a\033[2m</s>\033[0m"


@pytest.mark.parametrize("text", ["", "Grüße, 世界 🙂!", "a\n\n  b"])
def test_nothing_is_lost_between_the_pieces(tokenizer, text) -> None:
    """The tokens are bytes here, and every one begins a piece: half a character goes to the piece that completes it."""
    ids = tokenizer.encode(f"{text}</s>")
    labels = [token if place % 2 else IGNORED_LABEL for place, token in enumerate(ids)]
    shown = show_document(ids, labels, tokenizer, PLAIN)
    assert shown.replace("[[", "").replace("]]", "") == f"{text}</s>"


def test_the_histogram_counts_every_document() -> None:
    lengths = [1, 5, 50, 51, 99, 100, 100, 101, 480]
    lines = histogram(lengths).splitlines()
    assert [int(line.split()[-1]) for line in lines] == [3, 4, 1, 0, 0, 0, 0, 0, 0, 1]
    assert [line.count("#") for line in lines] == [30, 40, 10, 0, 0, 0, 0, 0, 0, 10]
    assert lines[1].startswith("   51 - 100  ")
    assert lines[-1].startswith("  451 - 480  "), "no range goes beyond the longest"
    assert histogram([1]).split() == ["1", "-", "1", "#" * 40, "1"]


def test_the_histogram_begins_where_the_documents_do() -> None:
    assert histogram([256] * 3).split() == ["251", "-", "256", "#" * 40, "3"]
    assert [line.split()[0] for line in histogram([154, 256]).splitlines()] == ["151", "201", "251"]


def test_packing_statistics() -> None:
    config = TrainConfig(max_seq_length=10, per_device_train_batch_size=1, gradient_accumulation_steps=2, packing=True)
    assert describe_packing([6, 4, 5, 5, 3], config) == (
        "packing: 5 documents in 3 rows of 10 tokens, 1.7 a row, 23.3% of the places empty; "
        "an epoch takes 2 steps of 2 rows"
    )


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--data", "x.json"], 2, "model is not set; give --model"),
        (["--model", "m"], 2, "data is not set; give --data"),
        (["--model", "m", "--data", "x.json", "--rows", "-1"], 2, "--rows must not be negative, got -1"),
        (
            ["--model", "m", "--data", "x.json", "--row", "1"],
            2,
            "unknown option 'row' in the flags; did you mean 'rows'",
        ),
        (["--model", "./absent", "--data", "x.json"], 1, "the folder ./absent does not exist"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(words, status, message, capsys) -> None:
    assert main(["preview", *words]) == status
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert message in errors
