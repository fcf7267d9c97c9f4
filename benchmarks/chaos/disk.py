"""A disk that is full at a random size: a small tmpfs, made larger once the run has ended.

Survived: the run ends by itself with a message and resumes to the same bits once there is room. Mounting needs root.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.chaos.kills import next_words, state_of, unlike
from benchmarks.chaos.made import command, ended, tiny_model, train_command, warm
from benchmarks.chaos.trial import Outcome, Plan

WHOLE = 50
ROOM = 64_000_000


def run(plan: Plan) -> Outcome:
    outcome, choose = Outcome("full disk, bitwise"), plan.random("disk")
    disk, log = plan.folder / "disk", plan.folder / "log"
    disk.mkdir()
    if not mounted(disk, ROOM):
        outcome.seen["no right to mount a tmpfs here, not tried"] = 1
        return outcome
    model = tiny_model(plan.folder / "model")
    warm(model, plan.folder / "first")
    try:
        whole = disk / "whole"
        if ended(command(train_command(model, whole), log)):
            outcome.tried += 1
            outcome.lost.append(f"the undisturbed run ended badly: {log.read_text()[-300:]}")
            return outcome
        expected = state_of(whole)
        needed = sum(path.stat().st_blocks * 512 for path in whole.rglob("*"))
    finally:
        subprocess.run(["umount", disk], check=True)
    for number in range(plan.count(WHOLE)):
        size = choose.randint(100_000, round(needed * 1.1))
        mounted(disk, size)
        try:
            with outcome.trial(f"disk {number} of seed {plan.seed}, {size:,} of {needed:,} bytes"):
                log.unlink(missing_ok=True)
                path = disk / "run"
                code = ended(command(train_command(model, path), log))
                outcome.seen[f"exit {code}"] += 1
                said = log.read_text()
                if code < 0 or "Traceback" in said:
                    raise AssertionError(f"ended with {code}: {said[-300:]}")
                if code:
                    subprocess.run(["mount", "-o", f"remount,size={ROOM}", disk], check=True)
                    words = next_words(model, path)
                    if ended(command(words, log)):
                        raise AssertionError(f"{words[0]} did not finish: {log.read_text()[-300:]}")
                if different := unlike(expected, state_of(path)):
                    raise AssertionError(f"not the same: {different}")
        finally:
            subprocess.run(["umount", disk], check=True)
    return outcome


def mounted(place: Path, size: int) -> bool:
    """Mount a tmpfs of a size; False without the right to."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    return subprocess.run(words, capture_output=True).returncode == 0
