"""Ranks and alphas of an adapter of experts: those that PEFT finds are those that it has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from slothcore.lora.adapter_io import load_adapter, save_adapter
from slothcore.models.load import load_model
from tests.lora.test_expert_adapters import TOLERANCE, adapted, all_sparse, assert_same_logits, logits_of
from tests.models.zoo import EXPERTS, tiny_model

PATTERNS = {
    "of attention": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 3, "[qv]_proj": 9}},
    "of down": {"rank_pattern": {"DOWN": 2}, "alpha_pattern": {"DOWN": 5}},
    "of gate and up": {"rank_pattern": {"GATE|UP": 2}, "alpha_pattern": {"UP|GATE": 5}},
    "of all": {
        "rank_pattern": {r"experts\.\d+\.(GATE|UP)": 2, "DOWN": 3, "k_proj": 5},
        "alpha_pattern": {".*": 7},
    },
    "like fused names": {"rank_pattern": {"(gate_up_proj|.*)": 5}, "alpha_pattern": {"(.*up_proj|UP|GATE)": 8}},
    # PEFT cannot read these again when it has saved them: it sorts its own pattern before ours.
    "of layers": {"rank_pattern": {r"layers\.0\..*\.(GATE|UP)": 2, r"layers\.1\..*\.(DOWN|v_proj)": 3}},
    "unequal": {"rank_pattern": {"GATE": 2, "DOWN": 7}, "alpha_pattern": {"GATE": 3}},
}


@pytest.mark.filterwarnings("error:PEFT has one scaling")
@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rank-stabilised"])
@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("family", EXPERTS)
def test_peft_reads_ranks_and_alphas_of_their_own(family: str, kind: str, use_rslora: bool, tmp_path: Path) -> None:
    """PEFT asks for them under the names of fused experts, and keeps alpha / r of those."""
    options: dict[str, Any] = PATTERNS[kind]
    if kind == "unequal" and use_rslora:
        options = {**options, "alpha_pattern": {"GATE": 6 / 2**0.5}}  # one scaling by the roots of the ranks
    text = json.dumps(options)
    for name, projection in zip(("GATE", "UP", "DOWN"), EXPERTS[family][1], strict=True):
        text = text.replace(name, projection)
    options = json.loads(text)
    variant = all_sparse(family)
    ours = adapted(variant, tmp_path / "base", use_rslora=use_rslora, **options)
    save_adapter(ours, tmp_path / "adapter")
    reference = tiny_model(variant)
    alone = logits_of(reference)
    theirs = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    assert_same_logits(ours, theirs)
    assert (logits_of(ours) - alone).abs().max() > 100 * TOLERANCE
    again = load_adapter(load_model(tmp_path / "base", bits=32, device="cpu"), tmp_path / "adapter")
    assert again.lora_config == ours.lora_config
    assert torch.equal(logits_of(again), logits_of(ours))
    if kind not in ("of layers", "unequal"):
        theirs.save_pretrained(tmp_path / "fused")
        back = load_adapter(load_model(tmp_path / "base", bits=32, device="cpu"), tmp_path / "fused")
        assert (logits_of(back) - logits_of(ours)).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", EXPERTS)
def test_two_scalings_for_gate_and_up_warn(family: str, tmp_path: Path) -> None:
    """PEFT has one for both; the adapter is ours to read."""
    gate = EXPERTS[family][1][0]
    ours = adapted(all_sparse(family), tmp_path / "base", rank_pattern={gate: 2})
    with pytest.warns(
        UserWarning, match=r"PEFT has one scaling for gate and up .*layers\.0\..* they have 3 and 1\.5;"
    ) as w:
        save_adapter(ours, tmp_path / "adapter")
    assert {warning.filename for warning in w if "one scaling" in str(warning.message)} == {__file__}
    again = load_adapter(load_model(tmp_path / "base", bits=32, device="cpu"), tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(ours))


@pytest.mark.parametrize("left_out", ["down", "up"])
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_that_peft_cannot_read_warn(family: str, left_out: str, tmp_path: Path) -> None:
    """PEFT passes over gate and up without down, and refuses one of the two; the adapter is ours to read."""
    gate, up, down = EXPERTS[family][1]
    targets = [gate, up] if left_out == "down" else [gate, down]
    ours = adapted(all_sparse(family), tmp_path / "base", target_modules=["q_proj", *targets])
    with pytest.warns(UserWarning, match=r"PEFT, whose experts are fused, takes .* or export the format merged") as w:
        save_adapter(ours, tmp_path / "adapter")
    assert [warning.filename for warning in w] == [__file__]
    again = load_adapter(load_model(tmp_path / "base", bits=32, device="cpu"), tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(ours))


@pytest.mark.filterwarnings("error:PEFT, whose")
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_that_peft_can_read_do_not_warn(family: str, tmp_path: Path) -> None:
    for name, targets in {"all": EXPERTS[family][1], "down": EXPERTS[family][1][2:], "none": ["q_proj"]}.items():
        ours = adapted(all_sparse(family), tmp_path / name, target_modules=list(targets))
        save_adapter(ours, tmp_path / f"{name} adapter")
        theirs = PeftModel.from_pretrained(tiny_model(all_sparse(family)), tmp_path / f"{name} adapter").eval()
        assert_same_logits(ours, theirs)
