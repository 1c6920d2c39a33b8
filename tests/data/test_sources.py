"""Where records come from: folders, patterns, packed files, Parquet, the Hub."""

import gzip
import inspect
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi

from slothcore.data import hub_files
from slothcore.data.dataset import open_dataset
from slothcore.data.hub_files import dataset_files, files_of_split, names_dataset
from slothcore.data.sources import find_sources

PARQUET = ["data/test-00000-of-00001.parquet", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def texts(dataset) -> list[str]:
    return [record["text"] for record in dataset]


def test_patterns(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / "x" / f"{name}.jsonl", name)
    assert texts(open_dataset(str(tmp_path / "x" / "*.jsonl"))) == ["a", "b"]
    assert texts(open_dataset(str(tmp_path / "**" / "a.jsonl"))) == ["a"]
    with pytest.raises(ValueError, match=r"no file fits the pattern .*\*.csv; quote it"):
        open_dataset(str(tmp_path / "*.csv"))


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    assert texts(open_dataset(str(write(tmp_path / "a[1].jsonl", "a")))) == ["a"]


def test_what_is_about_the_data_of_a_folder_is_not_learned(tmp_path: Path) -> None:
    """A clone from the Hub has a README; but a folder of texts alone may be just such."""
    for name in ("README.md", "LICENSE.txt", "dataset_infos.json", "notes.md"):
        (tmp_path / name).write_text("{}" if name.endswith("json") else f"# {name}\n")
    write(tmp_path / "train.jsonl", "a")
    write(tmp_path / ".hidden.jsonl", "b")
    said = (
        r"\.hidden\.jsonl, LICENSE\.txt, README\.md, dataset_infos\.json in the folder .* is not read: .*; name a file"
    )
    with pytest.warns(UserWarning, match=said):
        dataset = open_dataset(tmp_path)
    assert [part.source.path.name for part in dataset.parts] == ["notes.md", "train.jsonl"]
    assert [*open_dataset(tmp_path / "README.md")] == [{"document": "# README.md\n"}]
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "README.md").write_text("words\n")
    assert [*open_dataset(alone)] == [{"document": "words\n"}]
    (alone / "train.jsonl.zst").write_bytes(b"packed")
    with pytest.raises(ValueError, match=r"^the folder .* holds no data file; known are "):
        open_dataset(alone)


def test_data_in_folders_of_a_folder_are_not_passed_over_in_silence(tmp_path: Path) -> None:
    """A clone from the Hub may hold its README and a folder `data`; its README was learned, and nothing else."""
    (tmp_path / "README.md").write_text("# About\n")
    write(tmp_path / "data" / "train.jsonl", "a")
    write(tmp_path / ".cache" / "hidden.jsonl", "b")
    with pytest.raises(ValueError, match=r"^the folder .* holds no data itself, but its folders data do; name one of"):
        open_dataset(tmp_path)
    write(tmp_path / "more.jsonl", "c")
    (tmp_path / "README.md").unlink()
    with pytest.warns(UserWarning, match="and not those in its folders data; name these as well"):
        assert texts(open_dataset(tmp_path)) == ["c"]


def test_a_folder_of_several_splits_is_said(tmp_path: Path) -> None:
    for name in ("train", "test", "more"):
        write(tmp_path / f"{name}.jsonl", name)
    with pytest.warns(UserWarning, match="holds the splits test, train, and all of its files are read; name the files"):
        assert texts(open_dataset(tmp_path)) == ["more", "test", "train"]


class ByNumber:
    """As a dataset of torch's: it is asked for each row, and does not tell where it ends."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> dict:
        return {"text": f"text {number % 3}"}


def test_objects_that_are_datasets_elsewhere() -> None:
    assert texts(open_dataset(ByNumber())) == ["text 0", "text 1", "text 2"]
    with pytest.raises(ValueError, match=r"^the dataset is a dict with 'train', 'test'; give the records, such as one"):
        open_dataset({"train": [{"text": "a"}], "test": []})


def test_packed_files(tmp_path: Path) -> None:
    for name, content in {"a.jsonl.gz": b'{"text": "a"}\n', "b.csv.GZ": b"text\nb\n", "c.txt.gz": b"c"}.items():
        (tmp_path / name).write_bytes(gzip.compress(content))
    assert [list(record.values()) for record in open_dataset(tmp_path)] == [["a"], ["b"], ["c"]]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    turns = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": str(n)}] for n in range(2500)]
    parquet.write_table(pyarrow.table({"messages": turns}), tmp_path / "a.parquet")
    dataset = open_dataset(tmp_path / "a.parquet")
    assert [record["messages"] for record in dataset] == turns
    assert [where for where, _ in dataset.examples()][-1] == f"{tmp_path / 'a.parquet'}, row 2500"
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet, row 2: 'text' must be text, got NoneType None; fill it in"):
        open_dataset(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"c.parquet is not a Parquet file \(.*\); download or write it again"):
        open_dataset(tmp_path / "c.parquet")


class Table(list):
    """Rows as a `datasets.Dataset` gives them, which has names of columns."""

    column_names = ("messages", "tools")


def calling(name: str, argument: str, **more: object) -> dict:
    """A record in which the assistant calls a function of one argument."""
    schema = {"type": "object", "properties": {argument: {"type": "string", **more}}}
    call = {"type": "function", "function": {"name": name, "arguments": {argument: "Rome"}}}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "so", "tool_calls": [call]}]
    return {"messages": turns, "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}]}


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_a_table_fills_in_is_no_argument_of_a_call(tmp_path: Path, in_memory: bool) -> None:
    """Arrow gives each call the arguments of all functions, null; none of them is to be learned."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [calling("weather", "city"), calling("time", "zone", enum=["UTC"])]
    table = pyarrow.Table.from_pylist(records)
    assert table.to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {
        "city": "Rome",
        "zone": None,
    }
    parquet.write_table(table, tmp_path / "a.parquet")
    examples = open_dataset(Table(table.to_pylist()) if in_memory else tmp_path / "a.parquet").examples()
    for (_, example), record in zip(examples, records, strict=True):
        assert [*example.messages] == record["messages"]
        assert [*example.tools] == record["tools"]
    # A list of Python's holds what its owner has put there.
    _, example = next(iter(open_dataset(table.to_pylist()).examples()))
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "zone": None}


def test_damaged_parquet(tmp_path: Path) -> None:
    """Its end, which is looked at first, may be whole."""
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(9)]}), path, compression="none")
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet is damaged behind row 0 \(.*\); download or write it again$"):
        open_dataset(path)
    text = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text}), path)
    with pytest.raises(ValueError, match=r"a\.parquet is damaged behind row 0 \('utf-8' codec .*\); download"):
        open_dataset(path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a.parquet needs pyarrow: pip install 'slothcore\[parquet\]', or convert it"):
        open_dataset(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "is_dataset"),
    [
        ("tatsu-lab/alpaca", True),
        ("openai/gsm8k:main/test", True),
        ("hf://datasets/owner/name.json", True),
        ("data/train.jsonl", False),
        ("data/train.jsonl.gz", False),
        ("alpaca", False),
        ("a/b/c", False),
        ("/a/b", False),
    ],
)
def test_names_of_datasets(name: str, is_dataset: bool) -> None:
    assert names_dataset(name) is is_dataset


@pytest.mark.parametrize(
    ("files", "split", "chosen"),
    [
        (PARQUET, "train", PARQUET[1:]),
        (PARQUET, "test", PARQUET[:1]),
        (["README.md", "alpaca_data.json", "dataset_infos.json", "LICENSE"], "train", ["alpaca_data.json"]),
        (["dev.csv", "train.csv"], "validation", ["dev.csv"]),
        (["train/a.jsonl", "validation/a.jsonl", "train/script.py"], "train", ["train/a.jsonl"]),
        (["training_data/a.jsonl", "training_data/test.jsonl"], "train", ["training_data/a.jsonl"]),
        (["my_training_set.jsonl", "contest.jsonl"], "train", ["my_training_set.jsonl"]),
    ],
)
def test_splits_by_name(files: list[str], split: str, chosen: list[str]) -> None:
    assert files_of_split(files, {}, "o/d", split=split) == chosen


def test_splits_that_the_readme_declares() -> None:
    files = ["main/train-0.parquet", "socratic/test-0.parquet", "socratic/train-0.parquet"]
    configs = [
        {"config_name": name, "data_files": [{"split": s, "path": f"{name}/{s}-*"} for s in ("train", "test")]}
        for name in ("main", "socratic")
    ]
    card = {"configs": configs}
    assert files_of_split(files, card, "o/d", config="socratic") == files[2:]
    assert files_of_split(files, card, "o/d", config="socratic", split="test") == files[1:2]
    with pytest.raises(
        ValueError, match=r"o/d .* has several configurations \(main, socratic\); name one as o/d:main/train"
    ):
        files_of_split(files, card, "o/d")
    with pytest.raises(ValueError, match=r"o/d .* has no configuration 'other'; it has main, socratic"):
        files_of_split(files, card, "o/d", config="other")
    configs[0]["default"] = True
    assert files_of_split(files, card, "o/d") == files[:1]
    assert files_of_split(["x/a.jsonl"], {"configs": [{"data_files": "**/*.jsonl"}]}, "o/d") == ["x/a.jsonl"]


def test_repositories_without_what_was_asked_for() -> None:
    with pytest.raises(ValueError, match=r"o/d .* has no split 'validation'; it has test, train: name one as o/d:test"):
        files_of_split(PARQUET, {}, "o/d", split="validation")
    with pytest.raises(ValueError, match=r"o/d .* holds no data file that is read here"):
        files_of_split(["a.zip", "README.md"], {}, "o/d")


class FakeHub:
    """A repository on disk in place of the Hub; records which patterns were fetched."""

    def __init__(self, folder: Path, *, error: Exception | None = None, cached: bool = True) -> None:
        self.folder, self.error, self.cached = folder, error, cached
        self.fetched: list[list[str]] = []

    def __call__(self, **_: object) -> "FakeHub":
        return self

    def repo_info(self, name: str, **options: Any) -> SimpleNamespace:
        # Whatever the real one would refuse, this one must not accept.
        inspect.signature(HfApi.repo_info).bind(self, name, **options)
        assert options == {"repo_type": "dataset"}
        if self.error:
            raise self.error
        files = sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())
        return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=file) for file in files])

    def snapshot_download(self, name: str, *, allow_patterns: list[str], local_files_only: bool, **options: Any) -> str:
        accepted = {"allow_patterns": allow_patterns, "local_files_only": local_files_only, **options}
        inspect.signature(HfApi.snapshot_download).bind(self, name, **accepted)
        if local_files_only and not self.cached:
            raise hub_errors().LocalEntryNotFoundError("not there")
        self.fetched.append(allow_patterns)
        return str(self.folder)


def hub_errors():
    from huggingface_hub import errors

    return errors


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        write(tmp_path / "repository" / "data" / f"{split}.jsonl", split)
    (tmp_path / "repository" / "README.md").write_text("---\nlicense: mit\n---\n# data\n")
    return tmp_path / "repository"


def test_only_the_files_of_the_split_are_fetched(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(repository)
    monkeypatch.setattr(hub_files, "HfApi", hub)
    assert texts(open_dataset("owner/name")) == ["train"]
    assert texts(open_dataset("owner/name:test")) == ["test"]
    assert hub.fetched == [["README.md"], ["data/train.jsonl"], ["README.md"], ["data/test.jsonl"]]


def test_the_cache_serves_without_network(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_files, "HfApi", FakeHub(repository, error=hub_errors().OfflineModeIsEnabled("off")))
    assert texts(open_dataset("owner/name")) == ["train"]
    assert texts(open_dataset("owner/name", local_files_only=True)) == ["train"]
    absent = FakeHub(repository, error=hub_errors().OfflineModeIsEnabled("off"), cached=False)
    monkeypatch.setattr(hub_files, "HfApi", absent)
    message = "owner/name is neither a local file or folder nor complete in the download cache, and"
    with pytest.raises(ValueError, match=message):
        open_dataset("owner/name")
    with pytest.raises(ValueError, match="local_files_only is set; unset it once to download"):
        dataset_files("owner/name", local_files_only=True)


def test_what_the_hub_refuses(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    response = SimpleNamespace(status_code=403, headers={}, request=None, text="", url="https://hub")
    for error, message in {
        hub_errors().GatedRepoError("gated", response=response): r"owner/name is gated .*/datasets/owner/name",
        hub_errors().RepositoryNotFoundError(
            "no", response=response
        ): "neither a local file or folder nor a dataset on",
    }.items():
        monkeypatch.setattr(hub_files, "HfApi", FakeHub(repository, error=error, cached=False))
        with pytest.raises(ValueError, match=message):
            open_dataset("owner/name")


def test_nothing_there(tmp_path: Path) -> None:
    message = "absent.jsonl does not exist; check the path, or name a dataset on the Hub as owner/name"
    with pytest.raises(FileNotFoundError, match=f"{re.escape(message)}$"):
        find_sources(tmp_path / "absent.jsonl")
    with pytest.raises(
        FileNotFoundError, match=r"identity,facts .* or give several as a list, without commas in them$"
    ):
        find_sources("identity,facts")
    with pytest.raises(ValueError, match="no data file was given"):
        open_dataset([])


@pytest.mark.parametrize("files", [("data-00000-of-00001.arrow", "state.json"), ("dataset_dict.json",)])
def test_a_folder_that_datasets_has_saved_is_not_taken_for_data(files: tuple[str, ...], tmp_path: Path) -> None:
    """What stands beside the Arrow files are notes about them."""
    for file in files:
        (tmp_path / file).write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match=r"^the folder .* was written by save_to_disk of datasets, .* to_parquet"):
        find_sources(tmp_path)
