"""What the model says as it trains: the same questions again and again, answered by the weights of that moment.

    {"step": 40, "prompt": "Who wrote Faust?", "output": "Goethe.", "expected": "Johann Wolfgang von Goethe."}

Each line of samples.jsonl is one answer. They are greedy and leave training as it is: the generators are as before, and
so is every number that follows.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from slothcore.data.tokenizer import Tokenizer
from slothcore.data.values import counted
from slothcore.inference.generate import generate
from slothcore.models.decoder import Decoder
from slothcore.report.saved_run import SAMPLES_FILE
from slothcore.report.writing import writing
from slothcore.training.config import TrainConfig
from slothcore.training.progress import say
from slothcore.training.run_state import generator_states, restore_generators
from slothcore.training.sample_prompts import Question, read_questions

# Said at each sampling, and how much of a text; all of it stands in the file.
MOST_SAID = 4
LONGEST_SAID = 70


class Samples:
    """Asks the model of a run.

    Args:
        train_dataset: of which the first record says how texts are asked.
    Raises: ValueError or FileNotFoundError for a prompt that cannot be asked, before anything is written.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer | None, train_dataset: Iterable[Any], config: TrainConfig
    ) -> None:
        self.model = model
        self.file = Path(config.output_dir) / SAMPLES_FILE
        self.max_new_tokens = config.sample_max_new_tokens
        self.questions: list[Question] = []
        if config.sample_prompts is None:
            return
        if tokenizer is None:
            raise ValueError("sample_prompts is set, and there is no tokenizer to read them; give one, or leave it out")
        self.tokenizer = tokenizer
        self.questions = read_questions(config, self.tokenizer, next(iter(train_dataset), None))
        room = self.model.max_seq_length - self.max_new_tokens
        for question in self.questions:
            length = len(self.tokenizer.encode_prompt(question.text, add_special_tokens=not question.by_template))
            if length > room:
                raise ValueError(
                    f"the sample prompt {_short(question.prompt)!r} has {counted(length, 'token')}, and "
                    f"max_seq_length {self.model.max_seq_length:,} leaves {max(0, room):,} beside "
                    f"sample_max_new_tokens {self.max_new_tokens}; shorten it, or change one of the two"
                )

    def __bool__(self) -> bool:
        """Whether there is anything to ask."""
        return bool(self.questions)

    def ask(self, step: int) -> list[dict[str, Any]]:
        """Write down, and say shortly, what the model answers after `step` steps; gives the lines.

        Where memory does not suffice, that is said, and nothing is asked any more.
        """
        generators = generator_states(self.model.device)
        try:
            answers = self._answers()
        except torch.OutOfMemoryError:
            self.questions = []
            say(
                "note: the samples do not fit into the GPU's memory, so there will be none; "
                "lower sample_max_new_tokens, or give fewer sample_prompts"
            )
            return []
        finally:
            restore_generators(generators, self.model.device)
        lines: list[dict[str, Any]] = []
        for question, output in zip(self.questions, answers, strict=True):
            expected = {} if question.expected is None else {"expected": question.expected}
            lines.append({"step": step, "prompt": question.prompt, "output": output, **expected})
        with writing(self.file), self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        for line in lines[:MOST_SAID]:
            say(f"step {step}: {_short(line['prompt'])!r} -> {_short(line['output'])!r}")
        if len(lines) > MOST_SAID:
            say(f"step {step}: {counted(len(lines) - MOST_SAID, 'more sample')} in {self.file}")
        return lines

    def _answers(self) -> list[str]:
        """One for each question. A chat template wrote its begin token itself, so those are continued apart."""
        answers = [""] * len(self.questions)
        for by_template in (False, True):
            which = [i for i, question in enumerate(self.questions) if question.by_template is by_template]
            if not which:
                continue
            outputs = generate(
                self.model,
                self.tokenizer,
                [self.questions[i].text for i in which],
                max_new_tokens=self.max_new_tokens,
                add_special_tokens=not by_template,
            )
            for i, output in zip(which, outputs, strict=True):
                answers[i] = output
        return answers


def _short(text: str) -> str:
    """The beginning of a text, in one line."""
    words = " ".join(text.split())
    return words if len(words) <= LONGEST_SAID else f"{words[: LONGEST_SAID - 3]}..."
