"""The compiled update of the feature tracker against the QR form that defines it, and in hard float32 cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl import KalmanPreferenceTracker
from kalman_rl.kernels import jit
from kalman_rl.numerics import feature_filter as tracker

pytestmark = pytest.mark.skipif(not jit.usable(), reason="numba is not installed or switched off")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_qr(belief: KalmanPreferenceTracker, *batch: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(jit.SWITCH, "1")
        return belief.update(*batch)


@given(st.integers(0, 1000), st.sampled_from([1, 3, 8]), st.sampled_from([2, 8, 40]), st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_equals_the_qr_form(seed: int, rows: int, width: int, masked: bool) -> None:
    ours, theirs = (KalmanPreferenceTracker(8, Q_val=0.1, R_val=0.3) for _ in range(2))
    for step in range(4):
        x, y = normal(rows, width, seed=seed + step), normal(rows, seed=seed + step + 99)
        y[rows // 2] = math.nan if step == 2 else y[rows // 2]
        mask = (normal(rows, seed=step) > 0) if masked else None
        copies = x.clone(), y.clone()
        got, expected = ours.update(x, y, mask), by_qr(theirs, x, y, mask)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close((x, y), copies, rtol=0, atol=0, equal_nan=True)
        ours.predict()
        theirs.predict()
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.covariance, theirs.covariance, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.information(), theirs.information(), rtol=1e-9, atol=1e-10)
    assert torch.equal(ours.root, ours.root.tril())


def test_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    belief, made = KalmanPreferenceTracker(4), []
    absorber = tracker.Absorber
    monkeypatch.setattr(tracker, "Absorber", lambda *args: made.append(args) or absorber(*args))
    for seed in range(3):
        belief.update(normal(2, 4, seed=seed), normal(2, seed=seed))
    assert len(made) == 1  # the state stays where the loop has it
    belief.predict()
    belief.update(normal(2, 4), normal(2))
    assert len(made) == 2


@pytest.mark.parametrize("strength", [1e4, 1e6, 1e8])
@pytest.mark.parametrize("low_rank", [False, True])
def test_strong_priors_in_float32(strength: float, low_rank: bool) -> None:
    """P_0 |h|^2 / R up to 1e8, 600 rows, d = 32: no negative eigenvalue, and the covariance is right."""
    options = {"Q_val": 0.0, "R_val": 32 / strength, "noise_strength": None}
    single = KalmanPreferenceTracker(32, dtype=torch.float32, **options)
    exact = KalmanPreferenceTracker(32, **options)
    x = (
        normal(600, 4) @ normal(4, 32, seed=1) / 2 + 1e-3 * normal(600, 32, seed=2)
        if low_rank
        else normal(600, 32)
    )
    x, y = x.float(), normal(600, seed=3).float()
    for row in range(600):
        single.update(x[row : row + 1], y[row : row + 1])
    by_qr(exact, x.double(), y.double())
    assert torch.linalg.eigvalsh(single.covariance).min() > 0
    error = (single.covariance - exact.covariance).norm() / exact.covariance.norm()
    assert error < 5e-4


def test_a_refused_batch_changes_nothing() -> None:
    belief = KalmanPreferenceTracker(4)
    belief.update(normal(3, 4), normal(3))
    mean, root = belief.mean.clone(), belief.root.clone()
    bad = normal(2, 4)
    bad[1, 2] = math.inf
    with pytest.raises(Exception, match="phi: got inf at row 1, column 2"):
        belief.update(bad, normal(2))
    assert torch.equal(belief.mean, mean) and torch.equal(belief.root, root)
