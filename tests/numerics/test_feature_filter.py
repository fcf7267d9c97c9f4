"""The feature filter against closed ridge regression, refitting, statsmodels and its own dual form."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from statsmodels.tsa.statespace.kalman_filter import KalmanFilter
from torch import Tensor

from kalman_rl import KalmanPreferenceTracker
from kalman_rl.errors import ConfigError, NumericError, ShapeError
from kalman_rl.kernels import jit
from tests.oracles.gram import prefix_predictions
from tests.project.test_borders import WORDED

NAN = math.nan


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(dim: int, **options: Any) -> KalmanPreferenceTracker:
    return KalmanPreferenceTracker(dim, **{"noise_strength": None, **options})


def same_state(a: KalmanPreferenceTracker, b: KalmanPreferenceTracker, **tolerance: float) -> None:
    torch.testing.assert_close(a.mean, b.mean, **tolerance)
    torch.testing.assert_close(a.covariance, b.covariance, **tolerance)


def test_without_drift_it_is_ridge_regression() -> None:
    x, y = normal(90, 6), normal(90, seed=1)
    tracker = plain(6, Q_val=0.0, R_val=0.7, P_val=2.0)
    for rows in torch.arange(90).split(13):
        tracker.update(x[rows], y[rows])
    precision = x.T @ x / 0.7 + torch.eye(6, dtype=torch.float64) / 2.0
    torch.testing.assert_close(
        tracker.mean, torch.linalg.solve(precision, x.T @ y / 0.7), rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(tracker.covariance, torch.linalg.inv(precision), rtol=1e-10, atol=1e-12)
    total, prior = torch.linalg.slogdet(precision)[1], 6 * math.log(1 / 2.0)
    torch.testing.assert_close(tracker.information(), (total - prior) / 2)


def test_leave_one_out_equals_refitting_without_the_row() -> None:
    tracker = plain(5, R_val=0.4)
    tracker.update(normal(20, 5, seed=3), normal(20, seed=4))
    tracker.predict(3.0)
    x, y = normal(12, 5, seed=5), normal(12, seed=6)
    mask = torch.arange(12) != 7
    residual = tracker.loo_residuals(x, y, mask)
    for i in mask.nonzero().flatten().tolist():
        other = plain(5, R_val=0.4)
        other.load_state_dict(tracker.state_dict())
        keep = mask & (torch.arange(12) != i)
        other.update(x[keep], y[keep])
        torch.testing.assert_close(residual[i], y[i] - x[i] @ other.mean, rtol=1e-10, atol=1e-11)
    assert residual[7] == 0


def test_own_reward_never_moves_own_leave_one_out_prediction() -> None:
    tracker = KalmanPreferenceTracker(4)
    tracker.update(normal(9, 4), normal(9, seed=1))
    x, y = normal(6, 4, seed=2), normal(6, seed=3)
    before = y - tracker.loo_residuals(x, y)
    for j in range(6):
        changed = y.clone()
        changed[j] = 0.0  # so that the residual is minus the prediction, without rounding
        residual = tracker.loo_residuals(x, changed)
        changed[j] = 1e6
        assert changed[j] - tracker.loo_residuals(x, changed)[j] == pytest.approx(
            -residual[j].item(), abs=1e-9
        )
        assert before[j].item() == pytest.approx(-residual[j].item(), abs=1e-12)


def test_order_of_rows_and_splitting_do_not_matter() -> None:
    x, y = normal(150, 7), normal(150, seed=1)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(2))
    together, shuffled, single = plain(7), plain(7), plain(7)
    together.update(x, y)
    shuffled.update(x[order], y[order])
    for i in range(150):
        single.update(x[i : i + 1], y[i : i + 1])
    same_state(together, shuffled, rtol=1e-10, atol=1e-12)
    same_state(together, single, rtol=1e-10, atol=1e-12)


def test_one_dimension_is_the_local_level_model() -> None:
    y = normal(60).numpy()
    y[[7, 20, 21]] = NAN
    reference = KalmanFilter(k_endog=1, k_states=1, design=[[1.0]], transition=[[1.0]], selection=[[1.0]])
    reference["state_cov"], reference["obs_cov"] = np.array([[0.3]]), np.array([[1.4]])
    reference.initialize_known(np.zeros(1), np.ones((1, 1)))
    reference.tolerance = 0  # no steady-state shortcut
    reference.bind(y[None])
    expected = reference.filter()
    tracker, one = plain(1, Q_val=0.3, R_val=1.4), torch.ones(1, 1)
    for t, value in enumerate(y):
        seen = tracker.update(one, torch.tensor([value]))
        if not np.isnan(value):
            assert seen.innovation.item() == pytest.approx(expected.forecasts_error[0, t], abs=1e-12)
            assert seen.innovation_variance.item() == pytest.approx(expected.forecasts_error_cov[0, 0, t])
        assert tracker.value(one).mean.item() == pytest.approx(expected.filtered_state[0, t], abs=1e-12)
        assert tracker.value(one).variance.item() == pytest.approx(expected.filtered_state_cov[0, 0, t])
        tracker.predict()


@pytest.mark.parametrize("process_noise", [0.0, 0.2])
def test_dual_form_equals_the_sequential_filter(process_noise: float) -> None:
    phi, y = normal(3, 9, 20), normal(3, 9, seed=1)
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) > 0.25
    y[~mask] = NAN
    dual = prefix_predictions(
        phi, y, mask, prior_variance=0.6, process_noise=process_noise, observation_noise=0.5
    )
    for b in range(3):
        tracker = plain(20, Q_val=process_noise, R_val=0.5, P_val=0.6)
        for i in range(9):
            if mask[b, i]:
                expected = tracker.predictive(phi[b, i : i + 1])
                torch.testing.assert_close(dual.mean[b, i], expected.mean[0], rtol=1e-9, atol=1e-11)
                torch.testing.assert_close(dual.variance[b, i], expected.variance[0], rtol=1e-9, atol=1e-11)
            tracker.update(phi[b, i : i + 1], y[b, i : i + 1])
            tracker.predict()


def test_width_depends_on_the_rewards() -> None:
    """Equal features and counts: quiet rewards leave a narrower belief than noisy ones."""
    phi, quiet, loud = torch.ones(8, 1), KalmanPreferenceTracker(1), KalmanPreferenceTracker(1)
    quiet.update(phi, torch.ones(8))
    loud.update(phi, torch.tensor([6.0, -4.0] * 4))
    assert quiet.value(phi).variance[0] < 0.5 * loud.value(phi).variance[0]
    assert quiet.information(phi[:1]) > loud.information(phi[:1])
    assert quiet.noise < 1 < loud.noise


def test_learned_noise_is_the_conjugate_estimate() -> None:
    """R = (strength R_val + sum nu' S^-1 nu R_val) / (strength + n), by dense algebra."""
    x, y = normal(40, 3), 2.5 * normal(40, seed=1)
    tracker = KalmanPreferenceTracker(3, Q_val=0.0, R_val=0.8, noise_strength=5.0)
    tracker.update(x[:25], y[:25])
    tracker.update(x[25:], y[25:])
    total = x @ x.T + 0.8 * torch.eye(40, dtype=torch.float64)
    expected = 0.8 * (5.0 + y @ torch.linalg.solve(total, y)) / 45.0
    assert tracker.noise == pytest.approx(expected.item(), rel=1e-10)
    fixed = plain(3, Q_val=0.0, R_val=0.8)
    fixed.update(x, y)
    torch.testing.assert_close(tracker.mean, fixed.mean, rtol=1e-9, atol=1e-11)


def test_wide_features_are_projected_and_narrow_ones_kept() -> None:
    wide, narrow = KalmanPreferenceTracker(16), KalmanPreferenceTracker(16)
    state = torch.get_rng_state()
    x, y = normal(30, 100), normal(30, seed=1)
    first = wide.predictive(x)
    assert wide.projection is None  # asking changes nothing
    wide.update(x, y)
    assert wide.projection is not None and wide.projection.dimension_out == 16
    torch.testing.assert_close(first.variance, wide.projection(x).square().sum(1) + 1.0)
    narrow.update(x[:, :3], y)
    ridge = plain(3)
    ridge.update(x[:, :3], y)
    torch.testing.assert_close(narrow.mean[:3], ridge.mean, rtol=1e-9, atol=1e-11)
    assert (narrow.mean[3:] == 0).all() and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [2, 4, 9])
def test_compiled_updates_equal_those_by_qr(
    width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than one decomposition takes, some masked, some missing, some none at all."""
    fast, plain_one = (
        KalmanPreferenceTracker(4, Q_val=0.1, R_val=0.7, P_val=2.0, dtype=dtype) for _ in range(2)
    )
    x, y = normal(150, width), normal(150, seed=1)
    y[3] = NAN
    mask = torch.rand(150, generator=torch.Generator().manual_seed(2)) > 0.1
    close = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    for rows, given in ((slice(0, 1), None), (slice(0, 150), mask), (slice(5, 9), ~mask & mask)):
        seen = []
        for tracker, off in ((fast, ""), (plain_one, "1")):
            monkeypatch.setenv(jit.SWITCH, off)
            seen.append(tracker.update(x[rows], y[rows], None if given is None else given[rows]))
            tracker.predict(2.0)
            assert all(part.dtype == torch.float64 for part in seen[-1])
        for one, other in zip(*seen):
            torch.testing.assert_close(one, other, **close)
        same_state(fast, plain_one, **close)
        torch.testing.assert_close(fast.information(), plain_one.information(), **close)
        torch.testing.assert_close(fast.predictive(x[:3]), plain_one.predictive(x[:3]), **close)
        assert fast.state_dict()["seen"] == plain_one.state_dict()["seen"]
    nobody = fast.loo_residuals(x[:4], y[:4], torch.zeros(4, dtype=torch.bool))
    assert nobody.dtype == torch.float64 and nobody.tolist() == [0.0] * 4


def soak(updates: int) -> None:
    """float32, d = 128, one row at a time: the covariance stays symmetric positive definite and right.

    Time passes every ten rows, so a float64 twin may take ten rows at once: the same in exact arithmetic.
    """
    generator = torch.Generator().manual_seed(0)
    single, double = plain(128, dtype=torch.float32), plain(128, dtype=torch.float64)
    directions = 10 * torch.randn(40, 128, generator=generator)  # fewer than d: some are never seen
    for _ in range(updates // 10):
        rows = torch.randint(40, (10,), generator=generator)
        x, y = directions[rows], torch.randn(10, generator=generator)
        single.predict()
        double.predict()
        double.update(x, y)
        for i in range(10):
            single.update(x[i : i + 1], y[i : i + 1])
    values = torch.linalg.eigvalsh(single.covariance)
    assert torch.equal(single.covariance, single.covariance.T) and values.min() > 0
    torch.testing.assert_close(values, torch.linalg.eigvalsh(double.covariance), rtol=0.02, atol=0)
    seen = single.value(directions[:5]), double.value(directions[:5])
    torch.testing.assert_close(seen[0].mean, seen[1].mean, rtol=1e-2, atol=2e-3)


def test_float32_stays_positive_definite() -> None:
    soak(3000)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_float32_stays_positive_definite_for_1e5_updates() -> None:
    soak(100_000)


def test_state_continues_bit_for_bit_and_refuses_strangers(tmp_path) -> None:
    tracker = KalmanPreferenceTracker(16)
    tracker.update(normal(30, 100), normal(30, seed=1))
    torch.save(tracker.state_dict(), tmp_path / "state.pt")
    restored = KalmanPreferenceTracker(16)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one in (tracker, restored):
        one.predict(2.0)
        one.update(normal(5, 100, seed=2), normal(5, seed=3))
    same_state(tracker, restored, rtol=0, atol=0)
    assert tracker.noise == restored.noise
    before, state = tracker.mean.clone(), tracker.state_dict()
    for change in ({"format": 99}, {"settings": {}}, {"mean": torch.zeros(3)}):
        with pytest.raises(ConfigError, match="^tracker state: got"):
            tracker.load_state_dict({**state, **change})
    with pytest.raises(NumericError, match="^tracker state: got NaN"):
        tracker.load_state_dict({**state, "mean": torch.full((16,), NAN)})
    for name in ("surprise", "seen", "width"):
        with pytest.raises(ConfigError, match=f"^tracker state: got -1.5 as {name}, expected"):
            tracker.load_state_dict({**state, name: -1.5})
    assert torch.equal(tracker.mean, before)


@pytest.mark.parametrize(
    ("phi", "y", "mask", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(3), None, ShapeError, r"phi: got .*\(3,\)"),
        (torch.zeros(0, 4), torch.zeros(0), None, ShapeError, "y: got .*at least one row"),
        (torch.zeros(3, 5), torch.zeros(3), None, ShapeError, "phi: got width 5, expected 4"),
        (torch.zeros(3, 4), torch.zeros(2), None, ShapeError, r"y: got \(2,\), expected real \(3,\)"),
        (torch.zeros(3, 4).long(), torch.zeros(3), None, ShapeError, "phi: got torch.int64"),
        (torch.full((3, 4), NAN), torch.zeros(3), None, NumericError, "phi: got nan at row 0, column 0"),
        (torch.zeros(3, 4), torch.tensor([0, 0, math.inf]), None, NumericError, "y: got inf at row 2"),
        (torch.zeros(3, 4), torch.zeros(3), torch.ones(3), ShapeError, "mask: got torch.float32"),
    ],
)
def test_bad_batches_change_nothing(phi, y, mask, error, message) -> None:
    tracker = KalmanPreferenceTracker(4)
    tracker.update(normal(6, 4), normal(6, seed=1))
    mean, root, noise = tracker.mean.clone(), tracker.root.clone(), tracker.noise
    for call in (tracker.update, tracker.loo_residuals):
        with pytest.raises(error, match=f"^{message}") as caught:
            call(phi, y, mask)
        assert re.match(WORDED, str(caught.value))
    with pytest.raises(NumericError, match="^gap: got -1"):
        tracker.predict(-1)
    assert torch.equal(tracker.mean, mean) and torch.equal(tracker.root, root) and tracker.noise == noise


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 0},
        {"dim": 2.5},
        {"Q_val": -1.0},
        {"R_val": 0.0},
        {"R_val": NAN},
        {"P_val": math.inf},
        {"noise_strength": 0.0},
        {"dtype": torch.float16},
    ],
)
def test_bad_settings(options: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, NumericError), match=f"^{next(iter(options))}: got"):
        KalmanPreferenceTracker(**options)


def test_a_tracker_shows_its_settings_and_what_it_saw() -> None:
    tracker = KalmanPreferenceTracker(dim=2, noise_strength=None)
    tracker.update(torch.ones(3, 2), torch.ones(3))
    shown = "<KalmanPreferenceTracker(dim=2, Q_val=1e-05, R_val=1, P_val=1), rewards: 3, R: 1>"
    assert repr(tracker) == shown
