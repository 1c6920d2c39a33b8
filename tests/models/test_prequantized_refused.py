"""Quantised checkpoints of another kind, or damaged: one sentence each, which names the weight and the remedy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.models.bitsandbytes_models import STATE, edit, edit_config, edit_state, load, quantized

WEIGHT = "model.layers.0.mlp.up_proj.weight"
OTHER_METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq"}, r"\(gptq\)"),
    "awq": ({"quant_method": "awq"}, r"\(awq\)"),
    "fp8": ({"quant_method": "fp8"}, r"\(fp8\)"),
    "int8": ({"load_in_8bit": True, "load_in_4bit": False, "_load_in_4bit": False}, r"\(bitsandbytes int8\)"),
    "old int8": ({"quant_method": None, "load_in_8bit": True}, r"\(bitsandbytes int8\)"),
    "fp4": ({"bnb_4bit_quant_type": "fp4"}, r"\(bitsandbytes fp4\)"),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nested")
    quantized(folder, bnb_4bit_use_double_quant=True)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((original / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_quantisations_are_refused(method: str, bits: int, folder: Path) -> None:
    changes, named = OTHER_METHODS[method]
    edit_config(folder, lambda config: config["quantization_config"].update(changes))
    with pytest.raises(
        ValueError, match=rf"config\.json: the weights are quantised already.*({named}).*16-bit original"
    ):
        load(folder, bits=bits)


def test_quantization_config_of_the_oldest_files(folder: Path) -> None:
    """Without quant_method, and with the public names of the switches only."""
    edit_config(
        folder,
        lambda config: config.update(quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    )
    assert load(folder).model.layers[0].mlp.up_proj.is_nf4
    edit_config(folder, lambda config: config.update(quantization_config={"load_in_4bit": True}))
    with pytest.raises(ValueError, match="bitsandbytes fp4"):
        load(folder)
    edit_config(folder, lambda config: config.update(quantization_config=[4]))
    with pytest.raises(ValueError, match=r"quantization_config must be an object, got \[4\]"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocksize": 128}, "blocksize 128, and slothcore reads 64.*16-bit original"),
        ({"quant_type": "fp4"}, "quant_type 'fp4', and slothcore reads 'nf4'.*16-bit original"),
        ({"nested_blocksize": 512}, "nested_blocksize 512, and slothcore reads 256"),
        ({"nested_offset": float("nan")}, r"state that cannot be read \(.*nested_offset is nan.*download it again"),
        ({"dtype": ["bfloat16"]}, r"was quantised from \['bfloat16'\] of shape"),
        ({"nested_dtype": "float16"}, "nested_dtype 'float16'"),
        ({"shape": [128, 64, 1]}, "state that cannot be read"),
        ({"shape": [128, -64]}, "quantised from 'float32' of shape"),
        ({"dtype": "int8"}, "quantised from 'int8'"),
        ({"nested_offset": "much"}, "state that cannot be read"),
        ({"shape": [64, 64]}, r"absmax must be U8 of shape \[64\], got U8 of shape \[128\]"),
        ({"shape": [64, 128]}, r"has shape \[64, 128\], but config.json asks for \[128, 64\]"),
    ],
)
def test_states_that_are_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    edit_state(folder, WEIGHT, **changes)
    with pytest.raises(ValueError, match=rf"{WEIGHT}.*{message}"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{WEIGHT}.absmax"), "absmax is missing"),
        (lambda t: t.pop(f"{WEIGHT}.nested_quant_map"), "nested_quant_map is missing"),
        (lambda t: t.pop(WEIGHT), "must have 4096 bytes of codes, got 0"),
        (lambda t: t.update({WEIGHT: t[WEIGHT][1:]}), "must have 4096 bytes of codes, got 4095"),
        (lambda t: t[f"{WEIGHT}.quant_map"].mul_(2), "quant_map other than the NF4 code"),
        (lambda t: t[f"{WEIGHT}.{STATE}"].zero_(), "state that cannot be read"),
        (lambda t: t.update({f"{WEIGHT}.quant_state.bitsandbytes__fp4": t.pop(f"{WEIGHT}.{STATE}")}), "to 'fp4'"),
        (lambda t: t.pop(f"{WEIGHT}.{STATE}"), r"has shape \[4096, 1\], but config.json"),
    ],
)
def test_damaged_parts(change: Callable[[dict[str, Tensor]], Any], message: str, folder: Path) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=rf"{WEIGHT}.*{message}"):
        load(folder)
