"""One promise, and whether it is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kalman_rl.errors import one_line


class Promise(NamedTuple):
    """``name``: what is promised; ``kept``; ``found``: what was seen where it is broken, else empty."""

    name: str
    kept: bool
    found: str = ""

    def text(self) -> str:
        """The promise as a line of a table.

        >>> Promise("the order of rows changes nothing", True).text()
        'kept    the order of rows changes nothing'
        """
        line = f"{'kept' if self.kept else 'BROKEN':<8}{self.name}"
        return line + (f"\n{'':<8}found: {one_line(self.found, 400)}" if self.found else "")


def tried(name: str, look: Callable[[], str]) -> Promise:
    """The promise by ``look``, which returns what is wrong, or nothing; an exception breaks the promise too."""
    try:
        found = look()
    except Exception as error:  # foreign code raises anything
        found = f"{type(error).__name__}: {error}"
    return Promise(name, not found, found)
