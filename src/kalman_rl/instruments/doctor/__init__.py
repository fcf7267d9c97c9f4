"""``kalman-rl doctor``: what is installed, does it fit together, does the reward work, is there room?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from kalman_rl.errors import one_line
from kalman_rl.instruments.doctor import machine, reward, versions
from kalman_rl.instruments.doctor.finding import Finding, PlannedRun

__all__ = ["Finding", "PlannedRun", "doctor", "examine"]

LIMIT = 180.0  # seconds for all imports and the reward
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def doctor(plan: PlannedRun, *, as_json: bool = False, show: Callable[[str], None] = print) -> int:
    """Print what the checks find; the exit code is 1 if one of them is a problem, else 0."""
    findings = []
    for finding in examine(plan):
        findings.append(finding)
        if not as_json:
            show(finding.text())
    problems, warnings = (sum(f.status == kind for f in findings) for kind in ("problem", "warning"))
    if as_json:
        table = {"problems": problems, "warnings": warnings, "findings": [f.as_dict() for f in findings]}
        show(json.dumps(table, indent=1))
    else:
        show(f"problems: {problems}, warnings: {warnings}, ok: {len(findings) - problems - warnings}")
    return 1 if problems else 0


def examine(plan: PlannedRun, *, limit: float = LIMIT) -> Iterator[Finding]:
    """Findings: of what is declared here, then of what has to be imported or run, in a process that may die of it.

    Args:
        plan: what the user is about to do.
        limit: seconds that the process may take.
    """
    yield from versions.python()
    for name in versions.LIBRARIES:
        yield versions.library(name)
    yield from reward.settings(plan)
    yield machine.disk(plan)
    yield from _trial(plan, limit)


def _trial(plan: PlannedRun, limit: float) -> Iterator[Finding]:
    """Findings of :mod:`kalman_rl.instruments.doctor.trial`, and how it ended if it did not come to its end."""
    with tempfile.TemporaryDirectory() as folder:
        findings, output = Path(folder, "findings"), Path(folder, "output")
        findings.touch()
        command = [sys.executable, "-P", "-m", "kalman_rl.instruments.doctor.trial", str(findings)]
        environment = QUIET | dict(os.environ) | {"PYTHONPATH": _search_path()}
        how = f"gave no answer within {limit:.3g} s"
        with output.open("wb") as file:
            try:
                code = subprocess.run(
                    [*command, json.dumps(plan.texts())],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=environment,
                    timeout=limit,
                ).returncode
                how = (
                    f"was killed by {signal.Signals(-code).name}"
                    if code < 0
                    else f"ended with exit code {code}"
                )
            except subprocess.TimeoutExpired:
                pass
        at, mark = "start", 0
        for line in findings.read_text(encoding="utf-8").splitlines():
            message = json.loads(line)
            if isinstance(message, dict):
                yield Finding(**message)
            else:
                at, mark = message
        if at != "end":
            last = one_line(
                output.read_bytes()[mark:][-2000:].decode(errors="replace").strip().rpartition("\n")[2], 200
            )
            found = f"the process {how}" + (f": {last}" if last else "")
            advice = (
                "try it alone: python -c 'import NAME', or your reward by hand; checks after it did not run"
            )
            yield Finding(at, "problem", found, advice)


def _search_path() -> str:
    """Where this package was found comes first, so that the process has the same version."""
    here = Path(__file__).resolve().parents[3]
    given = os.environ.get("PYTHONPATH")
    if here.name in ("site-packages", "dist-packages"):  # found anyway, and must not come before Python's own
        return given or ""
    return os.pathsep.join(filter(None, (str(here), given)))
