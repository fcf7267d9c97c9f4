"""What the command measures, cut into tasks that can run in any order and in several processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.beliefs import allocation, weights
from benchmarks.beliefs.competitors import (
    Competitor,
    GroupMean,
    GroupStd,
    JamesStein,
    Krpo,
    LeaveOneOut,
    Oracle,
    Spo,
)
from benchmarks.beliefs.estimation import Ours, Stats, numpy_methods, run
from benchmarks.beliefs.rounds import POINTS as ROUND_POINTS
from benchmarks.beliefs.rounds import play_rounds
from benchmarks.beliefs.rules import rules
from benchmarks.beliefs.training import TUNING_SEEDS, start_reward, tuned
from benchmarks.beliefs.world import Scenario
from benchmarks.intervals import over_seeds
from kalman_rl.beliefs.beta import BetaBelief
from kalman_rl.beliefs.gaussian import GaussianBelief
from kalman_rl.beliefs.regression import RegressionBelief

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One unit of work: ``kind`` names the function, ``cell`` its settings, ``seeds`` how many worlds."""

    table: int
    kind: str
    cell: dict[str, Any]
    seeds: int


CLEAN = [{"group": 8, "noise": s, "walk": q} for s in (0.0, 0.5, 1.0, 2.0, 4.0) for q in (0.05, 0.3, 1.0)]
CLEAN += [{"group": g, "noise": s, "walk": 0.3} for g in (2, 4, 16) for s in (0.0, 1.0, 4.0)]
SLOW = {"epochs": 50, "trend": 0.05, "feature_drift": 0.03}
LONG = [{"group": 8, "noise": 4.0, "walk": 0.05, **SLOW}, {"group": 4, "noise": 4.0, "walk": 0.05, **SLOW}]
LONG += [{"group": 2, "noise": 4.0, "walk": 0.05, **SLOW}, {"group": 8, "noise": 2.0, "walk": 0.05, **SLOW}]
LONG += [{"group": 8, "noise": 1.0, "walk": 0.05, **SLOW}, {"group": 8, "noise": 0.0, "walk": 0.0, **SLOW}]
COLD = [
    {"noise": s, "share": f, "epochs": 1, "scored_from": 0} for s in (0.0, 1.0, 4.0) for f in (0.0, 0.6, 0.9)
]
WRONG = [
    {"label": "Gaussian, noise 1", "noise": 1.0},
    {"label": "0/1, jumps 15% per epoch", "jumps": 0.15},
    {"label": "noise 1, jumps 15% per epoch", "noise": 1.0, "jumps": 0.15},
    {"label": "Student-t 2.2, noise 1", "noise": 1.0, "tails": "student"},
    {"label": "5% outliers x10, noise 0.5", "noise": 0.5, "tails": "outliers"},
    {"label": "fast drift, noise 0.5", "noise": 0.5, "walk": 1.0},
    {"label": "0/1, slow drift", "walk": 0.05},
]
TRAIN = [{"group": g, "noise": s} for g, s in ((8, 0.0), (8, 1.0), (8, 4.0), (4, 4.0), (2, 1.0))]


def tasks(tables: Sequence[int], *, quick: bool, seeds: int) -> list[Task]:
    """The tasks of the wanted tables, longest first."""
    out = []
    if 4 in tables or 5 in tables:
        cells = [c for c in CLEAN if 4 in tables or (c["walk"] == 0.3 and c["noise"] in (0.0, 1.0, 4.0))]
        if quick:
            cells = [c for c in cells if (c["group"], c["noise"], c["walk"]) in QUICK]
        out += [Task(4, "clean", c, seeds) for c in cells]
    if 4 in tables:
        out += [Task(4, "long", c, seeds) for c in LONG[: 0 if quick else None]]
        out += [Task(4, "cold", c, seeds) for c in (COLD[4:5] if quick else COLD)]
        out += [Task(4, "wrong", c, seeds) for c in (WRONG[1:2] + WRONG[4:5] if quick else WRONG)]
    if 5 in tables:
        out += [Task(5, "weights", {}, 1)]
        out += [Task(5, "train", c, seeds) for c in (TRAIN[4:] if quick else TRAIN)]
    if 6 in tables:
        pools = allocation.POOLS[:1] if quick else allocation.POOLS
        out += [Task(6, "allocation", {"pool": p.name}, seeds) for p in pools]
        out += [Task(6, "rounds", {"pool": p.name}, 1 if quick else seeds) for p in pools[:1]]  # 12 s a world
        out += [Task(6, "log_det", {"prompts": 20 if quick else 200}, 1)]
    return sorted(out, key=lambda t: -_ORDER.index(t.kind))


QUICK = {(8, 0.0, 0.3), (8, 2.0, 0.3), (8, 4.0, 0.3), (2, 0.0, 0.3), (2, 4.0, 0.3)}
_ORDER = (
    "weights",
    "log_det",
    "cold",
    "allocation",
    "train",
    "wrong",
    "clean",
    "rounds",
    "long",
)


def perform(task: Task) -> Row:
    """Run one task; everything in the answer can be written as JSON."""
    began = time.perf_counter()
    answer = _KINDS[task.kind](dict(task.cell), range(task.seeds))
    done = round(time.perf_counter() - began, 1)
    return {"table": task.table, "kind": task.kind, "cell": task.cell, "seconds": done, **answer}


# ---- section 4 and gradients


def ours(c: Scenario, worlds: int, *, scalar: bool = True) -> list[Competitor]:
    """The package's beliefs: with features (also its prediction alone), without, and Beta where it applies."""
    rows: list[Competitor] = [
        Ours(
            "ours", lambda: RegressionBelief(scale=False), worlds, features=True, predictive="ours_predictive"
        )
    ]
    if scalar:
        rows.append(Ours("ours_scalar", lambda: RegressionBelief(scale=False), worlds))
        if c.noise == 0:
            beta = partial(BetaBelief, scale=False)
            rows.append(Ours("ours_beta", beta, worlds, predictive="ours_beta_predictive"))
    return rows


def _clean(cell: Row, seeds: range) -> Row:
    c = Scenario(**cell)
    gradients = c.walk == 0.3 and c.noise in (0.0, 1.0, 4.0)
    stats = run(
        c, seeds, lambda c, n: numpy_methods(c, n, kgrpo=c.walk == 0.3) + ours(c, n), gradients=gradients
    )
    return {"rows": _summary(stats), "mse": over_seeds(stats["group_mean"]["mse"])}


def _long(cell: Row, seeds: range) -> Row:
    stats = run(Scenario(**cell), seeds, lambda c, n: numpy_methods(c, n) + ours(c, n, scalar=False))
    return {"rows": _summary(stats), "mse": over_seeds(stats["group_mean"]["mse"])}


def _cold(cell: Row, seeds: range) -> Row:
    stats = run(Scenario(**cell), seeds, lambda c, n: numpy_methods(c, n, ceiling=False) + ours(c, n))
    return {"rows": _summary(stats)}


def _wrong(cell: Row, seeds: range) -> Row:
    cell.pop("label")

    def build(c: Scenario, n: int) -> list[Competitor]:
        rows = numpy_methods(c, n, ceiling=False) + ours(c, n, scalar=c.noise == 0)
        for q in (1e-5, 1e-3, 1e-1):
            fixed = {"process_noise": (q,), "scale": False}
            rows.append(Ours(f"fixed_Q{q:g}", partial(RegressionBelief, **fixed), n, features=True))
        constants = {"process_noise": 1e-5, "observation_noise": 1e-2, "scale": False}
        return [*rows, Ours("krpo_constants", lambda: GaussianBelief(**constants), n)]

    return {"rows": _summary(run(Scenario(**cell), seeds, build))}


def _summary(stats: Stats) -> dict[str, Row]:
    """Every number relative to its reference, with the interval over seeds."""
    out: dict[str, Row] = {}
    for name, own in stats.items():
        row: Row = {}
        if "mse" in own:
            row["gain"] = over_seeds(stats["group_mean"]["mse"] / own["mse"])
            row["over_const"] = over_seeds(stats["const"]["mse"] / own["mse"])
            row["over_krpo"] = over_seeds(stats["krpo"]["mse"] / own["mse"])
        if "first" in own:
            row["first"] = over_seeds(stats["group_mean"]["first"] / own["first"])
        for key in ("coverage", "cosine", "largest"):
            if key in own:
                row[key] = over_seeds(own[key])
        if "error" in own:
            row["error_ratio"] = over_seeds(stats["loo"]["error"] / own["error"])
        out[name] = row
    return out


# ---- section 5


def _weights(cell: Row, seeds: range) -> Row:
    return {"rows": weights.table()}


def _train(cell: Row, seeds: range) -> Row:
    c = Scenario(prompts=256, **cell)
    builds: dict[str, Callable[[Scenario, int], Competitor]] = {
        "krpo": lambda c, n: Krpo(),
        "grpo_std": lambda c, n: GroupStd(),
        "loo": lambda c, n: LeaveOneOut(),
        "js_loo": lambda c, n: JamesStein(),
        "spo_875": lambda c, n: Spo(c, n),
        "ours": lambda c, n: Ours("ours", lambda: RegressionBelief(scale=False), n, features=True),
        "oracle": lambda c, n: Oracle(),
        "group_mean": lambda c, n: GroupMean(),
    }
    rows = {}
    few = {"tuning": TUNING_SEEDS[:1], "rates": (1.0, 3.0), "steps": 32} if len(seeds) < 5 else {}
    for name, build in builds.items():
        final, rate = tuned(c, build, seeds, **few)
        rows[name] = {"final": over_seeds(final), "rate": rate}
    return {"rows": rows, "start": over_seeds(start_reward(c, seeds))}


# ---- section 6


def _pool(name: str) -> allocation.Pool:
    return next(p for p in allocation.POOLS if p.name == name)


def _reference(pool: allocation.Pool, seeds: range) -> tuple[np.ndarray, np.ndarray]:
    rule = rules()[0]
    fixed = allocation.play(rule, pool, seeds)["loo"]
    eight = rule.points.index(float(allocation.REFERENCE))
    return allocation.quality(fixed["cosine"][eight]), fixed["mixed"][eight]


def _allocation(cell: Row, seeds: range) -> Row:
    pool = _pool(cell["pool"])
    wanted = _reference(pool, seeds)
    rows = {}
    for rule in rules():
        for baseline, out in allocation.play(rule, pool, seeds).items():
            rows[f"{rule.name} [{baseline}]"] = _saving(out, wanted)
    return {"rows": rows, "reference": [over_seeds(x) for x in wanted]}


def _rounds(cell: Row, seeds: range) -> Row:
    """The package's RoundPlan on the package's BetaBelief, world by world."""
    pool = _pool(cell["pool"])
    wanted = _reference(pool, seeds)
    rows = {}
    for aim, budgets in ROUND_POINTS.items():
        rows[f"RoundPlan {aim} k2 [tau]"] = _saving(play_rounds(pool, seeds, aim, budgets), wanted)
    return {"rows": rows}


def _saving(out: dict[str, np.ndarray], wanted: tuple[np.ndarray, np.ndarray]) -> Row:
    gradient = allocation.savings(out["n"], allocation.quality(out["cosine"]), wanted[0])
    mixed = allocation.savings(out["n"], out["mixed"], wanted[1])
    near = int(np.abs(out["n"].mean(1) - allocation.REFERENCE).argmin())
    row = {
        "gradient": over_seeds(gradient) if _reached(gradient) else None,
        "informative": over_seeds(mixed) if _reached(mixed) else None,
        "n": over_seeds(out["n"][near]),
        "mixed": over_seeds(out["mixed"][near]),
        "cosine": over_seeds(out["cosine"][near]),
        "sweep": np.round(np.stack([out["n"], out["cosine"], out["mixed"]]).mean(2), 4).tolist(),
    }
    if "by_difficulty" in out:
        row["by_difficulty"] = np.round(np.nanmean(out["by_difficulty"][near], 0), 1).tolist()
    return row


def _reached(values: np.ndarray) -> bool:
    """A saving counts where nine worlds in ten reach the reference inside the sweep."""
    return bool(np.isfinite(values).mean() >= 0.9)


def _log_det(cell: Row, seeds: range) -> Row:
    return {"rows": allocation.log_det_table(cell["prompts"])}


_KINDS: dict[str, Callable[[Row, range], Row]] = {
    "clean": _clean,
    "long": _long,
    "cold": _cold,
    "wrong": _wrong,
    "weights": _weights,
    "train": _train,
    "allocation": _allocation,
    "rounds": _rounds,
    "log_det": _log_det,
}
