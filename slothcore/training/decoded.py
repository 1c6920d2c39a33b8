"""Weights kept decoded where memory is free: NF4 layers whose dense copy stays, so that no pass decodes them.

A product over an NF4 weight decodes it into a scratch tensor first, once in the forward pass and once in the backward
pass, however few tokens it has. A kept copy holds the values that decoding gives, so results stay as they are.

What it is worth, measured on an H100 with the weights of Llama-3.1-8B (+13 GiB for all layers), ms of a step:

    tokens of a pass      512      950      8192
    decoded every time    46.3     69.9     479
    copies kept           34.2     59.1     470

About 10 ms go at any number of tokens, and with many a pass takes longer by far, so copies are kept for passes up to
LARGEST_MEAN tokens on average.
"""

from slothcore.layers.linear import keep_decoded_together
from slothcore.models.decoder import Decoder
from slothcore.training.memory_layers import maps_of
from slothcore.training.memory_plan import MemoryPlan
from slothcore.training.micro_batches import GIB, PassSample
from slothcore.training.progress import say

LARGEST_MEAN = 4096
"""Tokens of a pass, on average, beyond which copies bring little: 10 ms are below 5% of such a pass."""


def choose_decoded_layers(plan: MemoryPlan, limit: float | None, passes: PassSample) -> int:
    """How many layers, the first ones, are to keep decoded weights, and say so in one line.

    The passes come first: copies get what the largest of them leaves free.

    Args:
        plan: of the run; copies that it counts already are counted anew.
        limit: bytes that the run may have (`micro_batches.memory_limit`); None: nobody gave memory away, so no layer.
        passes: of the steps to come (`micro_batches.sample_passes`).
    Returns: 0 to the number of layers.
    """
    every = len(plan.layers)
    if limit is None or not any(layer.decoded for layer in plan.layers):
        return 0
    if passes.mean_tokens > LARGEST_MEAN:
        say(
            f"memory: no decoded weights kept; with {passes.mean_tokens:,.0f} tokens in a pass they save no time, "
            f"as measured beyond {LARGEST_MEAN:,}"
        )
        return 0
    room = limit - plan.keeping_decoded(0).footprint(passes.most_tokens, passes=passes.most)
    count = 0
    while count < every and plan.keeping_decoded(count + 1).footprint(passes.most_tokens, passes=passes.most) <= limit:
        count += 1
    if count:
        taken = plan.keeping_decoded(count).decoded
        say(f"memory: decoded weights of {count} of {every} layers kept, {taken / GIB:.2f} GiB; no pass decodes those")
    else:
        needed = plan.keeping_decoded(1).decoded
        say(f"memory: no decoded weights kept; those of a layer take {needed / GIB:.2f} GiB, {room / GIB:.2f} are left")
    return count


def keep_decoded_layers(model: Decoder, count: int) -> None:
    """Keep the decoded weights of the first `count` layers, in the dtype in which the model computes, and no others.

    Dense weights, the router and stacked experts stay as they are. Layers that have their copies keep them.
    """
    for index, layer in enumerate(model.model.layers):
        for maps in maps_of(layer):
            group = [linear for linear in maps if linear.is_nf4]
            if index >= count:
                for linear in group:
                    linear.drop_decoded()
            elif not all(linear.has_decoded(model.dtype) for linear in group):
                keep_decoded_together(group, model.dtype)
