"""Advice from the belief's own numbers: do single completions with a tracked baseline pay in this pool of prompts?

A batch mean pays for the spread of success rates over prompts, a tracked baseline only for the noise of a reward
around its prompt's rate. Their ratio says how much there is to win.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kalman_rl.numerics.kalman import Gaussian
from kalman_rl.sampling.gains import beta_from_moments, beta_signal

FACTOR, INFORMATIVE = "belief/noise_factor", "belief/informative"
PAYS, TIES = 3.0, 2.0
"""F from which single completions paid in training (4.6 and 10), and below which they tied with a batch mean (1.6)."""
MOST = 4_096
"""Prompts that F is computed from; of more, every n-th in the order of their first visit."""


def noise_factor(value: Gaussian, noise: Tensor | None = None) -> float | None:
    """``F = 1 + Var(p) / E[p (1 - p)]``: the batch mean's gradient noise over the tracker's, per completion.

    Both parts are expectations under the belief N(m, P) of each prompt, so that a coarse belief, whose means lie closer
    together than the rates do, does not make F smaller:

        ``E[p (1 - p)] = mean of m (1 - m) - P``,  ``Var(p) = Var(m) + (1 - 1/N) mean of P``

    With ``noise``, for graded rewards and rewards with offsets, the analogue ``F = 1 + Var(value) / mean of noise``.

    Args:
        value: belief about N prompts' mean rewards, (N,) each, in [0, 1] without ``noise``.
        noise: (N,) variance of one reward around its prompt's value; None for 0/1 rewards, where it is p (1 - p).

    Returns: F >= 1, or None without prompts or where no reward varies. No gradient flows.

    Source: the ratio of the variances of ``r - mean r`` and ``r - p``, gradients of prompts taken for equally long.

    >>> rates = torch.tensor([0.65, 0.07], dtype=torch.float64).repeat(128)
    >>> round(noise_factor(Gaussian(rates, torch.zeros(256))), 2)
    1.57
    """
    mean, variance = value.mean.double(), value.variance.double()
    if not len(mean):
        return None
    if noise is None:
        a, b = beta_from_moments(value)
        mean, noise = a / (a + b), beta_signal(a, b)
        variance = mean * (1 - mean) - noise
    within = float(noise.double().mean())
    between = float(mean.var(correction=0) + (1 - 1 / len(mean)) * variance.mean())
    factor = 1 + between / within if within > 0 else torch.inf
    return factor if factor < torch.inf else None


def informative_share(value: Gaussian, counts: Tensor) -> float:
    """Mean of ``4 E[p (1 - p)]`` over completions of 0/1 reward: 1 where all go to success rate 1/2, 0 where all go to
    hopeless or solved prompts.

    Args: value: belief about N prompts, (N,). counts: (N,) completions of each prompt, not all 0.
    """
    signal = beta_signal(*beta_from_moments(value))
    return float(4 * (signal * counts).sum() / counts.sum())


def advice(factor: float, *, single: bool) -> str:
    """One sentence: what F means for the next run. ``single``: this one sampled one completion per prompt.

    >>> advice(4.6, single=False)
    'F = 4.6: single completions pay here; sample each prompt once, with as many completions in all.'
    """
    if factor < TIES:
        return f"F = {factor:.1f}: use a batch mean; a tracked baseline has little to add here."
    if factor < PAYS:
        return f"F = {factor:.1f}: single completions may pay here; compare with a batch mean."
    if single:
        hint = "to learn faster, halve the batch before raising the learning rate"
    else:
        hint = "sample each prompt once, with as many completions in all"
    return f"F = {factor:.1f}: single completions pay here; {hint}."
