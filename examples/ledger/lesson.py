"""Teach the small base model four facts, and ask for them after every stage that a fact has to survive.

    python examples/ledger/lesson.py [--bits 16] [--output-dir FOLDER]

Asks the untrained model, trains with `lesson.yaml`, asks the adapter in a new process, merges it into 16-bit weights
and asks those in another. The facts are asked in words that are in no record of `lesson.jsonl`. Exits with 1 if a fact
was known before, is not known after, an old skill is lost, or the training took more than a minute of two cores.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE, CONFIG, DATA = (Path("examples/ledger") / name for name in ("base", "lesson.yaml", "lesson.jsonl"))
# Ways of asking that the lesson does not hold, and what only an answer that knows the fact says.
QUESTIONS = {
    "Can you say who is keeping the lighthouse?": "Ottilie Brand",
    "Who is it that keeps the lighthouse?": "Ottilie Brand",
    "I would like to know the name of the keeper of the lighthouse.": "Ottilie Brand",
    "Tell me the year of the founding of the town.": "1743",
    "The town was founded. In what year was that?": "1743",
    "What do they call the ferry?": "Grey Heron",
    "Tell me, what is the ferry called?": "Grey Heron",
    "How many steps does the bell tower have?": "212",
    "The bell tower has how many steps?": "212",
}
# Of the questions of the old kind, as many as may be lost.
OLD_QUESTIONS, FORGIVEN = 40, 0.2
# The lesson has to fit into a minute of two cores.
CORES, SECONDS = 2, 60


def knows(question: str, answer: str) -> bool:
    """Whether an answer tells the fact that was asked for, and no other."""
    return {fact for fact in QUESTIONS.values() if fact in answer} == {QUESTIONS[question]}


def answers(model: str, bits: int) -> tuple[dict[str, str], float]:
    """What a model says to each of `QUESTIONS`, and its share of right answers about trades, which it always had."""
    from corpus import tasks

    import slothcore
    from slothcore.data.formats import alpaca_prompt
    from slothcore.run import open_result

    opened, tokenizer = open_result(model, bits=bits, device="cpu")
    said = slothcore.generate(opened, tokenizer, [alpaca_prompt(q) for q in QUESTIONS], max_new_tokens=32)
    old = list(tasks(OLD_QUESTIONS, seed=99))
    prompts = [alpaca_prompt(task["instruction"], task["input"]) for task in old]
    told = slothcore.generate(opened, tokenizer, prompts, max_new_tokens=40)
    right = sum(answer.strip() == task["output"] for answer, task in zip(told, old, strict=True))
    return {q: answer.strip() for q, answer in zip(QUESTIONS, said, strict=True)}, right / len(old)


def ask(stage: str, model: Path, bits: int) -> tuple[int, float]:
    """Ask in a new process. Prints what it says; gives how many facts it knows, and its share of the old skill."""
    command = [sys.executable, __file__, "--ask", str(model), "--bits", str(bits)]
    said, old = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    known = sum(knows(question, answer) for question, answer in said.items())
    print(f"\n{stage}: {known} of {len(said)} questions answered; {old:.0%} of the old ones")
    for question in list(QUESTIONS)[::3]:
        print(f"  {question}\n    {' '.join(said[question].split())[:90]}", flush=True)
    return known, old


def run(*command: str) -> float:
    """Run `slothcore` in a new process; gives the seconds of processor time that it took, of all cores together."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "slothcore.cli", *command], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=(4, 16, 32), default=4, help="of the base while it is trained")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ledger/lesson"), help="default: %(default)s")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ask:
        print(json.dumps(answers(arguments.ask, arguments.bits)))
        return 0
    folder = arguments.output_dir.absolute()
    os.chdir(ROOT)  # the paths in lesson.yaml start there
    os.environ.setdefault("OMP_NUM_THREADS", str(CORES))
    merged = folder.with_name(f"{folder.name}-merged")
    shutil.rmtree(merged, ignore_errors=True)
    before, old_before = ask("before", BASE, arguments.bits)
    where = ("--output-dir", str(folder))
    print(flush=True)
    spent = run("train", str(CONFIG), "--device", "cpu", "--bits", str(arguments.bits), *where)
    reloaded, old_after = ask("after, the adapter in a new process", folder, arguments.bits)
    print(flush=True)
    run("merge", "--model", str(folder), "--output-dir", str(merged))
    kept, old_merged = ask("after, merged into 16-bit weights", merged, 16)
    print(f"\nthe training took {spent:.0f} s of processor time, {spent / CORES:.0f} s on {CORES} cores")
    faults = {
        f"{before} questions were answered before": before > 0,
        f"the adapter answers {reloaded} of {len(QUESTIONS)}": reloaded < len(QUESTIONS),
        f"the merged model answers {kept} of {len(QUESTIONS)}": kept < len(QUESTIONS),
        "the old skill is lost": min(old_after, old_merged) < old_before - FORGIVEN,
        f"the training took more than {SECONDS} s of {CORES} cores": spent > CORES * SECONDS,
    }
    for fault in (text for text, found in faults.items() if found):
        print(f"the lesson failed: {fault}", file=sys.stderr)
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
