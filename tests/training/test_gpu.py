"""Training on a GPU: every optimizer, rates of their own, noise, float16 with loss scaling, resuming, graphs.

And a step that waits for nothing.
"""

import pytest
import torch

from slothcore.data.masking import TokenizedRow
from slothcore.lora.attach import add_lora
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config
from slothcore.training import trainer as trainer_module
from slothcore.training.config import TrainConfig
from slothcore.training.meter import Meter
from slothcore.training.optimizer_kinds import KINDS
from slothcore.training.report import read_log
from slothcore.training.step_feed import StepFeed
from slothcore.training.trainer import SFTTrainer
from tests.training.tiny import CONFIG, random_rows

pytestmark = pytest.mark.gpu

# Head dimension 64, a multiple of NF4's block in every row, and parameters large enough for 8-bit state.
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "initializer_range": 0.03,
}


# Passes over as many of these have the same number of tokens.
EQUAL_ROWS = [TokenizedRow([*range(i, i + 64)], [*range(i, i + 64)]) for i in range(16)]


def trainer(output_dir, *, dtype: torch.dtype = torch.bfloat16, bits: int = 4, rows=None, **options) -> SFTTrainer:
    torch.manual_seed(0)
    full = bool(options.get("full_finetuning"))
    model = from_config({**CONFIG, **SHAPE}, bits=bits, dtype=dtype, device="cuda")
    if not full:
        add_lora(model, r=options.pop("rank", 16), lora_dropout=options.pop("lora_dropout", 0.0))
    config = TrainConfig(
        output_dir=str(output_dir),
        bits=bits,
        **{
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 0,
            "plot": False,
            "disable_tqdm": True,
            **options,
        },
    )
    return SFTTrainer(model, None, rows or random_rows(16, longest=100), config=config)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_falls(tmp_path, dtype, optim) -> None:
    run = trainer(tmp_path, dtype=dtype, optim=optim, max_steps=30)
    assert run.scaler.is_enabled() == (dtype == torch.float16)
    run.train()
    log = read_log(tmp_path / "log.jsonl")
    losses = [record["loss"] for record in log]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert log[-1]["memory_gib"] > 0


# Where 1e-3 is too little for 30 steps.
RATES = {"sgd": 1.0}


@pytest.mark.parametrize("optim", sorted(KINDS.keys() - {"adamw", "adamw_8bit"}))
def test_the_loss_falls_with_every_optimizer(tmp_path, optim) -> None:
    trainer(tmp_path, optim=optim, max_steps=30, learning_rate=RATES.get(optim, 1e-3)).train()
    losses = [record["loss"] for record in read_log(tmp_path / "log.jsonl")]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_all_weights_train(tmp_path) -> None:
    run = trainer(tmp_path, bits=16, full_finetuning=True, max_steps=30)
    run.train()
    losses = [record["loss"] for record in read_log(tmp_path / "log.jsonl")]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_float16_steps_have_the_size_of_float32_ones(tmp_path) -> None:
    """The scale is taken out of the gradient before it is clipped and reported."""
    norms = []
    for name, dtype in {"half": torch.float16, "single": torch.float32}.items():
        trainer(tmp_path / name, dtype=dtype, max_steps=1).train()
        norms.append(read_log(tmp_path / name / "log.jsonl")[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@pytest.mark.parametrize("optim", KINDS)
def test_state_comes_back_to_the_last_bit(tmp_path, optim) -> None:
    """Kernels may add in another order from run to run, so what is compared is the restored state, not the course."""
    options = {"optim": optim, "dtype": torch.float16, "lora_dropout": 0.1}
    first = trainer(tmp_path, max_steps=4, save_steps=4, **options)
    first.train()
    generator = torch.cuda.get_rng_state()
    second = trainer(tmp_path, max_steps=8, resume_from_checkpoint="latest", **options)
    assert not torch.equal(torch.cuda.get_rng_state(), generator)  # drawing the second model moved it
    assert second._begin().step == 4
    assert torch.equal(torch.cuda.get_rng_state(), generator)
    assert second.scaler.get_scale() == first.scaler.get_scale()
    for name, parameter in first.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name
        ours, theirs = first.optimizer.state[parameter], second.optimizer.state[second.parameters[name]]
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert type(value) is type(theirs[key])
            assert torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key], key
            if isinstance(value, torch.Tensor):
                assert (value.dtype, value.device) == (theirs[key].dtype, theirs[key].device)
    if KINDS[optim].is_8bit:
        assert any(s.get("state1", torch.empty(0)).dtype == torch.uint8 for s in first.optimizer.state.values())


@pytest.mark.parametrize("optim", ["paged_adamw", "paged_adamw_8bit"])
def test_pages_come_back_as_pages(tmp_path, optim) -> None:
    """Rank 256 makes factors of 131,072 elements: from 100,000 on bitsandbytes has their moments in pages."""
    options = {"optim": optim, "max_steps": 8, "rank": 256, "cuda_graphs": True}
    first = trainer(tmp_path, save_steps=4, **options)
    first.train()
    kept = {name: {k: v.clone() for k, v in pages(first, name).items()} for name in first.parameters}
    assert sum(map(bool, kept.values())) == 2 * (2 * 7 - 2), "all factors but B of k and v, which are 256 by 256"
    allocated = sum(v.nbytes for s in first.optimizer.state.values() for v in s.values() if is_on_gpu(v))
    code_books = 2 * 256 * 4 * len(first.parameters) if optim == "paged_adamw_8bit" else 0
    assert first.memory.optimizer == pytest.approx(allocated - code_books)
    second = trainer(tmp_path, **{**options, "max_steps": 12}, resume_from_checkpoint="latest")
    assert second._begin().step == 8
    for name, states in kept.items():
        loaded = pages(second, name)
        assert loaded.keys() == states.keys()
        assert all(torch.equal(loaded[key], value) for key, value in states.items()), name
    second.train()
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 12


def pages(run: SFTTrainer, name: str) -> dict[str, torch.Tensor]:
    state = run.optimizer.state[run.parameters[name]]
    return {key: value for key, value in state.items() if getattr(value, "is_paged", False)}


def is_on_gpu(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_rates_of_their_own_change_nothing_else(tmp_path, cuda_graphs, optim) -> None:
    """LoRA+ at a ratio of 1 is the run without it, in groups of its own; at a ratio of 4, B moves further."""
    moved = {}
    for ratio in (None, 1.0, 4.0):
        run = trainer(tmp_path / str(ratio), optim=optim, cuda_graphs=cuda_graphs, loraplus_lr_ratio=ratio, max_steps=1)
        start = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
        run.train()
        moved[ratio] = [(p.detach() - start[n]).norm() for n, p in run.parameters.items() if n.endswith("lora_B")]
    for plain, one, four in zip(moved[None], moved[1.0], moved[4.0], strict=True):
        assert float(one) == pytest.approx(float(plain), rel=1e-2)
        assert float(four) == pytest.approx(4 * float(plain), rel=1e-2)


def test_overflow_is_skipped_on_the_gpu_and_said(tmp_path, monkeypatch) -> None:
    """A scale that begins far too high: nothing moves until it has come down, and the log counts the steps."""

    def create_scaler(model: Decoder) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(model.device.type, init_scale=2.0**32)

    monkeypatch.setattr(trainer_module, "create_scaler", create_scaler)
    run = trainer(tmp_path, dtype=torch.float16, max_steps=30)
    run.train()
    log = read_log(tmp_path / "log.jsonl")
    skipped = [record.get("skipped_steps", 0) for record in log]
    assert skipped[0] == 1
    assert sum(skipped) < 25
    assert run.scaler.get_scale() == 2.0 ** (32 - sum(skipped))
    assert all((record["grad_norm"] is None) == bool(count) for record, count in zip(log, skipped, strict=True))
    assert sum(record["loss"] for record in log[-4:]) < sum(record["loss"] for record in log[:4])


@pytest.mark.parametrize("bits", [4, 16])
def test_noise_on_embeddings_is_that_of_the_seed(tmp_path, bits) -> None:
    losses = []
    for name, alpha in (("one", 5.0), ("two", 5.0), ("none", None)):
        dtype = torch.float16 if bits == 16 else torch.bfloat16
        trainer(tmp_path / name, bits=bits, dtype=dtype, neftune_noise_alpha=alpha, max_steps=2).train()
        losses.append(read_log(tmp_path / name / "log.jsonl")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_step_does_not_wait_for_the_gpu(tmp_path, cuda_graphs, optim) -> None:
    """Not even the one whose line of the log is due."""
    run = trainer(tmp_path, rows=EQUAL_ROWS, max_grad_norm=0.5, cuda_graphs=cuda_graphs, optim=optim, max_steps=20)
    state = run._begin()
    steps = run._make_ready(state)
    run.model.train()
    meter = Meter(run.model.device, window_loss=0.0, window_steps=0, elapsed=0.0)
    with StepFeed(run.schedule, run.cut) as feed:
        for _ in range(4):  # compiles kernels, allocates state and pinned memory, captures graphs
            plan, loss, norm = steps.run(feed, 1.0)
            meter.add(loss, plan.num_tokens)
            meter.read(meter.close_window(norm))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan, loss, norm = steps.run(feed, 1.0)
            meter.add(loss, plan.num_tokens)
            reading = meter.close_window(norm)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert meter.read(reading).loss > 0
    if cuda_graphs:
        assert run.model.graphs.replays > 0


def take_a_step_without_waiting(run: SFTTrainer) -> None:
    """The third step of a run; waiting for the GPU in it is an error."""
    steps = run._make_ready(run._begin())
    run.model.train()
    with StepFeed(run.schedule, run.cut) as feed:
        for _ in range(2):
            steps.run(feed, 1.0)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps.run(feed, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_float16_with_adamw_does_not_wait_for_the_gpu(tmp_path) -> None:
    """torch skips the update of an overflowed gradient on the GPU. (bitsandbytes cannot.)"""
    take_a_step_without_waiting(trainer(tmp_path, rows=EQUAL_ROWS, dtype=torch.float16, cuda_graphs=False))


def test_noise_on_embeddings_does_not_wait_for_the_gpu(tmp_path) -> None:
    run = trainer(tmp_path, rows=EQUAL_ROWS, neftune_noise_alpha=5.0)
    assert not run.replays_graphs
    take_a_step_without_waiting(run)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_graphs_change_last_bits_only(tmp_path, optim) -> None:
    logs = []
    for graphs in (False, True):
        run = trainer(tmp_path / str(graphs), cuda_graphs=graphs, optim=optim, max_steps=12)
        run.train()
        assert run.model.graphs is None, "given back"
        logs.append(read_log(tmp_path / str(graphs) / "log.jsonl"))
    for eager, replayed in zip(*logs, strict=True):
        assert replayed["loss"] == pytest.approx(eager["loss"], rel=0.02)
        assert replayed["grad_norm"] == pytest.approx(eager["grad_norm"], rel=0.1)
