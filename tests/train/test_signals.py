"""Signals: at once, or at the end of what must not be torn."""

import os
import signal
import threading

import pytest
import torch

from shvit.train.signals import LATE, SignalHandler, Stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_what_is_under_way(number):
    signals, after = SignalHandler(), []

    def work() -> None:
        with signals.installed():
            os.kill(os.getpid(), number)
            after.append("went on")

    with pytest.raises(Stopped) as stop:
        work()
    assert not after
    assert stop.value.number == signals.received == number


def test_deferring_block_is_finished_first():
    signals, done = SignalHandler(), []

    def work() -> None:
        with signals.installed(), signals.defer_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("all of it")

    with pytest.raises(Stopped):
        work()
    assert done


def test_second_signal_does_not_tear_what_the_first_began():
    signals = SignalHandler()
    with signals.installed():
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # while the state is written
        os.kill(os.getpid(), signal.SIGINT)


def test_signal_in_one_long_call_is_handled_by_another_thread():
    """Python runs no handler in the main thread before the call into PyTorch ends; a future's wait is such a call."""
    signals, call = SignalHandler(), torch.futures.Future()
    signals.when_late = lambda: call.set_result("late")

    def work() -> None:
        with signals.installed():
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            call.wait()

    gives_up = threading.Timer(20, call.set_result, ("never",))
    gives_up.start()
    with pytest.raises(Stopped):
        work()
    gives_up.cancel()
    assert call.value() == "late"


def test_nothing_is_written_beside_a_deferring_block():
    signals, order = SignalHandler(), []
    signals.when_late = lambda: order.append("written")

    def work() -> None:
        with signals.installed(), signals.defer_signals():
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            wait_uninterrupted(3 * LATE)
            order.append("changed")

    with pytest.raises(Stopped):
        work()
    assert order == ["changed"]


def wait_uninterrupted(seconds: float) -> None:
    """One call of that length, during which Python runs no handler."""
    call = torch.futures.Future()
    threading.Timer(seconds, call.set_result, (None,)).start()
    call.wait()


@pytest.fixture
def worker_dies():
    """A function that ends a worker, as PyTorch's handler of SIGCHLD sees it; that handler is set as PyTorch does."""
    before = signal.getsignal(signal.SIGCHLD)

    def handler(number, frame):
        raise RuntimeError("DataLoader worker is killed by signal")

    def die():
        os.kill(os.getpid(), signal.SIGCHLD)

    die.start = lambda: signal.signal(signal.SIGCHLD, handler)
    yield die
    signal.signal(signal.SIGCHLD, before)


def test_death_of_a_worker_is_an_error(worker_dies):
    signals = SignalHandler()
    with signals.installed():
        with signals.defer_signals():
            worker_dies.start()
        with pytest.raises(RuntimeError, match="worker is killed"):
            worker_dies()
    with pytest.raises(RuntimeError, match="worker is killed"):
        worker_dies()  # the handler is given back


@pytest.mark.parametrize("order", ["worker first", "run first", "in a step"])
def test_signal_to_a_group_of_processes_stops_the_run_once(worker_dies, order):
    """A second exception, of a worker that dies later, would leave the block that saves the state."""
    signals = SignalHandler()

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def work() -> None:
        with signals.defer_signals():
            worker_dies.start()
        if order == "worker first":
            threading.Timer(0.2, stop).start()
            worker_dies()
        elif order == "run first":
            stop()
        else:
            with signals.defer_signals():
                worker_dies()
                stop()

    with signals.installed():
        with pytest.raises(Stopped):
            work()
        worker_dies()
        with pytest.raises(Stopped), signals.defer_signals():  # the state is saved
            worker_dies()
    worker_dies()


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with SignalHandler().installed():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_other_threads_can_train_without_handlers():
    outcome = []

    def train() -> None:
        with SignalHandler().installed():
            outcome.append("trained")

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert outcome == ["trained"]
