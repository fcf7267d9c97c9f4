"""What a run wrote after a step, dropped where it is resumed there: it is written again."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from kalman_rl.engine.runs.files import explained, replacing
from kalman_rl.engine.runs.received import read_lines
from kalman_rl.engine.runs.traces import steps

JOURNALS = {"beliefs.jsonl": -1, "alarms.jsonl": 0}
"""Files of rows beside the metrics, and the last step that a run resumed at step 0 does not write again. A row of
beliefs names the step before the ones that its generation batch is for."""


def drop_after(run: Path, step: int) -> None:
    """Drop rows and traces of later steps, and lines that are no rows. Raises: RunError with path and reason."""
    for name, last in JOURNALS.items():
        _keep_rows(run, name, step + last)
    with explained(run, "remove traces"):
        for later in [file for number, file in steps(run).items() if number > step]:
            later.unlink()


def _keep_rows(run: Path, name: str, step: int) -> None:
    if not os.path.lexists(run / name):
        return
    with explained(run / name, "rewrite"), replacing(run / name) as temporary:
        with temporary.open("wb") as new:
            new.writelines(line for line in read_lines(run, name, sys.maxsize) if _until(line, step))


def _until(line: bytes, step: int) -> bool:
    try:
        found = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return line.endswith(b"\n") and isinstance(found, int) and found <= step
