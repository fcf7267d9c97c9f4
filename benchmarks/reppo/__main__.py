"""REPPO against PPO at equal budgets: ``python -m benchmarks.reppo``; again to go on, one run at a time.

Needs the extra ``control`` and ``pip install --no-deps stable-baselines3==2.9.2``. Every finished run is a line of
``benchmarks/results/reppo/ledger.jsonl``; tables and figure are written from it alone (``--tables``).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.reppo import plan, ppo, report
from kalman_rl.reppo.training import TrainingPlan, horizon_for, settings_for, train

RESULTS = Path(__file__).parents[1] / "results" / "reppo"


def one_run(task: str, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """A line of the ledger."""
    start, told = time.perf_counter(), dict[str, Any]()
    if arm == "ppo":
        rows = ppo.train(task, steps, seed)
    else:
        told = plan.REPPO[arm]
        asked = TrainingPlan(
            task,
            steps,
            seed,
            settings_for(task, told),
            horizon=told.get("horizon", horizon_for(task)),
            evaluations=plan.EVALUATIONS,
            episodes=plan.EPISODES,
        )
        with tempfile.TemporaryDirectory() as folder:
            rows = train(asked, Path(folder), quiet=True)
    curve = [{key: row[key] for key in ("step", "return", "lowest")} for row in rows]
    outside = max((row["outside"] for row in rows if "outside" in row), default=0.0)
    return {
        "task": task,
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "changes": {name: str(value) for name, value in told.items()},
        "return": rows[-1]["return"],
        "outside": round(outside, 4),
        "seconds": round(time.perf_counter() - start, 1),
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(plan.TASKS), choices=list(plan.TASKS))
    parser.add_argument("--arms", nargs="+", default=list(plan.ARMS), choices=list(plan.ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(plan.SEEDS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--tables", action="store_true", help="only write tables and figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    ledger = args.output / "ledger.jsonl"
    done = {(row["task"], row["arm"], row["seed"]) for row in report.read(ledger)}
    end = time.monotonic() + 60 * args.minutes
    for task, seed, arm in [] if args.tables else product(args.tasks, args.seeds, args.arms):
        if (task, arm, seed) in done:
            continue
        if time.monotonic() > end:
            print("reppo: time is over; the same command goes on")
            break
        row = one_run(task, arm, seed, plan.TASKS[task].steps)
        with ledger.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{task} {arm} seed {seed}: {row['return']:.1f} in {row['seconds']:.0f} s", flush=True)
    report.write(report.read(ledger), args.output)


if __name__ == "__main__":
    main()
