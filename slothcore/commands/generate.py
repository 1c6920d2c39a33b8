"""`slothcore generate`."""

import argparse
from pathlib import Path
from typing import Any

from slothcore.commands.command import Command, UsageError, add_model_options, model_options
from slothcore.commands.sampling import add_sampling_options, sampling_of

EXAMPLES = """\
  slothcore generate --model runs/alpaca --instruction "Name three rivers in Europe."
  slothcore generate --model runs/chat --chat --prompt "Who are you?" --temperature 0.7 --top-p 0.9
  slothcore generate --model meta-llama/Llama-3.2-1B --prompt "The capital of France is" --max-new-tokens 8
"""
# What has an effect only beside another option.
NEEDED = {"input": "instruction", "system": "chat"}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    prompts = parser.add_argument_group("prompts (one kind)")
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to continue")
    prompts.add_argument("--prompts-file", metavar="FILE", help="the same, one on each line")
    prompts.add_argument("--instruction", metavar="TEXT", help="an instruction, put into Alpaca's template")
    prompts.add_argument("--input", metavar="TEXT", default="", help="the input that goes with --instruction")
    prompts.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    prompts.add_argument("--system", metavar="TEXT", help="the system message that goes with --chat")
    add_sampling_options(parser, max_new_tokens=256)


def run(values: dict[str, Any]) -> int:
    prompts = prompts_of(values)
    for name, needed in NEEDED.items():
        if values[name] and not values[needed]:
            raise UsageError(f"--{name} has no effect without --{needed}; add it, or leave --{name} out")
    sampling = sampling_of(values)
    from slothcore.inference.generate import generate
    from slothcore.models.vocabulary import round_tables
    from slothcore.run import open_result

    model, tokenizer = open_result(values["model"], **model_options(values))
    round_tables(model)
    if values["chat"]:
        system = [{"role": "system", "content": values["system"]}] if values["system"] else []
        prompts = [
            tokenizer.apply_chat_template([*system, {"role": "user", "content": prompt}], add_generation_prompt=True)
            for prompt in prompts
        ]
    texts = generate(
        model,
        tokenizer,
        prompts,
        **sampling,
        # A chat template writes the begin token itself.
        add_special_tokens=not values["chat"],
    )
    for text in texts:
        print(text)
    return 0


def prompts_of(values: dict[str, Any]) -> list[str]:
    """The texts to continue, from whichever option holds them."""
    if sum(values[name] is not None for name in ("prompt", "prompts_file", "instruction")) != 1:
        raise UsageError("give one of --prompt, --prompts-file and --instruction")
    if values["instruction"] is not None:
        from slothcore.data.formats import alpaca_prompt

        return [alpaca_prompt(values["instruction"], values["input"])]
    if values["prompt"] is not None:
        return list(values["prompt"])
    path = Path(values["prompts_file"])
    if not path.is_file():
        raise FileNotFoundError(f"the prompts file {path} does not exist")
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompts file {path} is not UTF-8; save it as UTF-8") from error
    if not prompts:
        raise ValueError(f"the prompts file {path} is empty; write one prompt on each line")
    return prompts


COMMAND = Command(
    name="generate",
    help="let a model, or the result of a run, answer",
    description="Continue prompts with a model, an adapter or the result of a run.",
    examples=EXAMPLES,
    add_options=add_options,
    run=run,
)
