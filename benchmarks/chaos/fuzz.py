"""Settings files and command lines at random, in this process; some of the lines as programs of their own.

Survived: a configuration, or one ConfigError (exit code 2) of at most a few lines; nothing else is ever raised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.chaos.trial import Outcome, Plan

FILES, LINES, PROGRAMS = 90_000, 9_970, 30
OPTIONS = ("method_options", "belief_options")
LONGEST = 4000
"""Characters of an error."""
ODD = (
    "", " ", "0", "-1", "1", "1.5", "1e400", "nan", "inf", "true", "None", "x" * 300, "/".join(["d" * 200] * 30),
    "a\udcff", "\ud800", "é" * 200, "../../x", "/dev/zero", "/dev/null/x", "~nobody/x", "x\ny", "\x1b[31m", "\u202e",
    "--", "-", "=", "os:system", "json:loads", "a:b:c", ":", "{}", "[1", '"', "1_000", "９", "9" * 5000, "1" * 400,
    "kpo", "grpo", "sort12",
)  # fmt: skip


def run(plan: Plan) -> Outcome:
    outcome, choose = Outcome("settings and command lines"), plan.random("fuzz")
    from kalman_rl.engine.config import TrainConfig, build, load_toml, to_toml, validate
    from kalman_rl.errors import ConfigError

    fields = [spec.name for spec in dataclasses.fields(TrainConfig)]
    file = plan.folder / "settings.toml"
    start = to_toml(TrainConfig())
    here = Path.cwd()
    os.chdir(plan.folder)
    try:
        for number in range(plan.count(FILES)):
            with outcome.trial(f"settings {number} of seed {plan.seed}"):
                file.write_bytes(toml(start, fields, choose).encode("utf-8", "surrogatepass"))
                try:
                    validate(build(TrainConfig, load_toml(file)))
                    outcome.seen["settings taken"] += 1
                except ConfigError as error:
                    check(str(error))
                    outcome.seen["settings refused"] += 1
        for number in range(plan.count(LINES)):
            words = line(fields, choose)
            with outcome.trial(f"line {number} of seed {plan.seed}: {words!r:.200}"):
                outcome.seen[f"exit {typed(words)}"] += 1
        for number in range(plan.count(PROGRAMS)):
            words = [
                word.replace("\ud800", "\udcff") for word in line(fields, choose)
            ]  # no shell types the former
            with outcome.trial(f"program {number} of seed {plan.seed}: {words!r:.200}"):
                outcome.seen[f"exit {started(words)} of a program"] += 1
    finally:
        os.chdir(here)
    return outcome


def typed(words: list[str]) -> int:
    """Exit code of a command line. Raises: what it lets through; AssertionError for a traceback or a long error."""
    from kalman_rl.cli.main import main

    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        code = main(words)
    return answered(code, said.getvalue())


def started(words: list[str]) -> int:
    """Exit code of a command line as a program. Raises: as :func:`typed`."""
    program = [os.fsencode(sys.executable), b"-m", b"kalman_rl.cli.main"]
    given = [word.encode(errors="surrogateescape") for word in words]
    done = subprocess.run([*program, *given], capture_output=True, text=True, errors="replace", timeout=600)
    return answered(done.returncode, done.stderr)


def answered(code: int, text: str) -> int:
    check(text)
    if "Traceback" in text or "KALMAN_RL_TRACEBACK" in text:
        raise AssertionError(text[-300:])
    if code not in (0, 1, 2):
        raise AssertionError(f"exit code {code}: {text[-300:]}")
    return code


def check(text: str) -> None:
    if len(text) > LONGEST or "\x1b" in text or "\u202e" in text:
        raise AssertionError(f"an error of {len(text)} characters: {text[:200]!r}")


def toml(start: str, fields: list[str], choose: random.Random) -> str:
    """Settings with mistakes in them."""
    lines = start.splitlines()
    for _ in range(choose.randint(1, 4)):
        key = choose.choice(
            [*fields, "nothing", "", "method.name", "a.b.c", '"\\ud800"', "method_options", "belief_options"]
        )
        lines.insert(choose.randrange(len(lines) + 1), f"{key} = {value(choose)}")
        if choose.random() < 0.7:  # else a key twice
            first: dict[str, str] = {}
            for one in lines:
                first.setdefault(one.partition(" ")[0], one)
            lines = list(first.values())
    text = "\n".join(lines)
    if choose.random() < 0.2:
        place = choose.randrange(len(text))
        text = (
            text[:place]
            + choose.choice(["\0", "\x1b", "[", "'''", "\udcff", "#", "\r", "{"])
            + text[place + choose.randint(0, 9) :]
        )
    return text


def value(choose: random.Random) -> str:
    kind = choose.randrange(6)
    if kind == 0:
        return repr(choose.uniform(-1e6, 1e6))
    if kind == 1:
        return str(choose.randint(-(10 ** choose.randint(0, 30)), 10 ** choose.randint(0, 30)))
    if kind == 2:
        return choose.choice(
            ["true", "false", "nan", "inf", "-inf", "1979-05-27", "07:32:00", "{}", "[]", "[[1]]"]
        )
    if kind == 3:
        return f"[{', '.join(value(choose) for _ in range(choose.randint(0, 3)))}]"
    if kind == 4:
        return f"{{a = {value(choose)}}}"
    text = choose.choice(ODD).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def line(fields: list[str], choose: random.Random) -> list[str]:
    """Words of a command that trains nothing: a dry run, or a run that is not there."""
    verb = choose.choice(["train", "train", "train", "resume", "report", "replay", "methods", "nothing"])
    if verb == "train":
        words: list[Any] = [verb, "--dry-run"]
        for _ in range(choose.randint(1, 4)):
            flag = "--" + choose.choice([*fields, "config", "nothing"]).replace("_", "-")
            words += choose.choice([[flag, choose.choice(ODD)], [flag + "=" + choose.choice(ODD)], [flag]])
        return words
    words = [verb, *choose.choices(ODD, k=choose.randint(0, 2))]
    for _ in range(choose.randint(0, 2)):
        words += [
            choose.choice(["--method", "--steps", "--top", "--output", "--json", "--quiet", "--x"]),
            choose.choice(ODD),
        ]
    return words
