"""Ctrl-C ends the command with exit code 130, also where a library turns KeyboardInterrupt into an error of its own."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interrupts:
    """While it lasts, remembers whether Ctrl-C came; otherwise Ctrl-C does what it always does.

    Imports of compiled packages, and lazy ones, lose a KeyboardInterrupt that arrives in them.
    """

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> Interrupts:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.default_int_handler:
            try:
                signal.signal(signal.SIGINT, self._note)
            except ValueError:  # not the main thread: the host decides about signals
                self._before = None
        else:
            self._before = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        signal.default_int_handler(number, frame)
