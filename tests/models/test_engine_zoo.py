"""Every family in continuous batches: 64 greedy tokens for 16 unequal prompts, as transformers gives each alone."""

from pathlib import Path

import pytest
import torch

import slothcore
from slothcore.models.engine import Engine
from slothcore.models.load import load_model
from tests.models.engines import SIXTEEN, WAYS, alone, requests_of, tokens_of
from tests.models.zoo import FAMILIES_TINY, Variant, saved, tiny_model

NEW = 64
HARDEST = ("recorded, ahead, in turns", "recorded, ahead, few pages")
ZOO = [variants[0] for variants in FAMILIES_TINY.values()]
LENGTH_DEPENDENT = [v for variants in FAMILIES_TINY.values() for v in variants if "longrope" in str(v)]
pytestmark = pytest.mark.filterwarnings("ignore:.*belong to no text model", "ignore:generation goes beyond")


@pytest.mark.parametrize("variant", [*ZOO, *LENGTH_DEPENDENT], ids=str)
def test_sixteen_unequal_prompts_are_continued_as_by_transformers(variant: Variant, tmp_path: Path) -> None:
    reference = tiny_model(variant)
    model = load_model(saved(reference, tmp_path), bits=32, device="cpu")
    requests = requests_of(SIXTEEN, NEW)
    written = [tokens_of(Engine(model, **{"capacity": 192, **WAYS[way]}), requests) for way in HARDEST]
    assert all(tokens == written[0] for tokens in written)
    assert len({tuple(tokens) for tokens in written[0]}) > 8, "equal answers would prove little"
    # Below and above every window, and every original length.
    for which in (1, 2, 4):
        # A module that has read a long text keeps its grown frequencies for the next one, so each gets a fresh one.
        reference = tiny_model(variant)
        expected = reference.generate(
            torch.tensor([SIXTEEN[which]]),
            attention_mask=torch.ones(1, len(SIXTEEN[which])),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert written[0][which] == expected[0, len(SIXTEEN[which]) :].tolist()


@pytest.mark.parametrize(("bits", "use_dora"), [(4, False), (4, True), (16, False)])
def test_nf4_and_16_bits_with_an_adapter_that_is_not_merged(bits: int, use_dora: bool, tmp_path: Path) -> None:
    model = load_model(saved(tiny_model(ZOO[0]), tmp_path), bits=bits, device="cpu")
    slothcore.add_lora(model, r=4, lora_alpha=16, use_dora=use_dora)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.2)
    requests = requests_of(SIXTEEN[:8], NEW)
    written = [tokens_of(Engine(model, **{"capacity": 192, **WAYS[way]}), requests) for way in HARDEST]
    if bits == 4:
        assert written == [[alone(model, request) for request in requests]] * 2
    for request, tokens in zip([*requests, *requests], [row for rows in written for row in rows], strict=True):
        # In 16 bits sums in another order decide near ties otherwise; nothing but a near tie may be chosen.
        with torch.no_grad():
            logits = model(torch.tensor([*request.prompt_ids, *tokens])).logits[-NEW - 1 : -1].float()
        behind = logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert behind.max() <= (1e-4 if bits == 4 else 0.02) * logits.abs().max()
    base = load_model(tmp_path, bits=bits, device="cpu")
    assert alone(base, requests[1]) not in (written[0][1], written[1][1])
