"""The text part of a multimodal checkpoint, under either of the names that such files give it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slothcore.models.checkpoint import save_pretrained
from slothcore.models.load import load_model
from tests.models.zoo import FAMILIES_TINY, saved, tiny_model, token_ids

VARIANT = FAMILIES_TINY["gemma3"][0]
# As published, and as transformers 5 names the modules.
SPELLINGS = {
    "published": ("language_model.model.", "language_model.lm_head.", "vision_tower.", "multi_modal_projector."),
    "transformers 5": ("model.language_model.", "lm_head.", "model.vision_tower.", "model.multi_modal_projector."),
}


def respell(folder: Path, spelling: str) -> None:
    """Rewrite the file under the names of `spelling`, whichever it has."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        for place, prefixes in enumerate(zip(*SPELLINGS.values(), strict=True)):
            for prefix in prefixes:
                if name.startswith(prefix):
                    renamed[SPELLINGS[spelling][place] + name.removeprefix(prefix)] = tensor
    assert len(renamed) == len(tensors)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_both_spellings_of_the_weights(spelling: str, tmp_path: Path) -> None:
    reference = tiny_model(VARIANT)
    respell(saved(reference, tmp_path), spelling)
    with pytest.warns(UserWarning, match=r"\d+ weights that belong to no text model were not loaded") as caught:
        ours = load_model(tmp_path, bits=32, device="cpu")
    assert len(caught) == 1
    with torch.no_grad():
        distance = ours(token_ids(1, 30)).logits - reference(token_ids(1, 30)).logits
    assert distance.abs().max() < 1e-4


def test_a_weight_of_neither_part_is_refused(tmp_path: Path) -> None:
    saved(tiny_model(VARIANT), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["audio_tower.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no place for: audio_tower\.weight"):
        load_model(tmp_path, bits=32, device="cpu")


@pytest.mark.filterwarnings("ignore:.*belong to no text model")
def test_what_we_write_is_a_text_model(tmp_path: Path) -> None:
    reference = tiny_model(VARIANT)
    ours = load_model(saved(reference, tmp_path / "theirs"), bits=32, device="cpu")
    save_pretrained(ours.state_dict().items(), tmp_path / "ours", hf_config=ours.hf_config)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert not {"vision_config", "text_config", "image_token_index"} & config.keys()
    text, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(text(token_ids(1, 30)).logits, reference(token_ids(1, 30)).logits)
