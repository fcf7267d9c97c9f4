"""Trackers (TensorBoard, W&B, trackio, ...) that cannot stop a run: a failing one is reported once and dropped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from kalman_rl.errors import one_line, unknown_name
from kalman_rl.terminal import printable

logger = logging.getLogger("kalman_rl")


class SafeSink(TrainerCallback):
    """A reporting callback behind a guard: the first exception it raises is reported and ends it.

    Only ``Exception`` is caught, so Ctrl-C still stops the run. What the callback returns is ignored: a tracker has no
    say in training. A tracker that blocks still blocks; that cannot be seen from here.

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

    def _pass(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self.callback is None:
            return
        try:
            getattr(self.callback, event)(*args, **kwargs)
        except Exception as error:
            self.callback = None
            self.say(_dropped(self.name, event, error))


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
        except Exception as error:
            (say or _warn)(_dropped(name, "set-up", error))
    return sinks


def _warn(text: str) -> None:
    logger.warning("%s", printable(text))


def _dropped(name: str, where: str, error: Exception) -> str:
    reason = one_line(error, 300)
    return (
        f"report_to: {name} failed in {where} ({type(error).__name__}: {reason}); the run goes on without it"
    )
