"""`slothcore train`."""

from pathlib import Path
from typing import Any

from slothcore.commands.command import Command, UsageError, add_run_options, config_of, require_set, wrong_call
from slothcore.training.config import TrainConfig

# What a shell reports for a command that Ctrl-C ended.
INTERRUPTED = 130

EXAMPLES = """\
  slothcore train --model meta-llama/Llama-3.2-1B --data alpaca.json --max-steps 200 --output-dir runs/alpaca
  slothcore train run.yaml --learning-rate 1e-4                             a file, and flags on top of it
  slothcore train runs/alpaca/config.yaml --output-dir runs/again           repeat a run
  slothcore train runs/alpaca/config.yaml --resume-from-checkpoint latest   go on with it
"""


def run(values: dict[str, Any]) -> int:
    config = config_of(values)
    require_set(config, "model", "data")
    _check_goes_on_in_place(values, config)
    from slothcore.run import train_from_config
    from slothcore.training.folder_lock import held
    from slothcore.training.preparation import check_evaluation

    with wrong_call():
        check_evaluation(config, has_data=bool(config.eval_data or config.eval_fraction))
    with held(Path(config.output_dir)):
        result = train_from_config(config)
    return INTERRUPTED if result.interrupted else 0


def _check_goes_on_in_place(values: dict[str, Any], config: TrainConfig) -> None:
    """Raises: UsageError if a run is to go on by a file that names another folder: a copy, or one that was moved."""
    named = values["config"] or values["config_file"]
    if named is None or config.resume_from_checkpoint != "latest" or "output_dir" in values:
        return
    from slothcore.training.run_folder import run_behind

    folder = Path(named) if Path(named).is_dir() else Path(named).parent
    if run_behind(folder) == folder and folder.resolve() != Path(config.output_dir).resolve():
        raise UsageError(
            f"the run in {folder} says that its output_dir is {config.output_dir}, so either may be meant to go on; "
            f"give --output-dir {folder} or --output-dir {config.output_dir}"
        )


COMMAND = Command(
    name="train",
    help="fine-tune a model",
    description="Fine-tune a model. Every option may stand in a YAML file or as a flag; flags win.\n"
    "output_dir/config.yaml holds the options of a run and repeats it.",
    usage="slothcore train [CONFIG.yaml] [--option value ...]",
    examples=EXAMPLES,
    add_options=add_run_options,
    run=run,
    takes_config=True,
)
