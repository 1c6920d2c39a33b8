"""Datasets: what an epoch takes of each source, what is held out, and that nothing stays in memory."""

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from slothcore.data.dataset import open_dataset
from slothcore.data.formats import ChatExample, TextExample
from slothcore.data.standardize import standardize


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def texts(dataset) -> list[str]:
    return [record["text"] for record in dataset]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "a.jsonl", list("abcd")), write(tmp_path / "b.jsonl", list("uvwxyz"))]


def test_a_dataset_is_a_sequence_of_records(files: list[Path]) -> None:
    dataset = open_dataset(files)
    assert len(dataset) == 10
    assert texts(dataset) == texts(dataset) == list("abcduvwxyz")
    assert [dataset[i]["text"] for i in (0, 4, -1)] == ["a", "u", "z"]
    with pytest.raises(IndexError):
        dataset[10]
    assert list(dataset.examples())[4] == (f"{files[1]}, line 1", TextExample("", "u"))
    assert dataset.notes[0] == f"{files[0]}: format text; 4 of 4 rows are used"


@pytest.mark.parametrize(
    ("weights", "counts"), [((1, 1), (4, 6)), ((3, 1), (12, 6)), ((0.1, 0.3), (4, 18)), ((1.5, 1), (6, 6))]
)
def test_weights_say_how_often_rows_are_seen(files: list[Path], weights: tuple, counts: tuple) -> None:
    dataset = open_dataset(files, weights=weights)
    seen = Counter(texts(dataset))
    assert tuple(sum(seen[text] for text in part) for part in ("abcd", "uvwxyz")) == counts
    for part in ("abcd", "uvwxyz"):
        assert max(seen[text] for text in part) - min(seen[text] for text in part) <= 1
    assert len(dataset) == sum(counts)


def test_there_is_a_weight_for_each(files: list[Path]) -> None:
    with pytest.raises(ValueError, match="there are 1 data_weights for 2 data; give one for each"):
        open_dataset(files, weights=(1,))
    with pytest.raises(ValueError, match="data_weights must be greater than 0, got 0; leave out what"):
        open_dataset(files, weights=(1, 0))
    assert f"{files[1]}: an epoch sees 12 rows of it, by data_weights" in open_dataset(files, weights=(1, 2)).notes


def test_held_out_rows_are_those_of_the_seed_and_no_others(files: list[Path]) -> None:
    dataset = open_dataset(files, weights=(2, 1))
    train, held_out = dataset.hold_out(0.3, seed=7)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(7)).tolist()
    assert texts(held_out) == [list("abcduvwxyz")[i] for i in sorted(order[:3])]
    assert set(texts(train)) == set("abcduvwxyz") - set(texts(held_out))
    assert Counter(texts(train))["a"] in (0, 2)
    with pytest.raises(ValueError, match=r"eval_fraction 0.01 of 10 records holds out 0"):
        dataset.hold_out(0.01, seed=0)


class ReadOnce:
    """As an object that goes through an open file."""

    def __init__(self, count: int) -> None:
        self.rows = iter([{"text": str(number)} for number in range(count)])

    def __iter__(self):
        yield from self.rows


def test_a_source_that_ends_earlier_the_next_time(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^the dataset held 3 records when they were checked and holds 0 now; .* list"
    ):
        list(open_dataset(ReadOnce(3)))
    path = write(tmp_path / "a.jsonl", list("abcd"))
    dataset = open_dataset(path)
    write(path, list("ab"))
    with pytest.raises(ValueError, match=r"a\.jsonl held 4 records when they were checked and holds 2 now"):
        list(dataset.examples())


def test_fields_that_are_not_read_are_said() -> None:
    """LLaMA-Factory's Alpaca files may have earlier turns in `history`, and its others pictures."""
    row = {"instruction": "a", "output": "b"}
    notes = open_dataset([{**row, "history": [["c", "d"]]}, {**row, "history": [], "images": None}, row]).notes
    assert [note for note in notes if "not read" in note] == [
        "the dataset: 1 row with 'history', which is not read; write what it says into the messages, or drop the field"
    ]
    assert not any("not read" in note for note in open_dataset([{**row, "history": []}]).notes)


def test_a_system_prompt_that_no_template_writes_is_said() -> None:
    """A prompt and a completion are joined as they stand."""
    joined = {"prompt": "a", "completion": "b"}
    for row in (joined, {"prompt": "a", "chosen": "b", "rejected": "c"}, {"text": "a"}):
        for field, value in (("system", "Be."), ("system_prompt", "Be."), ("tools", [{"name": "f"}])):
            (note,) = [note for note in open_dataset([{**row, field: value}, row]).notes if "not read" in note]
            assert note == (
                f"the dataset: 1 row with {field!r}, which is not read; write what it says into the prompt, "
                "or drop the field"
            )
    assert not any(
        "not read" in note for note in open_dataset([{"prompt": "Be. a", "completion": "b", "system": "Be."}]).notes
    )


@pytest.mark.parametrize("fields", [{"system": "Be."}, {"system": "", "system_prompt": "Be."}, {"system": None}])
def test_a_system_prompt_that_is_written(fields: dict) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in (
        {"instruction": "a", "output": "b"},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"messages": turns},
    ):
        dataset = open_dataset([{**row, **fields}])
        assert not any("not read" in note for note in dataset.notes)
        ((_, example),) = dataset.examples()
        assert ("Be." in repr(example)) == ("Be." in fields.values())
    (standard,) = standardize([{"prompt": "a", "completion": "b", **fields}])
    assert standard["messages"][-2:] == turns
    assert ("Be." in repr(standard)) == ("Be." in fields.values())


@pytest.mark.parametrize("labels", [(0, 1), ("0", "1"), (0.0, 1.0)])
def test_numbers_judge_no_answer_and_that_is_said(labels: tuple) -> None:
    """They may be classes; where they are verdicts, bad answers would be learned in silence."""
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in labels]
    (note,) = [note for note in open_dataset(rows).notes if "label" in note]
    assert note.startswith(
        "the dataset: 2 rows with a label of 0 or 1, which judges no answer here, so all are learned;"
    )
    assert not any("label of" in note for note in open_dataset([{**rows[0], "label": True}]).notes)
    assert not any("label of" in note for note in open_dataset([{"text": "a", "label": 1}]).notes)


def test_the_digest_sees_content_reading_and_choice(files: list[Path], tmp_path: Path) -> None:
    digest = open_dataset(files).digest()
    assert open_dataset(files).digest() == digest
    copies = [write(tmp_path / "c.jsonl", list("abcd")), files[1]]
    assert open_dataset(copies).digest() == digest
    others = [
        open_dataset(files[::-1]),
        open_dataset(files, weights=(2, 1)),
        open_dataset(files, completion_template="{text}"),
        open_dataset(files).hold_out(0.5, seed=0)[0],
        open_dataset([write(tmp_path / "d.jsonl", list("abce")), files[1]]),
    ]
    assert len({digest, *(other.digest() for other in others)}) == 6
    assert open_dataset([{"text": "a"}]).digest() is None


def test_own_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("ask,reply\nhi,ho\n")
    dataset = open_dataset(path, prompt_template="Q: {ask} A: ", completion_template="{reply}")
    assert [example for _, example in dataset.examples()] == [TextExample("Q: hi A: ", "ho")]
    assert "own columns, by completion_template" in dataset.notes[0]
    with pytest.raises(
        ValueError, match=r"a.csv, line 2 has no column 'answer', which completion_template names; it has"
    ):
        open_dataset(path, completion_template="{answer}")


def test_judged_answers_are_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"prompt": "a", "completion": str(i), "label": i % 3 == 0} for i in range(7)]))
    dataset = open_dataset(path)
    assert [record["completion"] for record in dataset] == ["0", "3", "6"]
    assert "those with label true are learned, 4 with label false left out" in " ".join(dataset.notes)


def test_preferences_are_said(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    dataset = open_dataset(path)
    assert [example for _, example in dataset.examples()] == [TextExample("a", "b")]
    assert (
        f"{path}: preference data, trained as SFT: the chosen answers are learned, the rejected ignored"
        in dataset.notes
    )
    assert not dataset.has_conversations()


def test_records_from_python() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    dataset = open_dataset(record for record in ({"text": "a"}, {"messages": turns}))
    assert [example for _, example in dataset.examples()] == [TextExample("", "a"), ChatExample(tuple(turns))]
    assert len(list(dataset)) == len(list(dataset)) == 2

    class Rows:
        """As `datasets.Dataset`: a length, and rows as mappings."""

        def __len__(self) -> int:
            return 3

        def __iter__(self):
            return iter([{"text": "a"}] * 3)

    assert len(open_dataset(Rows())) == 3
    with pytest.raises(ValueError, match="record 2 must be an object with named fields, got str"):
        open_dataset([{"text": "a"}, "b"])
    with pytest.raises(ValueError, match="the dataset holds no records"):
        open_dataset(iter(()))


def test_going_through_many_records_keeps_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for number in range(20_000):
            file.write(json.dumps({"text": f"{number} " * 50}) + "\n")
    tracemalloc.start()
    dataset = open_dataset(path)
    assert sum(1 for _ in dataset.examples()) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 5e6
    assert peak < 1e6
    assert dataset.parts[0].repeats.dtype == np.int32
