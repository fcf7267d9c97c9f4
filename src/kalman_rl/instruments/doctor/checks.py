"""The list of checks, and the process that runs them: ``python -m kalman_rl.instruments.doctor.checks``.

The process reads a pickled PlannedRun from stdin. It writes one line of JSON to stdout for each finding, and to stderr
the name of each check before it begins; whatever the checks print themselves goes to stderr too.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from functools import partial

from kalman_rl.instruments.doctor import hosts, machine, model, reward, versions
from kalman_rl.instruments.doctor.finding import Finding, PlannedRun, explain

MARK = "\nkalman-rl doctor, check: "
END = "end"

Check = Callable[[PlannedRun], Iterable[Finding]]

CHECKS: list[tuple[str, Check]] = [
    ("python", versions.python),
    *((name, partial(versions.declared, name)) for name in versions.LIBRARIES),
    ("settings", reward.settings),  # fills in what the plan leaves open
    ("disk", machine.disk),
    # from here on libraries are imported and the user's code runs, which may end the process
    *((name, partial(versions.imported, name)) for name in versions.LIBRARIES),
    ("gpu build", machine.device),
    *((f"{name} hooks", partial(hosts.hooks, name)) for name in hosts.HOOKS),
    ("verl plugin", hosts.plugin),
    ("model", model.model),
    ("reward", reward.dry_run),
]
"""In the order they run. A new check is a function and a line here."""


def main() -> None:
    """Entry point of the process."""
    plan = pickle.load(sys.stdin.buffer)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    for name, check in CHECKS:
        os.write(2, f"{MARK}{name}\n".encode())
        try:
            for finding in check(plan):
                print(json.dumps(vars(finding)), file=answers)
        except BaseException as error:  # a library may raise anything, SystemExit too
            print(
                json.dumps(vars(Finding(name, "problem", f"the check failed: {explain(error)}"))),
                file=answers,
            )
    os.write(2, f"{MARK}{END}\n".encode())
    os._exit(0)  # some libraries hang or crash on their way out


if __name__ == "__main__":
    main()
