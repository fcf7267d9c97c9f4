"""A decision with abstention whose Bayes rule is computable.

A path moves as an integrated Wiener process whose slope begins as N(0, SLOPE^2); a window of it is seen through noise
of variance 1. Decide short, none or long for the next HORIZON steps at a cost; a loss counts twice. Given the window,
the move is Gaussian with a mean and variance of linear algebra, and the best decision follows from them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.intervals import over_seeds
from benchmarks.kinematic import network
from benchmarks.kinematic.controls import SIZE, TOKENS, WINDOW, Control, controls, made

INTENSITY, SLOPE, HORIZON = 0.003, 0.15, 4
COST = 0.6
SIZES = (64, 512, 4096)
TEST = 3000
CELLS = [(size, False) for size in SIZES] + [(512, True)]
TUNED_ON = (512, [1, 2])  # size and seeds, none of them a test seed
COLLAPSED = 0.01


class Windows(NamedTuple):
    """``value`` (N, WINDOW) minus the last one, ``time`` (N, WINDOW), the future ``move`` (N,) and its posterior given
    the window, ``mean`` and ``deviation`` (N,)."""

    value: Tensor
    time: Tensor
    move: Tensor
    mean: Tensor
    deviation: Tensor


def drawn(count: int, seed: int, *, irregular: bool) -> Windows:
    """Windows with times 0, 1, 2, ... or, irregular, with steps of 0.1 to 4 that average 1."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.ones(count, WINDOW - 1, dtype=torch.float64)
    if irregular:
        step = 0.1 + torch.empty_like(step).exponential_(1 / 0.9, generator=generator).clamp(max=3.9)
    time = torch.nn.functional.pad(step.cumsum(1), (1, 0))
    every = torch.cat((time, time[:, -1:] + HORIZON), 1)
    first = torch.minimum(every[:, :, None], every[:, None, :])
    apart = (every[:, :, None] - every[:, None, :]).abs()
    path = (
        INTENSITY * (first**3 / 3 + apart * first**2 / 2) + SLOPE**2 * every[:, :, None] * every[:, None, :]
    )
    to_last = torch.eye(WINDOW + 1, dtype=torch.float64)
    to_last[:, WINDOW - 1] -= 1.0  # values relative to the last one; the position itself is unknown
    noise = torch.eye(WINDOW + 1, dtype=torch.float64)
    noise[-1, -1] = 0.0  # the move is of the path, not of an observation
    seen = to_last[: WINDOW - 1] @ (path + noise) @ to_last[: WINDOW - 1].T
    shared = (to_last[: WINDOW - 1] @ path @ to_last[-1])[..., None]
    total = to_last[-1] @ path @ to_last[-1]
    white = torch.randn(count, WINDOW + 1, dtype=torch.float64, generator=generator)
    jitter = 1e-12 * torch.eye(WINDOW, dtype=torch.float64)
    root = torch.linalg.cholesky(path[:, 1:, 1:] + jitter)
    truth = torch.nn.functional.pad((root @ white[:, 1:, None])[..., 0], (1, 0))
    value = truth[:, :WINDOW] + torch.randn(count, WINDOW, dtype=torch.float64, generator=generator)
    value = value - value[:, -1:]
    weight = torch.linalg.solve(seen, shared)
    mean = (value[:, None, : WINDOW - 1] @ weight)[:, 0, 0]
    variance = total - (shared.mT @ weight)[:, 0, 0]
    return Windows(value, time, truth[:, -1] - truth[:, -2], mean, variance.sqrt())


def expected_utility(windows: Windows, cost: float) -> Tensor:
    """Of the three decisions (N, 3) given the window, in closed form."""
    normal = torch.distributions.Normal(0.0, 1.0)

    def of(mean: Tensor) -> Tensor:
        gain = mean - cost
        z = gain / windows.deviation
        loss = windows.deviation * normal.log_prob(z).exp() - gain * normal.cdf(-z)
        return gain - (network.AVERSION - 1) * loss

    return torch.stack((of(-windows.mean), torch.zeros_like(windows.mean), of(windows.mean)), -1)


def shown(windows: Windows, letter: str, *, irregular: bool) -> Tensor:
    """What a control's first layer is given: the window, or where the map changes with the times, its output."""
    if not irregular:
        return windows.value.float()
    if (
        letter in "acg"
    ):  # a layer of one window's times would be wrong for another's: values and steps are given
        return torch.cat((windows.value, windows.time.diff(dim=1) - 1), 1).float()
    value, time = windows.value, windows.time
    if letter == "b":
        parts = made(INTENSITY, lag=None).transform(value, time)
    elif letter == "f":
        parts = made(INTENSITY, lag=0).transform(value, time)[:, 1:]
    elif letter == "d":
        parts, difference, gap = value.new_zeros(len(value), TOKENS, 4), value, time
        for k in range(4):
            ends = difference[:, max(1 - k, 0) :]
            parts[:, TOKENS - ends.shape[1] :, k] = ends
            difference = difference.diff(dim=1) / (gap[:, 1:] - gap[:, :-1])
            gap = (gap[:, 1:] + gap[:, :-1]) / 2
    else:
        layer = controls(INTENSITY)[letter].layer
        parts = (value @ layer.T).reshape(len(value), TOKENS, -1)
    parts = torch.nn.functional.pad(parts, (0, SIZE // TOKENS - parts.shape[-1]))
    return parts.reshape(len(value), SIZE).float()


def wide(part: Tensor, width: int) -> Tensor:
    """Filled up with zeros on the right."""
    return torch.nn.functional.pad(part, (0, width - part.shape[-1]))


def cell(
    size: int,
    seeds: list[int],
    rates: dict[str, list[float]],
    *,
    irregular: bool,
    steps: int,
    cost: float = COST,
) -> dict[str, Any]:
    """All controls at one sample size, each at its learning rates; plain numbers, one per seed and rate."""
    table = controls(INTENSITY)
    letters = [
        letter for letter in table if not (irregular and letter == "c")
    ]  # there is no one map to begin at
    test = drawn(TEST, 999_999, irregular=irregular)
    value = expected_utility(test, cost)
    best = value.max(-1).values
    tried: list[Control] = []
    inputs, utilities, names = [], [], []
    for seed in seeds:
        train = drawn(size, seed, irregular=irregular)
        for letter in letters:
            given = shown(train, letter, irregular=irregular)
            control = table[letter]
            if irregular and letter not in "ag":
                control = Control(control.title, torch.eye(SIZE))
            for rate in rates[letter]:
                tried.append(control)
                inputs.append(given)
                utilities.append(network.utility(train.move.float(), cost))
                names.append((letter, seed, rate))
    width = max(part.shape[-1] for part in inputs)
    data = torch.stack([wide(part, width) for part in inputs])
    tried = [control._replace(layer=wide(control.layer, width)) for control in tried]
    _, own, speeds = zip(*names)
    found = network.trained(tried, data, torch.stack(utilities), own, speeds, steps=steps)
    given = {letter: wide(shown(test, letter, irregular=irregular), width) for letter in letters}
    out: dict[str, Any] = {
        letter: {"rate": [], "regret": [], "acts": [], "coverage": []} for letter in letters
    }
    for k, (letter, _, rate) in enumerate(names):
        one = network.Network(*(part[k : k + 1] for part in found))
        decision, sure, side = (part[0] for part in network.decisions(one, given[letter][None]))
        gained = value.gather(1, (decision.long() + 1)[:, None])[:, 0]
        out[letter]["rate"].append(rate)
        out[letter]["regret"].append(float((best - gained).mean()))
        out[letter]["acts"].append(float((decision != 0).double().mean()))
        out[letter]["coverage"].append(risk_coverage(sure, side, value))
    return {
        "size": size,
        "cost": cost,
        "irregular": irregular,
        "bayes": float(best.mean()),
        "bayes_acts": float((value.argmax(-1) != 1).double().mean()),
        "controls": out,
    }


def tuned(found: dict[str, Any]) -> dict[str, list[float]]:
    """For each control the rate with the smallest mean regret of a cell that tried several."""
    best = {}
    for letter, row in found["controls"].items():
        regret = {
            rate: np.mean([r for r, q in zip(row["regret"], row["rate"]) if q == rate])
            for rate in row["rate"]
        }
        best[letter] = [min(regret, key=lambda rate: float(regret[rate]))]
    return best


SHARES = (0.05, 0.1, 0.2, 0.4, 1.0)


def risk_coverage(sure: Tensor, side: Tensor, value: Tensor) -> list[float]:
    """Mean expected utility of acting on the surest SHARES of the windows."""
    order = sure.argsort(descending=True)
    gained = value.gather(1, side.long()[:, None] + 1)[:, 0][order]
    return [float(gained[: math.ceil(share * len(gained))].mean()) for share in SHARES]


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds with half widths, differences to b paired by seed."""
    out = {}
    for letter, row in found["controls"].items():
        regret, reference = np.array(row["regret"]), np.array(found["controls"]["b"]["regret"])
        out[letter] = {
            "regret": over_seeds(regret),
            "minus_b": over_seeds(regret - reference),
            "acts": over_seeds(np.array(row["acts"])),
            "collapsed": float(np.mean(np.array(row["acts"]) < COLLAPSED)),
            "coverage": [over_seeds(np.array(part)) for part in zip(*row["coverage"])],
        }
    return out
