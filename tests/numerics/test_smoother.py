"""The smoother against splines, a dense Gaussian, 50 digits, statsmodels, and its own symmetries."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from scipy.interpolate import make_smoothing_spline
from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother
from torch import Tensor

from kalman_rl.errors import ConfigError, KalmanRLError, NumericError, ShapeError
from kalman_rl.numerics import state_space, wiener
from kalman_rl.numerics.curve import smooth_curve
from kalman_rl.numerics.smoother import (
    likely_noise,
    noise_sums,
    prepared,
    smoothing_matrix,
    wiener_filter,
    wiener_smoother,
)
from tests.oracles.wiener import functionals, posterior
from tests.project.test_borders import WORDED

T = 14


def made(seed: int = 0, length: int = T) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Irregular times from 0 on, values, noise of each."""
    rng = np.random.default_rng(seed)
    times = np.concatenate(([0.0], np.cumsum(rng.uniform(0.1, 1.5, length - 1))))
    return times, np.sin(times) + 0.3 * rng.normal(size=length), rng.uniform(0.3, 3.0, length)


def row(values: np.ndarray) -> Tensor:
    return torch.tensor(values)[None]


def smooth(times: np.ndarray, y: np.ndarray, noise: np.ndarray, q: float, **options: Any) -> Any:
    belief = wiener_smoother(
        row(y), torch.tensor(times), process_noise=q, observation_noise=row(noise), **options
    )
    return belief.mean[0].numpy(), belief.variance[0].numpy()


@pytest.mark.parametrize("q", [0.1, 1.0, 1e3])
def test_the_mean_is_the_smoothing_spline(q: float) -> None:
    times, y, noise = made(1, 40)
    spline = make_smoothing_spline(times, y, w=1 / noise, lam=1 / q)
    mean, _ = smooth(times, y, noise, q)
    np.testing.assert_allclose(mean[:, 0], spline(times), atol=1e-10, rtol=0)
    np.testing.assert_allclose(mean[:, 1], spline.derivative()(times), atol=1e-10, rtol=0)
    pair = torch.tensor(np.concatenate((mean[:-1], mean[1:]), 1))
    parts = wiener.polynomial(2, torch.tensor(times).diff()) @ pair[..., None]
    for degree in range(4):
        inside = np.nextafter(times[:-1], np.inf)  # a third derivative jumps at a knot
        want = spline.derivative(degree)(inside)
        np.testing.assert_allclose(
            parts[:, degree, 0], want, atol=1e-10 * max(1, abs(want).max()), rtol=1e-10
        )


def test_a_stiff_spline_keeps_its_digits() -> None:
    """At q = 1e-6 SciPy has seven digits left and the smoother has fifteen; 50 digits decide."""
    times, y, noise = made(2)
    q = 1e-6
    with mpmath.workdps(50):
        t = [mpmath.mpf(float(each)) for each in times]
        n = len(t)
        kernel = mpmath.matrix(n, n)
        whole = mpmath.matrix(n + 2, n + 2)
        right = mpmath.matrix(n + 2, 1)
        for i in range(n):
            right[i] = mpmath.mpf(float(y[i]))
            for j in range(n):
                first = min(t[i], t[j])
                kernel[i, j] = mpmath.mpf(q) * (first**3 / 3 + abs(t[i] - t[j]) * first**2 / 2)
                whole[i, j] = kernel[i, j] + (mpmath.mpf(float(noise[i])) if i == j else 0)
            for j, flat in enumerate((mpmath.mpf(1), t[i])):
                whole[i, n + j] = whole[n + j, i] = flat
        x = mpmath.lu_solve(whole, right)
        want = [float(sum(kernel[i, j] * x[j] for j in range(n)) + x[n] + t[i] * x[n + 1]) for i in range(n)]
    np.testing.assert_allclose(smooth(times, y, noise, q)[0][:, 0], want, atol=2e-15, rtol=0)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_mean_and_covariance_are_those_of_a_dense_gaussian(order: int) -> None:
    times, y, noise = made(order)
    seen = np.ones(T, dtype=bool)
    seen[[0, 5, 6, T - 1]] = False  # holes at both ends too
    holes = np.where(seen, y, np.nan)
    mean, covariance = smooth(times, holes, noise, 0.7, order=order, mask=row(seen))
    data = functionals(order, times, knots=times)[seen]
    for i in range(order):
        target = functionals(order, times, derivative=i, knots=times)
        want = posterior(target, data, y[seen], noise[seen], 0.7)
        size = max(1.0, abs(want.mean).max())
        np.testing.assert_allclose(mean[:, i], want.mean, atol=1e-9 * size, rtol=0)
        np.testing.assert_allclose(covariance[:, i, i], np.diag(want.covariance), rtol=1e-7)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_observed_integrals(order: int) -> None:
    """Also between the times: the mean is a polynomial of degree 2m there, which the pair of states gives."""
    times, y, noise = made(order + 10)
    y[0], seen = np.nan, np.arange(T) > 0
    seen[4] = False  # a missing integral is not the same as a longer interval
    series, steps = prepared(
        row(y), torch.tensor(times), row(seen), 0.7, row(noise), order=order, integral=True
    )
    path = state_space.filtered(series.value, series.variance, steps)
    state, _ = state_space.smoothed(path, steps)
    belief = state_space.settled(state, path.evidence[-1].expand_as(path.evidence), path.seen[-1] >= order)
    inner = np.linspace(times[2], times[3], 9)[1:-1]
    knots = np.concatenate((times, inner))
    data = functionals(order, times, derivative=-1, knots=knots)[seen]
    for i in range(order):
        target = functionals(order, times, derivative=i, knots=knots)
        want = posterior(target, data, y[seen], noise[seen], 0.7)
        np.testing.assert_allclose(
            belief.mean[:, 0, i], want.mean, atol=1e-9 * max(1, abs(want.mean).max()), rtol=0
        )
        np.testing.assert_allclose(belief.variance[:, 0, i, i], np.diag(want.covariance), rtol=1e-7)
    pair = torch.cat((belief.mean[2], belief.mean[3]), -1)[0]
    parts = wiener.polynomial(order, torch.tensor(times[3] - times[2]), integral=True) @ pair
    want = posterior(functionals(order, inner, knots=knots), data, y[seen], noise[seen], 0.7).mean
    got = sum(float(c) * (inner - times[2]) ** k / math.factorial(k) for k, c in enumerate(parts))
    np.testing.assert_allclose(got, want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("regular", [True, False])
def test_statsmodels_with_the_same_matrices(regular: bool) -> None:
    times, y, noise = made(3)
    times = np.arange(float(T)) / 2 if regular else times
    first = (
        0 if regular else 1
    )  # where F changes, statsmodels 0.15 smooths the diffuse start with another step's F
    y[4] = np.nan
    gap = torch.tensor(np.diff(times, append=times[-1] + 1))
    model = KalmanSmoother(k_endog=1, k_states=2)
    model.bind(y[:, None].copy())
    model["design"] = np.array([[1.0, 0.0]])
    model["selection"] = np.eye(2)
    model["obs_cov"] = noise[None, None]
    model["transition"] = wiener.transition(2, gap).permute(1, 2, 0).numpy()
    model["state_cov"] = (0.5 * wiener.diffusion(2, gap)).permute(1, 2, 0).numpy()
    model.initialize_diffuse()
    theirs = model.smooth()
    mean, covariance = smooth(times, y, noise, 0.5, mask=row(~np.isnan(y)))
    np.testing.assert_allclose(mean[first:], theirs.smoothed_state.T[first:], atol=1e-10)
    their_covariance = theirs.smoothed_state_cov.transpose(2, 0, 1)
    np.testing.assert_allclose(covariance[first:], their_covariance[first:], atol=1e-10)
    series, steps = prepared(
        row(y), torch.tensor(times), row(~np.isnan(y)), 0.5, row(noise), order=2, integral=False
    )
    path = state_space.filtered(series.value, series.variance, steps)
    count, quadratic, logs = state_space.likelihood_sums(path, series.observed, 2)
    ours = -0.5 * (count * math.log(2 * math.pi) + quadratic + logs)
    diffuse = -0.5 * 2 * math.log(2 * math.pi)  # they count the two observations that fix the start
    np.testing.assert_allclose(ours, theirs.llf_obs.sum() - diffuse, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_likelihood_and_innovations_of_a_dense_gaussian(order: int) -> None:
    times, y, noise = made(order + 20)
    data = functionals(order, times, knots=times)
    series, steps = prepared(row(y), torch.tensor(times), None, 0.7, row(noise), order=order, integral=False)
    path = state_space.filtered(series.value, series.variance, steps)
    count, quadratic, logs = state_space.likelihood_sums(path, series.observed, order)
    want = posterior(data, data, y, noise, 0.7)
    assert int(count) == T - order
    np.testing.assert_allclose((quadratic.item(), logs.item()), want[2:], rtol=1e-9)
    found = state_space.innovations(path, order)
    assert torch.isnan(found.mean[:order]).all()
    for k in range(order, T):
        ahead = posterior(data[k : k + 1], data[:k], y[:k], noise[:k], 0.7)
        np.testing.assert_allclose(found.mean[k, 0], y[k] - ahead.mean[0], atol=1e-9 * max(1, abs(y).max()))
        np.testing.assert_allclose(found.variance[k, 0], ahead.covariance[0, 0] + noise[k], rtol=1e-7)
    normal = found.mean[order:] ** 2 / found.variance[order:]
    np.testing.assert_allclose(normal.sum(), quadratic.item(), rtol=1e-9)


def test_the_filter_is_the_smoother_of_what_was_seen() -> None:
    times, y, noise = made(4)
    options = {"process_noise": 0.7, "order": 3}
    causal = wiener_filter(row(y), torch.tensor(times), observation_noise=row(noise), **options)
    assert torch.isnan(causal.mean[0, :2]).all() and torch.isnan(causal.variance[0, :2]).all()
    for k in range(3, T + 1):
        mean, covariance = smooth(times[:k], y[:k], noise[:k], 0.7, order=3)
        np.testing.assert_allclose(causal.mean[0, k - 1], mean[-1], atol=1e-11)
        np.testing.assert_allclose(causal.variance[0, k - 1], covariance[-1], rtol=1e-8)


def test_a_missing_value_is_a_longer_step() -> None:
    times, y, noise = made(5)
    kept = np.ones(T, dtype=bool)
    kept[[2, 7, 8]] = False
    with_holes = smooth(times, y, noise, 0.7, mask=row(kept))
    without = smooth(times[kept], y[kept], noise[kept], 0.7)
    for ours, theirs in zip(with_holes, without):
        np.testing.assert_allclose(ours[kept], theirs, atol=1e-12)


def test_units_of_values_and_times() -> None:
    """y -> c y with q, R -> c^2 q, c^2 R, and t -> s t + r with q -> q / s^3, change the units and nothing else."""
    times, y, noise = made(6)
    mean, covariance = smooth(times, y, noise, 0.7)
    other, wider = smooth(times, -3 * y, 9 * noise, 9 * 0.7)
    np.testing.assert_allclose(other, -3 * mean, atol=1e-13)
    np.testing.assert_allclose(wider, 9 * covariance, rtol=1e-11)
    unit = np.array([1.0, 1 / 86400])
    slower, narrower = smooth(86400 * times + 7, y, noise, 0.7 / 86400**3)
    np.testing.assert_allclose(slower / unit, mean, atol=1e-10)
    np.testing.assert_allclose(narrower / unit / unit[:, None], covariance, rtol=1e-9)


def test_a_batch_is_its_series() -> None:
    times, ys, noises = (np.stack(part) for part in zip(*(made(seed) for seed in range(3))))
    mask = torch.ones(3, T, dtype=torch.bool)
    mask[1, 3] = mask[2, 0] = False
    q = torch.tensor([[0.1], [0.7], [2.0]], dtype=torch.float64)
    given = {"process_noise": q, "observation_noise": torch.tensor(noises)}
    together = wiener_smoother(torch.tensor(ys), torch.tensor(times), mask, **given)
    for k in range(3):
        alone = smooth(times[k], ys[k], noises[k], float(q[k]), mask=mask[k : k + 1])
        for ours, theirs in zip(together, alone):
            np.testing.assert_allclose(ours[k], theirs, atol=1e-13)


def test_one_matrix_on_a_regular_grid() -> None:
    y = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = torch.arange(12.0)
    for order in (1, 2, 3):
        matrix = smoothing_matrix(grid, noise_ratio=0.3, order=order)
        want = wiener_smoother(y, grid, process_noise=0.6, observation_noise=2.0, order=order).mean
        torch.testing.assert_close(torch.einsum("imj,bj->bim", matrix, y), want, atol=1e-12, rtol=0)
    assert (smoothing_matrix(grid, noise_ratio=0.3, integral=True)[..., 0] == 0).all()


def test_float32_loses_nothing_but_its_rounding() -> None:
    y = torch.randn(2, 30, generator=torch.Generator().manual_seed(0)) + 1e4
    short = wiener_smoother(y, process_noise=0.3)
    exact = wiener_smoother(y.double(), process_noise=0.3)
    for ours, theirs in zip(short, exact):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())
    assert wiener_smoother(y.bfloat16(), process_noise=0.3).mean.dtype == torch.float32


def test_gradients() -> None:
    y = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    q = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    r = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 2] = False
    assert torch.autograd.gradcheck(
        lambda *x: wiener_smoother(x[0], None, mask, process_noise=x[1], observation_noise=x[2]).mean,
        (y, q, r),
    )


def drawn(ratio: float, noise: float, series: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """States of regular paths of order 2 and their noisy observations."""
    generator = torch.Generator().manual_seed(seed)
    one = torch.tensor(1.0, dtype=torch.float64)
    root = torch.linalg.cholesky(ratio * noise * wiener.diffusion(2, one))
    state, states = torch.zeros(series, 2, dtype=torch.float64), []
    for _ in range(length):
        states.append(state)
        white = torch.randn(series, 2, dtype=torch.float64, generator=generator)
        state = state @ wiener.transition(2, one).mT + white @ root.mT
    path = torch.stack(states, 1)
    white = torch.randn(series, length, dtype=torch.float64, generator=generator)
    return path, path[..., 0] + math.sqrt(noise) * white


def test_the_noise_is_found() -> None:
    _, y = drawn(0.01, 4.0, 40, 100)
    found = likely_noise(y)
    assert found is not None
    assert abs(found.log_shape - math.log(0.01)) < 0.35 and abs(found.scale / 4.0 - 1) < 0.06
    slower = likely_noise(y, 3600 * torch.arange(100.0))
    assert slower is not None
    assert math.isclose(slower.log_shape, found.log_shape - 3 * math.log(3600), abs_tol=1e-6)
    assert likely_noise(torch.arange(9.0)[None] / 7) is None


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("integral", [False, True])
def test_the_noise_at_a_known_ratio_is_that_of_a_dense_gaussian(order: int, integral: bool) -> None:
    """R = (y - m)' S^-1 (y - m) / (observed - order), with S for R = 1."""
    times, y, noise = made(order + 30)
    seen = np.arange(T) >= integral
    seen[4] = False
    data = functionals(order, times, derivative=-1 if integral else 0, knots=times)[seen]
    want = posterior(data, data, y[seen], noise[seen], 0.7).quadratic / (seen.sum() - order)
    given = row(y), torch.tensor(times), row(seen)
    options = {"relative_noise": row(noise), "order": order, "integral": integral}
    found = likely_noise(*given, **options, noise_ratio=0.7)
    assert found is not None
    assert found.log_shape == pytest.approx(math.log(0.7)) and found.scale == pytest.approx(want, rel=1e-7)
    free = likely_noise(*given, **options)
    again = likely_noise(*given, **options, noise_ratio=math.exp(free.log_shape))
    assert again.scale == pytest.approx(free.scale, rel=0.01)


@pytest.mark.parametrize("shared", [True, False])
def test_sums_of_many_series_are_the_sums_of_each(shared: bool) -> None:
    """More series than fit into one pass, with times and holes of their own or shared ones."""
    rng = np.random.default_rng(0)
    y, noise = torch.from_numpy(rng.normal(size=(90, 5))), torch.from_numpy(rng.uniform(0.5, 2, (90, 5)))
    times = torch.from_numpy(rng.uniform(0.5, 1.5, (1 if shared else 90, 5)).cumsum(1))
    times = times / times.diff(dim=1).mean(1, keepdim=True)  # one unit for all
    mask = torch.from_numpy(rng.random((90, 5)) < 0.9)
    mask[:, :3] = True
    whole, ratios = noise_sums(y, times, mask, relative_noise=noise)
    parts = torch.zeros_like(whole)
    for k in range(0, 90, 15):
        part = slice(k, k + 15)
        own = noise_sums(y[part], times if shared else times[part], mask[part], relative_noise=noise[part])
        torch.testing.assert_close(own[1], ratios)
        parts += own[0]
    torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-9)
    assert whole[0] == mask.sum() - 180


def test_bands_hold_the_truth() -> None:
    path, y = drawn(0.01, 1.0, 200, 60)
    belief = wiener_smoother(y, process_noise=0.01)
    inside = (belief.mean - path).abs() <= 1.96 * belief.variance.diagonal(dim1=-2, dim2=-1).sqrt()
    share = inside.double().mean((0, 1))
    assert ((share - 0.95).abs() < 0.01).all()  # 12000 values, correlated in each series


@pytest.mark.parametrize(("length", "most"), [(9, 400), (11, 11), (11, 4), (23, 9)])
def test_a_curve_is_a_mixture_of_dense_gaussians(length: int, most: int) -> None:
    """One for every smoothness, with its own noise, weighed by its likelihood; neighbours are averaged before."""
    rng = np.random.default_rng(length + most)
    steps, values = np.cumsum(rng.uniform(0.5, 2.0, length)) + 40, 3 + np.cumsum(rng.normal(size=length))
    curve = smooth_curve(steps.tolist(), values.tolist(), most=most)
    parts = np.array_split(np.arange(length), min(length, most))
    at, y = (np.array([data[part].mean() for part in parts]) for data in (steps, values))
    noise, n, step = (
        np.array([1 / len(part) for part in parts]),
        len(parts),
        (at[-1] - at[0]) / (len(parts) - 1),
    )
    time = (at - at[0]) / step
    data, slopes = (functionals(2, time, derivative=k, knots=time) for k in (0, 1))
    logs, lines = [], []
    for log_ratio in np.arange(6.0, -4 * math.log(n) - math.log(10) / 3, -math.log(10) / 3):
        found = [posterior(target, data, y, noise, math.exp(log_ratio)) for target in (data, slopes)]
        scale = found[0].quadratic / (n - 2)
        logs.append(-((n - 2) * math.log(scale) + found[0].log_determinant) / 2)
        lines.append([(one.mean, scale * np.diag(one.covariance)) for one in found])
    weight = np.exp(np.array(logs) - max(logs))
    weight[weight < 1e-3 * weight.sum()] = 0.0
    mean, variance = np.einsum("g,gkmt->mkt", weight / weight.sum(), np.array(lines))
    means = np.array(lines)[:, :, 0]
    half = 1.6448536 * np.sqrt(variance + np.einsum("g,gkt->kt", weight / weight.sum(), (means - mean) ** 2))
    np.testing.assert_allclose(curve.step, at, rtol=1e-12)
    for k, name in enumerate(("mean", "slope")):
        unit = step if k else 1.0
        np.testing.assert_allclose(getattr(curve, name), mean[k] / unit, rtol=1e-6, atol=1e-7)
        for side, bound in ((-1, "low"), (1, "high")):
            got = getattr(curve, bound if name == "mean" else f"slope_{bound}")
            np.testing.assert_allclose(got, (mean[k] + side * half[k]) / unit, rtol=1e-6, atol=1e-7)


def test_a_curve_for_people() -> None:
    path, y = drawn(1e-3, 1.0, 60, 30, seed=1)
    curves = [smooth_curve(range(30), line.tolist()) for line in y]
    for part, low, high in ((0, "low", "high"), (1, "slope_low", "slope_high")):
        lows, highs = (torch.tensor([getattr(curve, name) for curve in curves]) for name in (low, high))
        share = ((lows < path[..., part]) & (path[..., part] < highs)).double().mean()
        assert abs(share - 0.9) < 0.05, part  # 60 curves; with one likeliest smoothness the slope's is 0.70
    step, values = list(range(30)), y[0].tolist()
    values[3] = math.nan
    hole = smooth_curve(step, values)
    assert hole.step == [float(s) for s in step if s != 3] and len(set(map(len, hole))) == 1
    units = smooth_curve([10 * s for s in step], [100 * v for v in values])
    np.testing.assert_allclose(units.mean, 100 * np.array(hole.mean), rtol=1e-6)
    np.testing.assert_allclose(units.slope_low, 10 * np.array(hole.slope_low), rtol=1e-6)


def test_long_and_straight_curves() -> None:
    long = smooth_curve(range(2001), [math.sin(k / 300) for k in range(2001)], most=100)
    assert len(long.mean) == 100
    np.testing.assert_allclose(long.mean, np.sin(np.array(long.step) / 300), atol=1e-3)
    huge = smooth_curve([0, 1, 3, 7, 8], [1e300, -1e308, 1.7e308, 0.0, 1e300])
    assert all(map(math.isfinite, huge.mean)) and len(huge.low) == 5
    tiny = smooth_curve([0, 1, 3, 7, 8], [1e-310, 0.0, 2e-310, 0.0, 1e-310])
    assert all(map(math.isfinite, tiny.high))
    flat = smooth_curve([0, 1, 3, 7, 8], [0.5] * 5)
    np.testing.assert_allclose(flat.mean, 0.5, atol=1e-12)
    np.testing.assert_allclose(flat.high, flat.low, atol=1e-12)


Y = torch.zeros(1, 5)
BAD: dict[str, tuple[type[KalmanRLError], str, Callable[[], Any]]] = {
    "repeated": (
        NumericError,
        r"times: got 1.0, expected more than the time before; \(series, knot\) = \(0, 2\); sort",
        lambda: wiener_smoother(Y, torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0]), process_noise=1.0),
    ),
    "unsorted": (
        NumericError,
        "times: got 3.0, expected more",
        lambda: wiener_smoother(Y, torch.tensor([0.0, 4.0, 3.0, 5.0, 6.0]), process_noise=1.0),
    ),
    "NaN time": (
        NumericError,
        r"times: got nan, expected a finite number; \(series, knot\) = \(0, 2\); leave the observation out",
        lambda: wiener_smoother(Y, torch.tensor([0.0, 1.0, math.nan, 2.0, 3.0]), process_noise=1.0),
    ),
    "steps that no float64 holds": (
        NumericError,
        "times: got steps from 1e-200 to 1e-200, expected powers of them that a float64 holds; give times",
        lambda: wiener_smoother(Y, 1e-200 * torch.arange(5, dtype=torch.float64), process_noise=1.0),
    ),
    "too few times": (
        ShapeError,
        r"times: got torch.float32, shape \(4,\), expected \(5,\)",
        lambda: wiener_smoother(Y, torch.arange(4.0), process_noise=1.0),
    ),
    "NaN value": (
        NumericError,
        r"observation: got nan, .*; \(series, knot\) = \(0, 1\); mask it out",
        lambda: wiener_smoother(torch.tensor([[0.0, math.nan, 1.0]]), process_noise=1.0),
    ),
    "all missing": (
        NumericError,
        "observation: got 0 observed values in series 0, expected at least 2",
        lambda: wiener_smoother(Y, None, torch.zeros(1, 5, dtype=torch.bool), process_noise=1.0),
    ),
    "one row": (
        ShapeError,
        r"observation: got torch.float32, shape \(5,\)",
        lambda: wiener_smoother(Y[0], process_noise=1.0),
    ),
    "one value": (
        ShapeError,
        r"observation: got .* T >= 2",
        lambda: wiener_smoother(Y[:, :1], process_noise=1.0),
    ),
    "no noise": (
        NumericError,
        "observation_noise: got 0.0, expected a finite variance > 0",
        lambda: wiener_smoother(Y, process_noise=1.0, observation_noise=0.0),
    ),
    "negative q": (NumericError, "process_noise: got -1.0", lambda: wiener_smoother(Y, process_noise=-1.0)),
    "text": (NumericError, "process_noise: got '1'", lambda: wiener_smoother(Y, process_noise="1")),
    "no relative noise": (
        NumericError,
        "relative_noise: got 0.0, expected a finite variance > 0",
        lambda: likely_noise(Y, relative_noise=0.0),
    ),
    "no relative noise of a known ratio": (
        NumericError,
        "relative_noise: got -1.0, expected a finite variance > 0",
        lambda: likely_noise(Y, relative_noise=-1.0, noise_ratio=0.5),
    ),
    "R of others": (
        ShapeError,
        r"observation_noise: got shape \(3,\)",
        lambda: wiener_smoother(Y, process_noise=1.0, observation_noise=torch.ones(3)),
    ),
    "order": (
        ConfigError,
        "order: got 0, expected an integer from 1 to 4",
        lambda: wiener_smoother(Y, process_noise=1.0, order=0),
    ),
    "mask": (ShapeError, "mask: got torch.float32", lambda: wiener_smoother(Y, None, Y, process_noise=1.0)),
    "first integral": (
        NumericError,
        "mask: got an integral observed at the first time",
        lambda: wiener_smoother(Y, process_noise=1.0, integral=True),
    ),
    "short curve": (
        NumericError,
        "values: got 3 finite ones, expected at least 4",
        lambda: smooth_curve(range(4), [0.0, 1.0, math.nan, 2.0]),
    ),
    "steps of a curve": (
        NumericError,
        r"steps: got 1.0, expected more than the step before; \(place,\) = \(2,\); sort them",
        lambda: smooth_curve([0, 1, 1, 2], [0.0, 1.0, 0.5, 2.0]),
    ),
    "uneven curve": (ShapeError, "values: got 2, expected 3", lambda: smooth_curve(range(3), [0.0, 1.0])),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    kind, message, call = BAD[case]
    with pytest.raises(kind, match=f"^{message}") as caught:
        call()
    assert re.match(WORDED, str(caught.value))
