"""Trackers (TensorBoard, W&B, trackio, ...) that cannot stop a run: a failing one is reported once and dropped."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from kalman_rl.errors import one_line, unknown_name
from kalman_rl.terminal import logger

STEP, LONG = 1.0, 60.0
"""Seconds that a tracker may take in one optimizer step, and in one of ``RARE``."""
RARE = {"on_init_end", "on_train_begin", "on_train_end", "on_save"}
"""Events in which a tracker logs in, uploads or closes."""
FAILURES = 3
"""Failures after which a tracker is dropped."""


class SafeSink(TrainerCallback):
    """A reporting callback behind a guard, in a thread of its own: the trainer waits for it, but not for long.

    It is dropped where it takes longer than a second in one step, and after three failures, whatever it raises;
    ``sys.exit`` is a failure too. There is one warning, and Ctrl-C still stops the run. What the callback returns is
    ignored: a tracker has no say in training.

    Args:
        callback: the tracker's own TrainerCallback.
        name: what it is called in the report.
        say: what the report is given to; default: this package's logger.
    """

    def __init__(
        self, callback: TrainerCallback, name: str = "", say: Callable[[str], None] | None = None
    ) -> None:
        self.callback: TrainerCallback | None = callback
        self.name = name or type(callback).__name__
        self.say = say or _warn
        self._failures, self._used = 0, 0.0
        self._events: queue.SimpleQueue[Callable[[], BaseException | None]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def _pass(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self.callback is None:
            return
        if event == "on_step_begin":
            self._used = 0.0
        if self._thread is None:  # one for all events: some trackers keep their run in the thread
            self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
            self._thread.start()
        start = time.monotonic()
        self._events.put(functools.partial(_failure, self.callback, event, args, kwargs))
        try:
            error = self._answers.get(timeout=LONG if event in RARE else max(STEP - self._used, 0.0))
        except queue.Empty:  # it still runs, so nothing more can be asked of it
            self.callback = None
            if not self._failures:
                self.say(
                    _dropped(self.name, event, f"it took longer than {LONG if event in RARE else STEP:g} s")
                )
            return
        if event not in RARE:
            self._used += time.monotonic() - start
        if error is not None:
            self._failures += 1
            if self._failures == 1:
                why = f"{type(error).__name__}: {one_line(error, 300)}"
                self.say(_dropped(self.name, event, why, f" after {FAILURES - 1} failures more"))
            if self._failures == FAILURES:
                self.callback = None

    def _work(self) -> None:
        while self.callback is not None:
            self._answers.put(self._events.get()())


def _failure(callback: TrainerCallback, event: str, args: Any, kwargs: Any) -> BaseException | None:
    """What a callback raises."""
    try:
        getattr(callback, event)(*args, **kwargs)
    except BaseException as error:
        return error
    return None


def _forward(event: str) -> Callable[..., None]:
    def handler(self: SafeSink, *args: Any, **kwargs: Any) -> None:
        self._pass(event, *args, **kwargs)

    handler.__name__ = event
    return handler


for _event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(SafeSink, _event, _forward(_event))


def make_sinks(names: str | Sequence[str], say: Callable[[str], None] | None = None) -> list[TrainerCallback]:
    """Guarded callbacks for trackers, by TRL's names for them; one that cannot be set up is reported and left out.

    Give the trainer ``report_to="none"`` and these as callbacks.

    Raises: ConfigError for a name that TRL does not know.
    """
    names = [names] if isinstance(names, str) else list(names)
    sinks: list[TrainerCallback] = []
    for name in names:
        if name == "none":
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown_name("report_to", name, ["none", *INTEGRATION_TO_CALLBACK])
        try:
            sinks.append(SafeSink(INTEGRATION_TO_CALLBACK[name](), name, say))
        except (Exception, SystemExit) as error:
            (say or _warn)(_dropped(name, "set-up", f"{type(error).__name__}: {one_line(error, 300)}"))
    return sinks


def _warn(text: str) -> None:
    logger.warning("%s", text)


def _dropped(name: str, where: str, why: str, when: str = "") -> str:
    return f"report_to: {name} failed in {where} ({why}); the run goes on without it{when}"
