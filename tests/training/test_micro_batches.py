"""Steps cut by memory: the same result for any cut, the same cut after resuming, and what the user is told."""

import re
from itertools import product

import pytest
import torch

from benchmarks.shapes import LLAMA_3_1_8B
from slothcore.data.masking import TokenizedRow
from slothcore.lora.config import LoraConfig
from slothcore.models.families import decoder_config
from slothcore.training import readiness
from slothcore.training.batches import RowSet, StepSchedule
from slothcore.training.config import TrainConfig
from slothcore.training.memory import memory_of, plan_memory
from slothcore.training.micro_batches import (
    GIB,
    PassSample,
    StepCut,
    choose_token_budget,
    compare,
    describe,
    longest_pass,
    sample_passes,
)
from slothcore.training.run_state import checkpoints, read_state
from slothcore.training.trainer import SFTTrainer
from tests.numerics import relative_error
from tests.training.tiny import QUIET, random_rows, tiny_model, train

DROPOUT = 0.2
STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def row_set(lengths) -> RowSet:
    return RowSet([TokenizedRow([1] * length, [1] * length) for length in lengths])


def budget_for(tokens: int, **options) -> float:
    """GiB with which a pass of this tiny model may have this many tokens, and none more."""
    return memory_of(tiny_model(**options), optim="adamw").peak(tokens, passes=2) / GIB


def test_rows_are_merged_without_dividing_any() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = torch.randint(2, 40, (9,), generator=generator).tolist()
        rows, budget = row_set(lengths), int(torch.randint(1, 120, (1,), generator=generator))
        order = torch.randperm(9, generator=generator).tolist()
        groups = rows.merged(order, budget)
        assert groups == rows.merged(order, budget)
        assert sorted(row for group in groups for row in group) == list(range(9))
        for group in groups:
            assert len(group) == 1 or sum(lengths[row] for row in group) <= budget
            assert [order.index(row) for row in group] == sorted(order.index(row) for row in group)
        assert [order.index(group[0]) for group in groups] == sorted(order.index(group[0]) for group in groups)


@pytest.mark.parametrize(
    ("lengths", "budget", "groups"),
    [
        ([10, 20, 30, 40], 100, [[0, 1, 2, 3]]),
        ([10, 20, 30, 40], 50, [[0, 3], [1, 2]]),
        ([10, 20, 30, 40], 35, [[0, 1], [2], [3]]),
        ([10, 20, 30, 40], 0, [[0], [1], [2], [3]]),
    ],
)
def test_as_few_passes_as_fit(lengths, budget, groups) -> None:
    rows = row_set(lengths)
    cut = StepCut(rows, 2, token_budget=budget)
    assert cut.passes(range(4)) == groups
    assert [cut.tokens(group) for group in groups] == [sum(lengths[row] for row in group) for group in groups]


def test_a_sample_of_passes() -> None:
    """8 rows of 30 tokens, 3 a step: passes of 60, 30, 60, 30 and 60 tokens."""
    rows = row_set([30] * 8)
    schedule = StepSchedule(rows, step_rows=3, seed=0, max_steps=3)
    cut = StepCut(rows, 2, token_budget=None)
    assert sample_passes(cut, schedule, first_step=0) == PassSample(60, 48.0, fewest=1, most=2)
    assert sample_passes(cut, schedule, first_step=2) == PassSample(60, 60.0, fewest=1, most=1)


@pytest.mark.parametrize(("at_most", "expected"), [(99, 60), (60, 60), (59, 30), (29, 0)])
def test_the_longest_pass_that_graphs_take(at_most, expected) -> None:
    """The same passes of 60, 30, 60, 30 and 60 tokens."""
    rows = row_set([30] * 8)
    schedule = StepSchedule(rows, step_rows=3, seed=0, max_steps=3)
    cut = StepCut(rows, 2, token_budget=None)
    assert longest_pass(cut, schedule, first_step=0, at_most=at_most) == expected


def test_the_longest_pass_is_looked_for_in_the_steps_to_come() -> None:
    """One row a step, of 2 to 41 tokens in some order: from every step on, the longest of what is left."""
    rows = row_set(range(2, 42))
    schedule = StepSchedule(rows, step_rows=1, seed=3, max_steps=40)
    cut = StepCut(rows, 1, token_budget=None)
    lengths = [schedule.plan(step).num_tokens for step in range(40)]
    assert sorted(lengths) == list(range(2, 42))
    for first in range(40):
        fits = [tokens for tokens in lengths[first:] if tokens <= 33]
        assert longest_pass(cut, schedule, first_step=first, at_most=33) == max(fits, default=0)


def test_without_a_budget_rows_go_through_as_many_at_a_time_as_asked() -> None:
    assert StepCut(row_set([5] * 5), 2, token_budget=None).passes([4, 0, 3, 1, 2]) == [[4, 0], [3, 1], [2]]


@pytest.mark.parametrize(("packing", "bits"), product([False, True], [32, 4]))
def test_losses_and_gradients_are_the_same_for_any_cut(tmp_path, packing, bits) -> None:
    """Rows one by one, some together, all in one pass, and in fixed pairs; targets are unequal."""
    given, losses, passes = {}, {}, {}
    for name, tokens in (("alone", 0), ("some", 130), ("one pass", 100_000), ("pairs", None)):
        model = tiny_model(bits=bits)
        config = TrainConfig(
            output_dir=str(tmp_path / name),
            memory_budget=None if tokens is None else budget_for(tokens, bits=bits),
            packing=packing,
            max_seq_length=64,
            max_steps=1,
            max_grad_norm=0.0,
            **STEP,
            **QUIET,
        )
        trainer = SFTTrainer(model, None, random_rows(24), config=config)
        seen, gradients = [], {}
        model.register_forward_hook(lambda *_, seen=seen: seen.append(1))

        def remember(optimizer, arguments, options, trainer=trainer, gradients=gradients) -> None:
            gradients.update({name: weight.grad.clone() for name, weight in trainer.parameters.items()})

        trainer.optimizer.register_step_pre_hook(remember)
        losses[name] = trainer.train().train_loss
        given[name], passes[name] = gradients, len(seen)
    assert passes["alone"] == 8
    assert passes["pairs"] == 4
    assert passes["one pass"] == 1
    assert 1 < passes["some"] < 8
    for name in ("some", "one pass", "pairs"):
        assert losses[name] == pytest.approx(losses["alone"], rel=1e-6)
        for weight, gradient in given["alone"].items():
            assert gradient.norm() > 0
            assert relative_error(given[name][weight], gradient) < 1e-5, weight


def run(folder, **options):
    """Steps with dropout, whose numbers depend on the cut."""
    torch.manual_seed(0)
    options = {"save_steps": 3, "learning_rate": 1e-2, **STEP, **options}
    return train(folder, random_rows(24), tiny_model(dropout=DROPOUT), lr_scheduler_type="constant", **options)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


def test_a_resumed_run_is_cut_as_its_checkpoint_says(tmp_path, monkeypatch) -> None:
    budget = budget_for(90, dropout=DROPOUT)
    straight, _, _ = run(tmp_path / "straight", max_steps=6, memory_budget=budget)
    run(tmp_path / "halves", max_steps=3, memory_budget=budget)
    (checkpoint,) = checkpoints(tmp_path / "halves")
    assert read_state(checkpoint).token_budget == straight.cut.token_budget == 90

    def forget(*arguments, **options) -> int:
        raise AssertionError("the checkpoint has the token budget")

    monkeypatch.setattr(readiness, "choose_token_budget", forget)
    resumed, _, _ = run(tmp_path / "halves", max_steps=6, memory_budget=budget, resume_from_checkpoint="latest")
    assert resumed.cut.token_budget == 90
    expected, actual = weights(straight), weights(resumed)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_another_cut_would_not_have_been_bit_equal(tmp_path) -> None:
    """So the test above shows that the record is read."""
    budgets = [budget_for(tokens, dropout=DROPOUT) for tokens in (90, 50)]
    first, second = (run(tmp_path / str(i), max_steps=6, memory_budget=b)[0] for i, b in enumerate(budgets))
    expected, actual = weights(first), weights(second)
    assert not all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("changed", [50, None])
def test_another_budget_cuts_anew_after_resuming(tmp_path, capsys, changed) -> None:
    run(tmp_path / "run", max_steps=3, memory_budget=budget_for(90, dropout=DROPOUT))
    budget = None if changed is None else budget_for(changed, dropout=DROPOUT)
    resumed, _, _ = run(tmp_path / "run", max_steps=6, memory_budget=budget, resume_from_checkpoint="latest")
    assert resumed.cut.token_budget == changed
    assert read_state(checkpoints(tmp_path / "run")[-1]).token_budget == changed
    assert f"note: memory_budget is {budget}, and was {budget_for(90, dropout=DROPOUT)}" in capsys.readouterr().out


def test_the_report_says_what_is_predicted_and_how_a_step_is_cut(tmp_path, capsys) -> None:
    rows = [TokenizedRow([1, 2, 3, 4] * 5, [1, 2, 3, 4] * 5) for _ in range(12)]
    train(tmp_path, rows, max_steps=2, memory_budget=budget_for(80), **STEP)
    said = capsys.readouterr().out
    # Of 12 rows the second step has four.
    assert f"memory: {budget_for(80):.2f} GiB predicted (weights 0.00, gradients 0.00, optimizer 0.00, " in said
    assert "; a step takes 1 to 2 passes of at most 80 tokens\n" in said
    assert "note: a row" not in said


def test_a_row_that_does_not_fit_runs_alone_and_is_said(tmp_path, capsys) -> None:
    trainer, result, _ = train(tmp_path, random_rows(8), max_steps=1, memory_budget=1e-6, **STEP)
    assert result.steps == 1
    assert trainer.cut.token_budget == 0
    said = capsys.readouterr().out
    assert "tokens is predicted to take 0.1 GiB, more than the 0.0 of memory_budget; it runs alone" in said
    assert "a step takes 8 passes" in said


@pytest.mark.parametrize("budget", ["auto", None])
def test_without_a_budget_in_gib_nothing_changes_on_a_cpu(tmp_path, capsys, budget) -> None:
    trainer, _, _ = train(tmp_path, random_rows(8), max_steps=1, memory_budget=budget, **STEP)
    assert trainer.cut.token_budget is None
    assert "memory" not in capsys.readouterr().out


def test_the_end_of_a_run_compares() -> None:
    plan = memory_of(tiny_model(), optim="adamw")
    line = compare(plan, tokens=4096, passes=1, actual=round(1.05 * plan.peak(4096)))
    predicted = plan.peak(4096) / GIB
    assert line == (
        f"memory: {predicted:.2f} GiB predicted, {1.05 * predicted:.2f} at the peak (+5.0%), "
        "passes of up to 4,096 tokens"
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "memory_budget must be greater than 0 GiB, got 0.0"),
        ("-4", "memory_budget must be greater than 0 GiB, got -4.0"),
        ("inf", "memory_budget must be finite, got inf"),
        ("most", "memory_budget must be auto, a number or null, got 'most'"),
        (True, "memory_budget must be auto, a number or null, got True"),
    ],
)
def test_a_wrong_budget_is_refused_in_a_sentence(value, message) -> None:
    with pytest.raises(ValueError) as error:
        TrainConfig(memory_budget=value)
    assert str(error.value) == message


def test_what_a_budget_may_be() -> None:
    assert TrainConfig().memory_budget == "auto"
    assert TrainConfig(memory_budget="auto").memory_budget == "auto"
    assert TrainConfig(memory_budget="12").memory_budget == 12.0
    assert TrainConfig(memory_budget="null").memory_budget is None
    with pytest.raises(ValueError, match="did you mean 'memory_budget'"):
        TrainConfig.from_dict({"auto_find_batch_size": True})


@pytest.mark.parametrize(("free", "reserved", "foreign"), [(100, 0, 0), (60, 40, 0), (60, 60, 20)])
def test_auto_takes_what_is_free_and_what_torch_holds_unused(monkeypatch, free, reserved, foreign) -> None:
    """100 MiB beyond the weights each time, less the reserve: free, in torch's cache, or beside other tensors."""
    plan, mib = memory_of(tiny_model(), optim="adamw"), 2**20
    allocated = plan.weights + plan.trained
    total = 200 * mib
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * mib, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: allocated + reserved * mib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated + foreign * mib)
    device, rows = torch.device("cuda"), row_set([10**6])
    tokens = choose_token_budget(plan, "auto", rows, device, allocated=allocated)
    limit = allocated + 100 * mib - 0.08 * total
    assert plan.peak(tokens, passes=2) <= limit < plan.peak(tokens + 1, passes=2)
    assert tokens > 1000


def test_what_is_said_of_an_8b_model() -> None:
    rows, config = row_set([2048] * 4), decoder_config(dict(LLAMA_3_1_8B), "Llama-3.1-8B")
    schedule = StepSchedule(rows, step_rows=4, seed=0, max_steps=1)

    def said(*, decoded: int = 0, **options) -> str:
        plan = plan_memory(config, bits=4, lora=LoraConfig(r=16), optim="adamw_8bit", **options)
        return describe(plan.keeping_decoded(decoded), StepCut(rows, 4, None), schedule, first_step=0)

    # A layer keeps 92 KiB of a token, 13 GiB of decoded weights are 32 layers'.
    ways = "(weights 5.47, gradients 0.16, optimizer 0.08, activations 23"
    end = "; a step takes 1 pass of at most 8,192 tokens"
    assert re.fullmatch(rf"memory: 29.\d\d GiB predicted {re.escape(ways)}\.\d\d\){end}", said())
    assert re.search(r"activations 23\.\d\d, decoded weights 3.25\); a step", said(decoded=8))
    assert re.search(r"\), graphs hold 6\.\d\d more; a step", said(graph_tokens=2048))
    # 36 KiB of a token in all layers but the last, and a little of log-sum-exps and factors.
    assert re.search(
        r"activations 0\.1\d\), 8\.8\d wait in host memory; a step", said(gradient_checkpointing="offload")
    )
