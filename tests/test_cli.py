"""The command: help that teaches, flags that reach the call, and a round from training to an answer."""

import argparse
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import slothcore
from slothcore.cli import COMMANDS, build_parser, main
from slothcore.commands.command import config_of
from slothcore.data.formats import alpaca_prompt
from slothcore.training.config import TrainConfig, field_types
from slothcore.training.other_names import OTHER_FLAGS
from slothcore.training.report import read_log
from slothcore.version import __version__
from tests.training.tiny import write_model, write_records

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_model(folder / "model")
    write_records(folder / "data.jsonl", 8)
    return folder


@pytest.fixture(scope="module")
def run(folder) -> Path:
    (folder / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "model": str(folder / "model"),
                "data": str(folder / "data.jsonl"),
                "output_dir": str(folder / "run"),
                "device": "cpu",
                "bits": 4,
                "r": 4,
                "max_steps": 50,
                "logging_steps": 1,
                "plot": False,
                "disable_tqdm": True,
            }
        )
    )
    assert main(["train", "--config", str(folder / "run.yaml"), "--max_steps", "3", "--target-modules", "q_proj"]) == 0
    return folder / "run"


@pytest.mark.parametrize("words", ["{run}/config.yaml", "--config {run}/config.yaml", "{run}"])
def test_flags_reach_the_run_and_the_run_repeats(words, run, tmp_path) -> None:
    """From what its folder holds: the same losses and gradient norms, and the same adapter."""
    config = TrainConfig.from_yaml(run / "config.yaml")
    assert (config.max_steps, config.target_modules, config.bits) == (3, "q_proj", 4)
    assert config.max_seq_length == 128, "the model's, written down"
    repeated = tmp_path / "repeated"
    assert main(["train", *words.format(run=run).split(), "--output-dir", str(repeated)]) == 0
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, repeated))
    assert all((ours[name] == theirs[name]).all() for name in ours | theirs)
    logs = [read_log(path / "log.jsonl") for path in (run, repeated)]
    losses = [[(line["step"], line["loss"], line["grad_norm"]) for line in log if "loss" in line] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    again = TrainConfig.from_yaml(repeated / "config.yaml")
    assert again.to_dict() == {**config.to_dict(), "output_dir": str(repeated)}


def test_two_files_of_options_are_one_too_many(run, capsys) -> None:
    file = str(run / "config.yaml")
    assert main(["train", file, "--config", file]) == 2
    assert capsys.readouterr().err.endswith("both name a file; drop one of them\n")


def test_a_run_is_not_repeated_over_itself(run, capsys) -> None:
    assert main(["train", str(run / "config.yaml")]) == 1
    assert "already holds a run; choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["{copy}", "{copy}/config.yaml", "--config {copy}/config.yaml"])
def test_a_copy_of_a_run_does_not_go_on_in_the_folder_of_the_first(words, run, tmp_path, capsys) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    further = ["--resume-from-checkpoint", "latest", "--max-steps", "4"]
    assert main(["train", *words.format(copy=copy).split(), *further]) == 2
    assert capsys.readouterr().err.endswith(f"give --output-dir {copy} or --output-dir {run}\n")
    assert main(["train", *words.format(copy=copy).split(), *further, "--output-dir", str(copy)]) == 0
    assert read_log(copy / "log.jsonl")[-1]["step"] == 4
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("train --lr 1e-4", 2),
        ("train --bits 3", 2),
        ("train absent.yaml", 1),
        ("train --model a --data b --warmup-steps 1 --warmup-ratio 0.5", 2),
        ("generate --prompt a", 2),
        ("generate --model absent --prompt a --top-k 3", 2),
        ("merge --model absent", 2),
        ("merge --model ./absent --output-dir out", 1),
        ("report", 2),
        ("report absent", 1),
        ("trian", 2),
        ("", 2),
    ],
)
def test_the_status_tells_a_wrong_call_from_a_failure(words, status, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == status
    errors = capsys.readouterr().err
    assert errors.count("\n") == (1 if words else 0)
    assert errors.startswith("slothcore: error: " if words else "")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_chat_template_is_found_before_the_model(folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model", "./absent", "--data", str(folder / "data.jsonl"), "--chat-template", "chatlm"]
    assert main(["train", *words]) == 2
    assert "unknown chat template 'chatlm' (did you mean chatml?)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_options_that_are_lists_and_numbers(monkeypatch) -> None:
    given = []
    monkeypatch.setattr("slothcore.run.train_from_config", lambda config: given.append(config) or Stopped())
    words = "--data a.json b.json --data-weights 1 2.5 --modules-to-save lm_head --completion-template {answer}"
    assert main(["train", "--model", "m", *words.split(), "--mask-history", "--report", "no"]) == 130
    (config,) = given
    assert (config.data, config.data_weights) == (("a.json", "b.json"), (1.0, 2.5))
    assert (config.completion_template, config.mask_history, config.report) == ("{answer}", True, False)


class Stopped:
    """The result of a run that Ctrl-C ended."""

    interrupted = True


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", False),
        ("--gradient-checkpointing", True),
        ("--gradient_checkpointing mlp", "mlp"),
        ("--gradient-checkpointing=offload --packing", "offload"),
        ("--gradient-checkpointing false", False),
    ],
)
def test_a_flag_that_is_a_kind_or_yes_or_no(words, expected, monkeypatch) -> None:
    given = []

    def train_from_config(config: TrainConfig) -> None:
        given.append(config)
        raise ValueError("enough")

    monkeypatch.setattr("slothcore.run.train_from_config", train_from_config)
    further = ["--data", "b", *words.split(), "--cuda-graphs", "false", "--memory-budget", "null"]
    assert main(["train", "--model", "a", *further]) == 1
    (config,) = given
    assert config.gradient_checkpointing == expected
    assert (config.cuda_graphs, config.memory_budget) == (False, None)


def test_the_adapter_names_its_base(folder, run) -> None:
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "model")


def test_the_end_of_training_says_how_to_talk_to_the_result(folder, run, capsys) -> None:
    argv = ["train", "--config", str(run / "config.yaml"), "--output-dir", str(folder / "talk")]
    assert main(argv) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"talk to it: slothcore generate --model {folder / 'talk'} --prompt 'Add 0 and 0.'"


@pytest.mark.parametrize("which", ["run", "run/adapter", "run/checkpoint-3", "model"])
def test_generate_opens_runs_adapters_and_models(folder, run, capsys, which) -> None:
    capsys.readouterr()
    argv = ["generate", "--model", str(folder / which), "--device", "cpu", "--prompt", "Add 1", "Add 2"]
    assert main([*argv, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out


def test_sampling_flags_reach_the_generation(folder, run, capsys, monkeypatch) -> None:
    asked = {}

    def generate(model, tokenizer, prompts, **options) -> list[str]:
        asked.update(options, prompts=prompts)
        return ["an answer"]

    monkeypatch.setattr("slothcore.inference.generate.generate", generate)
    flags = "--prompt a --max-new-tokens 5 --temperature 0.5 --top-p 0.7 --top-k 9 --min-p 0.1 --seed 4".split()
    flags += ["--repetition-penalty", "1.2", "--frequency-penalty", "0.3", "--presence-penalty", "-0.2"]
    flags += ["--stop-strings", "b", "c d"]
    assert main(["generate", "--model", str(run), "--device", "cpu", *flags]) == 0
    assert capsys.readouterr().out == "an answer\n"
    sampling = {"max_new_tokens": 5, "temperature": 0.5, "top_p": 0.7, "top_k": 9, "min_p": 0.1, "seed": 4}
    sampling |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": -0.2}
    sampling |= {"stop_strings": ["b", "c d"]}
    assert asked == {**sampling, "prompts": ["a"], "add_special_tokens": True}

    assert main(["generate", "--model", str(run), "--device", "cpu", "--instruction", "Add.", "--input", "1, 2"]) == 0
    assert asked["prompts"] == [alpaca_prompt("Add.", "1, 2")]
    assert (asked["temperature"], asked["max_new_tokens"]) == (0.0, 256)


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["merge", "--output-dir", "merged"]])
def test_where_the_model_comes_from_reaches_the_loader(command, tmp_path, capsys, monkeypatch) -> None:
    asked = {}

    def open_result(name, **options):
        asked.update(options, name=name)
        raise ValueError("enough")

    monkeypatch.setattr("slothcore.run.open_result", open_result)
    monkeypatch.chdir(tmp_path)
    flags = "--model me/base --adapter me/adapter --revision v2 --token hf_secret --local-files-only --bits 16".split()
    assert main([*command, *flags, "--device", "cpu"]) == 1
    given = {"revision": "v2", "token": "hf_secret", "local_files_only": True, "bits": 16, "device": "cpu"}
    assert asked == {**given, "name": "me/base", "adapter": "me/adapter"}
    assert capsys.readouterr().err == "slothcore: error: enough\n"
    assert main([*command, "--model", "me/adapter"]) == 1
    nothing = {
        "adapter": None,
        "revision": None,
        "token": None,
        "local_files_only": False,
        "bits": None,
        "device": None,
    }
    assert asked == {**nothing, "name": "me/adapter"}


def test_chat_prompts_are_written_by_the_template(folder, tmp_path, monkeypatch) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '>' if add_generation_prompt }}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    asked = {}
    monkeypatch.setattr(
        "slothcore.inference.generate.generate",
        lambda model, tokenizer, prompts, **options: asked.update(options, p=prompts) or [],
    )
    argv = ["generate", "--model", str(tmp_path / "model"), "--device", "cpu", "--chat", "--prompt", "a", "b"]
    assert main([*argv, "--system", "Be brief."]) == 0
    assert asked["p"] == ["[system]Be brief.[user]a>", "[system]Be brief.[user]b>"]
    assert asked["add_special_tokens"] is False, "the template writes the begin token itself"


def test_prompts_from_a_file_are_those_of_the_flag(folder, run, capsys) -> None:
    (folder / "prompts.txt").write_text("Add 1\n\nAdd 2\n")
    common = ["generate", "--model", str(run), "--device", "cpu", "--max-new-tokens", "3"]
    outputs = []
    for further in (["--prompt", "Add 1", "Add 2"], ["--prompts-file", str(folder / "prompts.txt")]):
        capsys.readouterr()
        assert main([*common, *further]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_merge_writes_a_model_that_answers_like_the_run(folder, run, capsys) -> None:
    merged = folder / "merged"
    argv = ["merge", "--model", str(run), "--output-dir", str(merged), "--dtype", "float32", "--device", "cpu"]
    assert main(argv) == 0
    outputs = []
    for model in (run, merged):
        capsys.readouterr()
        bits = "4" if model == run else "32"
        assert main(["generate", "--model", str(model), "--device", "cpu", "--bits", bits, "--prompt", "Add 3"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_help_lists_every_option_with_its_default_and_an_example(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for item in fields(TrainConfig):
        assert f"--{item.name.replace('_', '-')}" in text
    assert {f"{item.metadata['group']}:" for item in fields(TrainConfig)} <= set(text.splitlines())
    assert "examples:\n  slothcore train --model" in text


@pytest.mark.parametrize("command", COMMANDS.values(), ids=str)
def test_every_command_has_a_help_with_examples_that_are_valid(command, capsys) -> None:
    """Words after two spaces are about the example."""
    with pytest.raises(SystemExit):
        main([command.name, "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    examples = text.partition("examples:\n")[2].splitlines()
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example.strip().split("   ")[0])
        assert words[:2] == ["slothcore", command.name], example
        arguments, unknown = build_parser().parse_known_args(words[1:])
        assert unknown == [], example
        if command.takes_config:
            flags = {k: v for k, v in vars(arguments).items() if k in field_types()}
            config_of({**flags, "config": None, "config_file": None})


def test_help_names_every_command_and_first_steps(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS.values():
        assert re.search(rf"^    {command.name} +{re.escape(command.help)}$", text, re.MULTILINE)
    for line in re.findall(r"^  slothcore (.+)$", text, re.MULTILINE):
        words = shlex.split(line.split("   ")[0].partition("  ")[0])
        assert build_parser().parse_known_args(words)[1] == []


def test_options_that_help_does_not_show_are_accepted_all_the_same(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["preview", "--help"])
    text = capsys.readouterr().out
    assert "--mask-history" in text
    assert "--warmup-ratio" not in text
    assert build_parser().parse_args(["preview", "--warmup-ratio", "0.5"]).warmup_ratio == "0.5"


def test_the_command_starts_without_torch() -> None:
    """Help and complaints come at once; torch alone would take a second."""
    code = (
        "import sys; from slothcore.cli import build_parser, main; build_parser().format_help(); "
        "assert main(['train', '--bits', '3']) == 2; assert main(['doctor', '--nothing']) == 2; "
        "assert not {'torch', 'tokenizers', 'huggingface_hub', 'triton', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_in_the_middle_of_an_import_ends_the_command(tmp_path) -> None:
    # As numpy's C code does with what is raised while it loads; torch's aborts.
    swallowing = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    (tmp_path / "torch.py").write_text(swallowing)
    words = ["train", "--model", "no-folder/no-model", "--data", "no.jsonl", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "slothcore", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "slothcore: interrupted\n")


def test_every_name_of_the_package_can_be_had() -> None:
    """They are imported when they are asked for; a type checker reads the same names."""
    for name in slothcore.__all__:
        assert getattr(slothcore, name) is not None
        assert name in dir(slothcore)
    declared = re.search(r"if TYPE_CHECKING:\n(.*?)\n\n", Path(slothcore.__file__).read_text(), re.DOTALL)[1]
    found = dict(re.findall(r"from ([\w.]+) import (?:\w+, )?(\w+)", declared))
    assert {slothcore._HOMES[name]: name for name in found.values()} == found
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        slothcore.lode  # noqa: B018


def test_report_writes_a_page_beside_the_run(run, tmp_path, capsys) -> None:
    page = run / "report.html"
    page.unlink(missing_ok=True)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    both = tmp_path / "both.html"
    assert main(["report", str(run), str(run), "-o", str(both)]) == 0
    assert both.is_file()


@pytest.mark.parametrize("flags", [[], ["-o", "page.html"]])
def test_a_run_that_is_misspelled_is_not_to_be_made(flags, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "rnu", *flags]) == 1
    assert capsys.readouterr().err == "slothcore: error: the run folder rnu does not exist\n"


def test_the_tilde_of_a_path_is_the_users_folder(folder, run, tmp_path, monkeypatch, capsys) -> None:
    """In YAML and behind an = no shell has made a path of it."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "mine.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    (home / "run.yaml").write_text("output_dir: ~/runs/x\nchat_template: ~/mine.jinja\n", encoding="utf-8")
    given = vars(build_parser().parse_args(["train", "~/run.yaml", "--resume-from-checkpoint=~/runs/x/checkpoint-1"]))
    config = config_of(given)
    assert config.output_dir == str(home / "runs" / "x")
    assert config.chat_template == str(home / "mine.jinja")
    assert config.resume_from_checkpoint == str(home / "runs" / "x" / "checkpoint-1")
    (home / "rows.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    files = ["--prompts-file=~/rows.jsonl", "--output=~/answers.jsonl"]
    assert main(["generate", "--model", str(run), *files, "--max-new-tokens", "1"]) == 0
    assert (home / "answers.jsonl").is_file()
    shutil.copytree(run, home / "run")
    assert main(["report", "~/run", "--output=~/page.html"]) == 0
    assert (home / "page.html").is_file()
    assert list(here.iterdir()) == []


def test_what_standard_output_cannot_encode_is_spelled(run, tmp_path, monkeypatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["report", str(run), "-o", str(tmp_path / "\u65e5.html")]) == 0
    assert shown.buffer.getvalue().endswith(rb"\u65e5.html" + b"\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_output_is_no_error(closed, folder) -> None:
    """As a daemon's script, or a window without a console, starts programs."""
    words = [sys.executable, "-m", "slothcore", "preview", "--model", folder / "model", "--data", folder / "data.jsonl"]
    assert subprocess.run(f"exec {shlex.join(map(str, words))} {closed}", shell=True, timeout=60).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_is_a_sentence_with_a_remedy(monkeypatch, capsys) -> None:
    """And nothing is left that would fail once more as Python exits."""
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        assert main(["doctor", "--json"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("slothcore: error: a file, or standard output, cannot be written: No space left on device;")


@pytest.mark.parametrize("format", ["gguf", "gguf-adapter", "ollama"])
def test_a_package_that_an_export_lacks_is_said_before_a_model_is_loaded(format, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("slothcore.export.gguf_file.find_spec", lambda name: None)
    assert main(["export", "--model", "./absent", "--format", format, "--output-dir", str(tmp_path / "out")]) == 1
    assert "install it with: pip install 'slothcore[gguf]'" in capsys.readouterr().err


def test_the_script_works_from_a_checkout(tmp_path) -> None:
    """Away from the repository, where only the script's own path leads to the package."""
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "train.py", "--bits", "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert result.stderr == "slothcore: error: bits must be 4 | 16 | 32, got '3'\n"
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_has_gone_is_no_error(folder, run) -> None:
    """As in `slothcore generate ... | true`."""
    argv = ["generate", "--model", str(folder / "model"), "--device", "cpu", "--prompt", "a", "--max-new-tokens", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "slothcore.cli", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert errors == b""


def test_underscores_are_dashes_in_every_command(folder, capsys) -> None:
    argv = ["generate", "--model", str(folder / "model"), "--device", "cpu", "--prompt", "a_b", "--max_new_tokens=2"]
    assert main(argv) == 0
    assert capsys.readouterr().out


def test_a_models_own_config_yaml_is_no_runs(folder, tmp_path, capsys) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "config.yaml").write_text("trainer: somebody else's\n")
    argv = ["generate", "--model", str(tmp_path / "model"), "--device", "cpu", "--prompt", "a"]
    assert main([*argv, "--max-new-tokens", "2"]) == 0


def test_names_of_other_programs_lead_to_the_option_here(capsys) -> None:
    for command, other, here in (
        ("serve", "max-model-len", "max_length"),
        ("serve", "lora-modules", "adapter"),
        ("generate", "max-length", "max_new_tokens"),
        ("generate", "do-sample", "temperature"),
        ("export", "quantization-method", "dtype"),
        ("export", "push-to-hub", "push"),
    ):
        assert (
            main([command, "--model", "./absent", *(["--format", "gguf"] * (command == "export")), f"--{other}", "x"])
            == 2
        )
        assert f"did you mean '{here}'?" in capsys.readouterr().err, other
    for words in (["train", "--push-to-hub", "x"], ["generate", "--model", "./absent", "--num-beams", "4"]):
        assert main(words) == 2
        assert "slothcore has nothing like it" in capsys.readouterr().err
    options = set()
    for command in COMMANDS.values():
        if not command.takes_config:
            parser = argparse.ArgumentParser()
            command.add_options(parser)
            options |= {action.dest for action in parser._actions}
    assert set(OTHER_FLAGS.values()) <= options


@pytest.mark.parametrize(("word", "hint"), [("trian", " (did you mean train?)"), ("xyz", "")])
def test_a_word_that_is_no_command(word, hint, capsys) -> None:
    assert main([word, "--model", "m"]) == 2
    said = capsys.readouterr().err
    assert said == f"slothcore: error: there is no command {word!r}{hint}; the commands are {', '.join(COMMANDS)}\n"


def test_an_option_before_any_command_is_not_passed_over(capsys) -> None:
    assert main(["--verson"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("slothcore: error: '--verson' is no option of slothcore itself; name a command")
    assert said.out == ""


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "slothcore", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"slothcore {__version__}\n")


def test_version(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"slothcore {__version__}\n"
