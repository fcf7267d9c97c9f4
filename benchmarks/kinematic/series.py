"""Series that ship with statsmodels and arch, walked forward: trained on what came before, decided day by day.

The payoff of a decision is the next change of the (log) series in units of its deviation in the training part; each
change of the position costs COST. Each series has a null beside it: its own changes, centred and in random order,
through the same pipeline, so that nothing can be predicted there. No hyper-parameter was tuned on any of them.
"""

from __future__ import annotations

import importlib
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks.intervals import over_seeds
from benchmarks.kinematic import network
from benchmarks.kinematic.controls import WINDOW, controls
from kalman_rl.kinematic import KinematicTokenizer

COST = 0.05
FOLDS = 2
LONGEST = 1500
SHIPPED = {  # package, module, column, whether the logarithm is taken
    "sp500": ("arch.data.sp500", "Adj Close", True),
    "nasdaq": ("arch.data.nasdaq", "Adj Close", True),
    "wti": ("arch.data.wti", "DCOILWTICO", True),
    "co2": ("statsmodels.datasets.co2", "co2", False),
    "sunspots": ("statsmodels.datasets.sunspots", "SUNACTIVITY", False),
    "realgdp": ("statsmodels.datasets.macrodata", "realgdp", True),
    "elnino": ("statsmodels.datasets.elnino", "", False),
}


def loaded(name: str) -> np.ndarray | None:
    """The series without its gaps, its last LONGEST values; None where the package is not installed."""
    module, column, logarithm = SHIPPED[name]
    try:
        package = importlib.import_module(module)
    except ModuleNotFoundError:
        return None
    frame = package.load() if module.startswith("arch") else package.load_pandas().data
    values = frame[column].to_numpy(float) if column else frame.iloc[:, 1:].to_numpy(float).ravel()
    values = values[np.isfinite(values)][-LONGEST:]
    return np.log(values) if logarithm else values


def null_of(values: np.ndarray, seed: int) -> np.ndarray:
    """A random walk of the same changes: centred, in random order."""
    change = np.diff(values)
    change = np.random.default_rng(seed).permutation(change - change.mean())
    return np.concatenate((values[:1], values[0] + np.cumsum(change)))


def windows(values: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Every window but the last one, minus its last value, and the change after it."""
    every = torch.tensor(values).unfold(0, WINDOW, 1)[:-1]
    return every - every[:, -1:], torch.tensor(np.diff(values)[WINDOW - 1 :])


def walked(
    values: np.ndarray, seeds: list[int], rates: dict[str, list[float]], *, steps: int
) -> dict[str, Any]:
    """Net payoffs per step of the test parts, (seeds, steps) per control; ``hold`` is always long."""
    shown, change = windows(values)
    begin = len(change) // 2
    edges = np.linspace(begin, len(change), FOLDS + 1).astype(int)
    decided: dict[str, list[torch.Tensor]] = {}
    moves, ratios = [], []
    for first, last in pairwise(edges):
        size = float(change[:first].std())
        known = torch.tensor(values[: first + WINDOW - 1])[None]  # nothing after the first decision
        ratio = float(KinematicTokenizer(normalise=False).fit(known / size).noise_ratio or 0)
        ratios.append(ratio)
        table = controls(ratio)
        tried = [control for _ in seeds for control in table.values()]
        data = (shown / size).float()
        move = (change / size).float()
        train = data[:first].expand(len(tried), -1, -1)
        gains = network.utility(move[:first], COST).expand(len(tried), -1, -1)
        order = torch.randperm(
            int(first), generator=torch.Generator().manual_seed(0)
        )  # held out: a random quarter
        found = network.trained(
            tried,
            train[:, order],
            gains[:, order],
            [seed for seed in seeds for _ in table],
            [rates[letter][0] for _ in seeds for letter in table],
            steps=steps,
        )
        decision = network.decisions(found, data[first:last].expand(len(tried), -1, -1))[0]
        for k, letter in enumerate(table):
            decided.setdefault(letter, []).append(decision[k :: len(table)])
        moves.append(move[first:last])
    move = torch.cat(moves)
    out: dict[str, Any] = {"log10_ratio": float(np.mean(np.log10(ratios))), "steps": len(move)}
    chosen = {letter: torch.cat(parts, 1) for letter, parts in decided.items()}
    chosen["hold"] = torch.ones_like(chosen["b"])
    for letter, position in chosen.items():
        turned = torch.nn.functional.pad(position, (1, 0)).diff(dim=1).abs()
        net = position * move - COST * turned
        out[letter] = {"net": net.double().numpy(), "acts": float((position != 0).double().mean())}
    return out


BLOCKS = 10


def summary(walk: dict[str, Any]) -> dict[str, Any]:
    """Per control: net payoff per step and what it is above ``hold``, both with the interval of BLOCKS stretches of
    time, seeds averaged; the spread between seeds; the share of acting."""
    out = {}
    hold = walk["hold"]["net"].mean(0)
    for letter in ("hold", "a", "b", "c", "d", "e", "f", "g"):
        net = walk[letter]["net"]
        blocks = [part.mean() for part in np.array_split(net.mean(0), BLOCKS)]
        above = [part.mean() for part in np.array_split(net.mean(0) - hold, BLOCKS)]
        out[letter] = {
            "net": over_seeds(np.array(blocks)),
            "above_hold": over_seeds(np.array(above)),
            "seeds": over_seeds(net.mean(1)),
            "acts": walk[letter]["acts"],
        }
    return out


def cell(name: str, seeds: list[int], rates: dict[str, list[float]], *, steps: int) -> dict[str, Any] | None:
    """A shipped series and its null; None where it is not installed."""
    values = loaded(name)
    if values is None:
        return None
    real, null = (walked(each, seeds, rates, steps=steps) for each in (values, null_of(values, seeds[0])))
    pack = {"name": name, "length": len(values)}
    for title, walk in (("real", real), ("null", null)):
        pack[title] = {"log10_ratio": walk["log10_ratio"], "steps": walk["steps"], "table": summary(walk)}
    return pack
