"""Signals: at once, or at the end of what must not be torn."""

import os
import signal
import threading

import pytest

from shvit.train.interrupt import Interrupt, Stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_what_is_under_way(number):
    interrupt, after = Interrupt(), []

    def work() -> None:
        with interrupt.handled():
            os.kill(os.getpid(), number)
            after.append("went on")

    with pytest.raises(Stopped) as stop:
        work()
    assert not after
    assert stop.value.number == interrupt.received == number


def test_shielded_block_is_finished_first():
    interrupt, done = Interrupt(), []

    def work() -> None:
        with interrupt.handled(), interrupt.shielded():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("all of it")

    with pytest.raises(Stopped):
        work()
    assert done


def test_second_signal_does_not_tear_what_the_first_began():
    interrupt = Interrupt()
    with interrupt.handled():
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # while the state is written
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interrupt().handled():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_other_threads_can_train_without_handlers():
    outcome = []

    def train() -> None:
        with Interrupt().handled():
            outcome.append("trained")

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert outcome == ["trained"]
