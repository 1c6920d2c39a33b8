"""NF4 decoding by byte permutes: the PTX carried out instruction by instruction, against code * absmax rounded."""

import re

import numpy as np
import pytest
import torch

from slothcore.kernels import nf4_permute
from slothcore.kernels.nf4_tensor import NF4_CODE

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def as_bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float32 values rounded to a 16-bit dtype, as unsigned integers."""
    rounded = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(dtype)
    return rounded.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """PTX ISA, prmt.b32 without a mode: bytes 0 to 3 are a's, 4 to 7 are b's; bit 3 of a selector asks for the sign."""
    bytes_of = [(source >> np.uint32(8 * i)) & np.uint32(255) for source in (a, b) for i in range(4)]
    table = np.stack(np.broadcast_arrays(*bytes_of))
    result = np.zeros(table.shape[1:], dtype=np.uint32)
    for i in range(4):
        nibble = np.broadcast_to((selector >> np.uint32(4 * i)) & np.uint32(15), result.shape)
        byte = np.take_along_axis(table, (nibble & 7)[None].astype(np.int64), axis=0)[0]
        sign = np.where(byte & 128, np.uint32(255), np.uint32(0))
        result |= np.where(nibble & 8, sign, byte).astype(np.uint32) << np.uint32(8 * i)
    return result


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """PTX ISA, lop3.b32: bit 4a + 2b + c of the table, for every bit."""
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), dtype=np.uint32)
    for case in range(8):
        if table >> case & 1:
            terms = [v if case >> shift & 1 else ~v for v, shift in ((a, 2), (b, 1), (c, 0))]
            result = result | (terms[0] & terms[1] & terms[2])
    return result


def run_ptx(code: str, inputs: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Carry out straight-line PTX over arrays of lanes. Raises ValueError at an instruction it does not know."""
    registers = dict(inputs)

    def value(name: str) -> np.ndarray:
        if name.startswith("0f"):
            return np.frombuffer(bytes.fromhex(name[2:]), dtype=">f4").astype(np.float32)
        return registers[name] if name in registers else np.array([int(name, 0)], dtype=np.uint32)

    for line in code.strip().strip("{}").strip().splitlines():
        if line.startswith(".reg"):
            continue
        op, rest = line.rstrip(";").split(" ", 1)
        unpacked = re.fullmatch(r"\{(\S+), (\S+)\}, (\S+)", rest)
        if op == "mov.b32" and unpacked:
            registers[unpacked[1]] = value(unpacked[3]) & np.uint32(0xFFFF)
            registers[unpacked[2]] = value(unpacked[3]) >> np.uint32(16)
            continue
        target, *names = rest.split(", ")
        sources = [value(name) for name in names]
        match op:
            case "mul.rn.f32":
                registers[target] = (sources[0] * sources[1]).astype(np.float32)
            case "cvt.rn.bf16x2.f32" | "cvt.rn.f16x2.f32":
                registers[target] = as_bits(sources[0], dtype) << np.uint32(16) | as_bits(sources[1], dtype)
            case "prmt.b32":
                registers[target] = prmt(*sources)
            case "lop3.b32":
                registers[target] = lop3(*sources[:3], int(names[3], 0))
            case "and.b32":
                registers[target] = sources[0] & sources[1]
            case "shl.b32":
                registers[target] = sources[0] << sources[1]
            case "shr.u32":
                registers[target] = sources[0] >> sources[1]
            case _:
                raise ValueError(f"unknown instruction {line!r}")
    return registers


def absmax_values() -> np.ndarray:
    """Every scale: usual ones, subnormal ones, those at which float16 overflows, zero of both signs, and below zero."""
    generator = np.random.default_rng(0)
    usual = generator.random(2000).astype(np.float32)
    every_exponent = (generator.random(1500) + 1) * 2.0 ** generator.integers(-149, 127, 1500)
    special = [0.0, -0.0, 1.0, 2.0**-149, 2.0**-133, 2.0**-126, 2.0**-24, 65504, 65519.996, 65520, 3e38, -0.003, np.inf]
    return np.concatenate([usual, every_exponent.astype(np.float32), np.array(special, dtype=np.float32)])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_ptx_gives_the_rounded_product_to_the_bit(dtype) -> None:
    absmax = absmax_values()
    code = nf4_permute.PRODUCTS_BFLOAT16 if dtype == torch.bfloat16 else nf4_permute.PRODUCTS_FLOAT16
    with np.errstate(over="ignore", invalid="ignore"):
        planes = run_ptx(code.value, {"$8": absmax}, dtype)
        expected = as_bits(np.array(NF4_CODE, dtype=np.float32)[:, None] * absmax, dtype)
    inputs = {f"${9 + i}": planes[f"${i}"] for i in range(8)}

    # Every code in every place, beside a rotation of all the others; then words at random.
    words = [np.uint32(sum(((code + 3 * i) % 16) << 4 * i for i in range(8))) for code in range(16)]
    words += list(np.random.default_rng(1).integers(0, 2**32, 40, dtype=np.uint32))
    for word in words:
        weights = run_ptx(nf4_permute.WEIGHTS.value, {"$8": np.full(absmax.shape, word, np.uint32), **inputs}, dtype)
        for i in range(8):
            byte = int(word) >> 8 * (i // 2) & 255
            code_of_weight = byte & 15 if i % 2 else byte >> 4
            assert np.array_equal(weights[f"${i}"], expected[code_of_weight]), f"weight {i} of word {word:08x}"


def test_ptx_counts_what_the_docstring_says() -> None:
    lines = nf4_permute.WEIGHTS.value.splitlines()
    count = {op: sum(line.startswith(op) for line in lines) for op in ("prmt", "lop3", "and", "shl", "shr")}
    assert count == {"prmt": 14, "lop3": 4, "and": 1, "shl": 1, "shr": 1}
    lines = nf4_permute.PRODUCTS_BFLOAT16.value.splitlines()
    assert [sum(line.startswith(op) for line in lines) for op in ("mul", "cvt", "prmt")] == [16, 8, 8]
