"""Which rows meet in which step: every row once an epoch, the same again for the same seed."""

import pytest
import torch

from slothcore.data.masking import TokenizedRow
from slothcore.data.token_store import TokenWriter
from slothcore.training.batches import RowSet, StepSchedule
from tests.training.tiny import random_rows


def test_an_epoch_has_every_row_once_and_each_epoch_its_own_order() -> None:
    rows = RowSet(random_rows(11))
    schedule = StepSchedule(rows, step_rows=4, seed=1, num_train_epochs=2)
    assert (schedule.steps_per_epoch, schedule.total_steps) == (3, 6)
    epochs = [[row for step in range(3 * e, 3 * e + 3) for row in schedule.plan(step).rows] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(11))
    assert epochs[0] != epochs[1]
    assert [len(schedule.plan(step).rows) for step in range(3)] == [4, 4, 3]


def test_the_order_depends_on_the_seed_and_on_nothing_before() -> None:
    rows = RowSet(random_rows(11))
    straight = StepSchedule(rows, step_rows=4, seed=1, max_steps=9)
    plans = [straight.plan(step) for step in range(9)]
    assert StepSchedule(rows, step_rows=4, seed=1, max_steps=9).plan(7) == plans[7]
    assert StepSchedule(rows, step_rows=4, seed=2, max_steps=9).plan(3) != plans[3]


@pytest.mark.parametrize("capacity", [None, 64])
def test_steps_count_tokens_and_targets_of_their_documents(capacity) -> None:
    documents = random_rows(30)
    rows = RowSet(documents, capacity=capacity)
    schedule = StepSchedule(rows, step_rows=5, seed=0)
    plans = [schedule.plan(step) for step in range(schedule.total_steps)]
    assert sum(plan.num_tokens for plan in plans) == sum(len(d.input_ids) for d in documents)
    assert sum(plan.num_targets for plan in plans) == sum(d.num_targets for d in documents)
    if capacity:
        assert len(rows) < len(documents)
        assert max(rows.row_tokens) <= capacity


def test_a_micro_batch_lays_documents_end_to_end() -> None:
    documents = random_rows(6)
    batch = RowSet(documents).micro_batch([4, 1])
    assert batch.cu_seqlens.tolist() == [
        0,
        len(documents[4].input_ids),
        len(documents[4].input_ids) + len(documents[1].input_ids),
    ]
    assert batch.input_ids.tolist() == documents[4].input_ids + documents[1].input_ids
    assert batch.labels.tolist() == documents[4].labels + documents[1].labels


def test_the_documents_are_copied() -> None:
    documents = random_rows(3)
    rows = RowSet(documents)
    first = documents[0].input_ids[0]
    documents[0].input_ids[0] += 1
    assert rows.micro_batch([0]).input_ids[0] == first
    assert rows.micro_batch([0]).input_ids.dtype == rows.micro_batch([0]).labels.dtype == torch.int64


def test_the_fingerprint_sees_tokens_labels_and_packing() -> None:
    documents = random_rows(8)
    same = RowSet(random_rows(8)).fingerprint()
    assert RowSet(documents).fingerprint() == same
    assert RowSet(documents, capacity=64).fingerprint() != same
    assert RowSet(documents[::-1]).fingerprint() != same
    documents[3].labels[-1] = 5
    assert RowSet(documents).fingerprint() != same


@pytest.mark.parametrize("capacity", [None, 64])
def test_rows_in_files_are_the_same_rows(tmp_path, capacity) -> None:
    """Batches and fingerprints do not depend on where the tokens lie, so a run can be resumed from either."""
    documents = [TokenizedRow(d.input_ids, d.labels) for d in random_rows(40)]
    with TokenWriter(tmp_path) as writer:
        for document in documents:
            writer.add(document)
        stored = RowSet(writer.finish({}), capacity=capacity)
    listed = RowSet(documents, capacity=capacity)
    assert stored.rows == listed.rows
    assert (stored.row_tokens, stored.row_targets) == (listed.row_tokens, listed.row_targets)
    assert stored.fingerprint() == listed.fingerprint()
    for row in range(len(listed)):
        one, other = stored.micro_batch([row]), listed.micro_batch([row])
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.cu_seqlens, other.cu_seqlens)


def test_the_fingerprint_is_that_of_earlier_releases() -> None:
    """Checkpoints hold it: with another, no run of before could go on."""
    rows = RowSet([TokenizedRow([5, 6, 7], [-100, 6, 7]), TokenizedRow([8, 9], [8, 9])], capacity=5)
    assert rows.fingerprint() == "9044f12c520db906e1de97e014c417f5504a6e58a8e6385210e98965997cd2a1"
