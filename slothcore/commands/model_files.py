"""What the small files of a model tell; `preview` and `plan` need nothing else of it."""

import warnings
from dataclasses import dataclass, replace

from slothcore.locating import Located, locate
from slothcore.models.config import DecoderConfig
from slothcore.models.load import read_config
from slothcore.training.config import TrainConfig
from slothcore.training.preparation import DEFAULT_MAX_SEQ_LENGTH


@dataclass(frozen=True)
class ModelFiles:
    """A model before its weights are read.

    Attributes:
        found: where it lies.
        family: its name, for people.
        decoder: its shape, with RoPE scaled as the run asks, and rows for new tokens.
        longest_document: how many tokens it takes.
        max_seq_length: tokens of the longest row, as the run will resolve it.
    """

    found: Located
    family: str
    decoder: DecoderConfig
    longest_document: int
    max_seq_length: int


def read_model_files(config: TrainConfig) -> ModelFiles:
    """Find the model of a run, in a folder or on the Hub, without its weights.

    Raises: ValueError, in one sentence, if there is no such model or slothcore cannot build it.
    """
    assert config.source is not None
    found = locate(
        config.source,
        adapter=config.adapter if config.model else None,
        max_seq_length=config.max_seq_length,
        rope_scaling=config.rope_scaling,
        revision=config.revision,
        token=config.token,
        local_files_only=config.local_files_only,
        progress=not config.disable_tqdm,
        weights=False,
    )
    family, _, decoder, message = read_config(
        found.folder, max_seq_length=found.max_seq_length, rope_scaling=found.rope_scaling
    )
    if message is not None:
        warnings.warn(message, stacklevel=3)
    decoder = replace(decoder, vocab_size=max(decoder.vocab_size, _tokens(found, config)))
    length = config.max_seq_length or min(DEFAULT_MAX_SEQ_LENGTH, found.max_seq_length or decoder.longest_document)
    return ModelFiles(found, family.name, decoder, max(length, decoder.longest_document), length)


def _tokens(found: Located, config: TrainConfig) -> int:
    """How many tokens the vocabulary comes to hold by those that an adapter brought and the run adds; 0: by none."""
    if found.adapter is None and not config.new_tokens:
        return 0
    tokenizer = found.tokenizer()
    if tokenizer is None:
        return 0
    tokenizer.add_tokens(config.new_tokens)
    return tokenizer.vocab_size
