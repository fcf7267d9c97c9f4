"""Ctrl-C and SIGTERM end the command with exit code 130, also where a library makes an error of its own of
KeyboardInterrupt."""

from __future__ import annotations

import contextlib
import signal
import sys
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """While it lasts, SIGTERM is what Ctrl-C is, and it remembers whether one of them came.

    Imports of compiled packages, and lazy ones, lose a KeyboardInterrupt that arrives in them. A terminal sends Ctrl-C
    to all processes of a command. SIGTERM comes to one, which passes it on to the runs in its other processes.
    """

    def __init__(self) -> None:
        self.came = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) is usual:
                with contextlib.suppress(ValueError):  # not the main thread: the host decides about signals
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if number == signal.SIGTERM and "multiprocessing" in sys.modules:
            for child in sys.modules["multiprocessing"].active_children():
                child.terminate()
        raise KeyboardInterrupt
