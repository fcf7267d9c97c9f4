"""Trackers (TensorBoard, W&B, trackio, ...) that cannot stop a run: a failing one is reported once and dropped."""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

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
    ignored, and what it could change is a copy: a tracker has no say in training.

    Args:
        callback: the tracker's own TrainerCallback.
        name: what it is called in the report.
        say: what the report is given to; default: this package's logger.
    """

    def __init__(
        self, callback: TrainerCallback, name: str = "", say: Callable[[str], None] | None = None
    ) -> None:
        self.callback: TrainerCallback | None = callback
        self.name, self._kind = name or type(callback).__name__, type(callback)
        self.say = say or _warn
        self._failures, self._used = 0, 0.0
        self._calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The tracker's, so that ``trainer.remove_callback(WandbCallback)`` finds it."""
        return self._kind

    def set_up(self, make: Callable[[], TrainerCallback]) -> bool:
        """Take the tracker that ``make`` gives, in the thread where it is then called; False where there is none."""

        def take() -> None:
            self.callback = make()
            self._kind = type(self.callback)

        failure = self._failure_of(take, LONG)
        if failure:
            self.callback = None
            self.say(_dropped(self.name, "set-up", failure))
        return not failure

    def _pass(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self.callback is None:
            return
        if event == "on_step_begin":
            self._used = 0.0
        args, kwargs = tuple(map(_own, args)), {name: _own(value) for name, value in kwargs.items()}
        callback = self.callback

        def call() -> None:
            getattr(callback, event)(*args, **kwargs)

        start = time.monotonic()
        failure = self._failure_of(call, LONG if event in RARE else max(STEP - self._used, 0.0))
        if event not in RARE:
            self._used += time.monotonic() - start
        if not failure:
            return
        last = "" if self.callback is None else f" after {FAILURES - 1} failures more"
        if not self._failures:
            self.say(_dropped(self.name, event, failure, last))
        self._failures += 1
        if self._failures == FAILURES:
            self.callback = None

    def _failure_of(self, call: Callable[[], object], seconds: float) -> str:
        """What went wrong in a call that is made in the tracker's thread; "" where nothing did."""
        if self._thread is None:  # one for all events: some trackers keep their run in the thread
            self._thread = threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
            self._thread.start()
        self._calls.put(call)
        try:
            return self._answers.get(timeout=seconds)
        except queue.Empty:  # it still runs, so nothing more can be asked of it
            self.callback = None
            return f"it took longer than {LONG if seconds == LONG else STEP:g} s"

    def _work(self) -> None:
        while self.callback is not None:
            call = self._calls.get()
            try:
                call()
                self._answers.put("")
            except BaseException as error:
                self._answers.put(f"{type(error).__name__}: {_told(error)}")


def _told(error: BaseException) -> str:
    try:
        return one_line(error, 300)
    except Exception:  # its own __str__ fails
        return "an error that cannot be written out"


def _own(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (TrainerControl, TrainerState, dict)) else value


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
        sink = SafeSink(TrainerCallback(), name, say)
        if sink.set_up(INTEGRATION_TO_CALLBACK[name]):
            sinks.append(sink)
    return sinks


def guard(handler: CallbackHandler) -> None:
    """Put the trackers among a trainer's callbacks, those that its ``report_to`` names, behind a guard."""
    names = {kind: name for name, kind in INTEGRATION_TO_CALLBACK.items()}
    handler.callbacks = [
        SafeSink(callback, names[type(callback)]) if type(callback) in names else callback
        for callback in handler.callbacks
    ]


def _warn(text: str) -> None:
    logger.warning("%s", text)


def _dropped(name: str, where: str, why: str, when: str = "") -> str:
    return f"report_to: {name} failed in {where} ({why}); the run goes on without it{when}"
