"""Packing documents into rows of fixed capacity: first-fit decreasing.

Documents are taken longest first, and each goes into the first row with room for it. No more rows result than 11/9 of
the fewest possible plus a constant (Johnson 1973); with the lengths of real instruction data hardly a token is wasted.

A tree over the rows, each node holding the largest room below it, finds the first fitting row in O(log rows).
"""

from collections.abc import Sequence


def pack_first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute documents over as few rows as first-fit decreasing needs.

    Deterministic: documents of equal length keep their order.

    Args:
        lengths: tokens of each document.
        capacity: tokens of a row.
    Returns: for each row the indices of its documents, longest first.
    Raises: ValueError if a length is not between 1 and `capacity`.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(
                f"document {index} has {length} tokens, but a row takes 1 to {capacity}; truncate or drop it first"
            )
    leaves = 1
    while leaves < len(lengths):
        leaves *= 2
    # room[1] is the root, room[leaves + row] the room of a row; every row is empty at first.
    room = [capacity] * (2 * leaves)
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        row = node - leaves
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        room[node] -= length
        while node > 1:
            node //= 2
            left, right = room[2 * node], room[2 * node + 1]
            room[node] = left if left > right else right
    return rows


def wasted_fraction(rows: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> float:
    """The share of all places in `rows` that no token fills; 0 if there are no rows."""
    places = len(rows) * capacity
    return 1.0 - sum(lengths[index] for row in rows for index in row) / places if places else 0.0
