"""Every published dataset, trained on through the command line by its file's name alone: the loss falls.

No option says anything about the data or the optimizer; the number of steps is less than an epoch to save time.

The files and the model, a small trained one whose rows have 256 tokens at most, lie in the folder shared/data beside
the checkout; without it the tests are skipped.
"""

from pathlib import Path

import pytest

from slothcore.cli import main
from slothcore.report.page import REPORT_FILE
from slothcore.report.saved_run import LOG_FILE
from slothcore.training.report import read_log

# What the run says of each file, and how many records are too long to teach a model of 256 tokens anything.
DATASETS = {
    "alpaca_4k.json": ("format alpaca; 3,999 of 4,000 rows are used", "1,242"),
    "alpaca_libre_3k.json": ("format alpaca; 3,097 of 3,102 rows are used", "1,569"),
    "dolly_3k.jsonl": ("format dolly; 2,996 of 2,996 rows are used", "744"),
    "dpo_en_demo.json": ("format preference; 300 of 300 rows are used", "261"),
    "gsm8k_test.jsonl": ("format question; 1,319 of 1,319 rows are used", "1,246"),
    "kto_en_demo.json": ("format kto; 150 of 300 rows are used", "127"),
    "oasst_100_sharegpt.json": ("format conversations; 100 of 100 rows are used", "55"),
    "preference_1100.json": ("format preference; 1,100 of 1,100 rows are used", "245"),
    "sharegpt_500.json": ("format conversations; 500 of 500 rows are used", None),
    "wiki_demo.txt": ("format document; 1 of 1 row is used", None),
}
# What a run says once that learns from preferences.
AS_SFT = {
    "dpo_en_demo.json": "preference data, trained as SFT: the chosen answers are learned, the rejected ignored",
    "preference_1100.json": "preference data, trained as SFT: the chosen answers are learned, the rejected ignored",
    "kto_en_demo.json": (
        "judged answers (KTO), trained as SFT: those with label true are learned, 150 with label false left out"
    ),
}
STEPS = 12
# Too little to learn anything: what the model as it came makes of the same batches.
NO_TRAINING = ("--learning-rate", "1e-12")
# Of the loss, for the mean of the last third of the steps; the least of ten files has 0.12.
LEAST_FALL = 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", DATASETS)
def test_the_loss_falls(name: str, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Below that of the same batches without training: one batch differs from the next by more than eight steps win."""
    model, file = shared_data / "models" / "babyllama-105", shared_data / "datasets" / name

    def losses(run: Path, *flags: str) -> list[float]:
        words = ["--model", str(model), "--data", str(file), "--output-dir", str(run), "--max-steps", str(STEPS)]
        # Of these none changes what is trained.
        shown = ["--device", "cpu", "--logging-steps", "1", "--plot", "false"]
        assert main(["train", *words, *shown, *flags]) == 0
        assert (run / REPORT_FILE).is_file()
        return [line["loss"] for line in read_log(run / LOG_FILE)]

    trained = losses(tmp_path / "trained")
    output = capsys.readouterr()
    assert output.err == ""
    said, dropped = DATASETS[name]
    assert f"training: {file}: {said}\n" in output.out
    assert (f"; {dropped} dropped, having no token to learn\n" in output.out) == (dropped is not None)
    assert (f"training: the first left out: {file}, " in output.out) == (dropped is not None)
    assert output.out.count("trained as SFT") == (name in AS_SFT)
    assert name not in AS_SFT or f"training: {file}: {AS_SFT[name]}\n" in output.out
    untrained = losses(tmp_path / "untrained", *NO_TRAINING)
    assert len(trained) == len(untrained) == STEPS
    assert trained[0] == untrained[0], "an adapter begins as nothing, and the batches are the same"
    falls = [before - after for before, after in zip(untrained, trained, strict=True)]
    last = falls[-STEPS // 3 :]
    assert sum(last) / len(last) > LEAST_FALL, falls
    assert min(last) > 0, falls
    assert sum(last) > 2 * sum(falls[: STEPS // 3]), "it falls further with every step"


def test_every_published_dataset_is_among_them(shared_data: Path) -> None:
    assert {path.name for path in (shared_data / "datasets").iterdir()} == set(DATASETS)
