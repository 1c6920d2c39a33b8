"""Whatever a user gets wrong ends in one clear sentence and a non-zero exit, with nothing half-written."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slothcore.cli import main
from tests.training.tiny import write_model, write_records


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A model, data and a run that are in order; each test spoils a copy."""
    folder = tmp_path_factory.mktemp("good")
    write_model(folder / "model")
    write_records(folder / "data.jsonl", 8)
    assert main(train_flags(folder, folder / "run")) == 0
    return folder


@pytest.fixture
def here(good, tmp_path) -> Path:
    shutil.copytree(good / "model", tmp_path / "model")
    shutil.copy(good / "data.jsonl", tmp_path / "data.jsonl")
    return tmp_path


def train_flags(folder: Path, output_dir: Path, *further: str) -> list[str]:
    flags = {
        "model": folder / "model",
        "data": folder / "data.jsonl",
        "output-dir": output_dir,
        "device": "cpu",
        "bits": 32,
        "r": 4,
        "max-steps": 2,
        "per-device-train-batch-size": 1,
        "gradient-accumulation-steps": 1,
        "plot": "false",
        "disable-tqdm": "true",
    }
    return ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value))), *further]


def refused(argv: list[str], capsys, message: str) -> None:
    """`argv` fails with one line that matches `message`."""
    capsys.readouterr()
    status = main(argv)
    errors = capsys.readouterr().err
    assert status != 0
    assert re.fullmatch(r"slothcore: error: [^\n]+\n", errors), errors
    assert "Traceback" not in errors
    assert re.search(message, errors), errors


def refused_training(here: Path, capsys, message: str, *further: str) -> None:
    """Training fails with one line, and leaves no trace of an output folder."""
    before = sorted(here.rglob("*"))
    refused(train_flags(here, here / "out", *further), capsys, message)
    assert sorted(here.rglob("*")) == before


def edit_weights(here: Path, change) -> None:
    path = here / "model" / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_model_config(here: Path, **changes) -> None:
    path = here / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_model_folder(here, capsys) -> None:
    shutil.rmtree(here / "model")
    refused_training(here, capsys, r"the folder .*model does not exist")


def test_folder_without_a_model(here, capsys) -> None:
    (here / "model" / "config.json").unlink()
    refused_training(here, capsys, "is not a model folder: it has no config.json")


def test_truncated_shard(here, capsys) -> None:
    path = here / "model" / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    refused_training(here, capsys, r"model.safetensors is truncated or damaged")


def test_missing_shard(here, capsys) -> None:
    path = here / "model" / "model.safetensors"
    index = {"weight_map": dict.fromkeys(load_file(path), "model-00001-of-00002.safetensors")}
    path.unlink()
    (here / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused_training(here, capsys, r"model-00001-of-00002.safetensors is missing")


def test_missing_tensor(here, capsys) -> None:
    edit_weights(here, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refused_training(here, capsys, r"lacks the weight model.layers.1.mlp.up_proj.weight")


def test_wrong_shape(here, capsys) -> None:
    edit_weights(here, lambda weights: weights.update({"model.norm.weight": torch.ones(63)}))
    refused_training(here, capsys, r"model.norm.weight has shape \[63\], but config.json asks for \[64\]")


def test_unknown_model_type(here, capsys) -> None:
    edit_model_config(here, model_type="rwkv")
    refused_training(here, capsys, r"rwkv")


def test_unknown_key_in_the_models_configuration(here, capsys) -> None:
    edit_model_config(here, flux_capacitor=True)
    refused_training(here, capsys, r"flux_capacitor")


def test_missing_tokenizer(here, capsys) -> None:
    (here / "model" / "tokenizer.json").unlink()
    refused_training(here, capsys, r"model has no tokenizer.json; put the tokenizer's files into that folder")


def test_unknown_option_in_the_file(here, capsys) -> None:
    (here / "run.yaml").write_text("learning_rat: 1e-4\n")
    message = r"unknown option 'learning_rat' in .*run.yaml; did you mean 'learning_rate'\?"
    refused_training(here, capsys, message, "--config", str(here / "run.yaml"))


@pytest.mark.parametrize("flag", ["--max-step", "--max_step", "--max-step=3"])
def test_unknown_flag(here, capsys, flag) -> None:
    refused_training(here, capsys, r"unknown option 'max_step' in the flags; did you mean 'max_steps'\?", flag, "3")


def test_configuration_file_in_another_encoding(here, capsys) -> None:
    (here / "run.yaml").write_text("seed: 1\n", encoding="utf-16")
    message = r"run.yaml is not UTF-8, but has byte 0xff in it; save it as UTF-8$"
    refused_training(here, capsys, message, "--config", str(here / "run.yaml"))


def test_configuration_file_that_is_no_yaml(here, capsys) -> None:
    (here / "run.yaml").write_text("seed: 1\nlearning_rate = 3\n")
    message = r"run.yaml is not valid YAML: while scanning a simple key in line 2, column 1: learning_rate = 3 \^ could"
    refused_training(here, capsys, message, "--config", str(here / "run.yaml"))


def test_configuration_file_that_may_not_be_read(here, capsys, monkeypatch) -> None:
    (here / "run.yaml").write_text("seed: 1\n")
    original = Path.read_text

    def read_text(self, *arguments, **options) -> str:
        if self.name == "run.yaml":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    message = r"run.yaml may not be read, or written: Permission denied; change its rights, or choose another$"
    refused_training(here, capsys, message, "--config", str(here / "run.yaml"))


def test_weights_that_may_not_be_read(here, capsys, monkeypatch) -> None:
    original = Path.open

    def open_file(self, *arguments, **options):
        if self.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_file)
    refused_training(here, capsys, r"model.safetensors may not be read: Permission denied; change its rights$")


def test_missing_configuration_file(here, capsys) -> None:
    refused_training(here, capsys, "the configuration file nowhere.yaml does not exist", "--config", "nowhere.yaml")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_dataset(here, capsys, text) -> None:
    (here / "data.jsonl").write_text(text)
    refused_training(here, capsys, r"data.jsonl holds no records")


def test_missing_data_file(here, capsys) -> None:
    (here / "data.jsonl").unlink()
    refused_training(here, capsys, r"the data file .*data.jsonl does not exist")


def test_broken_json(here, capsys) -> None:
    with (here / "data.jsonl").open("a") as file:
        file.write('{"prompt": "a", \n')
    refused_training(here, capsys, r"data.jsonl, line 9: not valid JSON")


def test_record_without_the_named_field(here, capsys) -> None:
    with (here / "data.jsonl").open("a") as file:
        file.write('{"prompt": "a", "answer": "b"}\n')
    refused_training(here, capsys, r"data.jsonl, line 9.* lacks 'completion': it has the fields 'prompt', 'answer'")


def test_record_without_the_named_text_field(here, capsys) -> None:
    further = ("--format", "text", "--text-field", "body")
    refused_training(here, capsys, r"data.jsonl, line 1.*'body'", *further)


def test_unknown_format(here, capsys) -> None:
    refused_training(here, capsys, "unknown record format 'parquet'", "--format", "parquet")


def test_rows_all_too_long_and_dropped(here, capsys) -> None:
    further = ("--max-seq-length", "4", "--overlength", "drop")
    refused_training(
        here, capsys, r"all 8 records are longer than max_seq_length = 4 tokens and were dropped", *further
    )


@pytest.mark.parametrize(
    ("overlength", "said"),
    [("truncate", r"1 truncated to 80 tokens"), ("drop", r"1 longer than 80 tokens dropped")],
)
def test_a_row_longer_than_the_maximum_is_counted_and_said(here, capsys, overlength, said) -> None:
    with (here / "data.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "a", "completion": "b" * 100}) + "\n")
    flags = train_flags(here, here / "out", "--max-seq-length", "80", "--overlength", overlength)
    assert main(flags) == 0
    assert re.search(said, capsys.readouterr().out)


def test_more_tokens_than_the_model_takes(here, capsys) -> None:
    edit_model_config(here, rope_scaling={"rope_type": "linear", "factor": 2.0})
    message = r"max_seq_length 4096 cannot be had: the model scales its RoPE already"
    refused_training(here, capsys, message, "--max-seq-length", "4096")


def test_a_scaling_that_is_none(here, capsys) -> None:
    message = r"rope_scaling must be linear \| dynamic \| yarn \| llama3, a mapping or null, got 'longer'"
    refused_training(here, capsys, message, "--rope-scaling", "longer")
    message = r"rope_scaling .*has no factor; give max_seq_length"
    refused_training(here, capsys, message, "--rope-scaling", '{"rope_type": "yarn"}')


def test_three_bits(here, capsys) -> None:
    refused_training(here, capsys, r"bits must be 4 \| 16 \| 32, got '3'", "--bits", "3")


def test_dtype_that_does_not_go_with_bits(here, capsys) -> None:
    refused_training(here, capsys, "dtype float16 does not go with bits=32", "--dtype", "float16")


def test_8_bit_adamw_without_a_gpu(here, capsys) -> None:
    refused_training(here, capsys, "optim adamw_8bit needs a GPU", "--optim", "adamw_8bit")


def test_all_weights_in_4_bits(here, capsys) -> None:
    further = ("--bits", "4", "--full-finetuning")
    refused_training(here, capsys, "full_finetuning trains dense weights, and bits is 4", *further)


def test_unknown_device(here, capsys) -> None:
    refused_training(here, capsys, r"device 'abacus' does not exist", "--device", "abacus")


def test_target_module_that_is_not_there(here, capsys) -> None:
    refused_training(here, capsys, r"query_proj", "--target-modules", "query_proj")


def test_no_model_and_no_data(here, capsys) -> None:
    refused(["train", "--data", str(here / "data.jsonl")], capsys, r"model is not set; give --model")
    refused(["train", "--model", str(here / "model")], capsys, r"data is not set; give --data")


def test_output_folder_that_holds_another_run(good, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in (good / "run").rglob("*")}
    refused(train_flags(good, good / "run"), capsys, "already holds a run; choose another folder")
    assert {path: path.stat().st_mtime_ns for path in (good / "run").rglob("*")} == before


def test_output_folder_that_is_a_file(here, capsys) -> None:
    (here / "out").write_text("mine")
    refused_training(here, capsys, "out is a file; choose a folder")


def test_output_folder_inside_a_file(here, capsys) -> None:
    for folder in (here / "data.jsonl" / "out", here / "data.jsonl" / "deep" / "out"):
        message = r"output_dir .*out would lie in .*data.jsonl, which is a file; choose a folder"
        refused(train_flags(here, folder), capsys, message)
        refused(["merge", "--model", str(here / "model"), "--output-dir", str(folder)], capsys, message)


def test_output_folder_that_may_not_be_written_into(here, capsys) -> None:
    closed = here / "closed"
    closed.mkdir(mode=0o555)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write anywhere")
    message = r"output_dir .*: .*closed may not be written into; choose another folder"
    refused(train_flags(here, closed / "out"), capsys, message)
    refused(["merge", "--model", str(here / "model"), "--output-dir", str(closed / "out")], capsys, message)


def test_output_folder_that_cannot_be_made(here, capsys, monkeypatch) -> None:
    """What no check foresees, such as a full disk or a file system that makes no folders."""

    def mkdir(self, *arguments, **options) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refused_training(
        here, capsys, r"output_dir .*out cannot be made \(No space left on device\); choose another folder"
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no file system at hand that takes no folder")
def test_output_folder_where_none_can_be_made_is_found_before_the_data_are_read(here, capsys) -> None:
    (here / "data.jsonl").write_text("not read")
    message = r"output_dir /proc/x: /proc (takes no new folder \(.+\)|may not be written into); choose another folder"
    refused(train_flags(here, Path("/proc/x")), capsys, message)


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999"])
def test_seed_out_of_range(good, here, capsys, seed) -> None:
    refused_training(here, capsys, rf"seed must .*got {seed}", "--seed", seed)
    argv = ["generate", "--model", str(good / "run"), "--device", "cpu", "--prompt", "a", "--seed", seed]
    refused(argv, capsys, rf"seed must .*got {seed}")


def test_resume_with_other_data(good, here, capsys) -> None:
    write_records(here / "data.jsonl", 9)
    further = ("--max-steps", "4", "--resume-from-checkpoint", str(good / "run" / "checkpoint-2"))
    refused_training(here, capsys, r"checkpoint-2 was trained on other data", *further)


def test_resume_folder_of_another_model(good, here, capsys) -> None:
    shutil.rmtree(here / "model")
    write_model(here / "model", seed=1)
    checkpoint = good / "run" / "checkpoint-2"
    further = ("--max-steps", "4", "--resume-from-checkpoint", str(checkpoint))
    refused_training(here, capsys, r"checkpoint-2 is of another model", *further)


@pytest.mark.parametrize("name", ["latest", "nowhere", "model"])
def test_resume_folder_without_a_checkpoint(here, capsys, name) -> None:
    where = str(here / "model") if name == "model" else name
    refused_training(here, capsys, r"no checkpoint to resume from|does not exist", "--resume-from-checkpoint", where)


def test_resume_from_a_checkpoint_that_is_not_there_lists_those_that_are(good, here, capsys) -> None:
    absent = good / "run" / "checkpoint-99"
    message = rf"the checkpoint folder {absent} does not exist; {good / 'run'} has checkpoint-2\n"
    refused_training(here, capsys, message, "--resume-from-checkpoint", str(absent))
    refused(train_flags(good, good / "run", "--resume-from-checkpoint", "checkpoint-99"), capsys, "has checkpoint-2\n")


def test_generate_without_a_prompt(good, capsys) -> None:
    refused(
        ["generate", "--model", str(good / "run")], capsys, "give one of --prompt, --prompts-file and --instruction"
    )


@pytest.mark.parametrize(
    ("flag", "needed"),
    [("--input", "--instruction"), ("--system", "--chat"), ("--top-p", "--temperature"), ("--top-k", "--temperature")],
)
def test_an_option_that_would_have_no_effect(good, capsys, flag, needed) -> None:
    argv = ["generate", "--model", str(good / "run"), "--device", "cpu", "--prompt", "a", flag, "1"]
    refused(argv, capsys, f"{flag} has no effect without {needed}")


def test_prompts_file_that_cannot_be_read(good, here, capsys) -> None:
    argv = ["generate", "--model", str(good / "run"), "--prompts-file", str(here / "prompts.txt")]
    refused(argv, capsys, r"the prompts file .*prompts.txt does not exist")
    (here / "prompts.txt").write_bytes(b"caf\xe9\n")
    refused(argv, capsys, r"the prompts file .*prompts.txt is not UTF-8; save it as UTF-8")
    (here / "prompts.txt").write_text("\n \n")
    refused(argv, capsys, r"the prompts file .*prompts.txt is empty; write one prompt on each line")


def test_generate_from_a_run_that_saved_nothing(tmp_path, capsys) -> None:
    (tmp_path / "config.yaml").write_text("model: model\n")
    refused(["generate", "--model", str(tmp_path), "--prompt", "a"], capsys, "has saved nothing yet")


def test_generate_without_a_chat_template(good, capsys) -> None:
    argv = ["generate", "--model", str(good / "run"), "--device", "cpu", "--chat", "--prompt", "a"]
    refused(argv, capsys, "has no chat template")


def test_merge_into_a_folder_that_is_not_empty(good, here, capsys) -> None:
    argv = ["merge", "--model", str(good / "run"), "--output-dir", str(here / "model")]
    refused(argv, capsys, "exists and is not empty")


def test_missing_argument_of_a_flag(here, capsys) -> None:
    refused_training(here, capsys, r"--max-steps.*expected one argument", "--max-steps")


def test_unknown_command(capsys) -> None:
    refused(["trian"], capsys, "trian")
