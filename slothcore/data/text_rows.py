"""Prompts and completions, and texts of their own, to token ids with labels."""

from collections.abc import Sequence

from slothcore.data.chat_rows import IGNORED_LABEL, TokenizedRow
from slothcore.data.formats import TextExample
from slothcore.data.running_text import running_row
from slothcore.data.tokenizer import Tokenizer


def text_rows(examples: Sequence[TextExample], tokenizer: Tokenizer, only_completions: bool) -> list[TokenizedRow]:
    """Targets begin at the first token that the prompt alone would not have given.

    The text is encoded as one piece, because a tokenizer may mark the beginning of each piece with a space. A token
    that joins the end of the prompt and the start of the completion is a target.
    """
    running = {index: running_row(example, tokenizer) for index, example in enumerate(examples) if example.running}
    texts = ["" if example.running else example.prompt + example.completion for example in examples]
    encoded = tokenizer.encode_batch(texts)
    prompts = tokenizer.encode_batch([example.prompt for example in examples]) if only_completions else []
    rows = []
    for index, example in enumerate(examples):
        if example.running:
            rows.append(running[index])
            continue
        ids = tokenizer.single_begin(encoded[index])
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        skipped = 0
        if only_completions and example.prompt:
            skipped = _common_prefix(tokenizer.single_begin(prompts[index]), ids)
        rows.append(TokenizedRow(ids, [IGNORED_LABEL] * skipped + ids[skipped:]))
    return rows


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids two sequences share."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
