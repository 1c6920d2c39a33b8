"""How long the documents of a dataset are, and what packing makes of them, in text."""

from collections.abc import Sequence

from slothcore.data.packing import pack_first_fit_decreasing, wasted_fraction
from slothcore.data.values import counted
from slothcore.training.batches import RowSet
from slothcore.training.config import TrainConfig

BARS = 10
WIDEST_BAR = 40
ROUND = (1, 2, 5)


def describe_lengths(rows: RowSet, config: TrainConfig) -> str:
    """A histogram of the documents' lengths, how much of them is learned, and how full packed rows are.

    Args:
        rows: of one document each.
    """
    assert config.max_seq_length is not None
    lengths, targets = rows.row_tokens, sum(rows.row_targets)
    ordered = sorted(lengths)
    middle, most = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]
    lines = [
        "tokens of a document",
        histogram(lengths),
        f"shortest {ordered[0]:,}, median {middle:,}, mean {sum(lengths) / len(lengths):,.0f}, "
        f"95% up to {most:,}, longest {ordered[-1]:,}",
        f"{targets:,} of {sum(lengths):,} tokens are learned ({targets / sum(lengths):.1%})",
    ]
    if full := sum(length == config.max_seq_length for length in lengths):
        lines.append(
            f"{full:,} of {len(lengths):,} documents are as long as max_seq_length ({config.max_seq_length:,}) allows"
        )
    return "\n".join([*lines, describe_packing(lengths, config)])


def describe_packing(lengths: Sequence[int], config: TrainConfig) -> str:
    """What packing does to these documents, or would do."""
    capacity = config.max_seq_length
    assert capacity is not None
    packed = pack_first_fit_decreasing(lengths, capacity)
    wasted = wasted_fraction(packed, lengths, capacity)
    figures = (
        f"{counted(len(lengths), 'document')} in {counted(len(packed), 'row')} of {capacity:,} tokens, "
        f"{len(lengths) / len(packed):.1f} a row, {wasted:.1%} of the places empty"
    )
    steps, alone = (-(-number // config.step_rows) for number in (len(packed), len(lengths)))
    of_rows = f"of {counted(config.step_rows, 'row')}"
    if config.packing:
        return f"packing: {figures}; an epoch takes {counted(steps, 'step')} {of_rows}"
    return f"packing is off: an epoch takes {counted(alone, 'step')} {of_rows}; with it {steps:,}: {figures}"


def histogram(lengths: Sequence[int]) -> str:
    """A line for each of about ten equal ranges: range, bar, how many. Ranges below the shortest have no line."""
    longest = max(lengths)
    width = _round_up(longest / BARS)
    counts = [0] * -(-longest // width)
    for length in lengths:
        counts[(length - 1) // width] += 1
    first = (min(lengths) - 1) // width
    wide = len(f"{longest:,}")
    lines = []
    # Where all rows are cut at one length, a list of empty ranges would stand above the only one that is not.
    for place, count in enumerate(counts[first:], first):
        bar = "#" * -(-count * WIDEST_BAR // max(counts))
        ends = f"{place * width + 1:>{wide},} - {min((place + 1) * width, longest):>{wide},}"
        lines.append(f"  {ends}  {bar:<{WIDEST_BAR}} {count:>{len(f'{max(counts):,}')},}")
    return "\n".join(lines)


def _round_up(value: float) -> int:
    """The next number of the kind 1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        for digit in ROUND:
            if digit * power >= value:
                return digit * power
        power *= 10
