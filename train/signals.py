"""Handling of SIGTERM and SIGINT, which may arrive at any moment and must not cost more than the current step."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from shvit.errors import InputError

STOPPING = (signal.SIGTERM, signal.SIGINT)
CHILD: Any = getattr(signal, "SIGCHLD", None)
"""The death of a child; Windows has no such signal, and PyTorch does without it there."""
LATE = 0.5
"""Seconds after which a signal that the main thread has not handled is late."""
GROUP = 1.0
"""Seconds within which a signal to a whole group of processes has reached all of them."""

NO_SIGNAL = b"\0"


class Stopped(BaseException):
    """A signal asked the run to stop; a BaseException, so that no `except Exception` catches it on the way up."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class SignalHandler:
    """Raises `Stopped` when a signal arrives; inside a `defer_signals` block only at its end.

    Python runs a signal's handler between two calls into PyTorch, and a backward pass, seconds for large images on a
    CPU, is one call. So a second thread waits for the signal too, and calls `when_late` where the first does not come.
    """

    def __init__(self) -> None:
        self._installed = False
        self._deferring = False
        self._changing = threading.Lock()
        self._handled = threading.Event()
        self._torch_on_death: Callable[[int, object], None] | None = None
        self.when_late: Callable[[], None] | None = None
        """Writes the state; called in another thread, never while the main one is in a `defer_signals` block."""
        self.received: int | None = None
        """The signal that asked to stop, if one did."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle both signals until the end of the block; do nothing outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._installed = True
        previous = [signal.signal(number, self._handle) for number in STOPPING]
        try:
            with self._watched():
                yield
        finally:
            self._installed = False
            for number, handler in zip(STOPPING, previous, strict=True):
                signal.signal(number, handler)
            if self._torch_on_death is not None and self.received is None:  # else later deaths must not raise
                signal.signal(CHILD, self._torch_on_death)

    def _handle(self, number: int, frame: object) -> None:
        again = self.received is not None  # one is enough: what follows writes the state
        self.received = number
        self._handled.set()
        if not self._deferring and not again:
            raise Stopped(number)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Run the second thread, to which Python's own C handler writes each signal's number at once."""
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        thread = threading.Thread(target=self._watch, args=(receiver,), daemon=True)
        thread.start()
        previous = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous)
            sender.send(NO_SIGNAL)  # closing would not end the wait: a loader's workers hold copies of it
            thread.join()
            sender.close()
            receiver.close()

    def _watch(self, receiver: socket.socket) -> None:
        while NO_SIGNAL not in (numbers := receiver.recv(64)):
            if set(STOPPING).isdisjoint(numbers) or self._handled.wait(LATE):
                continue
            with self._changing, suppress(InputError):  # the main thread's own attempt reports an error
                if self.when_late is not None and not self._handled.is_set():
                    self.when_late()

    @contextmanager
    def defer_signals(self) -> Iterator[None]:
        """Finish the block before a signal is handled: one that changes the run's state, writes it or starts a loader.

        SIGCHLD is deferred too: PyTorch raises an error from it when a loader's worker has died. Blocks can be nested.
        """
        if self._deferring:
            yield
            return
        self._deferring = True
        died: list[tuple[int, object]] = []
        deferred = self._installed and CHILD is not None

        def note(number: int, frame: object) -> None:
            died.append((number, frame))

        before = signal.signal(CHILD, note) if deferred else None
        try:
            with self._changing:
                yield
        finally:
            self._deferring = False
            if deferred:
                handler = signal.getsignal(CHILD)  # PyTorch's own if the block started the first loader
                self._handle_deaths(before if handler is note else handler)
        if self.received is not None:
            raise Stopped(self.received)
        if died:
            self._on_death(*died[0])

    def _handle_deaths(self, handler: Any) -> None:
        if callable(handler) and handler != self._on_death:
            self._torch_on_death, handler = handler, self._on_death
        signal.signal(CHILD, handler)

    def _on_death(self, number: int, frame: object) -> None:
        """Raise PyTorch's error about a worker that died, unless a signal to the whole group of processes killed it.

        That may reach workers first, and then `Stopped` is raised while this waits for it. One exception ends a run: a
        second one would leave the block that handles the first.
        """
        if self.received is not None or self._torch_on_death is None:
            return
        try:
            self._torch_on_death(number, frame)
        except RuntimeError:
            end = time.monotonic() + GROUP
            while time.monotonic() < end:
                time.sleep(0.02)
            raise
