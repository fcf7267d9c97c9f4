"""Run TRL's own tests of its GRPO trainer with TRL's classes and with ours in their place, without a network.

    python tools/trl_suite.py --checkout TRL            both, and the table of what passes with TRL's classes only
    python tools/trl_suite.py --checkout TRL --plain    TRL's own classes: what passes at all on this machine
    python tools/trl_suite.py --checkout TRL --ours     our classes alone
    python tools/trl_suite.py --checkout TRL -k peft    some tests; what stands behind is pytest's

``TRL`` is a checkout of https://github.com/huggingface/trl at the version that is installed. Every test is ``passed``,
``refused`` (an error of ours says why), ``failed``, ``no stand-in`` (a model or data set of the hub that is not made
here) or ``skipped`` by TRL. The exit code is 1 if a test failed or was refused; beside TRL's classes only tests that
pass with these count. Tests of tools and environments need jmespath.

Models and data sets of the hub are made by trl_stand_ins.py. The tests run in a folder where these lie under the names
of the hub, so that nothing of TRL or transformers is patched.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from trl_stand_ins import make_hub

os.environ.update({"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"})

TEST_FILE = "tests/test_grpo_trainer.py"
KINDS = ("passed", "refused", "failed", "no stand-in", "skipped")
Found = dict[str, tuple[str, str]]
"""Test -> how it ended, and why."""


class Outcomes:
    """A plugin of pytest that notes how every test ended, and why."""

    def __init__(self, title: str) -> None:
        self.found: Found = {}
        self.title = title

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.found[report.nodeid] = "failed", "not collected"
            print(f"{self.title}: not collected: {report.longrepr}", flush=True)

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        if call.when != "call" and call.excinfo is None:
            return
        test = item.nodeid.partition("::")[2]
        if self.found.get(test, ("passed", ""))[0] == "passed":
            self.found[test] = outcome(None if call.excinfo is None else call.excinfo.value)
            print(f"{self.title:<5}{line(test, *self.found[test])}", flush=True)


def line(name: str, kind: str, why: str) -> str:
    """One test in the table."""
    return f"{kind:<12} {name.rpartition('::')[2]}" + (f": {why}" if why else "")


def counts(found: Found) -> str:
    """How many tests ended how."""
    number = Counter(kind for kind, _ in found.values())
    return ", ".join(f"{number[kind]} {kind}" for kind in KINDS if number[kind]) or "no test ran"


def outcome(error: BaseException | None) -> tuple[str, str]:
    """How a test ended, from what it raised, and the first line of the reason.

    >>> outcome(None), outcome(AssertionError("1 == 2"))
    (('passed', ''), ('failed', 'AssertionError: 1 == 2'))
    """
    import pytest

    from kalman_rl.errors import KalmanRLError

    if error is None:
        return "passed", ""
    lines = str(error).strip().splitlines() or [""]
    why = f"{type(error).__name__}: {lines[0][:300]}"
    if isinstance(error, pytest.skip.Exception):
        return "skipped", lines[0]
    if isinstance(error, KalmanRLError):
        return "refused", why
    missing = isinstance(error, OSError) and any(
        word in str(error).lower() for word in ("offline", "huggingface.co")
    )
    missing = missing or type(error).__name__ in ("DatasetNotFoundError", "OfflineModeIsEnabled")
    return ("no stand-in" if missing else "failed"), why


def swap() -> None:
    """Let ``from trl import GRPOTrainer, GRPOConfig`` give ours."""
    import trl

    from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer

    trl.GRPOTrainer, trl.GRPOConfig = KalmanGRPOTrainer, KalmanGRPOConfig


def run(checkout: Path, title: str, options: list[str]) -> Found:
    """Make the stand-ins and run the tests in this process."""
    import pytest

    if title == "ours":
        swap()
    outcomes = Outcomes(title)
    with tempfile.TemporaryDirectory() as folder:
        make_hub(Path(folder))
        before = Path.cwd()
        os.chdir(folder)
        try:
            arguments = [str(checkout / TEST_FILE), f"--rootdir={checkout}", "-c", os.devnull]
            arguments += ["-pno:cacheprovider", "-pno:terminal", f"--basetemp={folder}/tests"]
            pytest.main([*arguments, *options], plugins=[outcomes])
        finally:
            os.chdir(before)
    print(f"{title}: {counts(outcomes.found)}")
    return outcomes.found


def run_both(checkout: Path, options: list[str]) -> tuple[Found, Found]:
    """The tests with TRL's classes and with ours, in two processes side by side."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "plain.json", Path(folder) / "ours.json"]
        started = []
        for flag, file in zip(("--plain", "--ours"), files):
            command = [sys.executable, str(Path(__file__).resolve()), "--checkout", str(checkout), flag]
            started.append(subprocess.Popen([*command, "--save", str(file), *options]))
        for process in started:
            process.wait()
        plain, ours = (json.loads(file.read_text()) if file.exists() else {} for file in files)
    return plain, ours


def compared(plain: Found, ours: Found) -> Found:
    """How the tests that pass with TRL's classes end with ours; one that did not end there failed.

    >>> compared({"a": ("passed", ""), "b": ("failed", "E")}, {"a": ("refused", "C")})
    {'a': ('refused', 'C')}
    """
    lost = ("failed", "did not end")
    return {name: ours.get(name, lost) for name, (kind, _) in plain.items() if kind == "passed"}


def main(words: list[str] | None = None) -> int:
    """Run the tests and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkout", type=Path, required=True, help="folder with TRL's repository")
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--plain", action="store_true", help="TRL's own classes alone")
    alone.add_argument("--ours", action="store_true", help="our classes alone")
    parser.add_argument("--save", type=Path, help="write how every test ended to this JSON file")
    given, rest = parser.parse_known_args(words)
    checkout = given.checkout.resolve()
    if not (checkout / TEST_FILE).exists():
        parser.error(
            f"--checkout: got {checkout}, expected a folder with {TEST_FILE}; git clone TRL's repository"
        )
    if given.plain or given.ours:
        judged = run(checkout, "TRL" if given.plain else "ours", rest)
    else:
        plain, ours = run_both(checkout, rest)
        judged = compared(plain, ours)
        print(f"\nTRL:  {counts(plain)}\nours: {counts(judged)}, of those that pass with TRL's classes")
        for name, (kind, why) in judged.items():
            if kind != "passed":
                print(line(name, kind, why))
    if given.save is not None:
        given.save.write_text(json.dumps(judged))
    bad = [kind for kind, _ in judged.values() if kind in ("failed", "refused")]
    return 1 if bad or not judged else 0


if __name__ == "__main__":
    sys.exit(main())
