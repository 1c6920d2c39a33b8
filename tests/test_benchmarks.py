"""The benchmarks on a tiny model: they run, and they refuse figures that nobody should believe."""

import csv
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, plan, processes, report, run, shapes, zoo
from benchmarks.ops.bench_ops import wrong_result
from benchmarks.ops.case import OpCase
from benchmarks.ops.cases import all_cases
from benchmarks.zoo_shapes import ZOO

TINY_OPS = shapes.OpShape.of(shapes.TINY, tokens=32, document_length=16)


def row(
    system: str, *, loss: float = 6.0, norm: float = 0.5, milliseconds: float = 10.0, **other: Any
) -> dict[str, Any]:
    """What a worker reports of one case."""
    return {
        "system": system,
        "case": "2x64",
        "bits": 4,
        "recompute": "no",
        "decoded": 0,
        "median_ms": milliseconds,
        "p20_ms": milliseconds,
        "p80_ms": milliseconds,
        "tokens_per_second": 12800.0,
        "peak_gib": None,
        "losses": [loss, 5.9],
        "gradient_norms": [0.4, norm],
        **other,
    }


def run_canned(monkeypatch: pytest.MonkeyPatch, folder: Path, rows: list[dict[str, Any]]) -> tuple[int, list[dict]]:
    """Exit status and CSV of a run whose workers report `rows`."""
    monkeypatch.setattr(run, "run_system", lambda job, args, journal: [r for r in rows if r["system"] == job.system])
    monkeypatch.setattr(run, "measure_floors", lambda args, bits: ({}, ""))
    systems = ",".join(dict.fromkeys(r["system"] for r in rows))
    options = ["--tiny", "--device", "cpu", "--checkpoint", str(folder / "model"), "--out", str(folder / "csv")]
    status = run.main(["--systems", systems, "--cases", "2x64", *options])
    return status, recorded(folder / "csv")


def recorded(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("*.csv")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("bits", "recompute", "tolerance"), [("32", [], 1e-5), ("16", ["--recompute"], 1e-2)])
def test_slothcore_beside_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: str, recompute: list[str], tolerance: float
) -> None:
    """Same checkpoint, same factors, same tokens: so the same loss and gradient norm, in processes of their own."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    status = run.main(
        [
            *("--systems", "slothcore,transformers", "--cases", "2x48,1x32", "--bits", bits, *recompute),
            *("--tiny", "--device", "cpu", "--warmup", "1", "--steps", "2"),
            *("--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "csv")),
        ]
    )
    output = capsys.readouterr()
    assert status == 0, output.err + output.out
    assert output.out.count("| slothcore ") == output.out.count("| transformers ") == 2
    rows = recorded(tmp_path / "csv")
    assert [r["case"] for r in rows] == ["2x48", "1x32"] * 2
    for ours, theirs in zip(rows[:2], rows[2:], strict=True):
        for name in ("first_loss", "gradient_norm"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=tolerance), name


def test_a_wrong_loss_is_refused(monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("slothcore", loss=6.1, milliseconds=1.0), row("transformers"), row("unsloth", loss=6.05)]
    status, kept = run_canned(monkeypatch, tmp_path, rows)
    output = capsys.readouterr().out
    assert status == 1
    assert "slothcore 2x64: refused: first loss 6.1000, transformers has 6.0000" in output
    assert [r["system"] for r in kept] == ["transformers", "unsloth"], "a refused figure must not be recorded"
    (line,) = [line for line in output.splitlines() if line.startswith("| slothcore")]
    assert "1.0" not in line, "nor printed"


@pytest.mark.parametrize("norm", [0.0, float("nan"), float("inf")])
def test_a_worthless_gradient_is_refused(monkeypatch, tmp_path: Path, norm: float) -> None:
    status, kept = run_canned(monkeypatch, tmp_path, [row("slothcore", norm=norm), row("transformers")])
    assert status == 1
    assert [r["system"] for r in kept] == ["transformers"]


def test_agreeing_systems_are_compared(monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("slothcore", loss=6.001), row("transformers", milliseconds=25.0)]
    status, kept = run_canned(monkeypatch, tmp_path, rows)
    assert (status, len(kept)) == (0, 2)
    lines = capsys.readouterr().out.splitlines()
    (ratio,) = [line.split("|")[-2].strip() for line in lines if line.startswith("| transformers")]
    assert ratio == "2.50"


def test_a_different_gradient_norm_is_remarked_upon(monkeypatch, tmp_path: Path, capsys) -> None:
    rows = [row("slothcore", gradient_norms=[0.3, 0.3]), row("transformers", gradient_norms=[0.4, 0.4])]
    status, kept = run_canned(monkeypatch, tmp_path, rows)
    assert (status, len(kept)) == (0, 2)
    assert "slothcore 2x64: gradient norm 0.3, transformers has 0.4" in capsys.readouterr().out


def test_without_transformers_the_table_says_that_the_loss_is_unverified(monkeypatch, tmp_path: Path, capsys) -> None:
    status, _ = run_canned(monkeypatch, tmp_path, [row("slothcore")])
    assert status == 0
    assert "loss unverified" in capsys.readouterr().out


def test_out_of_memory_takes_another_process_where_loading_settles_recomputation(monkeypatch, tmp_path: Path) -> None:
    calls = []

    def run_system(job: plan.Job, args, journal) -> list[dict]:
        (one,) = job.runs
        calls.append((job.system, one.case, one.recompute))
        if one.recompute == "no":
            return [row(job.system, problem=run.OUT_OF_MEMORY)]
        return [row(job.system, recompute=one.recompute)]

    monkeypatch.setattr(run, "run_system", run_system)
    monkeypatch.setattr(run, "measure_floors", lambda args, bits: ({}, ""))
    options = ["--tiny", "--device", "cpu", "--checkpoint", str(tmp_path / "model")]
    assert run.main(["--systems", "slothcore,unsloth", "--cases", "2x64", *options]) == 0
    # slothcore's own process has tried already.
    assert calls == [("slothcore", "2x64", "no"), ("unsloth", "2x64", "no"), ("unsloth", "2x64", "yes")]
    calls.clear()
    run.main(["--systems", "unsloth", "--cases", "2x64:no+yes", *options])
    assert calls == [("unsloth", "2x64", "no"), ("unsloth", "2x64", "yes")], "planned, so not run twice"


def test_results_are_told_as_they_come(tmp_path: Path) -> None:
    (tmp_path / "talker.py").write_text(
        "import sys, time\n"
        "file = open(sys.argv[2], 'a', buffering=1)\n"
        'file.write(\'{"number": 1}\\n{"num\')\n'
        "time.sleep(1)\n"
        "file.write('ber\": 2}\\n')\n"
        "sys.exit(3)\n",
        encoding="utf-8",
    )
    told: list[tuple[int, float]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        results, problem = processes.run_module(
            "talker", {}, 60, lambda result: told.append((result["number"], time.monotonic()))
        )
    assert results == [{"number": 1}, {"number": 2}]
    assert problem == "failed: exit status 3"
    assert [number for number, _ in told] == [1, 2]
    assert told[1][1] - told[0][1] > 0.3, "the first before the process had ended"


def test_a_failing_or_hanging_process_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-c"]
    assert processes.run_with_limit([*command, "pass"], tmp_path / "log", 60) == ""
    failed = processes.run_with_limit([*command, "raise OSError('no such GPU')"], tmp_path / "log", 60)
    assert failed == "failed: exit status 1 OSError: no such GPU"
    hung = processes.run_with_limit([*command, "import time; time.sleep(60)"], tmp_path / "log", 0.5)
    assert hung == "failed: over the limit of 0.5 s"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--cases", "4x", "4x2048"),
        ("--cases", "2x1", "ROWSxLENGTH"),
        ("--systems", "slothcore,axolotl", "axolotl"),
        ("--cases", "alpaca/3", "must divide the 8 sequences"),
        ("--cases", "4x32/", "must divide the 4 sequences"),
        ("--within", "7.8GiB", "7.8GiB"),
        ("--cases", "2x8@5", "4, 16, 32"),
        ("--cases", "2x8:mpl", "mpl"),
        ("--recompute", "no,half", "half"),
    ],
)
def test_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str], option: str, value: str, message: str) -> None:
    with pytest.raises(SystemExit) as exit_status:
        run.main(["--tiny", option, value])
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err


def test_csv_grows_under_one_header(tmp_path: Path) -> None:
    for milliseconds in ("1", "2"):
        path = harness.append_csv(tmp_path, [{"system": "slothcore", "median_ms": milliseconds}])
    assert [r["median_ms"] for r in recorded(tmp_path)] == ["1", "2"]
    assert path.read_text(encoding="utf-8").count("median_ms") == 1
    with pytest.raises(ValueError, match="speed"):
        harness.append_csv(tmp_path, [{"speed": 1}])


def test_quantiles_have_as_many_values_below_as_above() -> None:
    assert harness.quantiles([3.0, 1.0, 5.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)
    assert harness.quantiles(map(float, range(10))) == (4.5, 2.0, 7.0)
    assert harness.quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_every_operation_passes_its_own_check(kernel_device: str) -> None:
    """In float32, because the interpreter truncates where a GPU rounds to bfloat16; varlen_attn alone needs a GPU."""
    names = set()
    for case in all_cases(TINY_OPS, dtype=torch.float32, device=kernel_device):
        assert wrong_result(case) == "", f"{case.op} {case.shape}"
        case.run()
        if case.peer_name != "varlen_attn":
            case.peer()
        assert case.bytes or case.flops
        names.add(case.op)
    assert len(names) == 11


def test_a_wrong_operation_is_refused(kernel_device: str) -> None:
    case: OpCase = next(all_cases(TINY_OPS, dtype=torch.float32, device=kernel_device))
    right = case.check()
    for spoil in (lambda t: t * 1.1, lambda t: t.index_fill(0, torch.tensor(3, device=t.device), float("nan"))):
        wrong = [(spoil(right[0][0]), right[0][1]), *right[1:]]
        assert "off by" in wrong_result(dataclasses.replace(case, check=lambda wrong=wrong: wrong))
    short = [(right[0][0][1:], right[0][1])]
    assert "shape" in wrong_result(dataclasses.replace(case, check=lambda: short))


def test_the_best_round_counts_and_no_problem_is_passed_over() -> None:
    def timed(system: str, median_ms: float, **more: object) -> dict:
        return row(system, milliseconds=median_ms, **more)

    rows = [
        timed("a", 3.0),
        timed("b", 1.0, problem="refused: loss"),
        timed("b", 2.0),
        timed("a", 2.5),
        timed("a", 4.0),
    ]
    assert report.best_rounds(rows) == [timed("a", 2.5), timed("b", 1.0, problem="refused: loss")]
    ways = [timed("a", 3.0), timed("a", 2.0, decoded=32), timed("a", 1.0, bits=16), timed("a", 4.0, recompute="mlp")]
    assert report.best_rounds(ways) == ways, "another way is no other round"


@pytest.mark.parametrize("bits", ["32", "4"])
def test_a_step_of_every_kind_of_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: str) -> None:
    options = ["--tiny", "--device", "cpu", "--case", "2x16", "--bits", bits, "--warmup", "1", "--steps", "2"]
    assert zoo.main([*options, "--models", ",".join(ZOO), "--out", str(tmp_path)]) == 0
    rows = recorded(tmp_path)
    assert [row["benchmark"] for row in rows] == [f"zoo {name}" for name in ZOO]
    for row in rows:
        # The loss of tokens that nothing foretells, of 512 kinds.
        assert 5.5 < float(row["first_loss"]) < 7.5
        assert float(row["gradient_norm"]) > 0
    assert "tokens/s" in capsys.readouterr().out


def test_a_model_whose_loss_is_not_finite_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = zoo.build

    def broken(*args: Any, **options: Any) -> torch.nn.Module:
        model = build(*args, **options)
        model.model.norm.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(zoo, "build", broken)
    options = ["--tiny", "--device", "cpu", "--case", "2x16", "--bits", "32", "--models", "Qwen3-8B"]
    assert zoo.main([*options, "--out", str(tmp_path)]) == 1
    assert recorded(tmp_path) == []
    assert "refused: losses [nan" in capsys.readouterr().out
