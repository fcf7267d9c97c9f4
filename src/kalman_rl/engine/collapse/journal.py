"""Alarms on disk: ``alarms.jsonl`` in the run's folder, one whole line each, and reading them back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kalman_rl.engine.collapse.rule import Alarm, Token
from kalman_rl.engine.runs.files import explained, read_regular, write_all, write_file
from kalman_rl.errors import RunError

FILE = "alarms.jsonl"


def append_alarm(folder: Path, alarm: Alarm, action: str) -> None:
    """Append one alarm, in one write, with the action that was taken.

    Raises: RunError if the file cannot be written.
    """
    path = Path(folder) / FILE
    line = json.dumps({**asdict(alarm), "action": action}) + "\n"
    with explained(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o644)
        try:
            write_all(descriptor, line.encode())
        finally:
            os.close(descriptor)


def read_alarms(folder: Path) -> list[Alarm]:
    """The alarms of a run, oldest first; none if there is no file. Lines that are no alarms are skipped."""
    try:
        text = read_regular(Path(folder) / FILE, None).decode("utf-8", "replace")
    except RunError:
        return []
    return [alarm for line in text.splitlines() if (alarm := _alarm(line)) is not None]


def keep_alarms(folder: Path, step: int) -> None:
    """Drop the alarms after ``step``, which a run resumed there raises again if they come again."""
    path = Path(folder) / FILE
    if not path.is_file():
        return
    lines = read_regular(path, None).decode("utf-8", "replace").splitlines()
    kept = [line for line in lines if (alarm := _alarm(line)) is not None and alarm.step <= step]
    write_file(path, "".join(line + "\n" for line in kept).encode())


def _alarm(line: str) -> Alarm | None:
    try:
        row: Mapping[str, Any] = json.loads(line)
        tokens = tuple(
            Token(str(t["text"]), float(t["log_ratio"]), str(t["prompt_id"]), int(t["position"]))
            for t in row["tokens"]
        )
        texts = {name: str(row[name]) for name in ("metric", "key", "direction", "advice")}
        numbers = {name: float(row[name]) for name in ("value", "expected", "z")}
        counts = {name: int(row[name]) for name in ("step", "outside", "of")}
        return Alarm(**texts, **numbers, **counts, tokens=tokens)  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
