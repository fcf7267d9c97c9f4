"""``kalman-rl doctor``: what is installed, does it fit together, does the reward work, is there room and time?"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any

from kalman_rl.errors import one_line
from kalman_rl.instruments.doctor.finding import Finding, Plan

__all__ = ["Finding", "Plan", "doctor", "examine"]

START_LIMIT = 60.0  # seconds until the probe's first word
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def doctor(plan: Plan, *, as_json: bool = False, show: Callable[[str], None] = print) -> int:
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


def examine(plan: Plan, *, patience: float = 1.0) -> Iterator[Finding]:
    """Findings, as they come. A check that kills its process or takes too long is a finding too; the rest go on.

    Args:
        plan: what the user is about to do.
        patience: factor on the time that each check may take.
    """
    skip: list[str] = []
    broken: list[str] = []
    while True:
        begun: list[str] = []
        failure = yield from _probe(plan, skip, broken, begun, patience)
        if failure is None:
            return
        if not begun:
            yield Finding("doctor", "problem", f"the checks do not start: {failure}", "reinstall kalman-rl")
            return
        yield Finding(
            begun[-1], "problem", failure, "try it alone: python -c 'import NAME', or your reward by hand"
        )
        skip += begun
        broken.append(begun[-1])


def _probe(
    plan: Plan, skip: list[str], broken: list[str], begun: list[str], patience: float
) -> Generator[Finding, None, str | None]:
    """Findings of one process; returns why it ended early, or None. ``begun`` collects the checks it began."""
    texts = {name: getattr(plan, name) for name in ("task", "data", "reward", "run", "config")}
    words = [json.dumps(item, default=str) for item in (texts, skip, broken)]
    environment = QUIET | dict(os.environ) | {"PYTHONPATH": _search_path()}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-u", "-P", "-m", "kalman_rl.instruments.doctor.probe", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        assert process.stdout is not None
        lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True).start()
        limit, mark = START_LIMIT, 0
        try:
            while True:
                line = lines.get(timeout=limit)
                if line is None:
                    return _how_it_ended(process, errors, mark)
                message: dict[str, Any] = json.loads(line)
                if "end" in message:
                    return None
                if "begin" in message:
                    begun.append(message["begin"])
                    mark = os.fstat(errors.fileno()).st_size
                    broken[:] = message["broken"]
                    limit = patience * message["limit"]
                else:
                    yield Finding(**message)
        except queue.Empty:
            return f"no answer within {limit:.3g} s"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _pass_on(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _how_it_ended(process: subprocess.Popen[bytes], errors: IO[bytes], mark: int) -> str:
    """Signal or exit code, and the last line that was written to stderr since byte ``mark``."""
    code = process.wait()
    errors.seek(mark)
    last = one_line(errors.read()[-2000:].decode(errors="replace").strip().rpartition("\n")[2], 200)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"the process {how}" + (f": {last}" if last else "")


def _search_path() -> str:
    """Where this package was found comes first, so that the probe is of the same version."""
    here = Path(__file__).resolve().parents[3]
    given = os.environ.get("PYTHONPATH")
    if here.name in ("site-packages", "dist-packages"):  # found anyway, and must not come before Python's own
        return given or ""
    return os.pathsep.join(filter(None, (str(here), given)))
