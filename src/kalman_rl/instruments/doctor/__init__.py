"""``kalman-rl doctor``: what is installed, does it fit together, does the reward work, is there room?"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from kalman_rl.errors import one_line
from kalman_rl.instruments.doctor.checks import END, MARK
from kalman_rl.instruments.doctor.finding import Finding, PlannedRun
from kalman_rl.terminal import tell

__all__ = ["Finding", "PlannedRun", "doctor", "examine"]

LIMIT = 180.0  # seconds for all checks
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def doctor(plan: PlannedRun, *, as_json: bool = False, show: Callable[[str], None] = tell) -> int:
    """Print what the checks find; the exit code is 1 if one of them is a problem, else 0."""
    findings = list(examine(plan))
    problems, warnings = (sum(f.status == kind for f in findings) for kind in ("problem", "warning"))
    if as_json:
        table = {"problems": problems, "warnings": warnings, "findings": [vars(f) for f in findings]}
        show(json.dumps(table, indent=1))
    else:
        for finding in findings:
            show(finding.text())
        show(f"problems: {problems}, warnings: {warnings}, ok: {len(findings) - problems - warnings}")
    return 1 if problems else 0


def examine(plan: PlannedRun, *, limit: float = LIMIT) -> Iterator[Finding]:
    """Findings of :mod:`kalman_rl.instruments.doctor.checks`, run in a process that may die of them.

    Args:
        plan: what the user is about to do.
        limit: seconds that the process may take.
    """
    command = [sys.executable, "-P", "-m", "kalman_rl.instruments.doctor.checks"]
    environment = QUIET | dict(os.environ) | {"PYTHONPATH": _search_path()}
    try:
        done = subprocess.run(
            command, input=pickle.dumps(plan), capture_output=True, env=environment, timeout=limit
        )
        code, answers, notes = done.returncode, done.stdout, done.stderr
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    except subprocess.TimeoutExpired as late:
        answers, notes = late.stdout or b"", late.stderr or b""
        how = f"gave no answer within {limit:.3g} s"
    yield from (Finding(**json.loads(line)) for line in answers.splitlines())
    name, _, said = notes.decode(errors="replace").rpartition(MARK)[2].partition("\n")
    if name != END:
        last = one_line(said.strip().rpartition("\n")[2], 200)
        found = f"the process {how}" + (f": {last}" if last else "")
        advice = "try it alone: python -c 'import NAME', or your reward by hand; checks after it did not run"
        yield Finding(name, "problem", found, advice)


def _search_path() -> str:
    """Where this package was found comes first, so that the process has the same version."""
    here = Path(__file__).resolve().parents[3]
    given = os.environ.get("PYTHONPATH", "")
    if here.name in ("site-packages", "dist-packages"):  # found anyway, and must not come before Python's own
        return given
    return os.pathsep.join(filter(None, (str(here), given)))
