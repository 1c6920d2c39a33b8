"""The cases of the step benchmark: Alpaca's lengths, micro-batches, recomputation, memory limits, growth."""

import csv
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import checkpoint, floor, plan, report, run, shapes, targets, worker
from benchmarks.peers import Settings, peer, variants

TINY_OPTIONS = ("--tiny", "--device", "cpu", "--bits", "32")


def row(system: str, case: str, **other: Any) -> dict[str, Any]:
    """What a worker reports of one case."""
    milliseconds = other.pop("milliseconds", 10.0)
    return {
        "system": system,
        "case": case,
        "bits": 4,
        "recompute": "no",
        "decoded": 0,
        "median_ms": milliseconds,
        "tokens_per_second": 1e6 / milliseconds,
        "peak_gib": None,
        "losses": [6.0],
        "gradient_norms": [0.4],
        **other,
    }


def test_the_lengths_are_alpacas() -> None:
    every = [length for length, count in shapes.alpaca_lengths().items() for _ in range(count)]
    assert len(every) == 4000
    assert (round(statistics.mean(every)), statistics.median(every)) == (119, 103)
    case, micro_batch = shapes.parse_case("alpaca")
    assert (micro_batch, len(case.lengths(0)), case.longest) == (8, 8, max(every))
    assert case.lengths(3) == case.lengths(3 + case.batches) != case.lengths(2)
    drawn = [length for step in range(500) for length in shapes.AlpacaCase(batches=500).lengths(step)]
    assert statistics.mean(drawn) == pytest.approx(119, rel=0.03)
    assert statistics.median(drawn) == pytest.approx(103, rel=0.03)


def test_a_case_names_its_micro_batch() -> None:
    assert shapes.parse_case("8x512/2") == (shapes.StepCase(8, 512), 2)
    assert shapes.parse_case("4x2048") == (shapes.StepCase(4, 2048), 4)
    assert shapes.parse_case("alpaca/2") == (shapes.AlpacaCase(), 2)
    assert variants("transformers", "alpaca") == ["alpaca/2", "alpaca"]
    assert variants("slothcore", "alpaca") == ["alpaca"]
    assert variants("unsloth", "4x2048") == ["4x2048"]


def test_real_tokens_are_counted() -> None:
    assert worker.tokens_per_second([100, 100, 100], [10.0, 90.0, 20.0]) == pytest.approx(5000)
    # 600 tokens in 200 ms: a slow step is not passed over.
    assert worker.tokens_per_second([100, 200, 300], [10.0, 170.0, 20.0]) == pytest.approx(3000)


def test_the_tokens_do_not_depend_on_how_they_are_asked_for() -> None:
    case = shapes.StepCase(3, 5)
    rows = worker.random_batch(case, 7, 512)
    assert rows.shape == (3, 5)
    assert torch.equal(rows, torch.stack(worker.random_sequences([5, 5, 5], 7, 512)))
    assert not torch.equal(rows, worker.random_batch(case, 8, 512))


def test_peers_pad_on_the_right_and_leave_padding_out_of_the_loss() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from benchmarks.peers.hf import padded

    batch = padded([torch.tensor([7, 8, 9]), torch.tensor([5])])
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 2, 2]]
    assert batch["labels"].tolist() == [[7, 8, 9], [5, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in padded([torch.tensor([7, 8]), torch.tensor([5, 6])])


@pytest.mark.parametrize("system", ["slothcore", "transformers"])
def test_micro_batches_change_neither_loss_nor_gradient(tmp_path: Path, system: str) -> None:
    if system == "transformers":
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    checkpoint.write_checkpoint(tmp_path, shapes.TINY, device="cpu")
    settings = Settings(str(tmp_path), 32, "no", 4, longest=1024, device="cpu")
    model = peer(system).load(settings)
    factors = worker.lora_factors(model, layers=shapes.TINY["num_hidden_layers"])
    whole, halved = (
        worker.time_steps(
            peer(system),
            model,
            factors,
            settings,
            shapes.AlpacaCase(),
            micro_batch=micro_batch,
            warmup=0,
            steps=2,
            vocab_size=shapes.TINY["vocab_size"],
        )
        for micro_batch in (8, 2)
    )
    assert halved["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert halved["gradient_norms"] == pytest.approx(whole["gradient_norms"], rel=1e-4)


def test_unsloths_layout_is_that_of_padding_free_training() -> None:
    """transformers, which tells documents by their positions too, gives the padded batch's loss."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from benchmarks.peers.hf import end_to_end, padded

    sequences = [torch.tensor([7, 8, 9]), torch.tensor([5, 6])]
    row = end_to_end(sequences)
    assert row["input_ids"].tolist() == [[7, 8, 9, 5, 6]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert row["labels"].tolist() == [[-100, 8, 9, -100, 6]]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shapes.TINY)).eval()
    model.config.use_cache = False
    losses = [model(**batch).loss.item() for batch in (row, padded(sequences))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_alpaca_beside_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All ways of running the case, with and without recomputation: one loss, gradient norm and count of tokens."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    options = [
        "--cases",
        "alpaca",
        "--recompute",
        "no,yes",
        "--compare",
        "--warmup",
        "1",
        "--steps",
        "4",
        *TINY_OPTIONS,
    ]
    folders = ["--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "csv")]
    status = run.main(["--systems", "slothcore,transformers", *options, *folders])
    output = capsys.readouterr()
    assert status == 0, output.err + output.out
    with (tmp_path / "csv" / "cpu.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = [(r["system"], r["case"], r["settings"].rpartition("=")[2]) for r in rows]
    assert found == [
        ("slothcore", "alpaca", "no"),
        ("slothcore", "alpaca", "yes"),
        *[("transformers", case, recompute) for case in ("alpaca/2", "alpaca") for recompute in ("no", "yes")],
    ]
    for r in rows:
        assert float(r["first_loss"]) == pytest.approx(float(rows[0]["first_loss"]), rel=1e-5)
        assert float(r["gradient_norm"]) == pytest.approx(float(rows[0]["gradient_norm"]), rel=1e-4)
        assert float(r["fraction_of_floor"]) > 0
    assert "floor of alpaca fp32: " in output.out
    assert output.out.count(" first |") == len(rows), "nothing has landed in this folder yet"


def test_each_way_is_judged_by_the_plain_mean() -> None:
    """A sum of means over micro-batches is four times the loss."""
    rows = [row("transformers", "alpaca/2", losses=[24.0]), row("transformers", "alpaca"), row("slothcore", "alpaca")]
    report.judge(rows)
    assert [r.get("problem", "") for r in rows] == ["refused: first loss 24.0000, transformers has 6.0000", "", ""]
    rows = [row("transformers", "alpaca/2"), row("slothcore", "alpaca", losses=[6.5])]
    report.judge(rows)
    assert "transformers has 6.0000" in rows[1]["problem"], "without the whole batch, micro-batches are the reference"


def jobs(*options: str) -> list[tuple[str, list[tuple[str, int, str, int]]]]:
    """What is planned: the system of each process, and its runs."""
    args = run.parse_arguments([*options, "--tiny", "--device", "cpu"])
    return [
        (job.system, [(one.case, one.bits, one.recompute, one.decoded) for one in job.runs]) for job in run.plan(args)
    ]


def test_every_system_runs_each_case_in_its_own_ways() -> None:
    systems = ("--systems", "slothcore,unsloth,transformers")
    cases = ("--cases", "4x64:no+mlp+offload+yes,2x8:no+decoded,alpaca:no+decoded1,2x32@16", "--bits", "4")
    assert jobs(*systems, *cases) == [
        (
            "slothcore",
            [
                *[("4x64", 4, way, 0) for way in ("no", "mlp", "offload", "yes")],
                ("2x8", 4, "no", 0),
                ("alpaca", 4, "no", 0),
                ("2x8", 4, "no", 2),
                ("alpaca", 4, "no", 1),
            ],
        ),
        # Unsloth settles recomputation as it loads, and the peers know one kind of it.
        ("unsloth", [("4x64", 4, "no", 0), ("2x8", 4, "no", 0), ("alpaca/2", 4, "no", 0), ("alpaca", 4, "no", 0)]),
        ("unsloth", [("4x64", 4, "yes", 0)]),
        (
            "transformers",
            [
                *[("4x64", 4, way, 0) for way in ("no", "yes")],
                *[(case, 4, "no", 0) for case in ("2x8", "alpaca/2", "alpaca")],
            ],
        ),
        *[(system, [("2x32", 16, "no", 0)]) for system in ("slothcore", "unsloth", "transformers")],
    ]
    assert jobs("--systems", "slothcore", "--cases", "2x8", "--recompute") == [("slothcore", [("2x8", 4, "yes", 0)])]
    assert jobs("--systems", "slothcore", "--cases", "2x8:decoded+no", "--bits", "16") == [
        ("slothcore", [("2x8", 16, "no", 0)])
    ], "bfloat16 weights are not decoded"


def test_rounds_turn_back_and_forth() -> None:
    order = [system for system, _ in jobs("--systems", "slothcore,transformers", "--cases", "2x8", "--rounds", "2")]
    assert order == ["slothcore", "transformers", "transformers", "slothcore"]


def test_the_default_has_a_case_for_every_target() -> None:
    args = run.parse_arguments(["--device", "cpu"])
    cases = {(case, bits) for case, bits, _ in args.specs}
    assert cases == {(target.case, target.bits) for target in targets.STEPS}


def test_where_memory_runs_out_there_is_recomputation_to_try() -> None:
    plain, again = plan.Run("4x64", 4), plan.Run("4x64", 4, "yes")
    assert plan.fallbacks("slothcore", plain, [plain]) == ["mlp", "yes"]
    assert plan.fallbacks("transformers", plain, [plain, plan.Run("2x8", 4, "yes")]) == ["yes"]
    assert plan.fallbacks("transformers", plain, [plain, again]) == [], "it is planned anyway"
    assert plan.fallbacks("slothcore", again, [again]) == []
    assert worker.reachable_fallbacks("unsloth", plain, [plain]) == [], "that takes another process"


def test_warm_ups_meet_every_length_and_slow_systems_take_fewer_steps() -> None:
    batches = shapes.AlpacaCase().batches
    assert plan.warmup_steps("slothcore", "4x64", 4) == 4
    assert plan.warmup_steps("slothcore", "alpaca", 4) == 3 * batches, "a graph is captured at the second sight"
    assert plan.warmup_steps("transformers", "alpaca/2", 4) == 2
    assert plan.timed_steps(10.0, steps=8, batches=1, budget=6.0) == 8
    assert plan.timed_steps(1500.0, steps=8, batches=1, budget=6.0) == 4
    assert plan.timed_steps(1e6, steps=8, batches=1, budget=6.0) == 2
    assert plan.timed_steps(2800.0, steps=8, batches=batches, budget=6.0) == batches, "every length equally often"
    assert plan.timed_steps(100.0, steps=8, batches=batches, budget=6.0) == 2 * batches
    assert plan.timed_steps(0.0, steps=3, batches=1, budget=6.0) == 3


def test_a_slow_case_is_warmed_up_and_timed_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write_checkpoint(tmp_path, shapes.TINY, device="cpu")
    settings = Settings(str(tmp_path), 32, "no", 4, longest=8, device="cpu")
    system = peer("slothcore")
    model = system.load(settings)
    now = iter(float(i) for i in range(1000))
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(now))
    found = worker.time_steps(
        system,
        model,
        worker.lora_factors(model, layers=2),
        settings,
        shapes.StepCase(2, 8),
        micro_batch=2,
        warmup=9,
        steps=8,
        budget=2.5,
        vocab_size=512,
    )
    # A second a step: three after the first exceed the budget, and two steps are affordable.
    assert len(found["losses"]) == 4 + 2
    assert found["median_ms"] == 1000.0
    assert found["tokens_per_second"] == 16.0


def test_the_same_model_runs_in_every_way(tmp_path: Path) -> None:
    """One process, one model: each way leaves loss and gradient as they are, and is undone by the next."""
    checkpoint.write_checkpoint(tmp_path, shapes.TINY, device="cpu")
    runs = [plan.Run("2x24", 4, way) for way in ("no", "mlp", "offload", "yes")] + [plan.Run("2x24", 4, "no", 1)]
    settings = Settings(str(tmp_path), 4, "no", 4, longest=24, device="cpu")
    request = worker.request("slothcore", settings, runs, layers=2, vocab_size=512, warmup=0, steps=1, budget=60.0)
    checkpoint.write_json(tmp_path / "request.json", request)
    worker.main(str(tmp_path / "request.json"), str(tmp_path / "results.jsonl"))
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(r["recompute"], r["decoded"]) for r in rows] == [(one.recompute, one.decoded) for one in runs]
    for r in rows[1:]:
        assert r["losses"] == pytest.approx(rows[0]["losses"], rel=1e-3)
        assert r["gradient_norms"] == pytest.approx(rows[0]["gradient_norms"], rel=1e-2)


def test_out_of_memory_falls_back_in_the_same_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write_checkpoint(tmp_path, shapes.TINY, device="cpu")
    real = worker.time_steps

    def scarce(system: Any, model: Any, factors: Any, settings: Settings, case: Any, **options: Any) -> dict[str, Any]:
        if settings.recompute != "yes" and case.rows > 1:
            raise torch.OutOfMemoryError
        return real(system, model, factors, settings, case, **options)

    monkeypatch.setattr(worker, "time_steps", scarce)
    settings = Settings(str(tmp_path), 32, "no", 4, longest=24, device="cpu")
    runs = [plan.Run("2x24", 32), plan.Run("1x24", 32)]
    request = worker.request("slothcore", settings, runs, layers=2, vocab_size=512, warmup=0, steps=1, budget=60.0)
    checkpoint.write_json(tmp_path / "request.json", request)
    worker.main(str(tmp_path / "request.json"), str(tmp_path / "results.jsonl"))
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    found = [(r["case"], r["recompute"], r.get("problem")) for r in map(json.loads, lines)]
    assert found == [
        ("2x24", "no", run.OUT_OF_MEMORY),
        ("2x24", "mlp", run.OUT_OF_MEMORY),
        ("2x24", "yes", None),
        ("1x24", "no", None),
    ]


def test_transformers_turns_recomputation_on_and_off_without_loading_again(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    checkpoint.write_checkpoint(tmp_path, shapes.TINY, device="cpu")
    system, settings = peer("transformers"), Settings(str(tmp_path), 32, "no", 4, longest=16, device="cpu")
    model = system.load(settings)
    factors = worker.lora_factors(model, layers=2)
    worker.set_factors(factors)
    sequences = worker.random_sequences([16, 16], 0, 512)
    gradients = []
    for recompute in ("no", "yes", "no"):
        system.configure(model, replace(settings, recompute=recompute))
        layers = [part for part in model.modules() if hasattr(part, "gradient_checkpointing")]
        assert {part.gradient_checkpointing for part in layers} == {recompute == "yes"}
        model.zero_grad()
        system.loss(model, sequences, settings).backward()
        gradients.append(torch.cat([factor.grad.flatten() for factor in factors.values()]))
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_what_no_time_is_left_for_is_not_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(run, "run_module", lambda *args: pytest.fail("nothing may be begun"))
    options = ["--systems", "slothcore", "--cases", "2x8", "--deadline", "1", "--checkpoint", str(tmp_path / "model")]
    assert run.main([*options, *TINY_OPTIONS]) == 1
    printed = capsys.readouterr()
    assert "slothcore 2x8 fp32: not run: " in printed.out
    assert "floor: not run" in printed.out
    assert "s  slothcore, 32 bits: 2x8 no" in printed.err, "the plan comes first"


def test_a_run_that_is_killed_has_its_rows_in_the_csv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reported = [
        row("slothcore", "2x8", bits=32),
        row("slothcore", "2x8", bits=32, recompute="yes", gradient_norms=[0.0]),
    ]

    def run_module(module: str, request: dict, limit: float, on_result: Any) -> None:
        for one in reported:
            on_result(one)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_module", run_module)
    options = ["--systems", "slothcore", "--cases", "2x8:no+yes", "--checkpoint", str(tmp_path / "model")]
    with pytest.raises(KeyboardInterrupt):
        run.main([*options, "--out", str(tmp_path / "csv"), *TINY_OPTIONS])
    with (tmp_path / "csv" / "cpu.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [r["settings"].rpartition(" ")[2] for r in rows] == ["recompute=no"], "and no row without a gradient"


def test_rows_over_a_memory_limit_are_remarked_upon() -> None:
    rows = [
        row("slothcore", "4x64", milliseconds=5.0, peak_gib=33.0),
        row("slothcore", "4x64", milliseconds=8.0, peak_gib=7.7, recompute="yes"),
        row("unsloth", "4x64", milliseconds=10.0, peak_gib=7.8, recompute="yes"),
        row("transformers", "4x64", milliseconds=20.0, peak_gib=26.4),
    ]
    report.judge(rows)
    report.mark_limits(rows, [7.8, 30.0])
    text = report.table(rows)
    assert "slothcore 4x64: 33.00 GiB, over the limit of 7.8 and 30" in text
    assert "transformers 4x64: 26.40 GiB, over the limit of 7.8\n" in text + "\n"
    assert "unsloth 4x64, yes: " not in text
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in report.limits_table(rows, [7.8, 36.0]).split("\n")
    ]
    assert lines[2:] == [
        ["4x64", "7.8", "slothcore", "4x64", "yes", "125,000", "7.70", "1.00"],
        ["4x64", "7.8", "unsloth", "4x64", "yes", "100,000", "7.80", "0.80"],
        ["4x64", "7.8", "transformers", "none", "-", "-", "-", "-"],
        ["4x64", "36", "slothcore", "4x64", "no", "200,000", "33.00", "1.00"],
        ["4x64", "36", "unsloth", "4x64", "yes", "100,000", "7.80", "0.50"],
        ["4x64", "36", "transformers", "4x64", "no", "50,000", "26.40", "0.25"],
    ]
    assert "no row has a peak" in report.limits_table([row("slothcore", "4x64")], [7.8])


def test_every_way_is_timed_against_the_fastest_of_slothcore() -> None:
    rows = [
        row("slothcore", "alpaca", milliseconds=20.0, recompute="yes"),
        row("slothcore", "alpaca", milliseconds=10.0),
        row("transformers", "alpaca/2", milliseconds=40.0),
    ]
    report.judge(rows)
    ratios = [line.split("|")[-2].strip() for line in report.table(rows).splitlines()[2:5]]
    assert ratios == ["2.00", "1.00", "4.00"]


def test_growth_is_slothcore_alone_in_two_series(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--growth", "--warmup", "0", "--steps", "1", *TINY_OPTIONS, "--checkpoint", str(tmp_path / "model")]
    assert run.main(options) == 0
    printed = capsys.readouterr().out.split("| case ")
    first, second = ([line.split("|")[1:4] for line in part.splitlines()[2:] if line] for part in printed[-2:])
    assert [int(tokens.replace(",", "")) for _, tokens, _ in first] == [16 * 2**i for i in range(7)]
    assert [int(documents) for _, _, documents in first] == [2**i for i in range(7)]
    assert {tokens.strip() for _, tokens, _ in second} == {"128"}
    assert [int(documents) for _, _, documents in second] == [1, 2, 4, 8, 16]
    assert shapes.growth_cases(1024)[0][-1] == "64x1024"
    assert shapes.growth_cases(1024)[1] == ["1x8192", "2x4096", "4x2048", "8x1024", "16x512"]


def test_growth_shows_what_failed() -> None:
    rows = [
        row("slothcore", "1x16", floor_ms=8.0),
        row("slothcore", "2x16", problem=run.OUT_OF_MEMORY),
        row("slothcore", "2x16", recompute="yes", milliseconds=25.0),
        row("slothcore", "4x16", problem="failed: exit status 1"),
    ]
    lines = report.growth_table(rows, [["1x16", "2x16", "4x16", "8x16"]]).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["1x16", "16", "1", "no", "10.0", "100,000", "10.0", "1.25", "-"]
    assert cells[1][:5] == ["2x16", "32", "2", "yes", "25.0"]
    assert [line[-1] for line in cells[2:]] == ["failed", "not run"]


def test_step_over_floor_is_printed_and_a_missing_floor_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        run, "run_system", lambda job, args, journal: [row(job.system, one.case, bits=one.bits) for one in job.runs]
    )
    found = floor.Floor(1.0, 1.0, 2.0, 2.0, 2.0, 0.5, "varlen_attn, slothcore")
    for floors, problem in (({"2x8 fp32": found}, ""), ({}, "failed: exit status 1")):
        monkeypatch.setattr(run, "measure_floors", lambda args, bits, result=(floors, problem): result)
        options = ["--systems", "slothcore", "--cases", "2x8", "--checkpoint", str(tmp_path / "model")]
        assert run.main([*options, *TINY_OPTIONS]) == 0
        printed = capsys.readouterr().out
        (line,) = [line for line in printed.splitlines() if line.startswith("| slothcore")]
        assert line.split("|")[-3].strip() == ("-" if problem else "1.25")
        wanted = "floor: failed" if problem else "floor of 2x8 fp32: 8.0 ms = products 1.0 + 1.0, attention 2.0 + 2.0"
        assert wanted in printed


def test_targets_are_held_against_the_rows_of_their_step() -> None:
    rows = [
        row("slothcore", "4x2048", tokens_per_second=18000.0, peak_gib=29.0, median_ms=455.0),
        row("slothcore", "4x2048", tokens_per_second=15000.0, peak_gib=16.0, recompute="mlp"),
        row("slothcore", "4x2048", tokens_per_second=14000.0, peak_gib=7.5, recompute="offload"),
        row("slothcore", "alpaca", tokens_per_second=16000.0, decoded=32, peak_gib=26.0),
        row("unsloth", "alpaca/2", tokens_per_second=1000.0, peak_gib=8.0),
        row("unsloth", "alpaca", tokens_per_second=2000.0, peak_gib=9.0),
        row("transformers", "alpaca/2", tokens_per_second=300.0, peak_gib=12.0),
        row("transformers", "alpaca", tokens_per_second=900.0, peak_gib=13.0),
        row("slothcore", "2x4096", tokens_per_second=18000.0, peak_gib=40.0),
    ]
    report.add_floors(rows, {"4x2048": floor.Floor(100.0, 200.0, 20.0, 60.0, 20.0, 50.0, "")})
    text = report.targets_table(rows, targets.MACHINE)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:]]
    assert [line[2:4] for line in lines] == [
        ["18,000 tokens/s", "missed by 2.7%"],
        ["14,000 tokens/s", "met"],
        ["53.33x", "met"],
        ["8.00x", "missed by 20.0%"],
        ["1.14x", "missed by 1.6%"],
    ], "2x256 was not run, nor 2x4096 in bfloat16"
    assert lines[2][4] == "decoded 32, 10.0 ms, 26.00 GiB"
    assert text.startswith("Targets:")
    assert "this is cpu" in report.targets_table(rows, "cpu")
    assert report.targets_table([row("slothcore", "1x8")], "cpu") == ""
    alone = report.targets_table([row("slothcore", "alpaca")], "cpu")
    assert alone.count("not measured") == 2, "no peer to be faster than"


def test_a_verdict_says_how_much_is_missing() -> None:
    more, less = targets.Target("speed", 200.0), targets.Target("time", 1.1, at_least=False)
    assert [more.verdict(value) for value in (200.0, 150.0, None)] == ["met", "missed by 25.0%", "not measured"]
    assert [less.verdict(value) for value in (1.1, 1.21)] == ["met", "missed by 10.0%"]
    assert less.verdict(float("nan")) == "missed by nan%"
    stated = (
        targets.Target("share", 0.85, "").stated,
        targets.STEPS[0].stated,
        targets.OPERATIONS["head, memory"].stated,
    )
    assert stated == ("at least 85%", "at least 18,500 tokens/s", "at most 700 MiB")


def test_a_checkpoint_in_memory_is_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it takes itself may leave too little room for a second one."""
    monkeypatch.setattr(checkpoint, "MEMORY_FOLDER", tmp_path)
    folder = checkpoint.default_folder(shapes.TINY)
    assert folder.parent == tmp_path
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    assert checkpoint.default_folder(shapes.TINY).parent != tmp_path
    checkpoint.write_checkpoint(folder, shapes.TINY, device="cpu")
    assert checkpoint.default_folder(shapes.TINY) == folder


def test_a_floor_that_the_host_set_is_said_to_be_none() -> None:
    found = floor.Floor(1.0, 1.0, 2.0, 2.0, 2.0, 0.5, "varlen_attn, slothcore", host=7.5)
    assert "no floor of the GPU" in report.floor_lines({"2x8": found}, "")
    assert "no floor" not in report.floor_lines({"2x8": replace(found, host=4.0)}, "")
