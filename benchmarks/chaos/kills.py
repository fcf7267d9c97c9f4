"""SIGKILL at a random moment, and at a random touch of a file of the run; then on, until the run is finished.

Survived: the same weights bit for bit, rows of metrics and beliefs as in a run that nobody killed, each once, and no
help but the command that the run itself names. Runs are forks of a process that has trained once, so that a kill costs
what the training costs; the run they are compared with is a program of its own.
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

from benchmarks.chaos.made import command, ended, program, tiny_model, train_command, warm
from benchmarks.chaos.trial import Outcome, Plan

WHOLE = 400
"""Runs that are killed, each up to ``KILLS`` times."""
KILLS = 5
EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"})
OWN = ("time", "seconds", "step_time", "num_tokens", "memory/process_most", "memory/device_most")
"""Parts of metrics' names whose values are no function of the seed."""


def run(plan: Plan) -> Outcome:
    outcome, choose = Outcome("SIGKILL, bitwise"), plan.random("kills")
    model, log = tiny_model(plan.folder / "model"), plan.folder / "log"
    whole, again, touches = plan.folder / "whole", plan.folder / "again", plan.folder / "touches"
    warm(model, plan.folder / "first")
    with outcome.trial("the undisturbed runs"):
        if code := ended(program(train_command(model, whole), log)):
            raise AssertionError(f"ended with {code}: {log.read_text()[-300:]}")
        expected = state_of(whole)
        start = time.monotonic()
        code = ended(command(train_command(model, again), log, lambda: counted(again, touches)))
        length = time.monotonic() - start
        if different := code or unlike(expected, state_of(again)):
            raise AssertionError(f"a fork is not like a program: {different}")
    if outcome.lost:
        return outcome
    most = int(touches.read_text())
    for number in range(plan.count(WHOLE)):
        path = plan.folder / f"run-{number}"
        with outcome.trial(f"run {number} of seed {plan.seed}"):
            killed_and_finished(model, path, log, choose, length, most, outcome)
            if different := unlike(expected, state_of(path)):
                raise AssertionError(f"not the same: {different}")
            shutil.rmtree(path)
    return outcome


def killed_and_finished(
    model: Path, path: Path, log: Path, choose: random.Random, length: float, most: int, outcome: Outcome
) -> None:
    words = train_command(model, path)
    for kill in range(1, choose.randint(1, KILLS) + 1):
        log.unlink(missing_ok=True)
        share = choose.random() / kill  # of a whole run; less is left each time
        if inside := choose.random() < 0.5:
            touch = 1 + int(share * most)
            code = ended(command(words, log, lambda touch=touch: killed_at(path, touch)))
        else:
            pid = command(words, log)
            time.sleep(share * length)
            os.kill(pid, signal.SIGKILL)
            code = ended(pid)
        if code == 0:  # it ended before its turn came
            return
        told = log.read_text()
        if code != -signal.SIGKILL:
            raise AssertionError(f"{words[0]} ended with {code}: {told[-300:]}")
        saving = inside and "/checkpoints/" in told.rpartition("\n")[2]
        outcome.seen["kills in a save" if saving else f"kills at a {'file' if inside else 'time'}"] += 1
        words = next_words(model, path)
    if ended(command(words, log)):
        raise AssertionError(f"{words[0]} did not finish: {log.read_text()[-300:]}")


def next_words(model: Path, path: Path) -> list[str]:
    """What a user does next: resume what is a run, else the same command again."""
    return ["resume", str(path)] if (path / "manifest.json").exists() else train_command(model, path)


def killed_at(run: Path, touch: int) -> None:
    """Kill this process at its n-th touch of a file in the run's folder; what it touched is its last word."""

    def kill(count: int, name: str) -> None:
        if count == touch:
            os.write(1, f"\n{name}".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(run, kill)


def counted(run: Path, touches: Path) -> None:
    """Write down how often this process touches a file in the run's folder."""
    latest = 0

    def note(count: int, name: str) -> None:
        nonlocal latest
        latest = count

    _watch(run, note)
    exit_ = os._exit

    def leave(code: int) -> None:
        touches.write_text(str(latest))
        exit_(code)

    os._exit = leave  # type: ignore[assignment]


def _watch(run: Path, each: Callable[[int, str], None]) -> None:
    place, count = str(run), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in EVENTS and arguments and str(arguments[0]).startswith(place):
            count += 1
            each(count, str(arguments[0]))

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
