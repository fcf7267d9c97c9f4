"""Does a command reach for the network? It runs with every lookup and connection refused and written down.

python -m benchmarks.chaos.silence
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.chaos.trial import Outcome, Plan

SWITCHES = (
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"),
    *("DISABLE_TELEMETRY", "DO_NOT_TRACK", "WANDB_MODE", "CI"),
)
"""Environment variables that keep a library from the network; none of them may be needed."""
# Python imports it at its start, in the command and in every Python process that it starts.
REFUSING = """
import os, socket, sys, traceback

def refuse(event, arguments):
    if event not in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        return
    if arguments and isinstance(arguments[0], socket.socket) and arguments[0].family == socket.AF_UNIX:
        return
    where = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-1]]
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(f"{event} {arguments!r} at {' '.join(where[-8:])}\\n")
    raise PermissionError(f"no network here: {event}")

sys.addaudithook(refuse)
"""
KALMAN_RL = (sys.executable, "-m", "kalman_rl.cli.main")
COMMANDS = (
    ("train", "--task", "sort12", "--model", "tiny", "--steps", "2", "--run", "train", "--lora-rank", "2"),
    ("stress", "--conditions", "A", "--methods", "grpo", "--steps", "2", "--rollouts", "16", "--minibatch", "8",
     "--run", "stress"),
)  # fmt: skip
LONG = (("demo", "--run", "demo"),)
"""Minutes; only ``python -m benchmarks.chaos.silence`` runs it."""


def attempts(command: Sequence[str], folder: Path) -> list[str]:
    """Lookups and connections that a command and its processes try, with the frames that try.

    Args: command: program and arguments; of ``kalman-rl`` ``[*KALMAN_RL, verb, ...]``. folder: working directory.
    Raises: RuntimeError where the command fails.
    """
    with tempfile.TemporaryDirectory() as hooks:
        (Path(hooks) / "sitecustomize.py").write_text(REFUSING)
        record = Path(hooks) / "attempts"
        environment = {name: value for name, value in os.environ.items() if name not in SWITCHES}
        environment |= {"ATTEMPTS": str(record), "HF_HOME": str(Path(hooks) / "hub")}
        environment["PYTHONPATH"] = os.pathsep.join([hooks, *filter(None, sys.path)])
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
        return record.read_text().splitlines() if record.exists() else []


def run(plan: Plan) -> Outcome:
    """A part of ``python -m benchmarks.chaos``: each command is a trial."""
    outcome = Outcome("sockets forbidden")
    for command in COMMANDS[: plan.count(len(COMMANDS))]:
        with outcome.trial(command[0]):
            if found := attempts([*KALMAN_RL, *command], plan.folder):
                raise AssertionError(f"{len(found)} attempts to reach a machine: {found[0]}")
    return outcome


def main() -> int:
    """Try every command; the exit code is 1 if one of them tries to reach a machine."""
    tried = 0
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS + LONG:
            found = attempts([*KALMAN_RL, *command], Path(folder))
            tried += len(found)
            print(f"{command[0]}: {len(found)} attempts to reach a machine", *found, sep="\n  ", flush=True)
    return 1 if tried else 0


if __name__ == "__main__":
    sys.exit(main())
