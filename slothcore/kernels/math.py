"""Elementary functions to float32 precision, for use inside kernels; nothing here is launched.

Triton's exponentials are the hardware's; what these add is the digits that a plain use of them loses.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# What is left of log2(e) beyond float32.
LOG2_E_REST = tl.constexpr(1.925963033500645e-08)


@triton.jit
def exponential(x, NATURAL: tl.constexpr):
    """e^x to float32 precision, or 2^x for an x in units of base two."""
    if NATURAL:
        # e^x = 2^t with t = x log2(e); what rounding t and log2(e) loses, relative to e^x, grows with |x|: put it back.
        t = x * LOG2_E
        y = tl.exp2(t)
        y += y * ((tl.fma(x, LOG2_E, -t) + x * LOG2_E_REST) / LOG2_E)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def tanh(x):
    """tanh of a float32 to a few units in the last place.

    The hardware's tanh.approx has 11 bits, and (1 - e^-2x) / (1 + e^-2x) cancels near zero: a series serves there.
    """
    square = x * x
    # Least-squares fit of (tanh(x) / x - 1) / x^2 on [0, 0.6]; off by 3e-9 of the result.
    series = -0.0058939452
    series = series * square + 0.020794617
    series = series * square - 0.053783293
    series = series * square + 0.13331915
    series = series * square - 0.33333299
    series = x + x * square * series
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.36, series, tl.where(x < 0.0, -large, large))
