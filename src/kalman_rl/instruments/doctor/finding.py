"""What a check reports: one line about what is there, and one about what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kalman_rl.errors import one_line

MAX_CHARACTERS = 600
"""Of one line of a finding."""

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

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    def text(self) -> str:
        """The finding for a terminal; what came from outside cannot move the cursor.

        >>> print(Finding("disk", "warning", "1 GB free", "make room").text())
        warning  disk          1 GB free
                               do: make room
        """
        lines = [f"{self.status:<8} {self.check:<13} {one_line(self.found, MAX_CHARACTERS)}"]
        return "\n".join(
            lines + [f"{'':<22} do: {one_line(self.advice, MAX_CHARACTERS)}"] * bool(self.advice)
        )


@dataclass
class PlannedRun:
    """What the user is about to do, as far as it was given to the checks.

    Args:
        task: name of a built-in task.
        data: file of the user's rows; replaces the task.
        reward: the user's reward function, ``module:function``.
        run: folder that runs are written to.
        config: TOML file of the run that is planned.
    """

    task: str | None = None
    data: Path | None = None
    reward: str | None = None
    run: Path = Path("runs")
    config: Path | None = None

    def texts(self) -> dict[str, str | None]:
        """The plan as JSON can hold it."""
        return {name: None if value is None else str(value) for name, value in vars(self).items()}

    @classmethod
    def from_texts(cls, texts: dict[str, Any]) -> PlannedRun:
        """The plan that :meth:`texts` wrote."""
        paths = {name: Path(texts[name]) for name in ("data", "run", "config") if texts[name] is not None}
        return cls(**(texts | paths))


def explain(error: BaseException) -> str:
    """Type and text of an exception, on one line.

    >>> explain(ValueError("no"))
    'ValueError: no'
    """
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return one_line(text, MAX_CHARACTERS)
