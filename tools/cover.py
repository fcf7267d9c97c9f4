"""Branches of the numeric core that its tests run, and which test runs which line.

    python tools/cover.py

Run by ``make cover``, in an environment that has coverage beside the packages of ``.venv``. The tests of the rooms are
run once; for each the lines that it runs and its seconds are kept in ``build/mutants``, for ``tools/mutants.py``.
Stopped by ``--seconds``, the same command goes on, as long as no source has changed; ``--fresh`` begins anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "mutants"
ROOMS = ("numerics", "objectives", "beliefs", "sampling")
PROJECT = tuple(
    f"tests/project/test_{name}.py" for name in ("borders", "damaged_states", "bad_input", "odd_types")
)
"""Tests that walk over all rooms."""

ELSEWHERE = {"sampling": "tests/instruments/test_report_data.py", "objectives": "tests/methods"}
"""Tests of a room in another folder."""


def tests_of(rooms: Sequence[str]) -> tuple[str, ...]:
    """What pytest collects: the tests and examples of the rooms, and what runs over all of them.

    >>> tests_of(["beliefs"])[-2:], tests_of(ROOMS)[-1]
    (('src/kalman_rl/beliefs', 'tests/beliefs'), 'tests/methods')
    """
    own = [f"{folder}/{room}" for room in rooms for folder in ("src/kalman_rl", "tests")]
    return (*PROJECT, *own, *(test for room, test in ELSEWHERE.items() if room in rooms))


class Cover:
    """A plugin of pytest that runs every test under coverage, and keeps which lines it runs and its seconds."""

    def __init__(self, until: float) -> None:
        self.until, self.seconds, self.recorder = until, seconds_of_tests(), recorder_of_lines()
        if self.seconds:
            self.recorder.load()
        self.recorder.start()  # before the tests, and with them the package, are imported

    def pytest_runtestloop(self, session: Any) -> bool:
        """Run the tests that were not run before."""
        todo = [item for item in session.items if item.nodeid not in self.seconds]
        for item, following in zip(todo, [*todo[1:], None]):
            self.recorder.switch_context(item.nodeid)
            start = time.process_time()
            last = time.time() > self.until or following is None
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=None if last else following)
            self.seconds.setdefault(item.nodeid, time.process_time() - start)
            if last:
                break
        self.recorder.stop()
        self.recorder.save()
        (BUILD / "seconds.json").write_text(json.dumps(self.seconds))
        say(
            f"{len(self.seconds.keys() & {item.nodeid for item in session.items})} of {len(session.items)} tests run"
        )
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Say which test fails; it judges nothing."""
        if report.failed:
            say(f"{report.nodeid} fails\n{report.longreprtext}")
            self.seconds[report.nodeid] = -1.0


def recorder_of_lines() -> Any:
    """coverage of the rooms, with branches."""
    import coverage

    sources = [str(ROOT / "src" / "kalman_rl" / room) for room in ROOMS]
    return coverage.Coverage(
        data_file=str(BUILD / "coverage"), branch=True, source=sources, config_file=False
    )


def tests_of_lines() -> dict[str, dict[int, list[str]]]:
    """File to line to the tests that run it."""
    recorder = recorder_of_lines()
    recorder.load()
    data = recorder.get_data()
    return {
        Path(file).relative_to(ROOT).as_posix(): data.contexts_by_lineno(file)
        for file in data.measured_files()
    }


def seconds_of_tests() -> dict[str, float]:
    """Test to the seconds of the processor that it took; negative where it failed."""
    file = BUILD / "seconds.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def say(text: str) -> None:
    """Print past pytest's capture."""
    print(text, file=sys.__stdout__, flush=True)


def collected(rooms: Sequence[str], plugin: object) -> None:
    """Collect the tests of the rooms with pytest, in this process, and let ``plugin`` run them."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    os.environ.update(PYTHONPATH=os.pathsep.join(sys.path[:2]), CI="1", OMP_NUM_THREADS="1")
    import pytest

    arguments = "-x -q --tb=line --no-header --timeout 600 -p no:cacheprovider -p no:xdist".split()
    pytest.main([*arguments, "--basetemp", str(BUILD / "files"), *tests_of(rooms)], plugins=[plugin])


def main() -> None:
    """Run the tests, print what they do not run."""
    parser = argparse.ArgumentParser(description="Branches of the numeric core that its tests run.")
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=ROOMS)
    parser.add_argument(
        "--seconds", type=float, default=1e6, help="stop after so long; the same command goes on"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what was run before")
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.fresh:
        shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    collected(options.rooms, Cover(time.time() + options.seconds))
    recorder = recorder_of_lines()
    recorder.load()
    names = [f"*/kalman_rl/{room}/*" for room in options.rooms]
    recorder.report(include=names, show_missing=True, skip_covered=True, file=sys.__stdout__)


if __name__ == "__main__":
    main()
