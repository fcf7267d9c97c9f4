"""From a filter's path to tokens: two neighbouring states, the polynomial between them, how sure both are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kalman_rl.numerics import state_space, wiener
from kalman_rl.numerics.kalman import Gaussian
from kalman_rl.numerics.state_space import Columns, FilterPath, Steps

VALUES = ("x", "v", "a", "j")
DEVIATIONS = ("sd_x", "sd_v", "sd_a", "sd_j")
FLAGS = ("innovation", "missing")
CHANNELS = VALUES + DEVIATIONS + FLAGS


def pair_after(states: Sequence[Columns], transitions: Sequence[Tensor], noises: Sequence[Tensor]) -> Columns:
    """States k and k + 1 stacked (..., 2n, ...), smoothed back from the filtered state k + lag.

    Args:
        states: filtered beliefs of the knots k .. k + lag, lag >= 1.
        transitions, noises: F and Q of the lag steps between them.
    """
    later, state, across = states[-1], states[-1], noises[-1]
    for here, transition, noise in list(zip(states, transitions, noises))[::-1]:
        later = state
        state, across = state_space.smooth(here, later, transition, noise)
    return _stacked(state, later, across)


def every_pair(path: FilterPath, steps: Steps) -> Columns:
    """The same for all knots but the last (T - 1, B, 2n, ...), given every observation."""
    state, across = state_space.smoothed(path, steps)
    return _stacked(Columns(*(p[:-1] for p in state)), Columns(*(p[1:] for p in state)), across)


def _stacked(state: Columns, later: Columns, across: Tensor) -> Columns:
    left = torch.cat((state.covariance, across), -1)
    right = torch.cat((across.mT, later.covariance), -1)
    return Columns(torch.cat((state.mean, later.mean), -2), torch.cat((left, right), -2))


def motion(pair: Gaussian, step: Tensor, order: int, *, integral: bool) -> tuple[Tensor, Tensor]:
    """Derivatives of the path just after knot k, and their standard deviations (..., D + 1).

    From the order on, a derivative is a coefficient of the polynomial between two states, and the deviation is that of
    the coefficient: the path itself has no derivative of that order, only white noise.

    Args:
        pair: belief about two states (..., 2n).
        step: time between them, broadcastable to (...,).
    """
    parts = wiener.polynomial(order, step, integral=integral)
    spread = (parts @ pair.variance @ parts.mT).diagonal(dim1=-2, dim2=-1)
    return (parts @ pair.mean[..., None])[..., 0], spread.clamp(min=0.0).sqrt()


def normalised(innovation: Gaussian, observed: Tensor, noise: float) -> Tensor:
    """Innovation over its standard deviation, 0 where missing or where nothing was expected yet.

    ``innovation`` is in units of R = 1; ``noise`` is R.
    """
    known = observed & innovation.mean.isfinite()
    return torch.where(known, innovation.mean / (noise * innovation.variance).sqrt(), 0.0)
