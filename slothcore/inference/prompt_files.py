"""Prompts from a JSON-lines file, answers to another one, line for line; what was cut short goes on where it was."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from slothcore.data.formats import alpaca_prompt
from slothcore.data.readers import read_records
from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.answers import Answer, answers
from slothcore.inference.conversations import conversation_text
from slothcore.inference.endings import Endings
from slothcore.models.decoder import Decoder
from slothcore.models.sampling import Sampling

# What a row may be asked by, and what is added to it.
KINDS = ("prompt", "messages", "instruction")
TEXT, REASON, TOKENS = "generated", "finish_reason", "generated_tokens"


@dataclass(frozen=True)
class PromptRow:
    """A line of a file of prompts.

    Attributes:
        record: what it holds.
        ids: the tokens to be continued.
        goes_on: whether the answer goes on with the words of the prompt; behind a chat template it does not.
    """

    record: Mapping[str, Any]
    ids: list[int]
    goes_on: bool = True


def read_prompts(path: Path, tokenizer: Tokenizer, *, chat: bool = False, system: str | None = None) -> list[PromptRow]:
    """The prompts of a JSON-lines file.

    A row has `prompt` (a text), `messages` (a conversation, for the chat template) or `instruction` with or without
    `input` (for Alpaca's template); other fields are carried along.

    Args:
        chat: a `prompt` is what a user says, for the chat template.
        system: the system message that goes with it.
    Raises: ValueError, naming the line, for a row that is none of these or has no token.
    """
    rows: list[PromptRow] = []
    for where, record in read_records(path):
        if isinstance(record, ValueError):
            raise record
        if not isinstance(record, dict):
            raise ValueError(f'{where}: a row is an object, such as {{"prompt": ".."}}, got {type(record).__name__}')
        kinds = [kind for kind in KINDS if kind in record]
        if len(kinds) != 1:
            raise ValueError(f"{where}: a row has one of {', '.join(KINDS)}, got {', '.join(record) or 'nothing'}")
        for name in (TEXT, REASON, TOKENS):
            if name in record:
                raise ValueError(f"{where}: {name} is what the answer is called; rename it in the file of prompts")
        ids = _ids_of(record, kinds[0], tokenizer, where, chat=chat, system=system)
        if not ids:
            raise ValueError(f"{where}: the prompt has no token; give it some text")
        rows.append(PromptRow(record, ids, goes_on=kinds[0] == "instruction" or (kinds[0] == "prompt" and not chat)))
    if not rows:
        raise ValueError(f"the prompts file {path} is empty; write one row on each line")
    return rows


def answer_rows(
    model: Decoder,
    tokenizer: Tokenizer,
    rows: Sequence[PromptRow],
    output: Path,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    endings: Endings,
    seed: int | None = None,
    batch_size: int = 128,
) -> int:
    """Write a line for each row: what it holds, and what was added to it. Lines that are there already are kept.

    A line is written as soon as it and all before it are complete. Row i draws what it would alone with the seed
    `seed + i`, so that a run which goes on gives what it would have given at once.

    Returns: how many lines were there before.
    Raises: ValueError if the file has lines of other prompts. OSError if it cannot be written.
    """
    with output.open("a+b") as file:
        done = _lines_done(file, rows, output)
        written = answers(
            model,
            tokenizer,
            [row.ids for row in rows[done:]],
            goes_on=[row.goes_on for row in rows[done:]],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            endings=endings,
            seed=seed,
            batch_size=batch_size,
            first=done,
            stacklevel=4,
        )
        with tqdm(total=len(rows), initial=done, unit="row", disable=None) as bar:
            for answer in _in_order(written, first=done):
                added = {TEXT: answer.text, REASON: answer.finish_reason, TOKENS: answer.tokens}
                line = json.dumps({**rows[answer.index].record, **added}, ensure_ascii=False) + "\n"
                file.write(line.encode("utf-8"))
                file.flush()
                bar.update()
        os.fsync(file.fileno())
    return done


def _ids_of(
    record: Mapping[str, Any], kind: str, tokenizer: Tokenizer, where: str, *, chat: bool, system: str | None
) -> list[int]:
    value = _field(record, kind, list if kind == "messages" else str, where)
    if kind == "instruction":
        return tokenizer.encode_prompt(alpaca_prompt(value, _field(record, "input", str, where) or ""))
    if kind == "prompt" and not chat:
        return tokenizer.encode_prompt(value)
    messages = value
    if kind == "prompt":
        first = [] if system is None else [{"role": "system", "content": system}]
        messages = [*first, {"role": "user", "content": value}]
    try:
        text = conversation_text(tokenizer, messages)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    # The template writes the begin token itself.
    return tokenizer.encode_prompt(text, add_special_tokens=False)


def _field(record: Mapping[str, Any], name: str, wanted: type, where: str) -> Any:
    value = record.get(name)
    if not isinstance(value, wanted) and not (value is None and name not in KINDS):
        raise ValueError(f"{where}: {name} must be a {wanted.__name__}, got {type(value).__name__}")
    return value


def _lines_done(file: IO[bytes], rows: Sequence[PromptRow], output: Path) -> int:
    """How many lines answer the first rows; what a killed run left of a line is cut off."""
    file.seek(0)
    end = done = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        try:
            held = json.loads(line)
        except ValueError:
            held = None
        row = rows[done].record if done < len(rows) else None
        is_answer = isinstance(held, dict) and TEXT in held
        if row is None or not is_answer or {k: v for k, v in held.items() if k in row} != row:
            raise ValueError(
                f"{output}, line {done + 1} is no answer to that row of the prompts; move it away, or name another file"
            )
        end += len(line)
        done += 1
    file.truncate(end)
    return done


def _in_order(written: Iterator[Answer], *, first: int) -> Iterator[Answer]:
    """Answers by their index; those that come early wait."""
    early: dict[int, Answer] = {}
    for answer in written:
        early[answer.index] = answer
        while first in early:
            yield early.pop(first)
            first += 1
