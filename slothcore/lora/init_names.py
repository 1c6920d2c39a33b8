"""The values of `init_lora_weights`, under PEFT's names.

    true           A uniform as `nn.Linear` draws it, B zero
    false          both as `nn.Linear` draws them, so the adapter changes the model from the start
    gaussian       A normal with deviation 1 / r, B zero
    orthogonal     rows of A orthogonal to columns of B, both random: B A is zero, and neither factor is
    pissa          the r largest singular values of W, which the base weight loses (arXiv:2404.02948)
    pissa_niter_N  the same by a randomised decomposition with N power iterations: seconds instead of minutes
    olora          the first r columns of W's QR decomposition, which the base weight loses (arXiv:2406.01775)
    loftq          the best rank r for what NF4 lost of W (arXiv:2310.08659)

This file imports no torch: the options of a run are checked with it.
"""

import re

DRAWN = (True, False, "gaussian", "orthogonal")
"""Made of random numbers; the base weights are left alone."""
ALONE = (*DRAWN, "eva")
"""How an adapter of PEFT may have begun, so that its base is the model that it names."""
LATER = ("orthogonal", "eva")
"""Which older versions of PEFT refuse, though they mean nothing for an adapter that is finished."""
REPEATABLE = ("pissa", "olora")
"""Without a draw: what PEFT took out of the base of an adapter that it saved unconverted, anyone can take out again."""
FAST_PISSA = re.compile(r"pissa_niter_([1-9]\d*)")
INITIALISATIONS = ("true", "false", "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "loftq")


def check_init(init: bool | str) -> None:
    """Raise ValueError, naming the values that there are, for any other."""
    if not any(init is drawn or (isinstance(init, str) and init == drawn) for drawn in DRAWN):
        if isinstance(init, str) and uses_weights(init):
            return
        known = ", ".join(INITIALISATIONS[:-1])
        raise ValueError(f"init_lora_weights must be {known} or {INITIALISATIONS[-1]} (N as in 4), got {init!r}")


def uses_weights(init: bool | str) -> bool:
    """Whether the first factors come from the base weights, whose values may then change."""
    return isinstance(init, str) and (init in ("pissa", "olora", "loftq") or power_iterations(init) is not None)


def power_iterations(init: str) -> int | None:
    """N of `pissa_niter_N`, or None."""
    match = FAST_PISSA.fullmatch(init)
    return int(match[1]) if match else None
