"""Runs that a stranger made: links to secrets, pipes, devices, sparse and deep files in the place of every file.

Survived: read within seconds, in bounded memory, and no page or error holds a secret.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.instruments.report_runs import write_run

from benchmarks.chaos.corruption import read_all
from benchmarks.chaos.made import ended, forked
from benchmarks.chaos.trial import Outcome, Plan

WHOLE = 400
SECRET = "chaos-secret-"
SECONDS, MEMORY = 60, 8_000_000_000
NAMES = ("manifest.json", "config.toml", "metrics.jsonl", "alarms.jsonl", "beliefs.jsonl", "traces")


def run(plan: Plan) -> Outcome:
    outcome, choose = Outcome("received folders"), plan.random("received")
    from kalman_rl.instruments.replay import replay  # noqa: F401
    from kalman_rl.instruments.report import write_report  # noqa: F401

    secret, path, log = plan.folder / "secret", plan.folder / "run", plan.folder / "log"
    secret.write_text(f'{SECRET}1 = "{SECRET}2"\n{{"kind": "train", "step": 1, "{SECRET}3": 1.0}}\n')
    for number in range(plan.count(WHOLE)):
        with outcome.trial(f"folder {number} of seed {plan.seed}"):
            log.unlink(missing_ok=True)
            write_run(path, {"method": "kpo", "task": "products", "seed": number}, updates=3)
            for name in choose.sample(NAMES, choose.randint(1, 3)):
                kind, make = choose.choice(list(KINDS.items()))
                outcome.seen[kind] += 1
                place = (
                    path / name / "step-000001.parquet"
                    if name == "traces" and choose.random() < 0.5
                    else path / name
                )
                remove(place)
                place.parent.mkdir(exist_ok=True)
                make(place, secret, choose)
            code = ended(forked(lambda: look(path), log), 2 * SECONDS)
            page = plan.folder / "page.html"
            told = log.read_text(errors="replace") + (
                page.read_text(errors="replace") if page.exists() else ""
            )
            if code:
                raise AssertionError(f"ended with {code}: {told[-300:]}")
            if SECRET in told:
                raise AssertionError("a secret was shown")
            page.unlink(missing_ok=True)
        remove(path)
    return outcome


def look(run: Path) -> int:
    """Read a run with little time and memory, in a process of its own."""
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    read_all(run, page=True)
    return 0


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sparse(path: Path, secret: Path, choose: random.Random) -> None:
    with path.open("wb") as file:
        file.truncate(choose.choice([10**9, 10**10, 10**12]))


def deep(path: Path, secret: Path, choose: random.Random) -> None:
    levels = choose.choice([40, 900, 10_000, 200_000])
    path.write_text(
        choose.choice([
            "[" * levels + "]" * levels,
            '{"a":' * levels + "1" + "}" * levels,
            '{"kind": "train", "step": 1, "x": ' + "[" * levels + "]" * levels + "}\n",
            ".".join("a" * min(levels, 5000)) + " = 1\n",
        ])
    )  # fmt: skip


def long_line(path: Path, secret: Path, choose: random.Random) -> None:
    path.write_bytes(b'{"kind": "' + b"x" * choose.choice([10**6, 10**7, 10**8]))


def noise(path: Path, secret: Path, choose: random.Random) -> None:
    path.write_bytes(choose.randbytes(choose.randint(0, 10_000)))


def odd_values(path: Path, secret: Path, choose: random.Random) -> None:
    """Rows with values of other types and sizes."""
    odd = [
        "1e999",
        "-1e308",
        "null",
        "true",
        '"\\ud800"',
        "[]",
        "{}",
        "1" * 5000,
        '"</script><script>"',
        "NaN",
        "-0.0",
    ]
    keys = [
        "step",
        "time",
        "reward",
        "kind",
        "format",
        "labels",
        "id",
        "n",
        "mean",
        "tokens",
        "\\u202e",
        "__proto__",
    ]
    rows = []
    for _ in range(choose.randint(1, 50)):
        parts = [f'"{choose.choice(keys)}": {choose.choice(odd)}' for _ in range(choose.randint(1, 8))]
        rows.append('{"kind": "train", "step": 1, ' + ", ".join(parts) + "}")
    path.write_text("\n".join(rows), errors="replace")


Make = Callable[[Path, Path, random.Random], Any]
KINDS: dict[str, Make] = {
    "link": lambda path, secret, choose: path.symlink_to(secret),
    "link to a folder": lambda path, secret, choose: path.symlink_to(secret.parent),
    "zero": lambda path, secret, choose: path.symlink_to("/dev/zero"),
    "loop": lambda path, secret, choose: path.symlink_to(path.name),
    "pipe": lambda path, secret, choose: os.mkfifo(path),
    "folder": lambda path, secret, choose: path.mkdir(),
    "sparse": sparse,
    "deep": deep,
    "long line": long_line,
    "noise": noise,
    "odd values": odd_values,
}
