"""The guides in docs: every command and every block of Python runs, and shows what the guide says that it shows."""

import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainingArguments

from slothcore.training.config import field_types
from slothcore.training.options import check_names
from slothcore.training.other_names import OTHER_NAMES, has_no_counterpart
from tests.guides import GUIDES, ROOT, Reader, blocks_of, compare, is_made_of, messages_of, texts_of_the_program

sys.path.append(str(ROOT / "scripts"))
import moving_tables


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """In an empty folder beside the examples, on a machine without a GPU."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return Reader(tmp_path)


GUIDES_TO_FOLLOW = [
    "first-fine-tune",
    "your-own-data",
    "chat-models",
    "continued-pretraining",
    "memory",
    "moving",
    "adapters",
    "choosing",
    "watching",
    "generating",
    "exporting",
    "serving",
    "troubleshooting",
]
# They train for some seconds.
LONG = ["first-fine-tune", "chat-models", "continued-pretraining", "choosing", "watching", "serving"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in GUIDES_TO_FOLLOW]
)
def test_the_guide_can_be_followed(name: str, reader: Reader) -> None:
    page = GUIDES / f"{name}.md"
    assert blocks_of(page)
    reader.follow(page)


def test_quotes_are_compared() -> None:
    compare(["step 1/2: loss 3.5", "...", "saved run"], "step 10/20: loss 1e-05\nx\ny\nsaved run\n")
    compare(["a ... z"], "a b  c z\n")
    for quoted in (["step 1"], ["saved"], ["step 1", "saved", "more"]):
        with pytest.raises(AssertionError):
            compare(quoted, "step 1\nsaved\n")


def test_the_tables_of_options_name_what_the_others_have() -> None:
    """Of transformers and PEFT, which the tests have."""
    peft = {item.name for item in fields(LoraConfig)}
    arguments = {item.name for item in fields(TrainingArguments)}
    # transformers 5 has given it up; most of its users still have it.
    arguments |= {"warmup_ratio"}
    quantization = set(inspect.signature(BitsAndBytesConfig).parameters)
    assert set(moving_tables.PEFT) <= peft
    assert set(moving_tables.TRAINING_ARGUMENTS) <= arguments
    assert set(moving_tables.QUANTIZATION) <= quantization


def test_every_option_of_the_tables_is_answered_alike_by_the_command_line() -> None:
    for name in {name for names in moving_tables.LIBRARIES.values() for name in names}:
        here = moving_tables.name_here(name)
        if here is None:
            assert name in moving_tables.NOTES, f"say why {name} has no counterpart"
        if here != name:
            answer = f"did you mean '{here}'" if here else "nothing like it"
            with pytest.raises(ValueError, match=re.escape(answer)):
                check_names([name], field_types(), source="the flags")
    for name in moving_tables.NOTES:
        assert name in {*field_types(), *OTHER_NAMES} or has_no_counterpart(name), name


def test_messages_that_need_a_gpu_or_the_hub_are_in_the_code() -> None:
    """Those that no command on a CPU raises: some text of the program has to make each of them."""
    texts = list(texts_of_the_program())
    quoted = [line for block in blocks_of(GUIDES / "troubleshooting.md") for line in messages_of(block)]
    assert len(quoted) > 8
    for message in quoted:
        assert is_made_of(message, texts), f"no text of slothcore makes {message!r}"


def test_a_message_that_nobody_raises_is_found() -> None:
    texts = list(texts_of_the_program())
    assert is_made_of("the run folder somewhere does not exist", texts)
    assert not is_made_of("the run folder somewhere is not there", texts)
    assert not is_made_of("the run folder somewhere does not exist; make it", texts)


def test_every_choice_is_explained() -> None:
    text = (GUIDES / "choosing.md").read_text(encoding="utf-8")
    for name in (*get_args(field_types()["optim"]), *get_args(field_types()["lr_scheduler_type"])):
        assert f"`{name}`" in text, f"choosing.md does not say what {name} is"


def test_the_index_names_every_page() -> None:
    index = (GUIDES / "README.md").read_text(encoding="utf-8")
    for page in GUIDES.glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, f"docs/README.md does not name {page.name}"
    assert all(name in {page.stem for page in GUIDES.glob("*.md")} for name in GUIDES_TO_FOLLOW)


@pytest.mark.parametrize(
    "page",
    [
        "```sh\nslothcore plan --model nowhere\n```\n",
        "```console\n$ slothcore --version\nslothcore of yesterday\n```\n",
        "```console\n$ slothcore plan --model examples/ledger/base\nslothcore: error: ...\n```\n",
        "```sh gpu\nslothcore train --model owner/name --learning-rat 1e-4\n```\n",
        "```sh hub\nslothcore train --model owner/name --bits 8\n```\n",
        "```python gpu\nslothcore.TrainConfig(max_stebs=1)\n```\n",
        "```python peer\nfrom unsloth import\n```\n",
        "```python\nprint(1)\n```\n\n```text output\none\n```\n",
        "Save this:\n\n```jsonl data.jsonl\n{}\n```\n",
    ],
)
def test_a_guide_that_is_wrong_is_found(page: str, reader: Reader, tmp_path: Path) -> None:
    (tmp_path / "guide.md").write_text(page, encoding="utf-8")
    with pytest.raises(AssertionError, match=r"guide\.md, line"):
        reader.follow(tmp_path / "guide.md")
