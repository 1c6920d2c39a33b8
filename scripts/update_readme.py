"""Write the generated tables of README.md: what is supported, from the code that supports it.

    python scripts/update_readme.py [--check]

With --check nothing is written; the exit status is 1 if the README is behind the code.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import get_args, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from slothcore.cli import COMMANDS  # noqa: E402
from slothcore.data.formats import LAYOUTS  # noqa: E402
from slothcore.data.templates import BUILTIN_TEMPLATES  # noqa: E402
from slothcore.models.families import supported_families_table  # noqa: E402
from slothcore.training.config import TrainConfig  # noqa: E402


def options_table() -> str:
    """What a run can choose from, as the types of TrainConfig and the known layouts say it."""
    hints = get_type_hints(TrainConfig)

    def choices(name: str) -> str:
        return ", ".join(f"`{value}`" for value in get_args(hints[name]) if value is not type(None))

    rows = {
        "base weights (`bits`)": choices("bits"),
        "record formats": ", ".join(f"`{name}`" for name in LAYOUTS),
        "chat templates beside the model's own (`chat_template`)": ", ".join(f"`{name}`" for name in BUILTIN_TEMPLATES),
        "optimizers (`optim`)": choices("optim"),
        "schedules (`lr_scheduler_type`)": choices("lr_scheduler_type"),
        "trained biases (`bias`)": choices("bias"),
    }
    return "\n".join(["| Option | Choices |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])


def commands_table() -> str:
    """Every command, with the line that `slothcore --help` has for it."""
    rows = (f"| `slothcore {command.name}` | {command.help} |" for command in COMMANDS.values())
    return "\n".join(["| Command | What it does |", "| --- | --- |", *rows])


def with_tables(readme: str) -> str:
    """The README with every generated table replaced by its current form."""
    tables = {"commands": commands_table(), "families": supported_families_table(), "options": options_table()}
    for name, table in tables.items():
        block = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not block.search(readme):
            raise SystemExit(f"README.md has no block <!-- generated: {name} --> ... <!-- end -->")
        readme = block.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", readme)
    return readme


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = with_tables(old)
    if check and new != old:
        print("README.md is behind the code; run python scripts/update_readme.py", file=sys.stderr)
        return 1
    if not check:
        path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
