"""NF4 decoded by byte permutes: for use inside kernels that want 16-bit weights at the rate of the integer units.

A block of 64 weights has 16 possible values, dtype(code * absmax). They are computed once, with the roundings of
nf4.py, and kept in 8 registers: the low bytes of the 16 values, four to a register, then their high bytes. One `prmt`
finds four bytes at once in two registers, that is among 8 values; bit 3 of the code chooses between the two halves.

For 8 weights: 14 permutes, 4 selects, 3 other instructions; for a block: 16 products, 8 conversions, 8 permutes.
A thread that owns whole blocks keeps its planes to itself: nothing is exchanged, nothing is read from memory.

Off a GPU (the interpreter) the same planes are made and read by plain Triton.
"""

import struct
from collections.abc import Sequence

import triton
import triton.language as tl

from slothcore.kernels.nf4_tensor import NF4_CODE


def products_ptx(convert: str) -> str:
    """PTX from $8, the absmax, to $0..$3, the low bytes of its 16 products, and $4..$7, their high bytes.

    convert: the instruction that rounds two float32 and packs them, the second one low.
    """
    lines = [".reg .f32 p<16>;", ".reg .b32 r<8>;"]
    lines += [f"mul.rn.f32 p{i}, $8, {_literal(code)};" for i, code in enumerate(NF4_CODE)]
    lines += [f"{convert} r{i}, p{2 * i + 1}, p{2 * i};" for i in range(8)]
    for i in range(4):
        lines.append(f"prmt.b32 ${i}, r{2 * i}, r{2 * i + 1}, 0x6420;")
        lines.append(f"prmt.b32 ${i + 4}, r{2 * i}, r{2 * i + 1}, 0x7531;")
    return _scope(lines)


def weights_ptx() -> str:
    """PTX from $8, a word of 8 codes, and $9..$16, the planes, to $0..$7, the weights in order."""
    split = [f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, pair{i};" for i in range(4)]
    return _scope([".reg .b32 pair<4>;", *decoded_pairs(8, [f"pair{i}" for i in range(4)]), *split])


def pairs_ptx() -> str:
    """As `weights_ptx`, two weights in a register: from $4, the word, and $5..$12, the planes, to $0..$3."""
    return _scope(decoded_pairs(4, [f"${i}" for i in range(4)]))


def decoded_pairs(word: int, pairs: Sequence[str]) -> list[str]:
    """PTX that decodes operand number `word`, which the planes follow, into four registers of two weights each.

    Byte j of the word holds weights 2j (high nibble) and 2j + 1: in nibbles counted from the low end, the weights
    stand in the order 1, 0, 3, 2, ...
    """
    lines = [".reg .b32 index, shifted, upper, below, above, low, high;"]
    # A selector's bit 3 would ask for a sign, so it is cleared. The upper 16 bits of a selector are ignored.
    lines += [f"and.b32 index, ${word}, 0x77777777;", f"shl.b32 shifted, ${word}, 4;"]
    # Bit 3 of a nibble, spread over a byte: the sign of the word's byte, or of the word's shifted by a nibble.
    for half, signs in enumerate(("0x9D8C", "0xBFAE")):
        if half:
            lines.append("shr.u32 index, index, 16;")
        lines.append(f"prmt.b32 upper, ${word}, shifted, {signs};")
        for name, plane in (("low", word + 1), ("high", word + 5)):
            lines.append(f"prmt.b32 below, ${plane}, ${plane + 1}, index;")
            lines.append(f"prmt.b32 above, ${plane + 2}, ${plane + 3}, index;")
            lines.append(f"lop3.b32 {name}, upper, above, below, 0xCA;")  # upper ? above : below
        lines += [
            f"prmt.b32 {pairs[2 * half + pair]}, low, high, {order};" for pair, order in enumerate(("0x4051", "0x6273"))
        ]
    return lines


def _literal(value: float) -> str:
    """A float32 as PTX writes it, to the bit."""
    return "0f" + struct.pack(">f", value).hex().upper()


def _scope(lines: Sequence[str]) -> str:
    return "\n".join(["{", *lines, "}"])


PRODUCTS_BFLOAT16 = tl.constexpr(products_ptx("cvt.rn.bf16x2.f32"))
PRODUCTS_FLOAT16 = tl.constexpr(products_ptx("cvt.rn.f16x2.f32"))
PRODUCTS_REGISTERS = tl.constexpr(",".join(["=r"] * 8 + ["f"]))
WEIGHTS = tl.constexpr(weights_ptx())
WEIGHTS_REGISTERS = tl.constexpr(",".join(["=h"] * 8 + ["r"] * 9))
EIGHT_INT32 = tl.constexpr((tl.int32,) * 8)
EIGHT_INT16 = tl.constexpr((tl.int16,) * 8)
CODE = tl.constexpr(NF4_CODE)


@triton.jit
def _product_bytes(absmax, FIRST: tl.constexpr, DTYPE: tl.constexpr):
    """Four products from number FIRST on: their low bytes in one word, their high bytes in another."""
    low = tl.zeros(absmax.shape, dtype=tl.int32)
    high = tl.zeros(absmax.shape, dtype=tl.int32)
    for i in tl.static_range(4):
        bits = (absmax * CODE[FIRST + i]).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
        low |= (bits & 255) << (8 * i)
        high |= ((bits >> 8) & 255) << (8 * i)
    return low, high


@triton.jit
def products(absmax, DTYPE: tl.constexpr, ON_GPU: tl.constexpr):
    """The planes of a tile of blocks from its float32 absmax: 8 int32 tensors of the same shape."""
    if ON_GPU:
        return tl.inline_asm_elementwise(
            PRODUCTS_FLOAT16 if DTYPE.is_fp16() else PRODUCTS_BFLOAT16,
            PRODUCTS_REGISTERS,
            [absmax],
            dtype=EIGHT_INT32,
            is_pure=True,
            pack=1,
        )
    else:
        low_0, high_0 = _product_bytes(absmax, 0, DTYPE)
        low_1, high_1 = _product_bytes(absmax, 4, DTYPE)
        low_2, high_2 = _product_bytes(absmax, 8, DTYPE)
        low_3, high_3 = _product_bytes(absmax, 12, DTYPE)
        return low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3


@triton.jit
def _pick(index, plane_0, plane_1, plane_2, plane_3):
    """Byte number `index` (0 to 15) of a plane."""
    below = tl.where(index < 4, plane_0, plane_1)
    above = tl.where(index < 12, plane_2, plane_3)
    return (tl.where(index < 8, below, above) >> (8 * (index & 3))) & 255


@triton.jit
def _weight(
    word, NIBBLE: tl.constexpr, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3
):  # fmt: skip
    index = (word >> (4 * NIBBLE)) & 15
    return (_pick(index, low_0, low_1, low_2, low_3) | (_pick(index, high_0, high_1, high_2, high_3) << 8)).to(tl.int16)


@triton.jit
def decode_words(word, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3, ON_GPU: tl.constexpr):
    """The bits of 8 weights for each word of 8 codes: [..., 2, 2, 2] int16 from [...] int32.

    The planes must broadcast to the shape of `word`.
    """
    if ON_GPU:
        w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
            WEIGHTS,
            WEIGHTS_REGISTERS,
            [word, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3],
            dtype=EIGHT_INT16,
            is_pure=True,
            pack=1,
        )
    else:
        w0 = _weight(word, 1, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3)
        w1 = _weight(word, 0, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3)
        w2 = _weight(word, 3, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3)
        w3 = _weight(word, 2, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3)
        w4 = _weight(word, 5, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3)
        w5 = _weight(word, 4, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3)
        w6 = _weight(word, 7, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3)
        w7 = _weight(word, 6, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3)
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.join(even, odd)
