"""What was trained here in other programs: PEFT and transformers give the logits that slothcore gives.

llama.cpp has tests of its own. Every family is a tiny model trained for some steps; one small model was really trained.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import slothcore
from slothcore.data.tokenizer import Tokenizer
from slothcore.export.export import export_model
from slothcore.export.self_check import distance
from slothcore.loading import load
from slothcore.lora.attach import add_lora
from slothcore.models.checkpoint import stored_tensors
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from slothcore.models.reading import read_bytes
from tests.models.tiny import token_ids
from tests.models.zoo import FAMILIES_TINY, Variant, saved, tiny_model
from tests.training.tiny import QUIET

ZOO = [variants[0] for variants in FAMILIES_TINY.values()]
LONG = 40
FLOAT32 = 1e-4
# Of the spread of the logits, where weights are rounded to bfloat16.
BFLOAT16 = 1e-2


def train(model: Decoder, ids: Tensor, *, steps: int, lr: float) -> None:
    """AdamW on one batch, whose loss falls."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits.float()


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def through_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@pytest.mark.filterwarnings("ignore:.*belong to no text model")
@pytest.mark.parametrize("variant", ZOO, ids=str)
@pytest.mark.parametrize("bits", [32, 4])
def test_transformers_loads_the_merged_model_of_every_family(variant: Variant, bits: int, tmp_path: Path) -> None:
    model = load_model(Path(saved(tiny_model(variant), tmp_path / "base")), bits=bits, device="cpu")
    untrained = logits_of(model, token_ids(2, LONG))
    train(add_lora(model, r=4), token_ids(2, LONG), steps=4, lr=0.02)
    ours = logits_of(model, token_ids(2, LONG))
    assert (ours - untrained).abs().max() > 100 * FLOAT32
    export_model(model, None, tmp_path / "float32", dtype="float32")
    assert (logits_of(through_transformers(tmp_path / "float32"), token_ids(2, LONG)) - ours).abs().max() < FLOAT32
    export_model(model, None, tmp_path / "bfloat16")
    rounded = logits_of(through_transformers(tmp_path / "bfloat16"), token_ids(2, LONG))
    # The weights are those of the other folder, rounded once; and of the rounded ones both make the same logits.
    exact, stored = (weights_in(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    assert exact.keys() == stored.keys()
    for name in exact:
        assert torch.equal(stored[name], exact[name].to(torch.bfloat16)), name
    again = load_model(tmp_path / "bfloat16", bits=32, device="cpu").eval()
    assert (logits_of(again, token_ids(2, LONG)) - rounded).abs().max() < FLOAT32
    # Weights as large as a tiny model's round more than others, and where experts are chosen by them, others may be.
    assert distance(rounded, ours) < (3 if model.config.moe is None else 20) * BFLOAT16


def test_a_merged_model_needs_no_program_of_its_base(tmp_path: Path) -> None:
    """Phi-3 is published beside the code of its own that transformers takes where it is told to trust it."""
    file = Path(saved(tiny_model(FAMILIES_TINY["phi3"][0]), tmp_path / "base")) / "config.json"
    programs = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": programs}))
    model = load_model(file.parent, bits=32, device="cpu")
    export_model(model, None, tmp_path / "merged", dtype="float32")
    trusting = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True).eval()
    assert (logits_of(trusting, token_ids(1, LONG)) - logits_of(model, token_ids(1, LONG))).abs().max() < FLOAT32


@pytest.fixture(scope="module")
def trained(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on a small model that was really trained."""
    base, folder = shared_data / "models" / "babyllama-105", tmp_path_factory.mktemp("babyllama")
    model, tokenizer = load(base, bits=32, device="cpu")
    add_lora(model, r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    records = [{"text": f"Once upon a time, {name} had {n} apples."} for name in ("Tom", "Lily") for n in range(8)]
    config = slothcore.TrainConfig(
        **QUIET, output_dir=str(folder / "run"), max_steps=6, learning_rate=3e-3, device="cpu", bits=32
    )
    slothcore.SFTTrainer(model, tokenizer, records, config=config).train()
    return folder / "run"


def test_peft_loads_the_adapter(trained: Path, shared_data: Path, tmp_path: Path) -> None:
    """By the base that it names, too; and for slothcore it is what it was before."""
    model, tokenizer = load(trained, bits=32, device="cpu")
    ids = torch.tensor([tokenizer.encode("Once upon a time, Tom had three red apples.")])
    ours = logits_of(model, ids)
    with pytest.warns(UserWarning, match="names its base"):
        export_model(model, tokenizer, tmp_path / "adapter", format="adapter")
    base = through_transformers(shared_data / "models" / "babyllama-105")
    assert (logits_of(base, ids) - ours).abs().max() > 100 * FLOAT32
    by_peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert (logits_of(by_peft, ids) - ours).abs().max() < FLOAT32
    by_name = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    assert (logits_of(by_name, ids) - ours).abs().max() < FLOAT32
    assert torch.equal(logits_of(load(tmp_path / "adapter", bits=32, device="cpu")[0], ids), ours)


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("base", ["loaded", "original"])
def test_transformers_loads_the_merged_folder(bits: int, base: Any, trained: Path, shared_data, tmp_path) -> None:
    """In float32 and bfloat16, complete with tokenizer; what no adapter touches has the bytes that it had."""
    model, tokenizer = load(trained, bits=bits, device="cpu")
    if base == "original":
        unquantised, _ = load(trained, bits=32, device="cpu")
    ids = torch.tensor([tokenizer.encode("Once upon a time, Tom had three red apples.")])
    ours = logits_of(model if base == "loaded" else unquantised, ids)
    for dtype in ("float32", "bfloat16"):
        export_model(model, tokenizer, tmp_path / dtype, dtype=dtype, base=base)
    merged = through_transformers(tmp_path / "float32")
    assert (logits_of(merged, ids) - ours).abs().max() < FLOAT32
    rounded = through_transformers(tmp_path / "bfloat16")
    assert distance(logits_of(rounded, ids), ours) < BFLOAT16
    again, _ = load(tmp_path / "bfloat16", bits=32, device="cpu")
    assert (logits_of(again, ids) - logits_of(rounded, ids)).abs().max() < FLOAT32
    # And computed in bfloat16, as it is stored.
    assert distance(logits_of(through_transformers(tmp_path / "bfloat16", torch.bfloat16), ids), ours) < 3 * BFLOAT16
    assert Tokenizer.from_folder(tmp_path / "float32").encode("Tom had") == tokenizer.encode("Tom had")
    before = stored_tensors(shared_data / "models" / "babyllama-105")
    after = stored_tensors(tmp_path / "float32")
    changed = {name for name in after if read_bytes(after[name]) != read_bytes(before[name])}
    adapted = {name for name in after if name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight"))}
    in_nf4 = {name for name in after if name.endswith("_proj.weight")} if (bits, base) == (4, "loaded") else set()
    assert changed == adapted | in_nf4
    assert before.keys() - after.keys() <= {"lm_head.weight"}
