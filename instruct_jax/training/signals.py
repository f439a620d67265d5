"""SIGTERM and Ctrl-C where they must wait: for a step to end, or for arrays to be on disk."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StopSignal:
    """Whether a signal asked the run to stop, and which."""

    number: int | None = None

    @property
    def name(self) -> str | None:
        """As "SIGTERM"."""
        return None if self.number is None else signal.Signals(self.number).name

    def __bool__(self) -> bool:
        return self.number is not None


@contextmanager
def catch_stop_signals() -> Iterator[StopSignal]:
    """Within it SIGTERM and Ctrl-C set the StopSignal; a second one has its usual effect."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: Any) -> None:
        stop.number = number
        restore()

    for number, handler in usual.items():
        if handler is not signal.SIG_IGN:  # as for what a shell starts in the background
            signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        restore()


@contextmanager
def hold_signals() -> Iterator[None]:
    """Within it a signal waits until the end, and then has its usual effect; a second one at once.

    What Orbax does is a program of many threads and coroutines, which does not end well in the
    middle.
    """
    with catch_stop_signals() as stop:
        try:
            yield
        finally:
            held = stop.number
    if held is not None:
        signal.raise_signal(held)
