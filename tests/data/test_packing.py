"""First-fit decreasing: exactly its definition, nothing lost, little wasted, fast."""

import json
import math
import random
import time
from pathlib import Path

import pytest

from slothcore.data.packing import pack_first_fit_decreasing, wasted_fraction


def by_definition(lengths: list[int], capacity: int) -> list[list[int]]:
    """Look through all rows for the first with room."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row in rows:
            if sum(lengths[i] for i in row) + lengths[index] <= capacity:
                row.append(index)
                break
        else:
            rows.append([index])
    return rows


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 64, 200])
@pytest.mark.parametrize("capacity", [1, 10, 37])
def test_equals_the_definition(count: int, capacity: int) -> None:
    source = random.Random(count * 100 + capacity)
    for _ in range(5):
        lengths = [source.randint(1, capacity) for _ in range(count)]
        assert pack_first_fit_decreasing(lengths, capacity) == by_definition(lengths, capacity)


def test_a_known_packing() -> None:
    rows = pack_first_fit_decreasing([4, 8, 1, 4, 2, 1], 10)
    assert rows == [[1, 4], [0, 3, 2, 5]]
    assert wasted_fraction(rows, [4, 8, 1, 4, 2, 1], 10) == 0.0
    assert wasted_fraction([[0]], [4], 10) == pytest.approx(0.6)
    assert wasted_fraction([], [], 10) == 0.0


@pytest.mark.parametrize("length", [0, 11])
def test_a_document_that_fits_nowhere(length: int) -> None:
    with pytest.raises(ValueError, match=rf"document 1 has {length} tokens, but a row takes 1 to 10"):
        pack_first_fit_decreasing([5, length], 10)


def test_many_documents_are_packed_quickly() -> None:
    source = random.Random(0)
    lengths = [min(2048, 1 + int(source.expovariate(1 / 150))) for _ in range(100_000)]
    began = time.process_time()
    rows = pack_first_fit_decreasing(lengths, 2048)
    # Looking through all rows takes minutes here; the tree takes under a second.
    assert time.process_time() - began < 10
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 2048
    assert wasted_fraction(rows, lengths, 2048) < 0.01


def test_alpaca_wastes_little(shared_data: Path) -> None:
    """The 800 lengths get one row more than the fewest possible; with more of them, that row hardly counts."""
    lengths = json.loads((shared_data.parent / "bench" / "alpaca_lengths.json").read_text())
    assert len(pack_first_fit_decreasing(lengths, 2048)) <= math.ceil(sum(lengths) / 2048) + 1
    lengths = lengths * 5
    rows = pack_first_fit_decreasing(lengths, 2048)
    assert wasted_fraction(rows, lengths, 2048) < 0.02


def test_alpaca_wastes_under_two_percent() -> None:
    """The lengths of all rows of Alpaca that the benchmarks keep, at the usual length of a row."""
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "alpaca_lengths.json"
    lengths = [int(length) for length, rows in json.loads(file.read_text()).items() for _ in range(rows)]
    assert len(lengths) > 3000
    assert wasted_fraction(pack_first_fit_decreasing(lengths, 2048), lengths, 2048) < 0.02
