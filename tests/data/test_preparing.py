"""Records to token arrays: what a list of rows would hold, on disk or in memory, made once."""

import errno
import json
import os
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as TokenizerCore
from tokenizers import models

from slothcore.data import preparing
from slothcore.data.dataset import open_dataset
from slothcore.data.masking import TokenizedRow, tokenise_dataset
from slothcore.data.prepared_cache import HOME_VARIABLE, PreparedFolder, cache_home, find_prepared
from slothcore.data.preparing import Settings, prepare_dataset
from slothcore.data.special_tokens import unk_token_id
from slothcore.data.token_store import IDS_FILE, TokenStore, TokenWriter, rows_of
from slothcore.data.tokenizer import Tokenizer
from slothcore.training.config import TrainConfig
from slothcore.training.preparation import prepare_rows
from tests.data.tiny_tokenizers import CHATML, write_byte_tokenizer, write_sentencepiece_tokenizer
from tests.training.tiny import random_rows

CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "bytes", config={"chat_template": CHATML}))


@pytest.fixture
def records() -> list[dict]:
    texts = [{"prompt": f"{n} and", "completion": "x" * (n % 50)} for n in range(1, 2345)]
    return [*[text for text in texts if text["completion"]], {"messages": CHAT}]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache every file here, however small."""
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setattr(preparing, "CACHED_FROM", 0)
    return tmp_path / "home"


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def same(store: TokenStore, rows: list[TokenizedRow]) -> bool:
    return rows_of(store) == rows and store.targets.tolist() == [row.num_targets for row in rows]


def test_the_arrays_hold_what_the_rows_do(tokenizer: Tokenizer, records: list[dict]) -> None:
    rows, stats = tokenise_dataset(records, tokenizer, max_seq_length=40)
    prepared = prepare_dataset(open_dataset(records), tokenizer, Settings(40))
    assert same(prepared.store, rows)
    assert prepared.stats == stats
    assert prepared.store.ids.dtype == np.int32
    assert prepared.store.labels.dtype == np.bool_


@pytest.mark.parametrize("block", [1, 50, 10_000])
def test_a_writer_in_memory_and_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("slothcore.data.token_store.BLOCK", block)
    rows = random_rows(60)
    for folder in (None, tmp_path):
        with TokenWriter(folder) as writer:
            for row in rows:
                writer.add(row)
            store = writer.finish({"a": 1})
        assert same(store, rows)
        assert len(store) == len(writer) == 60
        assert store.lengths.tolist() == [len(row.input_ids) for row in rows]
        blocks = [store.ids[piece] for piece in store.blocks()]
        assert np.array_equal(np.concatenate(blocks), store.ids)
    assert isinstance(store.ids, np.memmap)


def test_labels_that_are_not_the_ids_are_kept() -> None:
    rows = [TokenizedRow([1, 2, 3], [-100, 9, 3])]
    assert same(TokenStore.from_rows(rows), rows)


def test_the_second_time_finds_the_first(home: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b" * n} for n in range(1, 9)])
    first = prepare_dataset(open_dataset(path), tokenizer, Settings(20))
    (folder,) = (home / "prepared").iterdir()
    assert first.notes == [f"the prepared rows are kept in {folder} for the next run (20 GiB in all, 30 days)"]
    monkeypatch.setattr(preparing, "tokenise_stream", None)
    second = prepare_dataset(open_dataset(path), tokenizer, Settings(20))
    assert rows_of(second.store) == rows_of(first.store)
    assert second.stats == first.stats
    assert second.notes == [f"8 prepared rows were found in {folder}"]


def test_whatever_changes_tokens_makes_another_folder(
    home: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT}])

    def prepare(settings: Settings, using: Tokenizer = tokenizer) -> int:
        prepare_dataset(open_dataset(path), using, settings)
        return len(list((home / "prepared").iterdir()))

    assert prepare(Settings(200)) == prepare(Settings(200)) == 1
    assert prepare(Settings(100)) == 2
    assert prepare(Settings(200, completion_only_loss=False)) == 3
    assert prepare(Settings(200, mask_history=True)) == 4
    other = Tokenizer.from_folder(
        write_byte_tokenizer(tmp_path / "other", config={"chat_template": CHATML.replace("\n", " ")})
    )
    assert prepare(Settings(200), other) == 5
    write(path, [{"messages": CHAT}])
    assert prepare(Settings(200)) == 6
    monkeypatch.setattr(preparing, "PREPARING_REVISION", preparing.PREPARING_REVISION + 1)
    assert prepare(Settings(200)) == 7


def test_a_damaged_folder_is_made_again(home: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "some text"}])
    first = rows_of(prepare_dataset(open_dataset(path), tokenizer, Settings(20)).store)
    (folder,) = (home / "prepared").iterdir()
    (folder / IDS_FILE).write_bytes(b"")
    again = prepare_dataset(open_dataset(path), tokenizer, Settings(20))
    assert rows_of(again.store) == first
    assert find_prepared(folder.name) is not None


def test_a_run_that_dies_leaves_nothing(home: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "some text"}, {"messages": [*CHAT[:1], *CHAT]}])
    with pytest.raises(ValueError, match="line 2"):
        prepare_dataset(open_dataset(path), tokenizer, Settings(20))

    def breaks(*_: object, **__: object):
        yield TokenizedRow([1, 2], [1, 2])
        raise KeyboardInterrupt

    write(path, [{"text": "some text"}])
    monkeypatch.setattr(preparing, "tokenise_stream", breaks)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(open_dataset(path), tokenizer, Settings(20))
    assert list((home / "prepared").iterdir()) == []


def test_of_two_runs_the_first_wins(home: Path) -> None:
    with PreparedFolder("key") as slow, PreparedFolder("key") as fast:
        for folder, token in ((fast, 1), (slow, 1)):
            folder.writer.add(TokenizedRow([token, 2], [token, 2]))
        fast.keep({})
        store, _ = slow.keep({})
        assert store.ids.tolist() == [1, 2]
    assert [path.name for path in (home / "prepared").iterdir()] == ["key"]


def test_what_is_written_leaves_memory(home: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    """Ten times the records take hardly more: what stays is a few numbers for each."""
    monkeypatch.setattr("slothcore.data.token_store.BLOCK", 20_000)
    monkeypatch.setattr(preparing, "BATCH", 100)
    monkeypatch.setattr("slothcore.data.masking.RECORDS_PER_BATCH", 100)
    peaks = []
    for count in (1_000, 10_000):
        path = write(tmp_path / "a.jsonl", [{"prompt": f"{n}", "completion": "word " * 30} for n in range(count)])
        dataset = open_dataset(path)
        tracemalloc.start()
        prepared = prepare_dataset(dataset, tokenizer, Settings(500))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert prepared.stats.tokens > 1_500_000
    assert peaks[1] - peaks[0] < 1_500_000


def test_without_a_place_to_keep_them_tokens_stay_in_memory(home: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    home.write_text("a file where the folder should be")
    prepared = prepare_dataset(open_dataset(write(tmp_path / "a.jsonl", [{"text": "text"}])), tokenizer, Settings(20))
    assert len(prepared.store) == 1
    assert prepared.notes[-1].startswith("nothing is kept for the next run: ")
    assert prepared.notes[-1].endswith("; set SLOTHCORE_HOME to a folder for it")


def test_a_full_disk_is_said(home: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TokenWriter, "_flush", full)
    message = (
        f"the prepared rows do not fit into {home / 'prepared'} .No space left.*; free some space there, or set SLO"
    )
    with pytest.raises(OSError, match=message):
        prepare_dataset(open_dataset(write(tmp_path / "a.jsonl", [{"text": "text"}])), tokenizer, Settings(20))
    assert list((home / "prepared").iterdir()) == []


def test_small_files_are_not_cached(tmp_path: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    prepare_dataset(open_dataset(write(tmp_path / "a.jsonl", [{"text": "text"}])), tokenizer, Settings(20))
    assert not (tmp_path / "home").exists()


def test_the_home_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HOME_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", os.sep + "x")
    assert cache_home() == Path("/x/slothcore")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_home() == Path.home() / ".cache" / "slothcore"


def test_rows_that_the_template_rejects_can_be_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = "{% if messages[0].content == 'bad' %}{{ raise_exception('bad word') }}{% endif %}" + CHATML
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "bytes", config={"chat_template": template}))
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": w}, CHAT[1]]} for w in ("a", "bad")])
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: .*bad word"):
        prepare_rows(open_dataset(path), tokenizer, TrainConfig(max_seq_length=100), what="training")
    config = TrainConfig(max_seq_length=100, on_bad_row="skip")
    assert len(prepare_rows(open_dataset(path, on_bad_row="skip"), tokenizer, config, what="training")) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].endswith("; 1 wrong one skipped")
    assert lines[-1].startswith(f"training: the first left out: {path}, line 2: "), "a line of its own"


def test_whatever_gives_records_can_be_trained_on(tokenizer: Tokenizer) -> None:
    config = TrainConfig(max_seq_length=100, completion_template="{b}", prompt_template="{a}")
    generator = ({"a": "x", "b": str(n)} for n in range(5))
    assert len(prepare_rows(generator, tokenizer, config, what="training")) == 5
    with pytest.raises(ValueError, match="the training dataset is empty"):
        prepare_rows(iter(()), tokenizer, config, what="training")


@pytest.mark.parametrize(
    ("count", "said"),
    [(1, "1 document packed into 1 row of up to 9 tokens"), (1200, "1,200 documents packed into 1,200 rows of up to")],
)
def test_what_packing_made_is_said(tokenizer: Tokenizer, count: int, said: str, capsys) -> None:
    config = TrainConfig(max_seq_length=9, packing=True)
    prepare_rows([{"text": "abcdef"}] * count, tokenizer, config, what="training")
    assert f"training: {said}" in capsys.readouterr().out


@pytest.mark.usefixtures("home")
def test_characters_that_the_vocabulary_lacks_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only where they are learned, and also of rows that are found again."""
    tokenizer = Tokenizer.from_folder(write_sentencepiece_tokenizer(tmp_path / "pieces"))
    path = write(tmp_path / "a.jsonl", [{"prompt": "ä ö", "completion": "a ü b ß"}, {"prompt": "a", "completion": "b"}])
    said = "training: '<unk>', which stands for characters that the vocabulary lacks, is learned 2 times; "
    for _ in range(2):
        prepare_rows(open_dataset(path), tokenizer, TrainConfig(max_seq_length=50), what="training")
        assert capsys.readouterr().out.count(said) == 1
    prepare_rows([{"prompt": "ä", "completion": "b"}], tokenizer, TrainConfig(max_seq_length=50), what="training")
    assert "vocabulary lacks" not in capsys.readouterr().out


@pytest.mark.usefixtures("home")
def test_that_nothing_ends_an_answer_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chat template ends it in its own way, or refuses."""
    folder = write_sentencepiece_tokenizer(tmp_path / "pieces")
    told = json.loads((folder / "tokenizer_config.json").read_text())
    del told["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    tokenizer = Tokenizer.from_folder(folder)
    rows = [{"prompt": "a", "completion": "b"}]
    prepare_rows(rows, tokenizer, TrainConfig(max_seq_length=50), what="training")
    assert "training: the tokenizer has no end token, so texts and answers end without one" in capsys.readouterr().out
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    config = TrainConfig(max_seq_length=50, chat_template="chatml")
    prepare_rows([{"messages": turns}], tokenizer, config, what="training")
    assert "end token" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (models.BPE({"<unk>": 0, "</s>": 1}, [], unk_token="<unk>"), 0),
        (models.BPE({"<unk>": 0, "</s>": 1}, [], unk_token="</s>"), None),
        (models.BPE({"<unk>": 0, "</s>": 1}, []), None),
        (models.Unigram([("<unk>", 0.0), ("</s>", -1.0)], unk_id=0, byte_fallback=False), 0),
    ],
)
def test_which_token_is_the_unknown_one(model: models.Model, expected: int | None) -> None:
    """As GPT-2 has it, the one that ends a text; one that is configured beside bytes never comes."""
    assert unk_token_id(TokenizerCore(model), "<unk>", 1) == expected


DATASETS = {
    "alpaca_4k.json": "format alpaca",
    "alpaca_libre_3k.json": "5 rows with an empty answer left out; first record 1196",
    "dolly_3k.jsonl": "format dolly",
    "dpo_en_demo.json": "preference data, trained as SFT: the chosen answers are learned, the rejected ignored",
    "gsm8k_test.jsonl": "format question",
    "kto_en_demo.json": "judged answers (KTO), trained as SFT: those with label true are learned, 150 with label false",
    "oasst_100_sharegpt.json": "the tokenizer has no chat template, so conversations are written by the built-in",
    "preference_1100.json": "preference data, trained as SFT",
    "sharegpt_500.json": "format conversations",
    "wiki_demo.txt": "format document",
}


@pytest.mark.parametrize("name", DATASETS)
def test_published_datasets_by_their_name_alone(shared_data: Path, name: str, capsys) -> None:
    """For a model of 256 tokens and without a chat template, every file gives rows, and the log says of which kind."""
    tokenizer = Tokenizer.from_folder(shared_data / "models" / "babyllama-105")
    config = TrainConfig(data=str(shared_data / "datasets" / name), max_seq_length=256, packing=True)
    rows = prepare_rows(open_dataset(config.data), tokenizer, config, what="training")
    assert min(rows.row_targets) > 0
    # Of conversations that were judged the last answer is learned, and most of these stand further behind.
    assert len(rows) >= (23 if name == "kto_en_demo.json" else 30)
    assert DATASETS[name] in capsys.readouterr().out


def test_every_published_dataset_is_among_them(shared_data: Path) -> None:
    assert {path.name for path in (shared_data / "datasets").iterdir()} == set(DATASETS)


class Stream:
    """Records that are made when they are asked for, as often as somebody asks; their number is not known before."""

    def __init__(self, count: int) -> None:
        self.count, self.times, self.alive = count, 0, weakref.WeakSet()
        self.most_alive = 0

    def __iter__(self) -> Iterator[dict]:
        self.times += 1
        for number in range(self.count):
            record = Remembered(prompt=f"{number}", completion="word " * 30)
            self.alive.add(record)
            self.most_alive = max(self.most_alive, len(self.alive))
            yield record


class Remembered(dict):
    __hash__ = object.__hash__


def test_an_iterable_larger_than_memory_is_never_a_list(tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(preparing, "BATCH", 100)
    monkeypatch.setattr("slothcore.data.masking.RECORDS_PER_BATCH", 100)
    stream = Stream(3000)
    rows = prepare_rows(stream, tokenizer, TrainConfig(max_seq_length=300), what="training")
    assert len(rows) == 3000
    assert stream.times == 2, "once to check it, and once to prepare it"
    assert stream.most_alive < 500
    with pytest.raises(ValueError, match="the dataset holds no records"):
        prepare_rows(Stream(0), tokenizer, TrainConfig(max_seq_length=300), what="training")
