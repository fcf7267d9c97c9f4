"""SIGKILL at a random moment, and at a random touch of a file of the run; then on, until the run is finished.

Survived: the same weights bit for bit, rows of metrics and beliefs as in a run that nobody killed, each once, and no
help but the command that the run itself names.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.chaos.made import command, ended, load, tiny_model, train_command
from benchmarks.chaos.trial import Outcome, Plan

WHOLE = 60
"""Runs that are killed, each up to ``KILLS`` times."""
KILLS = 3
EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"})
OWN = ("time", "seconds", "step_time", "num_tokens", "memory/process", "memory/device_most")
"""Parts of metrics' names whose values are no function of the seed."""


def run(plan: Plan) -> Outcome:
    outcome, choose = Outcome("SIGKILL, bitwise"), plan.random("kills")
    load()
    model = tiny_model(plan.folder / "model")
    whole, log = plan.folder / "whole", plan.folder / "log"
    start = time.monotonic()
    touches = plan.folder / "touches"
    code = ended(command(train_command(model, whole), log, lambda: counted(whole, touches)))
    length = time.monotonic() - start
    if code:
        outcome.tried += 1
        outcome.lost.append(f"the undisturbed run ended with {code}: {log.read_text()[-300:]}")
        return outcome
    expected, most = state_of(whole), int(touches.read_text())
    for number in range(plan.count(WHOLE)):
        path = plan.folder / f"run-{number}"
        with outcome.trial(f"run {number} of seed {plan.seed}"):
            log.unlink(missing_ok=True)
            killed_and_finished(model, path, log, choose, length, most, outcome)
            if different := unlike(expected, state_of(path)):
                raise AssertionError(f"not the same: {different}")
            shutil.rmtree(path)
    return outcome


def killed_and_finished(
    model: Path, path: Path, log: Path, choose: random.Random, length: float, most: int, outcome: Outcome
) -> None:
    words = train_command(model, path)
    for _ in range(choose.randint(1, KILLS)):
        inside = choose.random() < 0.5
        if inside:
            touch = choose.randint(1, most)
            code = ended(command(words, log, lambda touch=touch: killed_at(path, touch)))
        else:
            pid = command(words, log)
            time.sleep(choose.uniform(0, length))
            os.kill(pid, signal.SIGKILL)
            code = ended(pid)
        outcome.seen["killed at a file" if inside else "killed at a time"] += code == -signal.SIGKILL
        if code not in (0, -signal.SIGKILL):
            raise AssertionError(f"{words[0]} ended with {code}: {log.read_text()[-300:]}")
        words = next_words(model, path)
    if ended(command(words, log)):
        raise AssertionError(f"{words[0]} did not finish: {log.read_text()[-300:]}")


def next_words(model: Path, path: Path) -> list[str]:
    """What a user does next: resume what is a run, else the same command again."""
    return ["resume", str(path)] if (path / "manifest.json").exists() else train_command(model, path)


def killed_at(run: Path, touch: int) -> None:
    """Kill this process at its n-th touch of a file in the run's folder."""

    def kill(count: int) -> None:
        if count == touch:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(run, kill)


def counted(run: Path, touches: Path) -> None:
    """Write down how often this process touches a file in the run's folder."""
    latest = 0

    def note(count: int) -> None:
        nonlocal latest
        latest = count

    _watch(run, note)
    exit_ = os._exit

    def leave(code: int) -> None:
        touches.write_text(str(latest))
        exit_(code)

    os._exit = leave  # type: ignore[assignment]


def _watch(run: Path, each: Callable[[int], None]) -> None:
    place, count = str(run), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in EVENTS and arguments and str(arguments[0]).startswith(place):
            count += 1
            each(count)

    sys.addaudithook(hook)


def unlike(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """Names of what differs; empty if nothing does."""
    return ", ".join(sorted(name for name in expected if found.get(name) != expected[name]))


def state_of(run: Path) -> dict[str, Any]:
    """What two runs of the same seed must have in common."""
    found: dict[str, Any] = {"model": (run / "model" / "model.safetensors").read_bytes()}
    manifest = json.loads((run / "manifest.json").read_text())
    found["status"] = manifest["status"]
    for name in ("metrics.jsonl", "beliefs.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        found[name] = [
            {key: value for key, value in row.items() if not any(part in key for part in OWN)} for row in rows
        ]
    found["traces"] = sorted(path.name for path in (run / "traces").iterdir())
    found["checkpoints"] = sorted(path.name for path in (run / "checkpoints").glob("checkpoint-*"))
    return found
