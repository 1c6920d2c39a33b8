"""Where an export goes, what it is taken from, and what happens if either is not as one would think."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from slothcore.cli import main
from slothcore.data.tokenizer import Tokenizer
from slothcore.export import merged
from slothcore.export.export import export_model
from slothcore.export.formats import FORMATS
from slothcore.export.gguf_quantize import as_memory_allows
from slothcore.export.merged import save_merged
from slothcore.export.new_folder import require_new, require_room
from slothcore.export.self_check import sample_logits
from slothcore.loading import load
from slothcore.lora.adapter_io import save_adapter
from slothcore.lora.attach import add_lora
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from tests.lora.reference import randomise_zero_factors
from tests.models.zoo import FAMILIES_TINY, saved, tiny_model
from tests.training.tiny import write_model

pytestmark = pytest.mark.filterwarnings("ignore:the adapter names its base")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("places") / "base")


def adapted(base: Path) -> tuple[Decoder, Tokenizer | None]:
    model, tokenizer = load(base, bits=32, device="cpu")
    randomise_zero_factors(add_lora(model, r=4))
    return model, tokenizer


@pytest.mark.parametrize("leads_to", ["an empty folder", "nothing"])
def test_a_link_is_followed(leads_to: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `out` may lead to a larger disk; the link stays one, and the folder is built where it leads."""
    disk, link = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    if leads_to == "an empty folder":
        (disk / "out").mkdir()
    link.symlink_to(disk / "out")
    words = ["export", "--model", str(base), "--format", "merged", "--device", "cpu", "--output-dir", str(link)]
    assert main(words) == 0, capsys.readouterr().err
    assert link.is_symlink()
    assert load_model(link, bits=32, device="cpu").config.vocab_size > 0
    assert {path.name for path in (*tmp_path.iterdir(), *disk.iterdir())} == {"disk", "out"}
    model, _ = adapted(base)
    save_merged(model, None, link)  # a model that lies there is replaced
    assert link.is_symlink()
    assert {path.name for path in (*tmp_path.iterdir(), *disk.iterdir())} == {"disk", "out"}


def test_a_link_that_leads_in_a_circle(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    words = ["export", "--model", str(base), "--format", "merged", "--device", "cpu"]
    assert main([*words, "--output-dir", str(tmp_path / "one")]) != 0
    assert "one is a link that leads in a circle; choose another folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="two is a link that leads in a circle"):
        save_merged(adapted(base)[0], None, tmp_path / "two")


def test_a_folder_that_nothing_can_replace_is_refused_at_once(base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for here in (".", tmp_path):
        with pytest.raises(ValueError, match="is the folder that you are in and cannot be replaced; choose"):
            export_model(load_model(base, device="cpu"), None, here)
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    with pytest.raises(ValueError, match="disk is where a disk is mounted and cannot be replaced; choose"):
        require_new(tmp_path / "disk")
    with pytest.raises(ValueError, match="disk is where a disk is mounted; give a folder in it to write"):
        save_merged(load_model(base, device="cpu"), None, tmp_path / "disk")
    require_new(tmp_path / "disk" / "out")


def test_the_parent_is_what_is_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an empty folder, not in it, the export is built; on whichever disk that is."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match=r"may not be written into; choose another folder"):
        require_new(tmp_path / "out")
    asked: list[Path] = []

    def disk_usage(path: Path) -> Any:
        asked.append(path)
        return namedtuple("usage", "total used free")(0, 0, 0)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(ValueError, match="are free there"):
        require_room(tmp_path / "out", 1)
    assert asked == [tmp_path]


@pytest.mark.parametrize("way", ["by its name", "by a link"])
def test_the_base_is_not_replaced_by_its_merged_model(way: str, base: Path, tmp_path: Path) -> None:
    """Its adapter would be merged twice, by base="original" or by whoever loads both."""
    own = Path(shutil.copytree(base, tmp_path / "base"))
    model, tokenizer = adapted(own)
    before = {file.name: file.read_bytes() for file in own.iterdir()}
    (tmp_path / "link").symlink_to(own)
    with pytest.raises(ValueError, match="holds the model that was loaded; give another folder to write"):
        save_merged(model, tokenizer, own if way == "by its name" else tmp_path / "link")
    assert {file.name: file.read_bytes() for file in own.iterdir()} == before


@pytest.mark.parametrize("format", ["merged", "merged-4bit", "adapter"])
def test_a_tokenizer_whose_files_are_gone(format: str, base: Path, tmp_path: Path) -> None:
    """It is said before the weights are made, and no folder lacks its tokenizer silently."""
    model, _ = adapted(base)
    tokenizer = Tokenizer.from_folder(shutil.copytree(base, tmp_path / "moved"))
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"has lost its tokenizer\.json since the tokenizer was loaded; load it again"):
        export_model(model, tokenizer, tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


def test_a_base_whose_files_are_gone(base: Path, tmp_path: Path) -> None:
    """What is in memory can still be merged."""
    model, _ = adapted(Path(shutil.copytree(base, tmp_path / "moved")))
    shutil.rmtree(tmp_path / "moved")
    export_model(model, None, tmp_path / "merged")
    for options in ({"base": "original"}, {"format": "adapter"}):
        with pytest.raises(ValueError, match=r"moved (has neither model\.safetensors|does not exist)"):
            export_model(model, None, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_kill_while_a_model_takes_the_place_of_another(base: Path, tmp_path: Path, monkeypatch) -> None:
    """At no moment is the folder a model of some old files and some new ones."""
    model, tokenizer = adapted(base)
    folder = tmp_path / "merged"
    save_merged(model, tokenizer, folder, max_shard_bytes=60_000)
    shards = len(list(folder.glob("model-*.safetensors")))
    assert shards > 3
    older = sample_logits(load_model(folder, bits=32, device="cpu"))
    replace, unlink = Path.replace, Path.unlink

    class Killed(BaseException):
        pass

    def until(left: int) -> None:
        def step(change: Any) -> Any:
            def changing(path: Path, *arguments: Any, **options: Any) -> Any:
                nonlocal left
                if folder in (path.parent, *(Path(a).parent for a in arguments)):
                    left -= 1
                    if left < 0:
                        raise Killed
                return change(path, *arguments, **options)

            return changing

        monkeypatch.setattr(Path, "replace", step(replace))
        monkeypatch.setattr(Path, "unlink", step(unlink))

    with torch.no_grad():
        model.model.norm.weight *= 2
    for left in range(2 + shards):
        until(left)
        with pytest.raises(Killed):
            save_merged(model, tokenizer, folder, max_shard_bytes=60_000)
        monkeypatch.undo()
        if (folder / "config.json").exists():
            assert left == 0
            torch.testing.assert_close(sample_logits(load_model(folder, bits=32, device="cpu")), older)
    save_merged(model, tokenizer, folder)
    assert not torch.equal(sample_logits(load_model(folder, bits=32, device="cpu")), older)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_killed_save_merged_leaves_nothing_for_long(base: Path, tmp_path: Path) -> None:
    """What it has written is beside the folder, and the next one clears it away."""
    model, _ = adapted(base)
    save_adapter(model, tmp_path / "run")
    code = (
        "import os, signal, sys\nimport slothcore\nimport slothcore.export.merged as merged\n"
        "model, tokenizer = slothcore.load(sys.argv[1], device='cpu', bits=32)\n"
        "merged.compare = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "slothcore.save_merged(model, tokenizer, sys.argv[2])\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "out" / "merged")]
    assert subprocess.run(words, cwd=Path(merged.__file__).parents[2], capture_output=True).returncode == -9
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".merged.partial"]
    save_merged(model, None, tmp_path / "out" / "merged")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]


def test_both_spellings_of_the_dtype_are_true(base: Path, tmp_path: Path) -> None:
    model, _ = adapted(base)
    model.hf_config = {**model.hf_config, "dtype": "float16", "torch_dtype": "float16"}
    save_merged(model, None, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_a_gpu_whose_memory_is_full_is_one_sentence(base: Path, tmp_path: Path, monkeypatch) -> None:
    writer = FORMATS["merged"].writer()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr(writer, "write", full)
    with pytest.raises(ValueError, match=r"^the GPU's memory is full, so .*out was not written; free some .*cpu'\)$"):
        export_model(load_model(base, device="cpu"), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [1, 3, 5, 8, 100])
def test_less_is_quantised_at_once_where_memory_lacks(room: int) -> None:
    """Everything once and in order, in parts that fit."""
    done: list[int] = []
    tried = []

    def work(part: slice) -> None:
        tried.append(part.stop - part.start)
        if tried[-1] > room:
            raise torch.OutOfMemoryError
        done.extend(range(21)[part])

    as_memory_allows(work, 21, 8, least=1)
    assert done == list(range(21))
    assert tried == sorted(tried, reverse=True)
    if room < 8:
        with pytest.raises(torch.OutOfMemoryError):
            as_memory_allows(work, 21, 8, least=room + 1)


@pytest.mark.parametrize("family", ["gemma3", "gemma3_text"])
@pytest.mark.filterwarnings("ignore:.*belong to no text model")
def test_peft_puts_an_exported_adapter_on_what_its_base_loads(family: str, tmp_path: Path) -> None:
    """The whole model, whose layers have other names than the text part's, or a text model."""
    source = saved(tiny_model(FAMILIES_TINY[family][0]), tmp_path / family)
    model = load_model(source, bits=32, device="cpu")
    randomise_zero_factors(add_lora(model, r=4))
    export_model(model, None, tmp_path / "adapter", format="adapter", dtype="float32")
    whole = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert (theirs(input_ids=ids).logits - model.eval()(input_ids=ids).logits).abs().max() < 1e-4
