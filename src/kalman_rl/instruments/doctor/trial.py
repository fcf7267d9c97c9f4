"""What has to be imported or run, in a separate process:
``python -m kalman_rl.instruments.doctor.trial FILE PLAN``.

Writes to FILE a line of JSON before each check, its name and the length of stderr so far, and one for each finding;
after the last check, "end". stderr has to be a file.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial

from kalman_rl.instruments.doctor import hosts, machine, reward, versions
from kalman_rl.instruments.doctor.finding import Finding, PlannedRun, explain

CHECKS: dict[str, Callable[[PlannedRun], Iterable[Finding]]] = {
    **{name: partial(versions.imported, name) for name in versions.LIBRARIES},
    "gpu build": machine.device,
    **{f"{name} hooks": partial(hosts.hooks, name) for name in hosts.HOOKS},
    "verl plugin": hosts.plugin,
    "reward": reward.dry_run,
}


def main() -> None:
    """Entry point of the process."""
    plan = PlannedRun.from_texts(json.loads(sys.argv[2]))
    with open(sys.argv[1], "a", encoding="utf-8", buffering=1) as file:
        for name, check in CHECKS.items():
            file.write(json.dumps([name, os.fstat(2).st_size]) + "\n")
            try:
                for finding in check(plan):
                    file.write(json.dumps(finding.as_dict()) + "\n")
            except BaseException as error:  # a library may raise anything, SystemExit too
                failed = Finding(name, "problem", f"the check failed: {explain(error)}")
                file.write(json.dumps(failed.as_dict()) + "\n")
        file.write(json.dumps(["end", 0]) + "\n")
    os._exit(0)  # some libraries hang or crash on their way out


if __name__ == "__main__":
    main()
