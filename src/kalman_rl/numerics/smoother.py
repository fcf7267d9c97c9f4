"""Smoothing and filtering of noisy series by the integrated Wiener process: any times, holes, any noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl.checks import broadcasts, expect_tensor, is_real, is_whole
from kalman_rl.errors import ConfigError, NumericError, ShapeError, quote
from kalman_rl.numerics import state_space, wiener
from kalman_rl.numerics.arguments import expect_shape, expect_values
from kalman_rl.numerics.kalman import Gaussian, Noise
from kalman_rl.numerics.likelihood import Peak, pack, peak
from kalman_rl.numerics.state_space import Steps

AXES = "(series, knot)"
LOG_RATIOS = [math.log(10) * k / 3 for k in range(-36, 13)]
"""Grid of log(q step^(2m-1) / R): from a straight line over a million steps to following every observation."""
_ROWS = 2048  # series times grid points in one pass


class Checked(NamedTuple):
    """Checked, float64: ``value`` and ``variance`` (B, T), the latter inf where missing; ``time`` (1 or B, T)."""

    value: Tensor
    variance: Tensor
    time: Tensor

    @property
    def observed(self) -> Tensor:
        """(B, T) bool."""
        return ~self.variance.isinf()


def wiener_smoother(
    observation: Tensor,
    times: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    process_noise: Noise,
    observation_noise: Noise = 1.0,
    order: int = 2,
    integral: bool = False,
) -> Gaussian:
    """Path and derivatives at every time, given all observations.

    ``y_k = x(t_k) + v_k`` with ``x^(m) = sqrt(q) white noise``; the mean is the natural smoothing spline that minimises
    ``sum (y_k - x(t_k))^2 / R_k + 1/q int (x^(m))^2``. Nothing is assumed about the start.

    Args:
        observation: y (B, T), any floating type; with ``integral`` the integral of x since the time before, and the
            first entry must be masked.
        times: (T,) or (B, T), strictly increasing; None = 0, 1, 2, ...
        mask: (B, T) bool, True = observed; None = all. The values under it are never read.
        process_noise: q > 0, intensity in squared units of y per time^(2m-1).
        observation_noise: R > 0, a number or broadcastable to (B, T), in squared units of y.
        order: m from 1 to 4, derivatives in the state.

    Returns:
        Mean (B, T, m) of ``x, x', ..., x^(m-1)`` and covariance (B, T, m, m), computed in float64 and returned in the
        type of the observation, at least float32. Gradient flows through observation, q and R.

    Raises:
        ShapeError, NumericError, ConfigError: a shape, value or setting is wrong, or a series has fewer than m
        observations.

    Source: as in :mod:`kalman_rl.numerics.wiener` and :mod:`kalman_rl.numerics.state_space`.

    >>> y = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    >>> wiener_smoother(y, process_noise=0.1).mean[0, :, 1]  # a straight line stays one
    tensor([1., 1., 1., 1.])
    """
    series, steps = prepared(observation, times, mask, process_noise, observation_noise, order, integral)
    path = state_space.filtered(series.value, series.variance, steps)
    state, _ = state_space.smoothed(path, steps)
    everything = path.evidence[-1].expand_as(path.evidence)
    return _returned(state_space.settled(state, everything, path.seen[-1] >= order), order, observation)


def wiener_filter(
    observation: Tensor,
    times: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    process_noise: Noise,
    observation_noise: Noise = 1.0,
    order: int = 2,
    integral: bool = False,
) -> Gaussian:
    """As :func:`wiener_smoother`, but every time knows the observations up to it only; NaN before the m-th.

    >>> y = torch.tensor([[0.0, 1.0, 5.0]])
    >>> wiener_filter(y, process_noise=0.1).mean[0, :, 1]
    tensor([   nan, 1.0000, 2.5247])
    """
    series, steps = prepared(observation, times, mask, process_noise, observation_noise, order, integral)
    path = state_space.filtered(series.value, series.variance, steps)
    return _returned(state_space.settled(path.state, path.evidence, path.seen >= order), order, observation)


def smoothing_matrix(times: Tensor, *, noise_ratio: float, order: int = 2, integral: bool = False) -> Tensor:
    """The smoother as one matrix M (T, m, T): ``mean = M @ y`` for every series on this grid with one R and no holes.

    Args:
        times: (T,), strictly increasing. noise_ratio: q / R > 0.

    Returns: float64; with ``integral`` the first column is 0.

    >>> M = smoothing_matrix(torch.arange(4.0), noise_ratio=0.1)
    >>> M[:, 1] @ torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    tensor([1.0000, 1.0000, 1.0000, 1.0000], dtype=torch.float64)
    """
    unit = torch.eye(len(times), dtype=torch.float64, device=times.device)
    mask = torch.ones_like(unit, dtype=torch.bool)
    mask[:, 0] = not integral
    smooth = wiener_smoother(unit, times, mask, process_noise=noise_ratio, order=order, integral=integral)
    return smooth.mean.permute(1, 2, 0)


def likely_noise(
    observation: Tensor,
    times: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    relative_noise: Noise = 1.0,
    order: int = 2,
    integral: bool = False,
    noise_ratio: float | None = None,
) -> Peak | None:
    """The most likely q / R and R of all series together, by the diffuse likelihood of their innovations.

    Args:
        observation, times, mask, order, integral: as in :func:`wiener_smoother`.
        relative_noise: R_k / R, a number or broadcastable to (B, T).
        noise_ratio: q / R > 0 where it is known and only R is looked for.

    Returns:
        ``log_shape`` = log(q / R) in units of the times, ``scale`` = R; None where the observations lie on a
        polynomial of degree m - 1 or are no more than m in each series.

    Source: the profile likelihood of :mod:`kalman_rl.numerics.likelihood` with de Jong's diffuse sums.

    >>> y = torch.tensor([[0.0, 1.1, 1.9, 3.2, 3.9, 5.1]])
    >>> likely_noise(y).scale < 0.1
    True
    """
    grid = LOG_RATIOS
    if noise_ratio is not None:
        given = (observation, times, mask, 1.0, relative_noise, order, integral)
        time = prepared(*given, name="relative_noise")[0].time
        grid = [math.log(noise_ratio) + (2 * order - 1) * math.log(float(time.diff(dim=-1).mean()))]
    sums, log_ratios = noise_sums(
        observation, times, mask, grid, relative_noise=relative_noise, order=order, integral=integral
    )
    # Rounding of a straight line must not look like noise.
    size = 1e-24 * float(observation.detach().double().nan_to_num().square().sum())
    if not bool((sums[1 : 1 + len(grid)] > size).all()):
        return None
    found = peak(sums, grid, 1)
    return None if found is None else Peak(found.log_shape - grid[0] + log_ratios[0].item(), found.scale)


def noise_sums(
    observation: Tensor,
    times: Tensor | None = None,
    mask: Tensor | None = None,
    grid: Sequence[float] = LOG_RATIOS,
    *,
    relative_noise: Noise = 1.0,
    order: int = 2,
    integral: bool = False,
) -> tuple[Tensor, Tensor]:
    """The likelihood of every q / R on a grid, of all series together.

    Args:
        grid: G values of ``log(q step^(2m-1) / R)``; the step is the mean distance of neighbouring times.
        observation, times, mask, relative_noise, order, integral: as in :func:`likely_noise`.

    Returns: what :func:`kalman_rl.numerics.likelihood.profile` takes (1 + 2 G,), and log(q / R) (G,) in units of the
        times.
    """
    given = (observation, times, mask, 1.0, relative_noise, order, integral)
    series, steps = prepared(*given, name="relative_noise")
    unit = (2 * order - 1) * math.log(float(series.time.diff(dim=-1).mean()))
    log_ratios = torch.tensor(grid, dtype=torch.float64).sub(unit)
    ratio = log_ratios.exp().to(series.value.device)
    chunk = max(_ROWS // len(grid), 1)
    total = torch.zeros(1 + 2 * len(grid), dtype=torch.float64)
    for first in range(0, len(series.value), chunk):
        part = slice(first, first + chunk)
        value, variance = (
            data[part].detach().repeat_interleave(len(grid), 0) for data in (series.value, series.variance)
        )
        transition, noise = (
            m if m.shape[1] == 1 else m[:, part].repeat_interleave(len(grid), 1)
            for m in (steps.transition, steps.noise)
        )
        scaled = noise * ratio.repeat(len(value) // len(grid))[:, None, None]
        path = state_space.filtered(value, variance, Steps(transition, scaled, steps.row, order))
        count, quadratic, logs = state_space.likelihood_sums(path, ~variance.isinf(), order)
        kept = (values.reshape(-1, len(grid)).sum(0).cpu() for values in (quadratic, logs))
        total += pack(float(count[:: len(grid)].sum()), *kept)
    return total, log_ratios


def prepared(
    observation: Tensor,
    times: Tensor | None,
    mask: Tensor | None,
    process_noise: Noise,
    observation_noise: Noise,
    order: int,
    integral: bool,
    *,
    name: str = "observation_noise",
) -> tuple[Checked, Steps]:
    """The checked series and the model of their steps; ``name`` is what the caller calls the noise of an observation.

    Raises: as :func:`wiener_smoother`.
    """
    if not is_whole(order, 1, wiener.HIGHEST_ORDER):
        raise ConfigError(f"order: got {quote(order)}, expected an integer from 1 to {wiener.HIGHEST_ORDER}")
    expect_tensor("observation", observation)
    y = observation
    fits = y.is_floating_point() and y.ndim == 2 and y.shape[0] > 0 and y.shape[1] > 1
    expect_shape("observation", y, fits, "floating point (B, T), T >= 2; one row per series")
    mask = torch.ones_like(y, dtype=torch.bool) if mask is None else mask
    expect_tensor("mask", mask)
    fits = mask.dtype == torch.bool and mask.shape == y.shape
    expect_shape("mask", mask, fits, f"torch.bool {tuple(y.shape)} as observation; True = observed")
    value = torch.where(mask, y, 0.0).double()
    expect_values(
        "observation", value, value.isfinite(), "a finite number", "mask it out where missing", AXES
    )
    noise = [
        _positive("process_noise", process_noise, value, (value.shape[0], 1)),
        _positive(name, observation_noise, value, tuple(value.shape)),
    ]
    time = checked_times(times, value)
    expect_begun(integral, mask[:, 0])
    enough = mask.sum(1) >= order
    if not enough.all():
        row = int((~enough).nonzero()[0])
        raise NumericError(
            f"observation: got {int(mask[row].sum())} observed values in series {row}, expected at least {order}, "
            f"the order; leave the series out"
        )
    series = Checked(value, torch.where(mask, noise[1].expand_as(value), math.inf), time)
    return series, made_steps(time, noise[0][:, 0], order, integral)


def expect_begun(integral: bool, first: Tensor) -> None:
    """Raises: NumericError where an integral is ``first`` observed at a time that has none before."""
    if integral and bool(first.any()):
        raise NumericError(
            "mask: got an integral observed at the first time, expected none; it has no time before"
        )


def made_steps(time: Tensor, process_noise: Tensor, order: int, integral: bool) -> Steps:
    """The model of the steps between times (1 or B, T), with q (1 or B,). Raises: NumericError."""
    gap = torch.nn.functional.pad(time.diff(dim=-1), (1, 0), value=1.0).T  # entry 0 is not read
    transition = wiener.transition(order, gap, integral=integral)
    noise = process_noise[:, None, None] * wiener.diffusion(order, gap, integral=integral)
    sizes = noise.detach()[1:].diagonal(dim1=-2, dim2=-1)
    if not bool((sizes.isfinite() & (sizes > 0)).all()):
        apart = time.detach().diff(dim=-1)
        raise NumericError(
            f"times: got steps from {float(apart.min()):g} to {float(apart.max()):g}, expected powers of them that a "
            "float64 holds; give times, and the noise with them, in another unit"
        )
    row = torch.zeros(order + integral, dtype=time.dtype, device=time.device)
    row[order if integral else 0] = 1.0
    return Steps(transition, noise, row, order)


def checked_times(times: Tensor | None, value: Tensor) -> Tensor:
    """(1 or B, T) float64. Raises: ShapeError, NumericError where they do not increase."""
    if times is None:
        return torch.arange(value.shape[1], dtype=value.dtype, device=value.device)[None]
    expect_tensor("times", times)
    fits = times.ndim in (1, 2) and times.shape[-1] == value.shape[1] and not times.is_complex()
    fits = fits and (times.ndim == 1 or len(times) in (1, len(value)))
    expect_shape("times", times, fits, f"({value.shape[1]},) or {tuple(value.shape)}, one per observation")
    time = times.double().reshape(-1, value.shape[1])
    expect_values("times", time, time.isfinite(), "a finite number", "leave the observation out", AXES)
    rising = torch.nn.functional.pad(time.diff(dim=-1), (1, 0), value=1.0) > 0
    advice = "sort them and join observations of one time"
    expect_values("times", time, rising, "more than the time before", advice, AXES)
    return time


def _positive(name: str, noise: Noise, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A variance as a tensor of two axes. Raises: NumericError unless it is finite and > 0."""
    if not (is_real(noise) or isinstance(noise, float | Tensor)):
        raise NumericError(f"{name}: got {quote(noise, 80)}, expected a number or a tensor of numbers")
    variance = torch.as_tensor(noise, dtype=like.dtype, device=like.device)
    if not broadcasts(variance.shape, shape):
        raise ShapeError(
            f"{name}: got shape {tuple(variance.shape)}, expected a number or broadcastable to {shape}"
        )
    legal = variance.isfinite() & (variance > 0)
    expect_values(name, variance, legal, "a finite variance > 0", "mask out what was not observed", AXES)
    return variance.reshape((1,) * (2 - variance.ndim) + tuple(variance.shape))


def _returned(belief: Gaussian, order: int, like: Tensor) -> Gaussian:
    """From (T, B, n) to (B, T, m), in the type of the observation."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    mean, covariance = belief.mean.transpose(0, 1), belief.variance.transpose(0, 1)
    return Gaussian(mean[..., :order].to(dtype), covariance[..., :order, :order].to(dtype))
