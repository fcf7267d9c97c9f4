"""Ten thousand completions of which one in twenty hangs, raises, has no number or ends its process; and what calling a
reward in another process costs when nothing is wrong.

python -m benchmarks.chaos.rewards [--completions 10000] [--seconds 1.0] [--seed 0]
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import cloudpickle

from benchmarks.chaos.trial import Outcome as Trials
from benchmarks.chaos.trial import Plan
from kalman_rl.hosts.rewards import SupervisedReward
from kalman_rl.hosts.rewards.pool import Outcome
from kalman_rl.hosts.rewards.worker import given

BATCH = 256
FAULTS = ("sleep", "spin", "raise", "nan", "exit", "kill")
SHARES = (0.00625, 0.00625, 0.0125, 0.0125, 0.00625, 0.00625)
"""Hangs, errors, missing numbers and deaths in equal parts, 5 % in all."""


def hostile(completions: list[str], **columns: Any) -> list[float]:
    """What each completion asks for; the others earn their length."""
    return [_scored(text.partition(" ")[0], text) for text in completions]


def _scored(act: str, text: str) -> float:
    while act == "spin":
        pass
    if act == "sleep":
        time.sleep(3600)
    if act == "raise":
        raise ValueError(text)
    if act == "exit":
        os._exit(3)
    if act == "kill":
        os.kill(os.getpid(), 9)
    return float("nan") if act == "nan" else float(len(text))


def millisecond(completions: list[str], **columns: Any) -> list[float]:
    """A millisecond of work for each completion."""
    for _ in completions:
        end = time.perf_counter() + 1e-3
        while time.perf_counter() < end:
            pass
    return [1.0] * len(completions)


def supervise(function: Callable[..., Any], seconds: float = 60.0) -> SupervisedReward:
    """The function in watched processes, silent."""
    make = cloudpickle.dumps(functools.partial(given, function))  # by value: it may be of the script itself
    return SupervisedReward(make, seconds=seconds, say=lambda text: None)


def campaign(completions: int = 10_000, seconds: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Score completions in batches, of which one in twenty is hostile.

    Returns: how many of each kind there were; ``wrong``, completions whose outcome is not what their kind asks for
        (0 is right); ``longest``, seconds of the longest call; ``wall``, seconds of it all.
    """
    draw, reward = random.Random(seed), supervise(hostile, seconds)
    outcomes: list[Outcome] = []
    run = reward._pool.run
    reward._pool.run = lambda jobs: outcomes.extend(found := run(jobs)) or found  # type: ignore[method-assign]
    kinds, wrong, start = Counter[str](), 0, time.monotonic()
    for first in range(0, completions, BATCH):
        count = min(BATCH, completions - first)
        acts = draw.choices([*FAULTS, "fine"], [*SHARES, 1 - sum(SHARES)], k=count)
        texts = [f"{act} {first + i}" for i, act in enumerate(acts)]
        right = [float(len(text)) if act == "fine" else None for act, text in zip(acts, texts)]
        found = reward(texts)
        wrong += sum(a != b for a, b in zip(found, right, strict=True))
        kinds.update(acts)
    reward.close()
    return {
        "kinds": dict(kinds),
        "wrong": wrong,
        "reasons": dict(reward.reasons),
        "longest": max(outcome.seconds for outcome in outcomes),
        "wall": time.monotonic() - start,
    }


def overhead(rounds: int = 15) -> float:
    """Seconds that calling 256 completions of a millisecond in a watched process adds to what the function takes,
    as the worker measures it; the median over calls, so that a busy machine counts little."""
    reward, texts = supervise(millisecond), ["a completion of some length"] * BATCH
    more = {"prompts": ["a prompt"] * BATCH, "completion_ids": [list(range(64))] * BATCH}
    added = []
    for _ in range(rounds):
        start, inside = time.perf_counter(), reward.seconds
        reward(completions=texts, **more)
        added.append(time.perf_counter() - start - (reward.seconds - inside))
    reward.close()
    return statistics.median(added)


def run(plan: Plan) -> Trials:
    """A part of ``python -m benchmarks.chaos``: as many completions as the plan says, each a trial."""
    outcome = Trials("hostile rewards")
    asked, seconds = plan.count(10_000), 1.0
    found = campaign(asked, seconds, plan.seed)
    outcome.tried, outcome.seen = asked, Counter(found["kinds"])
    outcome.seen[f"s the longest call at a limit of {seconds:g}"] = round(found["longest"], 1)
    outcome.lost += ["a completion without the outcome of its kind"] * found["wrong"]
    if found["longest"] > seconds + 1:
        outcome.lost.append(f"a call took {found['longest']:.2f} s at a limit of {seconds:g} s")
    return outcome


def main() -> int:
    """Run both; the exit code is 1 where an outcome is wrong or a hang took longer than a second beyond its limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--completions", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    added = overhead()
    print(f"{BATCH} completions of 1 ms: a watched process adds {added * 1e3:.1f} ms ({added / BATCH / 1e-3:.1%})",
          flush=True)  # fmt: skip
    found = campaign(asked.completions, asked.seconds, asked.seed)
    hostile = {kind: count for kind, count in found["kinds"].items() if kind != "fine"}
    print(f"{asked.completions} completions, {sum(hostile.values())} hostile ({hostile}), seed {asked.seed}: "
          f"{found['wrong']} wrong outcomes, longest call {found['longest']:.2f} s at a limit of {asked.seconds:g} s, "
          f"{found['wall']:.0f} s in all")  # fmt: skip
    return int(found["wrong"] > 0 or found["longest"] > asked.seconds + 1)


if __name__ == "__main__":
    sys.exit(main())
