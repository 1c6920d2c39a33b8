"""float16 with loss scaling: the recipe of torch, to the last bit; skipped steps; the scale across a checkpoint.

A float16 model computes on a CPU too, and torch has a scaler for it, so all of it is tested without a GPU.
"""

import copy
from typing import Any

import pytest
import torch

from slothcore.lora.attach import add_lora
from slothcore.models.decoder import Decoder
from slothcore.models.load import from_config, resolve_dtype
from slothcore.training import trainer as trainer_module
from slothcore.training.optimizer import create_scaler
from slothcore.training.report import read_log
from slothcore.training.schedule import learning_rate_factor
from tests.training.tiny import CONFIG, random_rows, tiny_model, train

HALF = {"bits": 16, "learning_rate": 1e-2, "max_steps": 8, "max_grad_norm": 0.5}


def half_model() -> Decoder:
    torch.manual_seed(0)
    model = add_lora(from_config(CONFIG, bits=16, dtype=torch.float16, device="cpu"), r=4, lora_alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.02)
    return model


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A scale that begins far too high, and is doubled after every two updates: many steps are skipped."""
    options = {"init_scale": 2.0**23, "growth_interval": 2}
    monkeypatch.setattr(
        trainer_module, "create_scaler", lambda model: torch.amp.GradScaler(model.device.type, **options)
    )
    return options


@pytest.mark.parametrize("optim", ["adamw", "sgd", "adafactor"])
def test_a_run_is_torchs_recipe_to_the_last_bit(tmp_path, restless, optim) -> None:
    """Scale the loss, take the scale out, clip, skip or step, update the scale. A skipped step counts as a step."""
    model = half_model()
    reference = copy.deepcopy(model)
    trainer, _, log = train(tmp_path, random_rows(12), model, optim=optim, **HALF)

    parameters = [p for p in reference.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler("cpu", **restless)
    optimizer = type(trainer.optimizer)(
        parameters, lr=1e-2, **({} if optim == "adafactor" else {"fused": True, "weight_decay": 0.0})
    )
    reference.train()
    skipped = []
    for step in range(8):
        plan = trainer.schedule.plan(step)
        for rows in trainer.cut.passes(plan.rows):
            batch = trainer.train_rows.micro_batch(rows)
            loss = reference(
                batch.input_ids, labels=batch.labels, cu_seqlens=batch.cu_seqlens, num_items=plan.num_targets
            ).loss
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        factor = learning_rate_factor("linear", step, warmup_steps=0, total_steps=8)
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        before, scale = [p.detach().clone() for p in parameters], scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped.append(not norm.isfinite())
        assert skipped[-1] == all(map(torch.equal, parameters, before)) == (scaler.get_scale() < scale)
        assert log[step]["learning_rate"] == 1e-2 * factor
        assert log[step].get("skipped_steps", 0) == skipped[-1]
        assert log[step]["grad_norm"] == (None if skipped[-1] else norm.item())
    assert 2 <= sum(skipped) <= 6
    assert trainer.scaler.get_scale() == scaler.get_scale()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(map(torch.equal, trained, parameters))


@pytest.mark.parametrize("graphs_wanted", [False, True])
def test_a_checkpoint_has_the_scale_and_what_was_skipped(tmp_path, restless, graphs, graphs_wanted) -> None:
    """Saved while a line of the log is half collected, and while the scale waits for its next growth."""
    options = {**HALF, "logging_steps": 4, "cuda_graphs": graphs_wanted}
    rows = random_rows(12)
    straight, _, expected = train(tmp_path / "straight", rows, half_model(), **options)
    train(tmp_path / "resumed", rows, half_model(), save_steps=3, **options)
    resumed, result, log = train(
        tmp_path / "resumed",
        rows,
        half_model(),
        resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-3"),
        **options,
    )
    assert result.steps == 8
    assert resumed.scaler.state_dict() == straight.scaler.state_dict()
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
    assert [(r["loss"], r["grad_norm"], r["skipped_steps"]) for r in log] == [
        (r["loss"], r["grad_norm"], r["skipped_steps"]) for r in expected
    ]
    assert any(made.replays for made in graphs) == graphs_wanted


def test_skipped_steps_are_said(tmp_path, restless, capsys) -> None:
    train(tmp_path, random_rows(12), half_model(), **HALF)
    train(tmp_path / "none", random_rows(12), tiny_model(), **{**HALF, "bits": 32})
    shown = [(path / "report.html").read_text(encoding="utf-8") for path in (tmp_path, tmp_path / "none")]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")][:8]
    skipped = [record.get("skipped_steps", 0) for record in read_log(tmp_path / "log.jsonl")]
    assert ["1 skipped" in line for line in lines] == [count == 1 for count in skipped]
    assert f"<dt>Skipped steps</dt><dd>{sum(skipped)}</dd>" in shown[0]
    assert "Skipped steps" not in shown[1]


def test_a_run_that_skips_everything_ends(tmp_path) -> None:
    """Once no scale can be the reason, and with its log written; a checkpoint would be one of nothing learned."""
    model = half_model()
    weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    weight.register_hook(lambda gradient: gradient * float("inf"))
    options = {**HALF, "max_steps": 200, "logging_steps": 20, "cuda_graphs": False}
    with pytest.raises(ValueError, match="do not fit into float16 at any scale: 60 steps in a row were skipped; train"):
        train(tmp_path, random_rows(12), model, **options)
    log = read_log(tmp_path / "log.jsonl")
    assert [record["skipped_steps"] for record in log] == [20, 20, 20]
    assert not (tmp_path / "adapter").exists()


def test_gradients_too_small_for_float16_are_learned_from(tmp_path) -> None:
    """Unscaled, whatever is below 6e-8 is zero in a backward pass."""

    def gradients(model: Decoder, scale: float) -> list[torch.Tensor]:
        ids = torch.arange(30)
        (model(ids, labels=ids, num_items=1e7).loss * scale).backward()
        return [p.grad / scale for p in model.parameters() if p.requires_grad]

    exact = gradients(tiny_of(half_model()), 1.0)
    scaled, unscaled = (gradients(half_model().train(), scale) for scale in (65536.0, 1.0))
    errors = [
        max(float((g - e).norm() / e.norm()) for g, e in zip(found, exact, strict=True)) for found in (scaled, unscaled)
    ]
    assert errors[0] < 0.02
    assert errors[1] > 0.5


def tiny_of(model: Decoder) -> Decoder:
    """The same in float32."""
    model = copy.deepcopy(model).float().train()
    model.dtype = torch.float32
    return model


def test_only_float16_is_scaled() -> None:
    assert create_scaler(half_model()).is_enabled()
    assert not create_scaler(tiny_model()).is_enabled()
    assert not create_scaler(from_config(CONFIG, bits=16, dtype=torch.bfloat16, device="cpu")).is_enabled()


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_a_gpu_without_bfloat16_computes_in_float16(monkeypatch, bits, capability, dtype) -> None:
    """V100 and T4; torch emulates bfloat16 there, and calls it supported."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype(bits, None, torch.device("cuda", 0)) == dtype
    assert resolve_dtype(32, None, torch.device("cuda", 0)) == torch.float32
