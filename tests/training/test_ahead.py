"""Items and steps made ahead: their order, their errors, and a thread that ends."""

import threading
import time

import pytest
import torch

from slothcore.data.masking import TokenizedRow
from slothcore.training.ahead import Ahead
from slothcore.training.batches import RowSet, StepSchedule
from slothcore.training.micro_batches import StepCut
from slothcore.training.step_feed import StepFeed


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_items_come_in_order_each_made_while_the_one_before_is_in_use() -> None:
    made: list[int] = []

    def items():
        for number in range(4):
            made.append(number)
            assert threading.current_thread() in threads()
            yield number

    taken = []
    with Ahead(items()) as ahead:
        for number in ahead:
            taken.append(number)
            deadline = time.monotonic() + 10
            while len(made) < min(4, number + 2):
                assert time.monotonic() < deadline, "the next item is not being made"
                time.sleep(0.001)
            assert len(made) <= number + 2, "no more than one is made ahead"
        assert list(ahead) == []
    assert taken == [0, 1, 2, 3]


def test_an_error_is_raised_where_its_item_is_taken() -> None:
    def items():
        yield 1
        raise ValueError("damaged")

    with Ahead(items()) as ahead:
        assert next(ahead) == 1
        with pytest.raises(ValueError, match="damaged"):
            next(ahead)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_thread_ends_with_the_block_whatever_ends_that(error) -> None:
    before = threads()

    def use() -> None:
        with Ahead(iter(range(10**9))) as ahead:
            assert next(ahead) == 0
            assert len(threads()) == len(before) + 1
            raise error

    with pytest.raises(error):
        use()
    assert threads() == before


def schedule(lengths, **options) -> StepSchedule:
    rows = RowSet([TokenizedRow([i + 1] * length, [i + 1] * length) for i, length in enumerate(lengths)])
    return StepSchedule(rows, step_rows=4, seed=3, num_train_epochs=2.0, **options)


def test_a_feed_gives_the_steps_of_the_schedule() -> None:
    plans = schedule([3, 5, 8, 4, 9, 2, 7])
    cut = StepCut(plans.rows, 2, token_budget=None)
    with StepFeed(plans, cut, first_step=1) as feed:
        for number in range(1, plans.total_steps):
            step = feed.next()
            assert step.plan == plans.plan(number)
            assert [rows for rows, _ in step.passes] == cut.passes(step.plan.rows)
            for rows, batch in step.passes:
                expected = plans.rows.micro_batch(rows)
                assert torch.equal(batch.input_ids, expected.input_ids)
                assert torch.equal(batch.labels, expected.labels)
                assert torch.equal(batch.cu_seqlens, expected.cu_seqlens)
        with pytest.raises(StopIteration):
            feed.next()


def test_a_step_comes_again_smaller_and_so_do_those_after_it() -> None:
    plans = schedule([10] * 12)
    with StepFeed(plans, StepCut(plans.rows, 2, token_budget=40)) as feed:
        feed.next()
        step = feed.next()
        assert [len(rows) for rows, _ in step.passes] == [4]
        again = feed.again_smaller(step.passes[0][0])
        assert again is not None
        assert again.plan == step.plan
        assert feed.cut.token_budget == 20
        assert [len(rows) for rows, _ in again.passes] == [2, 2]
        assert [len(rows) for rows, _ in feed.next().passes] == [2, 2]
        assert feed.again_smaller([0]) is None, "a row is not divided"
    with StepFeed(plans, StepCut(plans.rows, 2, token_budget=None)) as feed:
        assert feed.again_smaller([0, 1]) is None, "rows of a pass were asked for, not predicted"
