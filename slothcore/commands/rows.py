"""Token rows as text in which one sees what is learned."""

import random
from dataclasses import dataclass
from itertools import groupby, pairwise

from slothcore.data.masking import IGNORED_LABEL
from slothcore.data.packing import pack_first_fit_decreasing
from slothcore.data.tokenizer import Tokenizer
from slothcore.training.batches import RowSet
from slothcore.training.config import TrainConfig

LEARNED, SPECIAL, LEARNED_SPECIAL, HEADING = "\033[32m", "\033[2m", "\033[2;32m", "\033[1m"
RESET = "\033[0m"


@dataclass(frozen=True)
class Ink:
    """How parts of a row are told apart: by colours, or by marks that a file and a blind reader can keep."""

    colors: bool

    def heading(self, text: str) -> str:
        return f"{HEADING}{text}{RESET}" if self.colors else text

    def legend(self) -> str:
        if self.colors:
            return f"{LEARNED}learned{RESET}, not learned, {SPECIAL}special tokens{RESET}"
        return "[[learned]], not learned"

    def piece(self, text: str, *, learned: bool, special: bool) -> str:
        """Some tokens alike; with marks, the neighbours of learned ones have to be joined first."""
        if not self.colors:
            return f"[[{text}]]" if learned else text
        style = {(True, False): LEARNED, (False, True): SPECIAL, (True, True): LEARNED_SPECIAL}.get((learned, special))
        return text if style is None else f"{style}{text}{RESET}"


def show_rows(rows: RowSet, tokenizer: Tokenizer, config: TrainConfig, *, count: int, ink: Ink) -> str:
    """`count` rows drawn by the seed, each with all its documents.

    Args:
        rows: of one document each; they are packed here if the configuration says so.
    """
    assert config.max_seq_length is not None
    packed = [[index] for index in range(len(rows))]
    if config.packing:
        packed = pack_first_fit_decreasing(rows.row_tokens, config.max_seq_length)
    chosen = sorted(random.Random(config.seed).sample(range(len(packed)), min(count, len(packed))))
    lines = [ink.legend(), ""] if chosen else []
    for number in chosen:
        documents = packed[number]
        tokens, targets = (sum(of[index] for index in documents) for of in (rows.row_tokens, rows.row_targets))
        many = f" in {len(documents)} document{'s' * (len(documents) > 1)}" if config.packing else ""
        full = ", the longest allowed" if tokens == config.max_seq_length and not config.packing else ""
        heading = f"row {number + 1:,} of {len(packed):,}: {tokens:,} tokens{full}{many}, {targets:,} learned"
        lines.append(ink.heading(heading))
        for place, index in enumerate(documents, 1):
            if config.packing:
                lines.append(ink.heading(f"-- document {place}: {rows.row_tokens[index]:,} tokens"))
            batch = rows.micro_batch([index])
            lines.append(show_document(batch.input_ids.tolist(), batch.labels.tolist(), tokenizer, ink))
        lines.append("")
    return "".join(f"{line}\n" for line in lines)


def show_document(ids: list[int], labels: list[int], tokenizer: Tokenizer, ink: Ink) -> str:
    """The text of a document, special tokens written out, with its targets told apart.

    The text is cut out of the decoded whole: tokens decoded piece by piece would lose spaces and halve characters.
    """
    text = tokenizer.decode(ids, skip_special_tokens=False)
    # The first token is predicted by nothing.
    learned = [False, *(label != IGNORED_LABEL for label in labels[1:])]
    # A lone space may decode to nothing as well, but it does so in either case.
    special = {token: ink.colors and _is_special(token, tokenizer) for token in set(ids)}
    kinds = [(is_learned, special[token]) for token, is_learned in zip(ids, learned, strict=True)]
    starts = [next(run)[0] for _, run in groupby(enumerate(kinds), key=lambda item: item[1])]
    cuts = [_characters(ids[:start], text, tokenizer) for start in starts]
    pieces = zip(starts, pairwise([*cuts, len(text)]), strict=True)
    return "".join(
        ink.piece(text[begin:end], learned=kinds[start][0], special=kinds[start][1]) for start, (begin, end) in pieces
    )


def _characters(ids: list[int], text: str, tokenizer: Tokenizer) -> int:
    """How many characters of `text` these first ids make: half a character at their end belongs to what follows."""
    begun = tokenizer.decode(ids, skip_special_tokens=False) if ids else ""
    while not text.startswith(begun):
        begun = begun[:-1]
    return len(begun)


def _is_special(token: int, tokenizer: Tokenizer) -> bool:
    return tokenizer.decode([token]) != tokenizer.decode([token], skip_special_tokens=False)
