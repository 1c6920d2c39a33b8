"""Every published dataset, trained on through the command line by its file's name alone: the loss falls.

The files and the model, a small trained one whose rows have 256 tokens at most, lie in the folder shared/data beside
the checkout; without it the tests are skipped.
"""

from pathlib import Path

import pytest

from slothcore.cli import main
from slothcore.report.page import REPORT_FILE
from slothcore.training.report import LOG_FILE, read_log

# What the run says of each file, and how many records are too long to teach a model of 256 tokens anything.
DATASETS = {
    "alpaca_4k.json": ("format alpaca; 3,999 of 4,000 rows are used", "1,242"),
    "alpaca_libre_3k.json": ("format alpaca; 3,097 of 3,102 rows are used", "1,569"),
    "dolly_3k.jsonl": ("format dolly; 2,996 of 2,996 rows are used", "744"),
    "dpo_en_demo.json": ("format preference; 300 of 300 rows are used", "232"),
    "gsm8k_test.jsonl": ("format question; 1,319 of 1,319 rows are used", "1,246"),
    "kto_en_demo.json": ("format kto; 150 of 300 rows are used", "117"),
    "oasst_100_sharegpt.json": ("format conversations; 100 of 100 rows are used", "55"),
    "preference_1100.json": ("format preference; 1,100 of 1,100 rows are used", "245"),
    "sharegpt_500.json": ("format conversations; 500 of 500 rows are used", None),
    "wiki_demo.txt": ("format document; 1 of 1 row is used", None),
}
STEPS = 8
LEARNING_RATE = "2e-3"
# Too little to learn anything: what the model as it came makes of the same batches.
NO_TRAINING = "1e-12"
# Of the loss, for the mean of the last half of the steps.
LEAST_FALL = 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", DATASETS)
def test_the_loss_falls(name: str, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Below that of the same batches without training: one batch differs from the next by more than eight steps win."""
    model, file = shared_data / "models" / "babyllama-105", shared_data / "datasets" / name

    def losses(learning_rate: str) -> list[float]:
        run = tmp_path / learning_rate
        paths = ["--model", str(model), "--data", str(file), "--output-dir", str(run)]
        options = f"--device cpu --max-steps {STEPS} --learning-rate {learning_rate} --logging-steps 1 --plot false"
        assert main(["train", *paths, *options.split()]) == 0
        assert (run / REPORT_FILE).is_file()
        return [line["loss"] for line in read_log(run / LOG_FILE)]

    trained = losses(LEARNING_RATE)
    output = capsys.readouterr()
    assert output.err == ""
    said, dropped = DATASETS[name]
    assert f"training: {file}: {said}\n" in output.out
    assert (f"; {dropped} dropped, having no token to learn\n" in output.out) == (dropped is not None)
    assert (f"training: the first left out: {file}, " in output.out) == (dropped is not None)
    untrained = losses(NO_TRAINING)
    assert len(trained) == len(untrained) == STEPS
    assert trained[0] == untrained[0], "an adapter begins as nothing, and the batches are the same"
    falls = [before - after for before, after in zip(untrained, trained, strict=True)]
    assert sum(falls[STEPS // 2 :]) / (STEPS // 2) > LEAST_FALL, falls
