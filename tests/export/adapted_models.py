"""A small model with an adapter, for the tests of every format."""

from pathlib import Path
from typing import Any

from slothcore.data.tokenizer import Tokenizer
from slothcore.loading import load
from slothcore.lora.attach import add_lora
from tests.lora.reference import randomise_zero_factors


def adapted(base: Path, **options: Any) -> tuple[Any, Tokenizer | None]:
    """A model whose adapter has moved, and its tokenizer."""
    loading = {"bits": options.pop("bits", 4), "dtype": options.pop("dtype", None)}
    model, tokenizer = load(base, device="cpu", **loading)
    add_lora(model, **{"r": 4, **options})
    randomise_zero_factors(model)
    return model, tokenizer
