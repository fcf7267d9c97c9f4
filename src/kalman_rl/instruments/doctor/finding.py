"""What is planned, and what a check reports about it: what is there, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kalman_rl.errors import one_line

MAX_CHARACTERS = 600  # of one line of a finding

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of ``kalman-rl doctor``.

    Args:
        check: what was looked at, in one or two words.
        status: "ok"; "warning", works but probably not as meant; "problem", something will fail.
        found: what is there.
        advice: what to do about it; empty where nothing need be done.
    """

    check: str
    status: Status
    found: str
    advice: str = ""

    def text(self) -> str:
        """The finding for a terminal; what came from outside cannot move the cursor.

        >>> print(Finding("disk", "warning", "1 GB free", "make room").text())
        warning  disk          1 GB free
                               do: make room
        """
        found = f"{self.status:<8} {self.check:<13} {one_line(self.found, MAX_CHARACTERS)}"
        return found + (f"\n{'':<22} do: {one_line(self.advice, MAX_CHARACTERS)}" if self.advice else "")


@dataclass
class PlannedRun:
    """What the user is about to do, as far as it was given to the checks.

    Args:
        task: name of a built-in task.
        data: file of the user's rows; replaces the task.
        reward: the user's reward functions, each ``module:function``.
        run: folder that runs are written to.
        config: TOML file of the run that is planned.
        settings: what that file says, once it was read: a :class:`~kalman_rl.engine.config.TrainConfig`.
    """

    task: str | None = None
    data: Path | None = None
    reward: tuple[str, ...] = ()
    run: Path = Path("runs")
    config: Path | None = None
    settings: Any = None


def explain(error: BaseException) -> str:
    """Type and text of an exception, on one line.

    >>> explain(ValueError("no"))
    'ValueError: no'
    """
    return one_line(
        f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, MAX_CHARACTERS
    )
