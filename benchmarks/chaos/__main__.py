"""Run the campaign and write the table::

python -m benchmarks.chaos                       # every kind, at most 15 minutes on two cores
python -m benchmarks.chaos --quick               # a small share of each, under a minute
python -m benchmarks.chaos kills fuzz --seed 7   # some kinds, other choices
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import random
import shlex
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.chaos.trial import Outcome, Plan

KINDS = ("kills", "corruption", "rewards", "received", "disk", "silence", "fuzz", "ranks", "memory")
RESULTS = Path(__file__).parents[1] / "results"
QUICK = 0.02
HEAD = "| kind | tried | survived | lost | seconds | seen |\n|---|---:|---:|---:|---:|---|\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, help="of every choice; default: one drawn and printed")
    parser.add_argument("--size", type=float, default=1.0, help="share of a whole campaign, in (0, 1]")
    parser.add_argument("--quick", action="store_true", help=f"--size {QUICK}")
    parser.add_argument("--output", type=Path, help="file for the table; default: only printed")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    size = QUICK if options.quick else options.size
    print(f"seed {seed}, size {size:g}", flush=True)
    outcomes = []
    for kind in options.kinds or KINDS:
        outcomes.append(outcome := one(kind, seed, size))
        print(outcome.line(), *(f"  lost: {loss}" for loss in outcome.lost[:20]), sep="\n", flush=True)
    if options.output is not None:
        words = shlex.join([arg for arg in sys.argv[1:] if not arg.startswith("--output")])
        options.output.write_text(page(outcomes, words, seed), encoding="utf-8")
    return 1 if any(outcome.lost for outcome in outcomes) else 0


def one(kind: str, seed: int, size: float) -> Outcome:
    """Run one kind in a folder of its own."""
    logging.getLogger("kalman_rl").setLevel(logging.ERROR)  # what was skipped is what was damaged
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        start = time.monotonic()
        outcome: Outcome = importlib.import_module(f"benchmarks.chaos.{kind}").run(
            Plan(Path(folder), seed, size)
        )
        outcome.seconds = time.monotonic() - start
    return outcome


def page(outcomes: list[Outcome], words: str, seed: int) -> str:
    """The table with command, seed, date and load."""
    today = datetime.now(UTC).date()
    text = f"# Faults on purpose\n\n`python -m benchmarks.chaos {words}`, seed {seed}, {today}, "
    text += f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.0f}.\n\n{HEAD}"
    text += "".join(outcome.line() + "\n" for outcome in outcomes)
    losses = [loss for outcome in outcomes for loss in outcome.lost]
    return text + ("\nLost:\n\n" + "".join(f"- {loss}\n" for loss in losses) if losses else "")


if __name__ == "__main__":
    sys.exit(main())
