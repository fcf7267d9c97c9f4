"""The checks, run in a process of their own: a library that crashes or hangs takes the probe with it, not the doctor.

``python -m kalman_rl.instruments.doctor.probe PLAN SKIP BROKEN``: the plan's texts, checks not to run, and libraries
that do not import, all as JSON. Every line of output is JSON: a check that begins (with its limit in seconds, and the
libraries that do not import so far), a finding, or the end.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kalman_rl.instruments.doctor import hosts, machine, reward, versions
from kalman_rl.instruments.doctor.finding import Finding, Plan, explain


class Check(NamedTuple):
    """A check, how many seconds it may take, and the libraries that have to import for it."""

    run: Callable[[Plan], Iterable[Finding]]
    limit: float = 60.0
    needs: tuple[str, ...] = ()


_NEEDS = {
    "accelerate": ("torch",),
    "transformers": ("torch",),
    "trl": ("torch", "accelerate", "transformers"),
    "verl": ("torch", "transformers"),
}
CHECKS: dict[str, Check] = {
    "python": Check(versions.python),
    **{
        name: Check(partial(versions.library, name), needs=_NEEDS.get(name, ()))
        for name in versions.LIBRARIES
    },
    "trl hooks": Check(hosts.hooks, needs=("torch", "trl")),
    "verl plugin": Check(hosts.plugin, needs=("torch", "verl")),
    "device": Check(machine.device, needs=("torch",)),
    "memory": Check(machine.memory),
    "settings": Check(reward.settings),
    "reward": Check(reward.dry_run, limit=30.0),
    "disk": Check(machine.disk),
    "time": Check(machine.duration),
}


def run_checks(plan: Plan, skip: Iterable[str], broken: Iterable[str], say: Callable[[Any], None]) -> None:
    """Run all checks but those in ``skip``, telling ``say`` what begins and what was found."""
    skip, broken = set(skip), set(broken)
    for name, check in CHECKS.items():
        if name in skip:
            continue
        say({"begin": name, "limit": check.limit, "broken": sorted(broken)})
        cause = next((library for library in check.needs if library in broken), None)
        if cause is not None:
            say(Finding(name, "warning", f"not looked at, because {cause} does not import").as_dict())
            if name in versions.LIBRARIES:
                broken.add(name)
            continue
        try:
            for finding in check.run(plan):
                say(finding.as_dict())
                if name in versions.LIBRARIES and finding.status == "problem" and name not in sys.modules:
                    broken.add(name)
        except BaseException as error:  # a library may raise anything, SystemExit too
            say(Finding(name, "problem", f"the check failed: {explain(error)}").as_dict())


def main() -> None:
    """Entry point of the process."""
    texts, skip, broken = (json.loads(argument) for argument in sys.argv[1:4])
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries and rewards print is no finding

    def say(value: Any) -> None:
        output.write(json.dumps(value) + "\n")
        output.flush()

    paths = {key: Path(value) for key, value in texts.items() if key in ("data", "run", "config") and value}
    run_checks(Plan(**(texts | paths)), skip, broken, say)
    say({"end": True})
    os._exit(0)  # some libraries hang or crash on their way out


if __name__ == "__main__":
    main()
