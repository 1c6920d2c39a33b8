"""30 steps straight equal 15 steps, the process killed, and 15 more after resuming: to the last bit."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slothcore.data import chat
from slothcore.run import load_both, train_from_config
from slothcore.training import resume
from slothcore.training.config import TrainConfig
from slothcore.training.report import read_log
from slothcore.training.run_state import checkpoints
from tests.training.tiny import random_rows, train, write_model, write_records

ROOT = Path(__file__).resolve().parents[2]
CLOCK = {"elapsed", "tokens_per_second", "host_memory_gib"}

# The first 17 steps pass, and the 18th ends the process as a power cut would: nothing is cleaned up.
KILLED_IN_STEP_18 = """
import os, signal, sys
from slothcore.cli import main
from slothcore.training.optimizer_step import OptimizerStep

original, steps = OptimizerStep.run, []

def run(self, *arguments):
    steps.append(1)
    if len(steps) == 18:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)

OptimizerStep.run = run
sys.exit(main(["train", *sys.argv[1:]]))
"""

KINDS = {
    # Dropout draws random numbers, so the generator's state must come back too.
    # Packed, an epoch is 2 steps, the second of one row.
    "lora nf4": {"bits": 4, "r": 4, "lora_dropout": 0.1, "packing": True},
    "dora": {"bits": 4, "r": 4, "use_dora": True, "lora_dtype": "auto", "gradient_accumulation_steps": 3},
    # An epoch is 4 steps, the last of one row: step 15 is the third of the fourth.
    "all weights": {"bits": 32, "full_finetuning": True, "gradient_accumulation_steps": 3},
}


def options(folder: Path, output: str, **changes) -> dict:
    return {
        "model": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "device": "cpu",
        "output_dir": str(folder / output),
        "max_seq_length": 128,
        "overlength": "truncate",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "weight_decay": 0.01,
        "max_steps": 30,
        # Neither divides the other: at step 15 a line of the log is half collected.
        "logging_steps": 2,
        "save_steps": 15,
        "eval_fraction": 0.2,
        "eval_steps": 10,
        "plot": False,
        "disable_tqdm": True,
        **changes,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_model(folder / "model")
    write_records(folder / "data.jsonl")
    return folder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def train_in_a_process(values: dict, *program: str, **options) -> subprocess.Popen:
    """Train in a process of its own, as a user would."""
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = program or (str(ROOT / "scripts" / "train.py"),)
    return subprocess.Popen([sys.executable, *program, *flags], env=environment, cwd=ROOT, text=True, **options)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "training ended before it was to be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_equals_straight(folder, kind) -> None:
    straight, killed = folder / f"straight {kind}", folder / f"killed {kind}"
    assert train_in_a_process(options(folder, straight.name, **KINDS[kind])).wait(timeout=120) == 0

    log = killed / "log.jsonl"
    process = train_in_a_process(options(folder, killed.name, **KINDS[kind]), "-c", KILLED_IN_STEP_18)
    assert process.wait(timeout=120) == -signal.SIGKILL
    assert read_log(log)[-1]["step"] == 16
    # What a writer leaves that was killed in the middle of a line, and of a checkpoint.
    with log.open("a") as file:
        file.write('{"step": 23, "lo')
    (killed / ".checkpoint-30.partial").mkdir(exist_ok=True)

    resumed = options(folder, killed.name, resume_from_checkpoint="latest", **KINDS[kind])
    assert train_in_a_process(resumed).wait(timeout=120) == 0

    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in straight.iterdir())
    result = "model" if "full_finetuning" in KINDS[kind] else "adapter"
    for part in ("checkpoint-30", "checkpoint-15", result):
        names = sorted(p.name for p in (straight / part).iterdir())
        assert names == sorted(p.name for p in (killed / part).iterdir())
        for name in names:
            if name != "state.json":
                assert digest(straight / part / name) == digest(killed / part / name), f"{part}/{name}"
    states = [json.loads((f / "checkpoint-30" / "state.json").read_text()) for f in (straight, killed)]
    for state in states:
        del state["elapsed"], state["rows_made"], state["config"]
    assert states[0] == states[1]
    middle = json.loads((straight / "checkpoint-15" / "state.json").read_text())
    assert middle["epoch"] >= 2
    assert middle["position"] > 0, "an epoch is to be cut in two"
    logs = [
        [{k: v for k, v in record.items() if k not in CLOCK} for record in read_log(f / "log.jsonl")]
        for f in (straight, killed)
    ]
    assert logs[0] == logs[1]
    steps = [record["step"] for record in logs[1] if "loss" in record]
    assert steps == list(range(2, 31, 2))


def test_the_checkpoint_holds_the_moments_and_the_generator(folder) -> None:
    checkpoint = folder / "straight lora nf4" / "checkpoint-30"
    if not checkpoint.is_dir():
        pytest.skip("the run that writes it was not selected")
    tensors = load_file(checkpoint / "optimizer.safetensors")
    assert {key.rpartition("/")[2] for key in tensors} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(tensor == 30 for key, tensor in tensors.items() if key.endswith("/step"))
    assert load_file(checkpoint / "rng.safetensors")["cpu"].dtype == torch.uint8


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(folder) -> None:
    out = folder / "interrupted"
    values = options(folder, out.name, bits=32, max_steps=100000, save_steps=0, logging_steps=1)
    process = train_in_a_process(values, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: bool(read_log(out / "log.jsonl")), process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "\nstopping after this step; Ctrl-C again stops at once, without a checkpoint\n"
    assert f"slothcore train --config {out / 'config.yaml'} --resume-from-checkpoint latest" in output
    assert [p.name for p in checkpoints(out)] == [f"checkpoint-{read_log(out / 'log.jsonl')[-1]['step']}"]


def test_ctrl_c_ends_tee_as_well_and_the_checkpoint_is_saved_all_the_same(folder) -> None:
    """As in `slothcore train ... 2>&1 | tee train.log`, where the terminal sends the signal to both."""
    out = folder / "behind tee"
    values = options(folder, out.name, bits=32, max_steps=100000, save_steps=0, logging_steps=1)
    process = train_in_a_process(values, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: bool(read_log(out / "log.jsonl")), process)
    process.stdout.close()
    first = len(read_log(out / "log.jsonl"))
    wait_for(lambda: len(read_log(out / "log.jsonl")) > first + 3, process)  # lines that nobody reads
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert [p.name for p in checkpoints(out)] == [f"checkpoint-{read_log(out / 'log.jsonl')[-1]['step']}"]


@pytest.fixture(scope="module")
def short_run(folder) -> Path:
    train_from_config(TrainConfig(**options(folder, "short", bits=32, max_steps=4, save_steps=2)))
    return folder / "short"


def test_a_finished_run_goes_on_when_max_steps_is_raised(folder, short_run) -> None:
    values = options(folder, "longer", bits=32, max_steps=6, save_steps=2)
    result = train_from_config(TrainConfig(**values, resume_from_checkpoint=str(short_run / "checkpoint-4")))
    assert result.steps == 6
    records = read_log(folder / "longer" / "log.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [2, 4, 6]


@pytest.mark.parametrize("best", [False, True])
def test_a_run_that_could_not_write_its_result_writes_it_when_it_is_resumed(tmp_path, best) -> None:
    """As where the last checkpoint had filled the disk: no step is left to do, and the result is still to come."""
    options = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.3}
    if best:
        options |= {"eval_steps": 1, "load_best_model_at_end": True}
    rows, eval_rows = random_rows(16), random_rows(4, seed=1)
    _, before, _ = train(tmp_path, rows, eval_rows=eval_rows, **options)
    (file,) = (tmp_path / "adapter").glob("*.safetensors")
    content, log = file.read_bytes(), (tmp_path / "log.jsonl").read_bytes()
    if best:
        shutil.rmtree(tmp_path / "adapter")
    else:
        file.write_bytes(b"of the run when it was shorter")
        os.utime(tmp_path / "adapter", (0, 0))
    _, after, _ = train(tmp_path, rows, eval_rows=eval_rows, resume_from_checkpoint="latest", **options)
    assert file.read_bytes() == content
    assert (tmp_path / "log.jsonl").read_bytes() == log
    assert (after.steps, after.train_loss, after.best_step) == (4, before.train_loss, before.best_step)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"
    with pytest.raises(ValueError, match="has already done 4 of 4 steps; raise max_steps to go on"):
        train(tmp_path, rows, eval_rows=eval_rows, resume_from_checkpoint="latest", **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, "is of another model"),
        ({"bits": 4}, "is of another model"),
        ({"model": "other"}, "is of another model"),
        ({"completion_only_loss": False}, "was trained on other data"),
        ({"packing": True}, "was trained on other data"),
        ({"max_steps": 4}, "has already done 4 of 4 steps; raise max_steps to go on"),
        ({"max_steps": -1, "num_train_epochs": 0.01}, "has already done 4 of 1 steps; raise num_train_epochs to go on"),
        ({"resume_from_checkpoint": "nowhere"}, "the checkpoint folder nowhere does not exist"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(folder, short_run, tmp_path, changes, message) -> None:
    if changes.get("model") == "other":
        # The same shapes: only the values tell it apart.
        changes = {"model": str(write_model(folder / "other", seed=1))}
    values = {
        **options(folder, "x", bits=32, max_steps=8),
        "output_dir": str(tmp_path / "run"),
        "resume_from_checkpoint": str(short_run / "checkpoint-4"),
        **changes,
    }
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        train_from_config(TrainConfig(**values))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_after_midnight_with_a_template_that_writes_the_day(folder, tmp_path, monkeypatch) -> None:
    """As Llama 3.2's does: each row begins with the day on which it was made."""

    def on_day(day: int) -> None:
        class Today(datetime):
            @classmethod
            def now(cls, tz=None) -> datetime:
                return datetime(2031, 1, day, 23, 59)

        for module in (chat, resume):
            monkeypatch.setattr(module, "datetime", Today, raising=False)

    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}\nassistant: {% endif %}"
    )
    turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(12)]
    data = tmp_path / "turns.json"
    data.write_text(json.dumps([{"messages": messages} for messages in turns]))
    chosen = {"data": str(data), "chat_template": str(template), "bits": 32, "save_steps": 2, "max_steps": 4}
    values = {**options(folder, "x", **chosen), "sample_prompts": "Who?", "sample_max_new_tokens": 2}
    straight, halves = ({**values, "output_dir": str(tmp_path / name)} for name in ("straight", "halves"))
    on_day(1)
    train_from_config(TrainConfig(**straight))
    train_from_config(TrainConfig(**halves))
    on_day(2)
    train_from_config(TrainConfig(**halves, resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-2")))
    adapters, samples = "*/adapter/adapter_model.safetensors", "*/samples.jsonl"
    assert len({digest(path) for path in tmp_path.glob(adapters)}) == 1 == len([*tmp_path.glob(samples)]) - 1
    assert len({digest(path) for path in tmp_path.glob(samples)}) == 1
    _, tokenizer = load_both(str(folder / "model"), bits=32, device="cpu")
    tokenizer.use_chat_template(str(template))
    assert tokenizer.apply_chat_template(turns[0]).startswith("02 Jan 2031"), "where nothing goes on, it is today"


def test_a_damaged_checkpoint_is_refused(folder, short_run, tmp_path) -> None:
    broken = tmp_path / "checkpoint-2"
    shutil.copytree(short_run / "checkpoint-2", broken)
    with (broken / "optimizer.safetensors").open("r+b") as file:
        file.truncate(100)
    values = options(folder, "x", bits=32, max_steps=8, resume_from_checkpoint=str(broken))
    values["output_dir"] = str(tmp_path / "run")
    with pytest.raises(ValueError, match=r"optimizer.safetensors cannot be read.*resume from another checkpoint"):
        train_from_config(TrainConfig(**values))


def test_resuming_an_older_checkpoint_rewinds_the_run(folder, tmp_path) -> None:
    values = options(folder, "x", bits=32, max_steps=6, save_steps=2, save_total_limit=None)
    values["output_dir"] = str(tmp_path / "run")
    train_from_config(TrainConfig(**values))
    reference = read_log(tmp_path / "run" / "log.jsonl")
    train_from_config(TrainConfig(**values, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")))
    again = read_log(tmp_path / "run" / "log.jsonl")
    assert [[r["step"], r.get("loss"), r.get("eval_loss")] for r in again] == [
        [r["step"], r.get("loss"), r.get("eval_loss")] for r in reference
    ]
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
