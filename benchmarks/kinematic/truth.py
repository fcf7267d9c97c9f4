"""Known paths seen through noise: how well are velocity and acceleration found, and do the bands hold them?

Four kinds of path: the model's own (integrated Wiener), a chirp, a line that jumps, a random walk. Every method is
given the noise or window that is best for it: the smoother learns q / R and R by the likelihood of other paths of the
kind; the window of Savitzky and Golay and the stride of finite differences are those with the smallest error on these
paths, so they know the truth there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.signal import savgol_filter
from torch import Tensor

from benchmarks.intervals import Mean, over_seeds
from kalman_rl.kinematic import KinematicTokenizer
from kalman_rl.numerics import wiener
from kalman_rl.numerics.smoother import wiener_smoother

LENGTH, SERIES = 100, 20
KINDS = ("integrated Wiener", "chirp", "jumps", "random walk")
STRIDES = (1, 2, 4, 8)
WINDOWS = (5, 7, 9, 13, 19, 27)
EDGE = 2  # knots left out at both ends, where a difference has no neighbours


def drawn(kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Path, velocity and acceleration (NaN where there is none) and observations (SERIES, LENGTH), noise 1."""
    generator = torch.Generator().manual_seed(seed)

    def white(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    time = torch.arange(float(LENGTH), dtype=torch.float64)
    none = torch.full((SERIES, LENGTH), math.nan, dtype=torch.float64)
    if kind == "integrated Wiener":
        one = torch.tensor(1.0, dtype=torch.float64)
        root = torch.linalg.cholesky(0.01 * wiener.diffusion(2, one))
        state, states = white(SERIES, 2) * 0.3, []
        for _ in range(LENGTH):
            states.append(state)
            state = state @ wiener.transition(2, one).mT + white(SERIES, 2) @ root.mT
        path, velocity, acceleration = torch.stack(states, 1)[..., 0], torch.stack(states, 1)[..., 1], none
    elif kind == "chirp":
        phase, rate = 2 * math.pi * torch.rand(SERIES, 1, dtype=torch.float64, generator=generator), 0.05
        bend = 0.3 / LENGTH / 2
        angle = phase + rate * time + bend * time**2
        turn = rate + 2 * bend * time
        path = 5 * angle.sin()
        velocity = 5 * turn * angle.cos()
        acceleration = 5 * (2 * bend * angle.cos() - turn**2 * angle.sin())
    elif kind == "jumps":
        steps = white(SERIES, LENGTH) * 6 * (torch.rand(SERIES, LENGTH, generator=generator) < 0.03)
        slope = 0.1 * white(SERIES, 1)
        path, velocity, acceleration = steps.cumsum(1) + slope * time, slope.expand_as(steps), 0 * steps
    else:
        path, velocity, acceleration = white(SERIES, LENGTH).cumsum(1), none, none
    return path, velocity, acceleration, path + white(SERIES, LENGTH)


def differences(y: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Central differences over 2 strides, at the ends over what there is."""
    at = np.arange(LENGTH)
    back, ahead = np.maximum(at - stride, 0), np.minimum(at + stride, LENGTH - 1)
    velocity = (y[:, ahead] - y[:, back]) / (ahead - back)
    return velocity, (velocity[:, ahead] - velocity[:, back]) / (ahead - back)


def polynomials(y: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Local cubics by least squares (Savitzky and Golay)."""
    return tuple(savgol_filter(y, window, 3, deriv=k, mode="interp") for k in (1, 2))  # type: ignore[return-value]


def error(found: np.ndarray, truth: Tensor) -> float:
    """Root mean square, NaN where there is no truth."""
    return float(np.sqrt(np.mean((found - truth.numpy())[:, EDGE:-EDGE] ** 2)))


def cell(kind: str, seed: int) -> dict[str, Any]:
    """Every method on the paths of one seed."""
    path, velocity, acceleration, y = drawn(kind, seed)
    learner = KinematicTokenizer(lag=None, normalise=False).fit(drawn(kind, seed + 500_000)[3])
    ratio, noise = float(learner.noise_ratio or 0), float(learner.noise or 0)
    belief = wiener_smoother(y, process_noise=ratio * noise, observation_noise=noise)
    out: dict[str, Any] = {"kind": kind, "seed": seed, "log10_ratio": math.log10(ratio), "noise": noise}
    for name, methods in (
        ("finite differences", [differences(y.numpy(), each) for each in STRIDES]),
        ("Savitzky-Golay", [polynomials(y.numpy(), each) for each in WINDOWS]),
    ):
        out[name] = [
            min(error(found[k], truth) for found in methods)
            for k, truth in enumerate((velocity, acceleration))
        ]
    for name, lag in (("smoother", None), ("lag 1", 1), ("lag 4", 4), ("lag 0", 0)):
        names = ("x", "v") if lag == 0 else ("x", "v", "a")
        tokenizer = KinematicTokenizer(2, ratio, lag, names, noise=noise, normalise=False)
        made = tokenizer.transform(y)
        count = made.shape[1]
        padding = torch.full((SERIES, LENGTH - count, made.shape[2]), math.nan, dtype=torch.float64)
        made = torch.cat((made, padding), 1).numpy()
        whole = slice(EDGE, min(count, LENGTH - EDGE))
        out[name] = [
            float(np.sqrt(np.mean((made[:, whole, k] - truth.numpy()[:, whole]) ** 2)))
            if k < made.shape[2]
            else math.nan
            for k, truth in ((1, velocity), (2, acceleration))
        ]
    deviation = belief.variance.diagonal(dim1=-2, dim2=-1).sqrt()
    inside = [
        ((belief.mean[..., k] - truth).abs() <= 1.959964 * deviation[..., k]).double().mean().item()
        if bool(truth.isfinite().all())
        else math.nan
        for k, truth in enumerate((path, velocity))
    ]
    channels = ("innovation", "missing")
    surprise = KinematicTokenizer(2, ratio, 1, channels, noise=noise, normalise=False).transform(y)
    out["coverage"], out["nis"] = inside, surprise[:, 2:, 0].square().mean().item()
    return out


METHODS = ("finite differences", "Savitzky-Golay", "lag 0", "lag 1", "lag 4", "smoother")


def summary(cells: list[dict[str, Any]], kind: str) -> dict[str, list[Mean]]:
    """Means over seeds: errors of velocity and acceleration per method; coverage; innovations squared."""
    mine = [each for each in cells if each["kind"] == kind]
    out = {
        name: [over_seeds(np.array([each[name][k] for each in mine])) for k in range(2)]
        for name in (*METHODS, "coverage")
    }
    return out | {"nis": [over_seeds(np.array([each["nis"] for each in mine]))]}
