"""The contests of single operations: what they accept, how they time, and that all of them run."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import harness, targets
from benchmarks.ops import bench_targets, contest, contest_linear, contest_model
from benchmarks.ops.contest import OWN, Contest, Outcome, Score, plain


def of(entries: dict[str, float], scores: tuple[Score, ...] = (), floor_ms: float = 0.0) -> Outcome:
    """The outcome of entries with these milliseconds."""
    made = Contest("op", "8x8", {name: plain(lambda: torch.ones(1)) for name in entries}, lambda: [], scores=scores)
    return Outcome(made, {name: (value, value, value) for name, value in entries.items()}, floor_ms=floor_ms)


def test_every_contest_runs_and_is_right(
    kernel_device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On tiny shapes in float32; on a GPU the kernels are compiled, elsewhere interpreted."""
    if kernel_device == "cuda":
        pytest.skip("test_every_contest_on_a_gpu runs them there")
    assert bench_targets.main(["--tiny", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert "refused" not in printed
    for group in bench_targets.GROUPS:
        assert f"\n{group}, " in printed
    (path,) = tmp_path.glob("*.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    named = {row["benchmark"] for row in rows}
    assert len(named) == 16, "paths are no figures of their own"
    assert {row["system"] for row in rows} >= {OWN, "bitsandbytes", "torch.compile", contest_linear.BARE, "SDPA math"}
    assert all(float(row["median_ms"]) > 0 for row in rows)
    judged = printed[printed.index("Targets, stated for") :]
    for target in targets.OPERATIONS.values():
        # The rows that these are stated for are none of the tiny ones.
        if not target.what.startswith("of a bare product"):
            assert target.what in judged, target


@pytest.mark.gpu
def test_every_contest_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code on a GPU: small shapes in bfloat16, with whatever peers are installed."""
    monkeypatch.setattr(bench_targets, "MANY_ROWS", (128, 256))
    monkeypatch.setattr(bench_targets, "TABLE_ROWS", (1, 256))
    monkeypatch.setattr(bench_targets, "ATTENTION_CASES", ((2, 128), (3, 70)))
    monkeypatch.setattr(bench_targets, "PRODUCT_SIZE", 1024)
    small = bench_targets.shapes.TINY | {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    monkeypatch.setattr(bench_targets.shapes, "LLAMA_3_1_8B", small)
    monkeypatch.setattr(contest, "ROUNDS", 1)
    assert bench_targets.main(["--out", str(tmp_path)]) == 0
    assert list(tmp_path.glob("*.csv"))


def test_a_wrong_result_is_refused_and_a_wrong_peer_left_out() -> None:
    right, wrong = torch.arange(4.0), torch.tensor([0.0, 1.0, 2.0, float("nan")])

    def held(own: torch.Tensor, peer: torch.Tensor) -> Outcome:
        made = Contest("op", "4", {OWN: plain(lambda: own), "peer": plain(lambda: peer)}, lambda: [right])
        return contest.hold(made, device="cpu", floor_ms=0.0)

    refused = held(wrong, right)
    assert refused.refused
    assert refused.milliseconds == {}, "no time of a wrong result"
    assert "slothcore: result 0 is off by nan" in refused.problems[0]
    assert set(held(right, wrong).milliseconds) == {OWN}
    assert "shape" in held(right[:3], right).problems[0]
    assert not held(right, right).problems


def test_an_entry_that_raises_loses_only_itself() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("no such GPU\nand more")

    made = Contest("op", "1", {OWN: plain(lambda: torch.ones(1)), "peer": plain(broken)}, lambda: [torch.ones(1)])
    outcome = contest.hold(made, device="cpu", floor_ms=0.0)
    assert outcome.problems == ["peer: RuntimeError: no such GPU"]
    assert set(outcome.milliseconds) == {OWN}


def test_equal_bits_are_asked_for_where_they_are_due() -> None:
    expected = torch.full((4,), 1.0)
    near = expected * (1 + 1e-6)
    assert contest.difference([near], [expected], 0.02) == ""
    assert "allowed is 0" in contest.difference([near], [expected], 0.0)
    assert contest.difference([expected.clone()], [expected], 0.0) == ""
    assert "2 results" in contest.difference([near, near], [expected], 0.02)


def test_scores() -> None:
    times = {OWN: 2.0, "a": 3.0, "b": 1.0}
    assert contest.share_of_floor("memory").figure(times, 1.0) == 0.5
    assert contest.times_of("head", "b").figure(times, 0.0) == 2.0
    assert contest.faster_than("attention, varlen_attn", "a").figure(times, 0.0) == 1.5
    assert contest.faster_than_all("memory, peers").figure(times, 0.0) == 0.5
    for missing in (contest.times_of("head", "c"), contest.faster_than("head", "c")):
        assert missing.figure(times, 0.0) is None
    assert contest.faster_than_all("memory, peers").figure({OWN: 2.0}, 0.0) is None


def test_verdicts_of_an_operation() -> None:
    scores = (contest.share_of_floor("memory"), contest.faster_than_all("memory, peers"))
    lines = bench_targets.verdict_lines(of({OWN: 2.0, "liger": 1.9}, scores, floor_ms=1.8))
    assert [line[-2:] for line in lines] == [["90%", "met"], ["0.95x", "missed by 5.0%"]]
    refused = Outcome(of({OWN: 1.0}, scores).contest)
    assert [line[-1] for line in bench_targets.verdict_lines(refused)] == ["not measured"] * 2


def test_the_linears_of_a_layer_are_also_judged_together() -> None:
    def linear(own: float, bare: float) -> Outcome:
        outcome = of({OWN: own, contest_linear.BARE: bare}, (contest.times_of("linear, 8192", contest_linear.BARE),))
        return outcome

    lines = bench_targets.total_lines([linear(2.0, 1.0), linear(9.0, 9.0), of({OWN: 5.0, "x": 1.0})])
    assert [line[-2:] for line in lines] == [["1.10x", "missed by 3.8%"]]


def test_operands_take_turns_and_fill_more_than_a_cache() -> None:
    call = contest.rotating(lambda operand: operand, ["a", "b", "c"])
    assert [call() for _ in range(5)] == ["a", "b", "c", "a", "b"]
    assert contest.copies_beyond_cache(33 * 2**20) * 33 * 2**20 >= contest.CACHE_BYTES
    assert contest.copies_beyond_cache(2**40) == 2


def test_systems_take_turns_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(contest, "ROUNDS", 2)
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times, waiting = contest.take_turns(calls, "cpu")
    assert order[-4:] == ["a", "b", "b", "a"]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    assert waiting == []


def test_the_path_that_is_taken_is_marked(capsys: pytest.CaptureFixture[str], kernel_device: str) -> None:
    if kernel_device == "cuda":
        pytest.skip("the tiny shapes are for the interpreter")
    assert bench_targets.main(["--tiny", "--only", "paths"]) == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| qkv")]
    assert [int(line[1]) for line in lines[:3]] == [1, 16, 32]
    assert {line[-2].strip() for line in lines} == {contest_linear.BY_CUBLAS}, "of a CPU"


def test_exact_attention_is_attention() -> None:
    """One document, one query head a key head: as torch's own."""
    torch.manual_seed(0)
    qkv, dout = torch.randn(6, 6, 8), torch.randn(6, 2, 8)
    leaf = qkv.clone().requires_grad_()
    q, k, v = (part.transpose(0, 1)[None] for part in leaf.split([2, 2, 2], dim=1))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
    (gradient,) = torch.autograd.grad(expected, leaf, dout)
    out, grad = contest_model.exact_attention(qkv, dout, 1, 2, 2, "both")
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close(grad, gradient)
    assert len(contest_model.exact_attention(qkv, dout, 2, 2, 2, "forward")) == 1


def test_nothing_is_begun_after_the_deadline(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench_targets.main(["--tiny", "--only", "few,paths", "--deadline", "-1", "--out", str(tmp_path)]) == 0
    assert not list(tmp_path.glob("*.csv"))
    assert "met" not in capsys.readouterr().out


def test_unknown_groups_and_machines_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_targets.main(["--only", "few,most"])
    assert "unknown group most" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            bench_targets.main([])
        assert "needs a CUDA GPU" in capsys.readouterr().err


def test_every_figure_of_the_csv_is_one_of_its_fields() -> None:
    outcome = of({OWN: 2.0}, floor_ms=1.0)
    outcome.extra_mib = 512.0
    (row,) = bench_targets.csv_rows(outcome, torch.bfloat16)
    assert set(row) <= set(harness.CSV_FIELDS)
    assert (row["fraction_of_floor"], row["peak_gib"], row["settings"]) == ("0.500", "0.5", "bfloat16")
