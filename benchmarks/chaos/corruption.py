"""Random damage to a checkpoint and to the files of a run.

Survived: no damaged checkpoint verifies; reading a damaged run gives what is left, or an error with a name.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.chaos.made import ended, load, program, tiny_model, train_command
from benchmarks.chaos.trial import Outcome, Plan

CHECKPOINTS, FILES = 8000, 2000


def run(plan: Plan) -> Outcome:
    outcome, choose = Outcome("corruption"), plan.random("corruption")
    load()
    from kalman_rl.engine.runs.checkpoints import verify_checkpoint
    from kalman_rl.errors import RunError

    whole, log = plan.folder / "run", plan.folder / "log"
    if ended(program(train_command(tiny_model(plan.folder / "model"), whole), log)):
        outcome.tried += 1
        outcome.lost.append(f"no run to damage: {log.read_text()[-300:]}")
        return outcome
    folder = max(
        (whole / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])
    )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number in range(plan.count(CHECKPOINTS)):
        file = choose.choice(files)
        with outcome.trial(f"checkpoint {number} of seed {plan.seed}, {file.name}"):
            undo, how = damage(file, choose)
            try:
                verify_checkpoint(folder)
            except RunError:
                outcome.seen[f"refused: {how}"] += 1
            else:
                raise AssertionError(f"accepted after {how}")
            finally:
                undo()
    verify_checkpoint(folder)  # all is as it was
    shutil.rmtree(whole / "checkpoints")
    files = sorted(path for path in whole.rglob("*") if path.is_file() and "model" not in path.parts[-2:-1])
    for number in range(plan.count(FILES)):
        file = choose.choice(files)
        with outcome.trial(f"file {number} of seed {plan.seed}, {file.name}"):
            undo, _ = damage(file, choose)
            try:
                read_all(whole, page=number % 50 == 0)
                outcome.seen["read, or refused by name"] += 1
            finally:
                undo()
    return outcome


def damage(file: Path, choose: random.Random) -> tuple[Callable[[], object], str]:
    """Damage a file at random; returns what undoes it, and what was done."""
    data = file.read_bytes()
    place = choose.randrange(max(len(data), 1))
    made = bytearray(data)
    kind = choose.choice(("bit", "byte", "cut", "more", "gone", "zeros", "swap"))
    if kind == "gone":
        file.unlink()
        return lambda: file.write_bytes(data), kind
    if kind == "bit" and data:
        made[place] ^= 1 << choose.randrange(8)
    elif kind == "byte" and data:
        made[place] = (made[place] + choose.randrange(1, 256)) % 256
    elif kind == "cut":
        del made[place:]
    elif kind == "zeros":
        made[place : place + 64] = bytes(len(made[place : place + 64]))
    elif kind == "swap":
        made[place:], made[:place] = made[:-place], made[-place:] if place else b""
    if bytes(made) == data:  # zeros on zeros, or nothing to change
        made, kind = made + choose.randbytes(choose.randint(1, 100)), "more"
    file.write_bytes(made)
    return lambda: file.write_bytes(data), kind


def read_all(run: Path, *, page: bool = False) -> None:
    """Read a run in every way there is; errors with a name are answers."""
    from kalman_rl.engine.collapse.rule import read_alarms
    from kalman_rl.engine.config import settings_of
    from kalman_rl.engine.runs.beliefs import read_beliefs
    from kalman_rl.engine.runs.reading import read_manifest, read_metrics, read_run
    from kalman_rl.errors import KalmanRLError
    from kalman_rl.instruments.replay import replay
    from kalman_rl.instruments.report import write_report

    def report(path: Path) -> None:
        write_report([path], path.with_name("page.html"))

    ways: list[Callable[[Path], object]] = [read_manifest, read_metrics, settings_of, read_alarms]
    ways += [lambda path: replay(path, "kpo"), *([report] if page else [])]
    read_run(run)  # never raises
    read_beliefs(run, [])
    for read in ways:
        try:
            read(run)
        except KalmanRLError:
            continue
