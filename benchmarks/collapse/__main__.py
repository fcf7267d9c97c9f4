"""Does the collapse warning help: false alarms on runs that hold, lead time on runs that fail, against simple rules.

    python -m benchmarks.collapse.runs && python -m benchmarks.collapse   # the last writes alarm.json, .md, .png

Decided before looking at any alarm of the reported runs:

* Accuracy is the share of exact replies among the samples of a generation batch (256, fresh questions).
* A run has collapsed at the first batch from which on accuracy stays below half of its best so far, for at least
  32 steps and two batches. A run that was meant to fail and did not is in neither group.
* An alarm warns of a collapse if it comes at most 64 steps before it, or at the collapse itself. Later it is late;
  earlier is too early to count. Lead is the collapse minus the first alarm that warns.
* Every detector has a small grid of settings. On the runs of seeds 0 and 1 the one that warned of most collapses is
  chosen among those with at most 1 false alarm per 1000 steps (then fewest false and too early alarms, then the
  longest lead). The runs of the other seeds are what is reported.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.collapse.k_of_n import Judge, Rule
from benchmarks.collapse.metrics import WATCHED
from benchmarks.collapse.recorded import LASTS, Event, Recorded, load
from benchmarks.collapse.report import picture, report
from benchmarks.collapse.runs import ROOT
from benchmarks.collapse.surprise import Surprise, Watch, WatchOptions
from kalman_rl.engine.collapse import Fall

RESULTS = Path(__file__).parents[1] / "results" / "collapse"
HORIZON, MAX_FALSE, REST = 64, 1.0, 16


# ---------------------------------------------------------------- detectors


def filtered(run: Recorded, options: WatchOptions, rule: Rule) -> list[Event]:
    """The surprise rule: our filter, k of n beyond the band."""
    if options not in run.surprises:
        watch = Watch(run.period, options=options)
        run.surprises[options] = [(row["step"], watch.see(row["step"], row)) for row in run.rows]
    judge = Judge(rule)
    return [(a.step, a.metric) for step, seen in run.surprises[options] for a in judge.judge(step, seen)]


def moving_z(run: Recorded, window: int, band: float, k: int, n: int) -> list[Event]:
    """(value - mean) / deviation over the last ``window`` values of the metric; k of n beyond the band."""
    if window not in run.surprises:
        run.surprises[window] = list(_against_the_window(run, window))
    judge = Judge(Rule(band=band, k=k, n=n, rest=REST))
    return [(a.step, a.metric) for step, seen in run.surprises[window] for a in judge.judge(step, seen)]


def _against_the_window(run: Recorded, window: int) -> Iterator[tuple[int, list[Surprise]]]:
    past: dict[str, list[float]] = {metric.name: [] for metric in WATCHED}
    for row in run.rows:
        seen = []
        for metric in WATCHED:
            value = metric.read(row)
            if value is None:
                continue
            old = np.array(past[metric.name][-window:])
            if len(old) == window:
                spread = max(float(old.std()), metric.least, 1e-12)
                seen.append(Surprise(metric, value, float(old.mean()), (value - float(old.mean())) / spread))
            past[metric.name].append(value)
        yield row["step"], seen


def fixed(run: Recorded, limits: dict[tuple[str, int], float], factor: float) -> list[Event]:
    """The value beyond the most extreme one of the held runs of seeds 0 and 1, by ``factor`` transformed
    deviations."""
    events, rest = [], dict.fromkeys((metric.name for metric in WATCHED), 0)
    for row in run.rows:
        for metric in WATCHED:
            value = metric.read(row)
            if value is None:
                continue
            rest[metric.name] -= 1
            outside = any(
                side * value > side * limits[metric.name, side] + factor
                for side in metric.harmful
                if (metric.name, side) in limits
            )
            if outside and rest[metric.name] < 0:
                events.append((row["step"], metric.name))
                rest[metric.name] = REST
    return events


def extremes(runs: list[Recorded]) -> dict[tuple[str, int], float]:
    """The most extreme transformed value of every metric and harmful side over runs, after their first batch."""
    limits: dict[tuple[str, int], float] = {}
    for run in runs:
        for row in run.rows[run.period :]:
            for metric in WATCHED:
                value = metric.read(row)
                for side in metric.harmful if value is not None else ():
                    assert value is not None
                    old = limits.get((metric.name, side), -math.inf * side)
                    limits[metric.name, side] = max(old, value) if side > 0 else min(old, value)
    return limits


def fallen(run: Recorded) -> list[Event]:
    """The reward's filtered level below half of its best."""
    fall = Fall()
    return [(row["step"], "reward") for row in run.rows if fall.see(row["step"], row)]


Detector = Callable[[Recorded], list[Event]]


def candidates(chosen_on: list[Recorded]) -> dict[str, list[tuple[dict[str, Any], Detector]]]:
    """Every detector's grid of settings."""
    counts = [(2, 3), (3, 4), (3, 6), (4, 6), (4, 8), (5, 8), (6, 8), (6, 12), (8, 12)]

    def ours() -> Iterator[tuple[dict[str, Any], Detector]]:
        filters = product((1e-3, 1e-2), (12, 24))
        for (stiffest, warm_up), band, (k, n) in product(filters, (1.5, 2.0, 2.5, 3.0, 4.0), counts):
            options, rule = WatchOptions(stiffest, warm_up=warm_up), Rule(band, k, n, REST)
            given = {"stiffest": stiffest, "warm_up": warm_up, "band": band, "k": k, "n": n}
            yield given, lambda run, options=options, rule=rule: filtered(run, options, rule)

    def moving() -> Iterator[tuple[dict[str, Any], Detector]]:
        for window, band, (k, n) in product((16, 32, 64), (2.0, 3.0, 4.0, 6.0), [(1, 1), (2, 3), (3, 6)]):
            given = {"window": window, "band": band, "k": k, "n": n}
            yield given, lambda run, g=given: moving_z(run, **g)

    limits = extremes([run for run in chosen_on if run.group == "held"])
    still = [({"factor": f}, lambda run, f=f: fixed(run, limits, f)) for f in (0.0, 0.1, 0.25, 0.5, 1.0)]
    return {
        "filter": list(ours()),
        "fallen reward": [({}, fallen)],
        "moving z-score": list(moving()),
        "fixed thresholds": still,
    }


# ---------------------------------------------------------------- scores


def score(runs: list[Recorded], detect: Detector) -> dict[str, Any]:
    """False alarms on held runs, warnings, lead and false alarms on collapsed ones."""
    found = {run.name: sorted(detect(run)) for run in runs}
    held = [run for run in runs if run.group == "held"]
    failed = [run for run in runs if run.group == "collapsed"]
    false, steps = sum(len(found[run.name]) for run in held), sum(run.steps for run in held)
    leads, late, early, by_run, by_metric = [], [], 0, {}, {}
    for run in failed:
        assert run.collapse is not None
        warned = [e for e in found[run.name] if run.collapse - HORIZON <= e[0] <= run.collapse]
        after = [step for step, _ in found[run.name] if step > run.collapse]
        early += sum(step < run.collapse - HORIZON for step, _ in found[run.name])
        by_run[run.name] = {
            "collapse": run.collapse,
            "first": warned[0][0] if warned else None,
            "metric": warned[0][1] if warned else None,
            "late": after[0] if after and not warned else None,
        }
        if warned:
            leads.append(run.collapse - warned[0][0])
            by_metric[warned[0][1]] = by_metric.get(warned[0][1], 0) + 1
        elif after:
            late.append(after[0] - run.collapse)
    for run in held:
        for _, metric in found[run.name]:
            by_metric[f"false: {metric}"] = by_metric.get(f"false: {metric}", 0) + 1
    low = stats.chi2.ppf(0.025, 2 * false) / 2 if false else 0.0
    high = stats.chi2.ppf(0.975, 2 * false + 2) / 2
    thousand = 1000 / max(steps, 1)
    return {
        "held_runs": len(held),
        "held_steps": steps,
        "false_alarms": false,
        "per_1000": false * thousand,
        "per_1000_low": low * thousand,
        "per_1000_high": high * thousand,
        "held_runs_with_alarm": sum(bool(found[run.name]) for run in held),
        "collapsed_runs": len(failed),
        "warned": len(leads),
        "leads": leads,
        "median_lead": median(leads) if leads else None,
        "late": late,
        "too_early": early,
        "by_metric": by_metric,
        "by_run": by_run,
    }


def choose(runs: list[Recorded]) -> dict[str, tuple[dict[str, Any], Detector, dict[str, Any]]]:
    """The best setting of every detector on these runs, by the rule in the module's docstring."""
    best = {}
    for name, grid in candidates(runs).items():
        scored = [(given, detect, score(runs, detect)) for given, detect in grid]

        def rank(entry: tuple[dict[str, Any], Detector, dict[str, Any]]) -> tuple[float, ...]:
            result = entry[2]
            allowed = result["per_1000"] <= MAX_FALSE
            # where nothing is quiet enough, the quietest
            return (
                allowed,
                result["warned"] if allowed else 0,
                -result["false_alarms"] - result["too_early"],
                result["median_lead"] or 0,
            )

        best[name] = max(scored, key=rank)
    return best


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT)
    runs = load(parser.parse_args().root)
    first, rest = [run for run in runs if run.seed < 2], [run for run in runs if run.seed >= 2]
    if not first or not rest:
        print("no runs yet: python -m benchmarks.collapse.runs")
        return 1
    results = {
        name: {"settings": given, "chosen_on": chosen, "reported": score(rest, detect)}
        for name, (given, detect, chosen) in choose(first).items()
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    groups = {
        run.name: {"group": run.group, "collapse": run.collapse, "accuracy": run.accuracy} for run in runs
    }
    whole = {
        "lasts": LASTS,
        "horizon": HORIZON,
        "most_false": MAX_FALSE,
        "runs": groups,
        "detectors": results,
    }
    (RESULTS / "alarm.json").write_text(json.dumps(whole, indent=1) + "\n")
    text = report(runs, results, __doc__ or "")
    (RESULTS / "alarm.md").write_text(text)
    picture(rest, results, RESULTS / "alarm.png")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
