"""Pictures of what a filter believes: a few lines of matplotlib each, drawn into axes of yours.

Needs the extra ``plot``. Every function returns the axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kalman_rl.errors import extra
from kalman_rl.numerics.kalman import Filtered, Gaussian, causal_mean
from kalman_rl.palette import LIGHT, MUTED

with extra("plot", __name__):
    from matplotlib import pyplot as plt

OBSERVED, BELIEVED, SECOND = MUTED, LIGHT[0], LIGHT[1]


def posterior(filtered: Filtered, observation: Tensor, *, row: int = 0, ax: Any = None) -> Any:
    """Observations of one row, the filter's mean, and two standard deviations around it.

    Args:
        filtered: of :func:`kalman_rl.causal_filter`.
        observation: what it was given, (B, T).
        row: which of the B rows.
        ax: matplotlib axes; None = new ones.
    """
    ax = _axes(ax)
    mean, deviation = (
        value[row].detach().tolist() for value in (filtered.state.mean, filtered.state.variance.sqrt())
    )
    tokens = range(1, len(mean) + 1)
    ax.plot(tokens, observation[row].detach().tolist(), "o", color=OBSERVED, markersize=3, label="observed")
    ax.plot(tokens, mean, color=BELIEVED, label="believed")
    band = [[m + side * 2 * d for m, d in zip(mean, deviation)] for side in (-1, 1)]
    ax.fill_between(tokens, *band, color=BELIEVED, alpha=0.18, linewidth=0, label="two standard deviations")
    return _finished(ax, "token", "log-ratio")


def dial(
    observation: Tensor,
    process_noise: Sequence[float] = (math.inf, 1.0, 1e-2, 0.0),
    *,
    row: int = 0,
    initial_variance: float = math.inf,
    ax: Any = None,
) -> Any:
    """The filtered log-ratios of one row for several process noises, from each token's own to their running mean.

    Args:
        observation: log-ratios (B, T). process_noise: Q in units of R.
        row: which of the B rows. initial_variance: of the start; infinite is diffuse.
        ax: matplotlib axes; None = new ones.
    """
    ax = _axes(ax)
    for number, noise in enumerate(process_noise):
        mean = causal_mean(
            observation, process_noise=noise, observation_noise=1.0, initial_variance=initial_variance
        )
        share = number / max(len(process_noise) - 1, 1)
        name = (
            {math.inf: " (GRPO)", 0.0: " (GSPO so far)"}.get(noise, "")
            if math.isinf(initial_variance)
            else ""
        )
        ax.plot(
            range(1, mean.shape[1] + 1),
            mean[row].detach().tolist(),
            color=plt.get_cmap("viridis")(0.1 + 0.75 * share),
            label=f"Q / R = {noise:g}{name}",
        )
    return _finished(ax, "token", "log-weight")


def values(beliefs: Mapping[str, Gaussian], *, truth: Sequence[float] | None = None, ax: Any = None) -> Any:
    """Means of several prompts' values with two standard deviations, one colour a belief.

    Args:
        beliefs: name -> belief about the same n prompts, as ``predict`` of a belief gives it.
        truth: the n values, where they are known.
        ax: matplotlib axes; None = new ones.
    """
    ax = _axes(ax)
    for number, (name, value) in enumerate(beliefs.items()):
        mean, deviation = value.mean.tolist(), value.variance.sqrt().tolist()
        places = [place + 0.15 * (number - (len(beliefs) - 1) / 2) for place in range(len(mean))]
        color = (BELIEVED, SECOND)[number % 2]
        ax.errorbar(
            places,
            mean,
            [2 * d for d in deviation],
            fmt="o",
            color=color,
            capsize=2,
            markersize=4,
            label=name,
        )
    if truth is not None:
        ax.plot(range(len(truth)), list(truth), "_", color="black", markersize=14, label="truth")
    return _finished(ax, "prompt", "value")


def spent(counts: Sequence[float], values: Sequence[float], *, ax: Any = None) -> Any:
    """Completions that each prompt took, over its value.

    Args:
        counts: n numbers of completions. values: n mean rewards.
        ax: matplotlib axes; None = new ones.
    """
    ax = _axes(ax)
    ax.scatter(list(values), list(counts), color=BELIEVED, s=18, alpha=0.7)
    return _finished(ax, "value of the prompt", "completions", legend=False)


def _axes(ax: Any) -> Any:
    return plt.subplots(figsize=(7.0, 3.4), layout="constrained")[1] if ax is None else ax


def _finished(ax: Any, across: str, up: str, *, legend: bool = True) -> Any:
    ax.set_xlabel(across)
    ax.set_ylabel(up)
    ax.spines[["top", "right"]].set_visible(False)
    if legend:
        ax.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    return ax
