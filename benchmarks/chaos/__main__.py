"""Run the campaign and write the table::

python -m benchmarks.chaos                       # every kind, at most 15 minutes on two cores
python -m benchmarks.chaos --quick               # a small share of each, under a minute
python -m benchmarks.chaos kills fuzz --seed 7   # some kinds, other choices
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.chaos.trial import Outcome, one

KINDS = ("kills", "memory", "fuzz", "corruption", "rewards", "received", "disk", "silence", "ranks")
"""The longest ones first, as the others fill up what time is left."""
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
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="kinds at a time")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    size = QUICK if options.quick else options.size
    print(f"seed {seed}, size {size:g}", flush=True)
    kinds, outcomes = options.kinds or KINDS, []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(one, kind, seed, size) for kind in kinds]):
            outcomes.append(outcome := done.result())
            print(outcome.line(), *(f"  lost: {loss}" for loss in outcome.lost[:20]), sep="\n", flush=True)
    if options.output is not None:
        words = shlex.join([*options.kinds, f"--seed={seed}", f"--size={size:g}"])
        options.output.write_text(page(outcomes, words), encoding="utf-8")
    return 1 if any(outcome.lost for outcome in outcomes) else 0


def page(outcomes: list[Outcome], words: str) -> str:
    """The table with command, date and load; what else was found stands in a file that no run writes."""
    today = datetime.now(UTC).date()
    text = f"# Faults on purpose\n\n`python -m benchmarks.chaos {words}`, {today}, "
    text += f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.0f}.\n\n{HEAD}"
    text += "".join(outcome.line() + "\n" for outcome in outcomes)
    text += (
        "\nWhat earlier campaigns found, and figures beside this table: [chaos_notes.md](chaos_notes.md).\n"
    )
    losses = [loss for outcome in outcomes for loss in outcome.lost]
    return text + ("\nLost:\n\n" + "".join(f"- {loss}\n" for loss in losses) if losses else "")


if __name__ == "__main__":
    sys.exit(main())
