"""Generation where RoPE depends on the length: across the original length, in batches whose rows cross at their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from tests.models.test_generation import greedy_without_cache, left_padded
from tests.models.zoo import FAMILIES_TINY, Variant, saved, tiny_model, token_ids

NEW = 48
ORIGINAL = 32
VARIANTS = {str(variant): variant for family in FAMILIES_TINY.values() for variant in family}
LONGROPE = [variant for name, variant in VARIANTS.items() if "longrope" in name]
DYNAMIC = VARIANTS["llama-dynamic-rope"]
# Far below the original length, just below, at it, just above, far above.
PROMPTS = [token_ids(length, seed=length) for length in (3, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 60)]


def build(variant: Variant, folder: Path) -> tuple[Any, Decoder]:
    reference = tiny_model(variant)
    return reference, load_model(saved(reference, folder), bits=32, device="cpu")


def new_tokens(model: Decoder, prompt: Tensor, count: int = NEW) -> list[int]:
    return model.generate(prompt, max_new_tokens=count, eos_token_id=())[0, len(prompt) :].tolist()


@pytest.mark.filterwarnings("ignore:generation goes beyond")
@pytest.mark.parametrize("variant", [*LONGROPE, DYNAMIC], ids=str)
def test_tokens_across_the_original_length_are_those_of_transformers(variant: Variant, tmp_path: Path) -> None:
    for prompt in PROMPTS:
        # A module that has read a long text keeps its grown frequencies for the next one, so each gets a fresh one.
        reference, model = build(variant, tmp_path)
        options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = reference.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **options)
        new = new_tokens(model, prompt)
        assert new == expected[0, len(prompt) :].tolist()
        assert len(set(new)) > 2


@pytest.mark.filterwarnings("ignore:generation goes beyond")
@pytest.mark.parametrize("variant", [*LONGROPE, DYNAMIC], ids=str)
def test_rows_that_cross_at_different_times_equal_their_solo_runs(variant: Variant, tmp_path: Path) -> None:
    _, model = build(variant, tmp_path)
    prompts = [*PROMPTS, token_ids(3, seed=77)]  # two rows cross together
    ids, mask = left_padded(prompts)
    together = model.generate(ids, mask, max_new_tokens=NEW, eos_token_id=())[:, ids.shape[1] :]
    for row, prompt in zip(together, prompts, strict=True):
        assert row.tolist() == new_tokens(model, prompt)


@pytest.mark.parametrize("variant", LONGROPE, ids=str)
def test_longrope_with_a_cache_equals_reading_everything_again(variant: Variant, tmp_path: Path) -> None:
    _, model = build(variant, tmp_path)
    prompt = PROMPTS[0]
    with_cache = new_tokens(model, prompt)
    assert with_cache == greedy_without_cache(model, prompt, NEW)
    prompts_read = 0

    def count(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal prompts_read
        prompts_read += arguments[3].is_prompt

    handle = model.model.register_forward_pre_hook(count)
    new_tokens(model, prompt)
    assert prompts_read == 2, "once as a prompt, once when it outgrows the short factors"
    prompts_read = 0
    new_tokens(model, prompt, ORIGINAL - len(prompt) + 1)  # the last token is chosen, but never read
    assert prompts_read == 1
    handle.remove()


def test_dynamic_keeps_cached_keys_as_they_were_turned(tmp_path: Path) -> None:
    """So its tokens are not those of reading everything again, which shows that the test above can fail."""
    _, model = build(DYNAMIC, tmp_path)
    prompt = token_ids(6, seed=0)
    with pytest.warns(UserWarning, match=f"generation goes beyond the {2 * ORIGINAL} positions"):
        cached = new_tokens(model, prompt, 2 * NEW)
    assert cached != greedy_without_cache(model, prompt, 2 * NEW)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", LONGROPE, ids=str)
def test_gpu_gives_the_tokens_of_the_cpu(variant: Variant, tmp_path: Path) -> None:
    _, model = build(variant, tmp_path)
    on_gpu = load_model(tmp_path, bits=32, device="cuda")
    ids, mask = left_padded(PROMPTS)
    expected = model.generate(ids, mask, max_new_tokens=NEW, eos_token_id=())
    assert torch.equal(on_gpu.generate(ids, mask, max_new_tokens=NEW, eos_token_id=()).cpu(), expected)
