"""Write the generated tables of README.md and of the guides: what is supported, from the code that supports it.

    python scripts/update_readme.py [--check]

With --check nothing is written; the exit status is 1 if a page is behind the code.
"""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from guide_tables import fits_table, layouts_table, templates_table  # noqa: E402
from moving_tables import LIBRARIES, defaults_table, moving_table  # noqa: E402

from slothcore.cli import COMMANDS  # noqa: E402
from slothcore.data.formats import LAYOUTS  # noqa: E402
from slothcore.data.templates import BUILTIN_TEMPLATES  # noqa: E402
from slothcore.export.formats import FORMATS  # noqa: E402
from slothcore.lora.init_names import INITIALISATIONS  # noqa: E402
from slothcore.models.families import supported_families_table  # noqa: E402
from slothcore.training.config import TrainConfig  # noqa: E402


def options_table() -> str:
    """What a run and an export can choose from, as the types of TrainConfig, the layouts and the formats say it."""
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
        "first factors of an adapter (`init_lora_weights`)": ", ".join(f"`{name}`" for name in INITIALISATIONS),
        "exports (`--format`)": ", ".join(f"`{name}`" for name in FORMATS),
        "numbers of a GGUF file (`--dtype`)": ", ".join(f"`{dtype}`" for dtype in FORMATS["gguf"].dtypes),
    }
    return "\n".join(["| Option | Choices |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])


def commands_table() -> str:
    """Every command, with the line that `slothcore --help` has for it."""
    rows = (f"| `slothcore {command.name}` | {command.help} |" for command in COMMANDS.values())
    return "\n".join(["| Command | What it does |", "| --- | --- |", *rows])


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"commands": commands_table, "families": supported_families_table, "options": options_table},
    "docs/your-own-data.md": {"layouts": layouts_table},
    "docs/memory.md": {"fits": fits_table},
    "docs/moving.md": {
        "defaults": defaults_table,
        **{library: partial(moving_table, library) for library in LIBRARIES},
    },
    "docs/chat-models.md": {"templates": templates_table},
}


def with_tables(name: str, page: str) -> str:
    """A page with every generated table of it replaced by its current form."""
    for table, make in PAGES[name].items():
        block = re.compile(rf"(<!-- generated: {table} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not block.search(page):
            raise SystemExit(f"{name} has no block <!-- generated: {table} --> ... <!-- end -->")
        made = make()
        page = block.sub(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", page)
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    check = parser.parse_args().check
    for name in PAGES:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = with_tables(name, old)
        if check and new != old:
            print(f"{name} is behind the code; run python scripts/update_readme.py", file=sys.stderr)
            return 1
        if not check and new != old:
            path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
