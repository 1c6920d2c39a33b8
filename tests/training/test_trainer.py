"""The loop: accumulation, packing, evaluation, clipping, what it writes and what it refuses."""

import json
import math

import pytest
import torch

from slothcore.data.files import load_dataset
from slothcore.data.tokenizer import Tokenizer
from slothcore.models.load import from_config
from slothcore.training.config import TrainConfig
from slothcore.training.report import draw_loss
from slothcore.training.run_state import checkpoints
from slothcore.training.trainer import SFTTrainer
from tests.numerics import relative_error
from tests.training.tiny import CONFIG, QUIET, random_rows, tiny_model, train, write_records, write_tokenizer


def trainable(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bits", [32, 4])
def test_accumulation_changes_nothing_but_rounding(tmp_path, bits) -> None:
    """8 rows of unequal target counts as 1 x 8, 2 x 4 and 8 x 1: the same loss, gradient norm and weights."""
    runs = {}
    for rows_at_once in (1, 2, 8):
        trainer, _, log = train(
            tmp_path / str(rows_at_once),
            random_rows(16),
            tiny_model(bits=bits),
            max_steps=3,
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=8 // rows_at_once,
            learning_rate=1e-2,
        )
        runs[rows_at_once] = trainable(trainer.model), log
    weights, log = runs[8]
    for other, other_log in (runs[1], runs[2]):
        for ours, theirs in zip(log, other_log, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for name, value in weights.items():
            assert torch.allclose(value, other[name], rtol=1e-3, atol=2e-5), name


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_every_gradient_is_the_same_however_a_step_is_cut(tmp_path, packing) -> None:
    """What the optimizer is given in one step of 8 rows, cut into 1 x 8, 2 x 4 and 8 x 1; targets are unequal."""
    gradients = {}
    for rows_at_once in (1, 2, 8):
        config = TrainConfig(
            output_dir=str(tmp_path / str(rows_at_once)),
            packing=packing,
            max_seq_length=64,
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=8 // rows_at_once,
            max_steps=1,
            max_grad_norm=0.0,
            **QUIET,
        )
        trainer = SFTTrainer(tiny_model(), None, random_rows(24), config=config)
        chosen = trainer.schedule.plan(0).rows
        assert len(chosen) == 8
        assert len({trainer.train_rows.row_targets[row] for row in chosen}) > 4
        given = gradients[rows_at_once] = {}

        def remember(optimizer, arguments, options, trainer=trainer, given=given) -> None:
            given.update({name: weight.grad.clone() for name, weight in trainer.parameters.items()})

        trainer.optimizer.register_step_pre_hook(remember)
        trainer.train()
    assert all(len(given) == 2 * 2 * 7 for given in gradients.values())
    for name, gradient in gradients[8].items():
        assert gradient.norm() > 0, name
        for other in (gradients[1], gradients[2]):
            assert relative_error(other[name], gradient) < 1e-5, name


def test_the_gradient_of_a_step_is_that_of_the_mean_over_its_targets(tmp_path) -> None:
    """Against one padded batch through the model's public forward, loss averaged over all targets by torch."""
    rows = random_rows(8)
    model = tiny_model()
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
    labels = torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
    logits = model(ids, attention_mask=mask).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
    _, _, log = train(tmp_path, rows, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert log[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_packed_rows_give_the_loss_of_unpacked_ones(tmp_path) -> None:
    rows = random_rows(20)
    losses = {}
    for packing in (False, True):
        trainer, _, log = train(
            tmp_path / str(packing),
            rows,
            packing=packing,
            max_seq_length=100,
            max_steps=1,
            per_device_train_batch_size=32,
        )
        losses[packing] = log[0]
        assert (len(trainer.train_rows) < len(rows)) == packing
    assert losses[True]["tokens"] == losses[False]["tokens"]
    assert losses[True]["loss"] == pytest.approx(losses[False]["loss"], rel=1e-5)
    assert losses[True]["grad_norm"] == pytest.approx(losses[False]["grad_norm"], rel=1e-4)


def test_evaluation_counts_tokens_not_batches(tmp_path) -> None:
    rows = random_rows(7, seed=3)
    results = []
    for size in (1, 3, 7):
        trainer, _, _ = train(
            tmp_path / str(size), random_rows(4), eval_rows=rows, max_steps=1, per_device_eval_batch_size=size
        )
        results.append(trainer.evaluate().loss)
        assert trainer.model.training
    assert results[1:] == pytest.approx([results[0]] * 2, rel=1e-6)
    total = sum(
        trainer.model(torch.tensor(row.input_ids), labels=torch.tensor(row.labels), num_items=1).loss.item()
        for row in rows
    )
    assert results[0] == pytest.approx(total / sum(row.num_targets for row in rows), rel=1e-5)


def test_evaluation_is_due_every_eval_steps_and_at_the_end(tmp_path) -> None:
    _, result, log = train(tmp_path, random_rows(8), eval_rows=random_rows(3, seed=1), max_steps=5, eval_steps=2)
    evaluated = [record for record in log if "eval_loss" in record]
    assert [record["step"] for record in evaluated] == [2, 4, 5]
    assert result.eval_loss == evaluated[-1]["eval_loss"]
    assert evaluated[-1]["eval_perplexity"] == pytest.approx(math.exp(result.eval_loss))


def test_evaluation_does_not_disturb_training(tmp_path) -> None:
    """Dropout draws the same numbers whether or not there was an evaluation between two steps."""
    evaluated = {"eval_rows": random_rows(3, seed=1), "eval_steps": 1}
    runs = [
        train(tmp_path / str(i), random_rows(8), tiny_model(dropout=0.3), max_steps=4, **options)
        for i, options in enumerate(({}, evaluated))
    ]
    first, second = (trainable(run[0].model) for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_clipping_scales_the_update_and_reports_the_norm_before(tmp_path) -> None:
    """SGD would show the scale; AdamW's first moment does too: after one step it is (1 - beta1) times the gradient."""
    moments = {}
    for max_grad_norm in (0.0, 0.05):
        trainer, _, log = train(tmp_path / str(max_grad_norm), random_rows(8), max_steps=1, max_grad_norm=max_grad_norm)
        state = [s["exp_avg"].square().sum() for s in trainer.optimizer.state.values()]
        moments[max_grad_norm] = torch.stack(state).sum().sqrt().item() / (1 - 0.9)
        assert log[0]["grad_norm"] > 0.05
    assert moments[0.0] == pytest.approx(log[0]["grad_norm"], rel=1e-4)
    assert moments[0.05] == pytest.approx(0.05, rel=1e-3)


def test_the_log_averages_the_steps_between_its_lines(tmp_path) -> None:
    _, _, every = train(tmp_path / "a", random_rows(8), max_steps=5)
    _, result, thinned = train(tmp_path / "b", random_rows(8), max_steps=5, logging_steps=2)
    assert [record["step"] for record in thinned] == [2, 4, 5]
    losses = [record["loss"] for record in every]
    expected = [sum(losses[0:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert [record["loss"] for record in thinned] == pytest.approx(expected, rel=1e-12)
    assert result.train_loss == pytest.approx(sum(losses) / 5, rel=1e-12)


def test_decay_spares_biases_and_norms(tmp_path) -> None:
    torch.manual_seed(0)
    model = from_config(CONFIG, device="cpu")
    config = TrainConfig(
        output_dir=str(tmp_path), bits=32, full_finetuning=True, weight_decay=0.1, max_steps=1, **QUIET
    )
    trainer = SFTTrainer(model, None, random_rows(4), config=config)
    decayed, exempt = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[0].rpartition(".")[2] for p in exempt["params"]} == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)


def test_a_second_run_of_a_trainer_is_a_run_of_its_own(tmp_path) -> None:
    """As after a first one that failed: the moments of its steps do not count."""
    model = tiny_model(dropout=0.1)
    config = TrainConfig(output_dir=str(tmp_path), overwrite_output_dir=True, max_steps=3, **QUIET)
    trainer = SFTTrainer(model, None, random_rows(8), config=config)
    begin = trainable(model)
    trainer.train()
    first = trainable(model)
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter.copy_(begin[name])
    trainer.train()
    assert all(torch.equal(value, first[name]) for name, value in trainable(model).items())


def test_a_run_of_records_leaves_everything_it_promises(tmp_path) -> None:
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path / "tokenizer"))
    records = load_dataset(write_records(tmp_path / "data.jsonl"))
    out = tmp_path / "run"
    config = TrainConfig(
        output_dir=str(out), max_steps=3, save_steps=3, logging_steps=1, disable_tqdm=True, max_seq_length=128
    )
    result = SFTTrainer(tiny_model(), tokenizer, records, config=config).train()
    assert result.path == out / "adapter"
    files = {"config.yaml", "log.jsonl", "run.json", "report.html", "loss.png"}
    assert {path.name for path in out.iterdir()} == {*files, "checkpoint-3", "adapter"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    for folder in (out / "adapter", out / "checkpoint-3"):
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
            p.name for p in folder.iterdir()
        }
    for line in (out / "log.jsonl").read_text().splitlines():
        assert {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "elapsed"} <= json.loads(
            line
        ).keys()


def test_without_matplotlib_the_drawing_is_a_sentence(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    train(tmp_path, random_rows(4), max_steps=1, plot=True)
    assert "loss.png was not drawn: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "loss.png").exists()


def test_without_a_line_in_the_log_nothing_is_drawn(tmp_path) -> None:
    assert draw_loss(tmp_path) == "loss.png was not drawn: the log has no line yet"
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_no_number_stops_the_run(tmp_path) -> None:
    with pytest.raises(ValueError, match="the loss or its gradient is no longer finite"):
        train(tmp_path, random_rows(8), max_steps=20, learning_rate=1e30, max_grad_norm=0.0)
    assert not (tmp_path / "adapter").exists()


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path) -> None:
    """Even in the last step, whose loss came before it: the weights that it made must not be saved."""
    model = tiny_model()
    weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ValueError, match="the loss or its gradient is no longer finite"):
        train(tmp_path, random_rows(8), model, max_steps=1, save_steps=1)
    assert not (tmp_path / "adapter").exists()
    assert not checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({}, [], "the training dataset is empty"),
        ({"max_seq_length": 8}, None, "has 11 tokens; max_seq_length is 8|tokens; max_seq_length is 8"),
        ({"max_seq_length": 4096}, None, "max_seq_length is 4096, but the model takes at most 128"),
        ({"optim": "adamw_8bit"}, None, "optim adamw_8bit needs a GPU"),
        ({"eval_rows": []}, None, "the evaluation dataset is empty"),
        ({"eval_steps": 2}, None, "eval_steps is 2, but there is no evaluation data"),
        ({"full_finetuning": True, "bits": 32}, None, "the model has a LoRA adapter"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path, options, rows, message) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(out, random_rows(4) if rows is None else rows, **options)
    assert not out.exists()


def test_a_model_without_adapter_needs_full_finetuning(tmp_path) -> None:
    model = from_config(CONFIG, device="cpu")
    with pytest.raises(ValueError, match=r"no LoRA adapter; call slothcore\.add_lora"):
        train(tmp_path / "run", random_rows(4), model)
