"""Teach the small base model a new skill with QLoRA, and show that it learned it.

    python examples/ledger/demo.py

Writes the data of the skill, asks the untrained model, trains through `scripts/train.py` with `train.yaml`, and
asks again; the records asked about are in no training file. Exits with 1 if the skill was there before or is not there
after.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from corpus import records

import slothcore
from slothcore.data.formats import alpaca_prompt

ROOT = Path(__file__).resolve().parents[2]
RUN = Path("runs/ledger")
BASE = Path("examples/ledger/base")
LACKING, LEARNED = 0.10, 0.80


def write_data(folder: Path) -> list[dict[str, str]]:
    """Write train.jsonl and eval.jsonl, and return up to 100 further records, none of which was written."""
    folder.mkdir(parents=True, exist_ok=True)
    train, evaluation, held_out = list(records(2000, seed=1)), list(records(50, seed=2)), list(records(100, seed=3))
    for name, rows in (("train", train), ("eval", evaluation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    known = {row["input"] for row in (*train, *evaluation)}
    return [row for row in held_out if row["input"] not in known]


def exact_match(model, tokenizer, held_out: list[dict[str, str]]) -> tuple[float, list[str]]:
    """Share of the records whose greedy answer equals the expected one to the letter, and the answers."""
    prompts = [alpaca_prompt(row["instruction"], row["input"]) for row in held_out]
    answers = [a.strip() for a in slothcore.generate(model, tokenizer, prompts, max_new_tokens=80)]
    hits = sum(answer == row["output"] for answer, row in zip(answers, held_out, strict=True))
    return hits / len(held_out), answers


def main() -> int:
    os.chdir(ROOT)  # the paths in train.yaml start there
    held_out = write_data(RUN / "data")
    model, tokenizer = slothcore.load(str(BASE), bits=4)
    before, first_answers = exact_match(model, tokenizer, held_out)
    print(f"before training: {before:.0%} of {len(held_out)} held-out records exactly right", flush=True)

    start = time.perf_counter()
    status = subprocess.run([sys.executable, "scripts/train.py", "--config", "examples/ledger/train.yaml"]).returncode
    if status:
        return status  # it has said why
    minutes = (time.perf_counter() - start) / 60

    model, tokenizer = slothcore.load(str(BASE), bits=4)
    model = slothcore.load_adapter(model, str(RUN / "run" / "adapter"))
    after, answers = exact_match(model, tokenizer, held_out)
    for row, first, last in list(zip(held_out, first_answers, answers, strict=True))[:3]:
        print(
            f"\n  asked   {row['input']}\n  before  {first.splitlines()[0] if first else '(nothing)'}\n  after   {last}"
        )
    print(f"\nheld-out exact match: {before:.0%} before, {after:.0%} after {minutes:.1f} minutes of training")
    print(f"how it went: {RUN / 'run' / 'report.html'}")
    question = f"--instruction {shlex.quote(held_out[0]['instruction'])} --input {shlex.quote(held_out[0]['input'])}"
    command = os.path.relpath(Path(sys.executable).parent / "slothcore")
    print(f"talk to it: {command} generate --model {RUN / 'run'} {question}")
    if before >= LACKING or after <= LEARNED:
        print(
            f"the skill was not learned: expected under {LACKING:.0%} before and over {LEARNED:.0%} after",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
