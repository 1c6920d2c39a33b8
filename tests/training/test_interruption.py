"""Signals: the first asks for a stop, the second Ctrl-C stops, and what is ignored stays ignored."""

import os
import select
import signal
import sys
import threading

import pytest

from slothcore.training.interruption import ASKING, Interruption
from tests.training.tiny import write_model, write_records


@pytest.fixture(autouse=True)
def handlers():
    """Puts back what the test runner has, which ignores SIGHUP where `nohup` runs it."""
    before = [signal.getsignal(number) for number in ASKING]
    for number, handler in zip(ASKING, before, strict=True):
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in zip(ASKING, before, strict=True):
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ASKING)
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


@pytest.mark.parametrize("number", ASKING)
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


@pytest.mark.skipif(sys.platform == "win32", reason="its terminals send no signal")
def test_a_terminal_that_closes_leaves_a_checkpoint(tmp_path) -> None:
    """The run is told by SIGHUP, and by errors wherever it writes to the terminal from then on."""
    import pty  # which Windows lacks

    write_model(tmp_path / "model")
    write_records(tmp_path / "data.jsonl")
    words = [sys.executable, "-m", "slothcore", "train", "--model", str(tmp_path / "model")]
    words += ["--data", str(tmp_path / "data.jsonl"), "--device", "cpu", "--plot=false", "--max-steps", "100000"]
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, [*words, "--output-dir", str(tmp_path / "run")], {**os.environ, "TERM": "xterm"})
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.stat().st_size):
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)  # raises when the process has ended
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
