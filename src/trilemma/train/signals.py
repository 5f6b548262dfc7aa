"""Ctrl-C, SIGTERM and SIGUSR1 (a scheduler's warning): the first asks to stop, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Signals:
    """`received`: the number of the first signal so far, or 0."""

    def __init__(self) -> None:
        self.received = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler. It only takes note: what is half done is finished or abandoned by the loop, not here."""
        if self.received:
            # Asked twice: no clean-up, which could hang. Published checkpoints are whole at any instant.
            os._exit(128 + number)
        self.received = number


@contextmanager
def listening() -> Iterator[Signals]:
    """Catches the signals while the body runs; in another thread than the main one nothing is caught."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals) for number in _SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
