"""Signals: the first asks for a stop, the second Ctrl-C stops, and what is ignored stays ignored."""

import os
import signal
import threading

import pytest

from slothcore.training.interruption import Interruption


@pytest.fixture(autouse=True)
def handlers():
    """Puts back what the test runner has."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks(number, capfd) -> None:
    with Interruption() as interruption:
        assert not interruption.requested
        send(number)
        assert interruption.requested
    assert "stopping after this step" in capfd.readouterr().err


def test_nobody_reads_and_the_first_asks_all_the_same() -> None:
    """As `tee` that the same Ctrl-C has ended leaves a run."""
    kept, (reader, writer) = os.dup(2), os.pipe()
    os.close(reader)
    os.dup2(writer, 2)
    try:
        with Interruption() as interruption:
            send(signal.SIGINT)
            assert interruption.requested
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(writer)


def test_the_second_interrupts_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruption():
        send(signal.SIGINT)
        send(signal.SIGTERM)  # a scheduler that asks again gives no less time
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ignored_signal_stays_ignored(number) -> None:
    """A shell script starts a job with `&`, and Ctrl-C is meant for the script."""
    signal.signal(number, signal.SIG_IGN)
    with Interruption() as interruption:
        send(number)
        assert not interruption.requested
    assert signal.getsignal(number) is signal.SIG_IGN


def test_another_thread_changes_no_handler() -> None:
    before, inside = signal.getsignal(signal.SIGINT), []

    def run() -> None:
        with Interruption():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert inside == [before]
