"""`slothcore generate`."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slothcore.commands.command import (
    Command,
    UsageError,
    add_adapter_option,
    add_model_options,
    add_template_option,
    check_model_options,
    model_options,
)
from slothcore.commands.sampling import add_sampling_options, sampling_of

if TYPE_CHECKING:
    from slothcore.data.tokenizer import Tokenizer
    from slothcore.models.decoder import Decoder

EXAMPLES = """\
  slothcore generate --model runs/alpaca --instruction "Name three rivers in Europe."
  slothcore generate --model runs/chat --chat --prompt "Who are you?" --temperature 0.7 --top-p 0.9
  slothcore generate --model meta-llama/Llama-3.2-1B --prompt "The capital of France is" --max-new-tokens 8
  slothcore generate --model runs/alpaca --prompts-file questions.txt --chat --chat-template alpaca
  slothcore generate --model runs/chat --prompts-file prompts.jsonl --output answers.jsonl   again: the rest of them
"""
# What has an effect only beside another option.
NEEDED = {"input": "instruction", "system": "chat", "output": "prompts_file"}
ROWS = ".jsonl"
STANDARD_INPUT = "-"
KINDS = ("prompt", "prompts_file", "instruction")
ONE_KIND = "give one of --prompt, --prompts-file and --instruction"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_adapter_option(parser)
    prompts = parser.add_argument_group("prompts (one kind)")
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to continue")
    prompts.add_argument(
        "--prompts-file",
        type=os.path.expanduser,
        metavar="FILE",
        help="the same, one on each line (-: of standard input); or rows of a .jsonl file, with --output",
    )
    prompts.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="FILE.jsonl",
        help="each row of --prompts-file (with prompt, messages, or instruction and input) and what was generated; "
        "rows that are there already are not done again",
    )
    prompts.add_argument("--instruction", metavar="TEXT", help="an instruction, put into Alpaca's template")
    prompts.add_argument("--input", metavar="TEXT", default="", help="the input that goes with --instruction")
    prompts.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    prompts.add_argument("--system", metavar="TEXT", help="the system message that goes with --chat")
    add_template_option(prompts)
    add_sampling_options(parser, max_new_tokens=256)


def run(values: dict[str, Any]) -> int:
    by_rows = (values["prompts_file"] or "").endswith(ROWS)
    if values["prompts_file"] and not by_rows:
        check_kind(Path(values["prompts_file"]))
    if by_rows != (values["output"] is not None) and values["prompts_file"] is not None:
        raise UsageError(f"--output goes with a {ROWS} file of prompts; give both, or a file of another kind alone")
    prompts = [] if by_rows else prompts_of(values)
    # Rows with messages go through the template in any case.
    for name, needed in {**NEEDED, **({} if by_rows else {"chat_template": "chat"})}.items():
        if values[name] and not values[needed]:
            flag, other = name.replace("_", "-"), needed.replace("_", "-")
            raise UsageError(f"--{flag} has no effect without --{other}; add it, or leave --{flag} out")
    if values["chat"] and values["instruction"] is not None:
        raise UsageError(
            "--instruction has Alpaca's template and takes no --chat; give the text as --prompt, or drop one"
        )
    sampling = sampling_of(values)
    check_model_options(values)
    if by_rows:
        return answer_file(values, sampling)
    from slothcore.inference.conversations import conversation_text
    from slothcore.inference.generate import generate

    model, tokenizer = open_model(values)
    if values["chat"]:
        system = [{"role": "system", "content": values["system"]}] if values["system"] else []
        prompts = [conversation_text(tokenizer, [*system, {"role": "user", "content": prompt}]) for prompt in prompts]
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


def check_kind(prompts_file: Path) -> None:
    """Raises: UsageError for records of another kind than rows, whose lines would be taken for prompts."""
    from slothcore.data.readers import READERS, extension, is_running_text

    if extension(prompts_file) in READERS and not is_running_text(prompts_file):
        raise UsageError(
            f"--prompts-file takes rows in a {ROWS} file, or a text file with one prompt on each line, got "
            f"{prompts_file}; write it as one of these"
        )


def answer_file(values: dict[str, Any], sampling: dict[str, Any]) -> int:
    """Answer the rows of a file; gives the exit status."""
    if sum(values[name] is not None for name in KINDS) != 1:
        raise UsageError(ONE_KIND)
    source, output = Path(values["prompts_file"]), Path(values["output"])
    if not source.is_file():
        raise FileNotFoundError(f"the prompts file {source} does not exist")
    if output.exists() and output.samefile(source):
        raise UsageError(f"--output {output} is the file of prompts; give it another name")
    if not output.parent.is_dir():
        raise ValueError(
            f"--output {output} would lie in {output.parent}, which is no folder; make it, or name another"
        )
    from slothcore.inference.endings import Endings
    from slothcore.inference.prompt_files import answer_rows, read_prompts
    from slothcore.models.sampling import Sampling

    model, tokenizer = open_model(values)
    rows = read_prompts(source, tokenizer, chat=values["chat"], system=values["system"])
    options = {name: sampling.pop(name) for name in ("max_new_tokens", "seed")}
    endings = Endings.of(model, tokenizer, sampling.pop("stop_strings"))
    before = answer_rows(model, tokenizer, rows, output, sampling=Sampling(**sampling), endings=endings, **options)
    hint = "; another --output has them answered anew" if before == len(rows) else ""
    print(f"{output}: {len(rows)} row{'s' * (len(rows) > 1)}, {len(rows) - before} of them new{hint}")
    return 0


def open_model(values: dict[str, Any]) -> tuple["Decoder", "Tokenizer"]:
    """The model, and its tokenizer with the template that was asked for."""
    from slothcore.models.vocabulary import round_tables
    from slothcore.run import open_result

    model, tokenizer = open_result(values["model"], adapter=values["adapter"], **model_options(values))
    round_tables(model)
    if values["chat_template"] is not None:
        tokenizer.use_chat_template(values["chat_template"])
    return model, tokenizer


def prompts_of(values: dict[str, Any]) -> list[str]:
    """The texts to continue, from whichever option holds them."""
    if sum(values[name] is not None for name in KINDS) != 1:
        raise UsageError(ONE_KIND)
    if values["instruction"] is not None:
        from slothcore.data.formats import alpaca_prompt

        return [alpaca_prompt(values["instruction"], values["input"])]
    if values["prompt"] is not None:
        return list(values["prompt"])
    name = f"the prompts file {values['prompts_file']}"
    if values["prompts_file"] == STANDARD_INPUT:
        name = "standard input"
        content = b"" if sys.stdin is None else sys.stdin.buffer.read()
    elif Path(values["prompts_file"]).is_dir():
        raise ValueError(f"{name} is a folder; name a file in it")
    else:
        try:
            # A pipe, such as a shell's <(command), is as good as a file.
            content = Path(values["prompts_file"]).read_bytes()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name} does not exist") from error
    try:
        # Other marks that Unicode takes for the end of a line belong to a prompt.
        lines = [line.rstrip("\r") for line in content.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8; save it as UTF-8") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{name} is empty; write one prompt on each line")
    return prompts


COMMAND = Command(
    name="generate",
    help="let a model, or the result of a run, answer",
    description="Continue prompts with a model, an adapter or the result of a run.",
    examples=EXAMPLES,
    add_options=add_options,
    run=run,
)
