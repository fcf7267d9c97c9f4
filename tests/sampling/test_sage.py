"""SAGE's score against mpmath and autograd; and what wrong labels do to it."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError
from kalman_rl.sampling import sage as sl

quick = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
MARGINS = [-1e4, -800.0, -40.0, -3.0, -1e-9, 0.0, 1e-9, 0.7, 3.0, 40.0, 800.0, 1e4]


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- margins


def test_success_margin_is_the_logit() -> None:
    p = torch.linspace(0, 1, 21, dtype=torch.float64)
    np.testing.assert_allclose(sl.success_margin(p).numpy(), scipy.special.logit(p.numpy()), rtol=1e-12)
    assert sl.success_margin(torch.tensor([0.0, 1.0])).tolist() == [-math.inf, math.inf]


# ---- score


@pytest.mark.parametrize("damping", [0.0, 1e-50, 1e-6, 0.1, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_score_against_mpmath(damping: float, dtype: torch.dtype) -> None:
    margin = torch.tensor(MARGINS, dtype=dtype)
    ours = sl.log_score(margin, damping)
    assert ours.dtype == dtype
    with mpmath.workdps(9000):
        for m, found in zip(margin.tolist(), ours.tolist()):
            x = mpmath.mpf(m)
            g = 1 / (1 + mpmath.exp(x))
            h = g / (1 + mpmath.exp(-x))
            expected = float(mpmath.log(g**2 / (h + mpmath.mpf(damping))))
            tolerance = 1e-12 if dtype == torch.float64 else 1e-6
            assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_no_damping_is_exactly_the_margin() -> None:
    margin = double(MARGINS)
    assert torch.equal(sl.log_score(margin, 0.0), -margin)
    assert torch.equal(sl.score(margin, damping=0.0), torch.exp(-margin))


@quick
@given(damping=st.sampled_from([1e-3, 0.1, 1.0]), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_limits(damping: float, dtype: torch.dtype) -> None:
    ends = torch.tensor([-math.inf, -1e4, 0.0, 1e4, math.inf], dtype=dtype)
    expected = torch.tensor([1 / damping, 1 / damping, 0.25 / (0.25 + damping), 0.0, 0.0], dtype=dtype)
    torch.testing.assert_close(sl.score(ends, damping=damping), expected)


def test_score_is_autograds_gradient_and_hessian() -> None:
    for m in np.linspace(-6, 6, 25).tolist():
        x = double([m])[0].requires_grad_()
        loss = torch.nn.functional.softplus(-x)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (hessian,) = torch.autograd.grad(gradient, x)
        expected = (gradient**2 / (hessian + 0.3)).item()
        assert sl.score(double([m]), damping=0.3).item() == pytest.approx(expected, rel=1e-12)


def test_half_the_undamped_score_is_the_newton_gain_near_the_optimum() -> None:
    """Of a quadratic with the loss's gradient and curvature; the damped score is never above it."""
    m = torch.linspace(-3, 3, 31, dtype=torch.float64)
    g, h = torch.sigmoid(-m), torch.sigmoid(m) * torch.sigmoid(-m)
    step = g / h
    gain = g * step - 0.5 * h * step**2
    torch.testing.assert_close(sl.score(m, damping=0.0) / 2, gain)
    assert (sl.score(m, damping=0.1) / 2 < gain).all()


@quick
@given(seed=seeds, damping=st.sampled_from([0.0, 0.1, 1.0]))
def test_monotone_in_margin_and_variance(seed: int, damping: float) -> None:
    """The score alone never re-orders margins: pools, variance and limit are what does."""
    g = torch.Generator().manual_seed(seed)
    margin = (5 * torch.randn(20, generator=g, dtype=torch.float64)).sort().values
    assert (sl.log_score(margin, damping).diff() <= 1e-12).all()
    variance = torch.rand(20, generator=g, dtype=torch.float64)
    ours = sl.score(margin, damping=0.1, variance=variance, penalty=2.0)
    torch.testing.assert_close(ours, sl.score(margin, damping=0.1) / (1 + 2 * variance))
    assert torch.equal(sl.score(margin, variance=variance, penalty=0.0), sl.score(margin))


def test_limit_is_inclusive_and_detached() -> None:
    margin = torch.tensor([-5.1, -5.0, 0.0], requires_grad=True)
    ours = sl.score(margin, limit=5.0)
    assert (ours > 0).tolist() == [False, True, True] and not ours.requires_grad
    assert sl.score(torch.tensor([-math.inf]), damping=0.0, limit=50.0).item() == 0


# ---- wrong labels


def noisy_pairs(seed: int, rows: int = 20_000, wrong: float = 0.1) -> tuple[Tensor, Tensor]:
    """A policy that is mostly right, N(2, 2) margins; one label in ten flipped, which flips the margin."""
    g = torch.Generator().manual_seed(seed)
    margin = 2 + 2 * torch.randn(rows, generator=g, dtype=torch.float64)
    flipped = torch.rand(rows, generator=g) < wrong
    return torch.where(flipped, -margin, margin), flipped


def share_of_wrong(margin: Tensor, flipped: Tensor, fraction: float, **options: float) -> float:
    scores = sl.score(margin, **options)
    best = scores.argsort(descending=True, stable=True)[: math.ceil(fraction * len(scores))]
    return flipped[best].double().mean().item()


def expected_share(fraction: float, limit: float, wrong: float = 0.1) -> float:
    """Of wrong labels among the lowest margins above ``-limit``, for infinitely many pairs."""
    good, bad = scipy.stats.norm(2, 2).cdf, scipy.stats.norm(-2, 2).cdf
    start = {"good": float(good(-limit)), "bad": float(bad(-limit))}

    def kept(end: float) -> float:
        return (1 - wrong) * (good(end) - start["good"]) + wrong * (bad(end) - start["bad"])

    end = scipy.optimize.brentq(lambda x: kept(x) - fraction, -20, 20)
    return wrong * (bad(end) - start["bad"]) / fraction


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.1])
def test_best_scores_are_mostly_wrong_labels_and_a_limit_lowers_their_share(fraction: float) -> None:
    """One label in ten is wrong; among the best-scored rows it is most of them. A limit helps
    and does not cure."""
    rows = 60_000
    margin, flipped = noisy_pairs(0, rows)
    found = {}
    for limit in (math.inf, 3.0, 1.0):
        found[limit] = share_of_wrong(margin, flipped, fraction, limit=limit)
        expected = expected_share(fraction, limit)
        error = math.sqrt(expected * (1 - expected) / (fraction * rows))
        assert abs(found[limit] - expected) < 4 * error
    assert found[math.inf] > 0.5 and found[math.inf] > found[3.0] > found[1.0] > 0.1


def test_every_order_of_one_score_has_the_same_wrong_labels() -> None:
    """Damping does not help against them: it changes the scores and not their order."""
    margin, flipped = noisy_pairs(0)
    shares = {share_of_wrong(margin, flipped, 0.05, damping=damping) for damping in (1e-3, 0.1, 1.0)}
    assert len(shares) == 1


# ---- errors

ONE = torch.ones(3)
HOLE = torch.tensor([1.0, math.nan, 1.0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sl.log_score(HOLE), "margin: got nan at row 1 .1 such rows., expected numbers"),
        (lambda: sl.log_score(ONE, -0.1), "damping: got -0.1"),
        (lambda: sl.log_score(ONE, math.nan), "damping: got nan"),
        (lambda: sl.score(ONE, limit=-1.0), "limit: got -1.0"),
        (lambda: sl.score(ONE, limit=math.nan), "limit: got nan"),
        (lambda: sl.score(ONE, penalty=math.inf), "penalty: got inf"),
        (lambda: sl.score(ONE, variance=-ONE), "variance: got -1.0 at row 0"),
        (lambda: sl.score(ONE, variance=HOLE), "variance: got nan at row 1"),
        (lambda: sl.success_margin(2 * ONE), "mean: got 2.0 at row 0"),
        (lambda: sl.success_margin(HOLE), "mean: got nan at row 1"),
    ],
)
def test_bad_numbers(call: Any, message: str) -> None:
    with pytest.raises(NumericError, match=f"^{message}"):
        call()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sl.log_score(torch.ones(3, 1)), r"margin: got shape \(3, 1\), expected \(N,\)"),
        (lambda: sl.score(ONE, variance=torch.ones(2)), r"variance: got shape \(2,\), expected \(3,\)"),
    ],
)
def test_bad_shapes(call: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=f"^({message})"):
        call()
