"""The most likely shape and scale against their definition, and bins of equal ratio."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial

from kalman_rl.numerics.likelihood import pack, peak
from kalman_rl.numerics.log_bins import bin_of, counted, edge

COUNT = 9.0
STEP = 0.7


def packed(curve: np.ndarray, log_scale: np.ndarray) -> torch.Tensor:
    """Sums whose profile is ``curve`` and whose best scales are ``exp(log_scale)``."""
    logs = -2 * curve - COUNT * (math.log(2 * math.pi) + log_scale) - COUNT
    return pack(COUNT, torch.from_numpy(COUNT * np.exp(log_scale)), torch.from_numpy(logs))


@pytest.mark.parametrize("limits", [(), (0,), (-1,), (0, -1)])
@pytest.mark.parametrize("best", range(7))
@pytest.mark.parametrize("seed", range(4))
def test_the_peak_is_that_of_the_polynomial_through_the_best_point_and_its_neighbours(
    seed: int, best: int, limits: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(seed)
    curve, log_scale = rng.normal(size=7), rng.normal(size=7)
    curve[best] = curve.max() + rng.uniform(0.1, 1)
    grid = STEP * np.arange(-3.0, 4.0)
    for limit in limits:
        grid[limit] = math.copysign(math.inf, grid[limit])
    found = peak(packed(curve, log_scale), grid.tolist(), COUNT)
    assert found is not None
    if not math.isfinite(grid[best]):
        assert found.log_shape == grid[best] and found.scale == pytest.approx(math.exp(log_scale[best]))
        return
    near = [i for i in range(7) if abs(i - best) <= 2 and math.isfinite(grid[i])]
    nodes = np.array(near) - best
    line, scales = (Polynomial.fit(nodes, part[near], len(near) - 1) for part in (curve, log_scale))
    fine = np.linspace(max(-1, nodes[0]), min(1, nodes[-1]), 100_001)
    at = (found.log_shape - grid[best]) / STEP
    assert at == pytest.approx(fine[line(fine).argmax()], abs=5.1e-4)
    assert found.scale == pytest.approx(math.exp(scales(at)), rel=1e-9)


def test_sums_that_determine_nothing() -> None:
    grid, flat = [0.0, 1.0, 2.0], np.zeros(3)
    good = packed(flat, flat)
    assert peak(good, grid, COUNT) is not None and peak(good, grid, COUNT + 0.5) is None
    for place, value in (
        (0, 0.0),
        (0, -1.0),
        (1, 0.0),
        (2, -1.0),
        (3, math.inf),
        (4, math.nan),
        (6, -math.inf),
    ):
        bad = good.clone()
        bad[place] = value
        assert peak(bad, grid, -9.0) is None, (place, value)
    for count, quadratic in ((1e-9, 1e305), (1e9, 1e-320)):  # R would be infinite or 0
        sums = pack(count, torch.full((1,), quadratic, dtype=torch.float64), torch.zeros(1))
        assert peak(sums, [math.inf], 0.0) is None


@pytest.mark.parametrize("bins", [1, 12, 240])
def test_bins_have_equal_ratios(bins: int) -> None:
    edges = [edge(k, bins) for k in range(bins + 1)]
    assert edges[0] == pytest.approx(1e-9) and edges[-1] == pytest.approx(1e3)
    np.testing.assert_allclose(np.diff(np.log(edges)), math.log(1e12) / bins)
    inside = torch.tensor([edge(k + part, bins) for k in range(bins) for part in (0.01, 0.99)])
    places = bin_of(inside.double(), bins)
    assert places.tolist() == [k for k in range(bins) for _ in range(2)]
    assert bin_of(torch.tensor([0.0, 1e-12, 1e4, math.inf]), bins).tolist() == [0, 0, bins - 1, bins - 1]
    values = torch.arange(2.0 * bins)
    total = counted(places, values, bins + 1)
    assert total.dtype == torch.float64 and total.tolist() == [4.0 * k + 1 for k in range(bins)] + [0.0]
