"""The scalar filter per prompt against RLOO, statsmodels, brute force; pooled noise and kurtosis."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.tsa.statespace.kalman_filter import KalmanFilter

from kalman_rl.beliefs import BetaBelief, GaussianBelief, RegressionBelief, SPOBelief
from kalman_rl.beliefs.groups import group_rewards
from kalman_rl.beliefs.noise import RewardNoise
from kalman_rl.objectives.advantage.group import leave_one_out

NAN = math.nan


def test_diffuse_prior_is_leave_one_out() -> None:
    belief = GaussianBelief(variance=math.inf, observation_noise=1.0, scale=False)
    reward = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 1, 0])
    ours = belief.advantages(group.tolist(), reward, step=0).advantage
    torch.testing.assert_close(ours, leave_one_out(reward, group), rtol=1e-12, atol=1e-12)
    belief.update(group.tolist(), reward, step=0)
    assert torch.isfinite(belief.predict([0, 1, 2], step=0).variance).all()


def test_certain_prior_is_a_constant_baseline() -> None:
    belief = GaussianBelief(variance=0.0, process_noise=0.0, observation_noise=1.0, mean=0.4, scale=False)
    ids, reward = ["a", "b", "a"], torch.tensor([1.0, 0.0, 5.0])
    for step in range(3):
        assert (belief.advantages(ids, reward, step=step).baseline == 0.4).all()
        belief.update(ids, reward, step=step)


def test_scalar_filter_equals_statsmodels_local_level() -> None:
    """A level that moves once per step, seen at irregular steps, groups of one to four."""
    rng = np.random.default_rng(0)
    q, r, steps = 0.2, 0.7, 40
    sizes = np.where(rng.random(steps) < 0.5, 0, rng.integers(1, 5, steps))
    rewards = [rng.normal(size=n) for n in sizes]
    mean = np.array([x.mean() if len(x) else NAN for x in rewards])
    model = KalmanFilter(k_endog=1, k_states=1, design=[[1.0]], transition=[[1.0]], selection=[[1.0]])
    model["state_cov"] = np.array([[q]])
    model.tolerance = 0
    model.bind(mean[None])
    model["obs_cov"] = (r / np.maximum(sizes, 1))[None, None]
    model.initialize_known(np.array([0.5]), np.array([[0.25]]))
    expected = model.filter()
    belief = GaussianBelief(process_noise=q, observation_noise=r)
    belief.update(["a"], torch.tensor([0.0]), step=0)  # creates the row; then set to the prior at step 0
    belief._table.columns["mean"][0], belief._table.columns["variance"][0] = 0.5, 0.25
    for t in range(steps):
        before = belief.predict(["a"], step=t)
        assert before.mean.item() == pytest.approx(expected.predicted_state[0, t], abs=1e-12)
        assert before.variance.item() == pytest.approx(expected.predicted_state_cov[0, 0, t], abs=1e-12)
        if sizes[t]:
            belief.update(["a"] * int(sizes[t]), torch.from_numpy(rewards[t]), step=t, part=1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(1, 8))
def test_a_group_at_once_equals_one_reward_after_another(seed: int, size: int) -> None:
    reward = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options = {"process_noise": 0.1, "observation_noise": 0.5}
    once, steps = GaussianBelief(**options), GaussianBelief(**options)
    once.update(["a"] * size, reward, step=4)
    for i in torch.randperm(size).tolist():
        steps.update(["a"], reward[i : i + 1], step=4, part=i)
    torch.testing.assert_close(
        once.predict(["a"], step=4), steps.predict(["a"], step=4), rtol=1e-12, atol=1e-12
    )


def test_leave_one_out_baseline_is_the_posterior_without_the_reward() -> None:
    options = {"process_noise": 0.1, "observation_noise": 0.5, "scale": False}
    reward = torch.randn(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    belief = GaussianBelief(**options)
    baseline = belief.advantages(["a"] * 5, reward, step=0).baseline
    for j in range(5):
        other = GaussianBelief(**options)
        other.update(["a"] * 4, reward[torch.arange(5) != j], step=0)
        assert baseline[j].item() == pytest.approx(other.predict(["a"], step=0).mean.item(), abs=1e-13)


def test_parts_of_a_step_add_up_to_the_whole() -> None:
    whole = GaussianBelief(process_noise=0.1, observation_noise=0.5)
    parts = GaussianBelief(process_noise=0.1, observation_noise=0.5)
    for belief in (whole, parts):
        belief.update(["a"], torch.tensor([0.0]), step=0)
    whole.update(["a"] * 4, torch.tensor([1.0, 0.0, 1.0, 1.0]), step=5)
    parts.update(["a"] * 2, torch.tensor([1.0, 0.0]), step=5)
    parts.update(["a"] * 2, torch.tensor([1.0, 1.0]), step=5, part=1)
    torch.testing.assert_close(whole.predict(["a"], step=6), parts.predict(["a"], step=6), rtol=1e-12, atol=0)


def test_late_reward_is_an_observation_with_the_drift_added() -> None:
    belief = GaussianBelief(process_noise=0.1, observation_noise=0.5, mean=0.0, variance=1.0)
    belief.update(["a"], torch.tensor([1.0]), step=8)
    m, p = (t.item() for t in belief.predict(["a"], step=8))
    belief.update(["a"], torch.tensor([3.0]), step=5)
    gain = p / (p + 0.5 + 3 * 0.1)
    after = belief.predict(["a"], step=8)
    assert after.mean.item() == pytest.approx(m + gain * (3.0 - m), abs=1e-14)
    assert after.variance.item() == pytest.approx((1 - gain) * p, abs=1e-14)
    assert belief.predict(["a"], step=9).variance.item() == pytest.approx(
        (1 - gain) * p + 0.1
    )  # clock still at 8


# ---- noise


def test_pooled_noise_and_kurtosis_find_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)
    normal, heavy = RewardNoise(), RewardNoise()
    for _ in range(60):
        ids = [i for i in range(50) for _ in range(2 + i % 5)]
        level = torch.arange(50, dtype=torch.float64)[ids]
        eps = torch.randn(len(ids), generator=generator, dtype=torch.float64)
        chi = torch.randn(3, len(ids), generator=generator, dtype=torch.float64).square().mean(0).sqrt()
        values = torch.arange(50, dtype=torch.float64)
        normal.learn(group_rewards(ids, level + 2 * eps), values, torch.full((50,), 0.1))
        heavy.learn(group_rewards(ids, level + eps / chi), values, torch.full((50,), 0.1))
    assert normal.pooled == pytest.approx(4.0, rel=0.03) and abs(normal.excess_kurtosis) < 0.3
    assert not normal.robust and heavy.robust and heavy.excess_kurtosis > 5


def test_binary_rewards_never_switch_robust_mode_on() -> None:
    belief = RegressionBelief()
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        reward = torch.bernoulli(torch.full((128,), 0.02), generator=generator)
        belief.update([i // 4 for i in range(128)], reward, step=step)
    noise = belief.reward_noise
    assert noise.binary and noise.excess_kurtosis > 5 and not noise.robust


@pytest.mark.parametrize("name", ["gaussian", "beta", "spo"])
def test_given_noise_is_never_made_robust_by_chance(name: str) -> None:
    """One reward of ten far off: the posterior of a filter with known noise does not depend on rewards."""
    if name == "gaussian":
        options = {"process_noise": 0.0, "observation_noise": 1.0, "mean": 0.0, "variance": 1.0}
        belief = GaussianBelief(**options)
        belief.update(["a"] * 10, torch.tensor([0.0] * 9 + [10.0]), step=0)
        assert belief.reward_noise.robust  # heavy tails were seen
        assert belief.predict(["a"], step=0).variance.item() == pytest.approx(1 / 11, abs=1e-12)
        assert belief.predictive(["a"], step=0).variance.item() == pytest.approx(12 / 11, abs=1e-12)
        found = belief.advantages(["b"] * 4, torch.tensor([0.0, 0.0, 0.0, 100.0]), step=0)
        torch.testing.assert_close(found.baseline, torch.tensor([25.0, 25.0, 25.0, 0.0], dtype=torch.float64))
        return
    belief = BetaBelief(prior=(1.0, 1.0), forgetting=1.0) if name == "beta" else SPOBelief(rho=1.0)
    start = 1.0 if name == "beta" else 0.5
    reward = torch.tensor([0.5] * 19 + [1.0])
    belief.update(["a"] * 20, reward, step=0)
    a, b = start + 10.5, start + 9.5
    expected = a * b / ((a + b) ** 2 * (a + b + 1))
    assert belief.predict(["a"], step=0).variance.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("make", [GaussianBelief, RegressionBelief])
def test_learned_noise_is_robust_in_prediction_and_baseline_together(make: type) -> None:
    belief, generator = make(), torch.Generator().manual_seed(0)
    ids = [i for i in range(16) for _ in range(4)]
    for step in range(6):
        reward = torch.randn(64, generator=generator, dtype=torch.float64)
        reward[torch.rand(64, generator=generator) < 0.05] *= 10
        belief.update(ids, reward, step=step)
    assert belief.reward_noise.robust
    value, new = belief.predict([0], step=6), belief.predictive([0], step=6)
    plain = belief._prior(belief._table.rows([0]), torch.ones(1).double(), 6, None)
    assert value.variance.item() == pytest.approx(1.7 * plain.value.variance.item())
    assert (new.variance - value.variance).item() == pytest.approx(1.7 * plain.noise.item())
    seen = belief.update([0], torch.tensor([0.0]), step=6)
    assert seen.innovation_variance.item() == pytest.approx(new.variance.item())
    far = belief.advantages([0] * 4, torch.tensor([0.0, 0.0, 0.0, 1e6]), step=7).baseline
    assert far.abs().max() < 20


@pytest.mark.parametrize("start, share", [(0.0, 1.0), (0.5, 0.5625), (1.0, 0.0), (1.7, 0.0), (-2.0, 0.0)])
def test_the_drift_of_binary_values_falls_to_nothing_at_the_ends(start: float, share: float) -> None:
    belief = GaussianBelief(mean=start, variance=1e-12, process_noise=0.01)
    belief.update(
        ["a", "b", "b"], torch.tensor([1.0, 0.0, 1.0]), step=0
    )  # R = P: half way from the start to 1
    near, far = (belief.predict(["a"], step=step) for step in (1, 5))
    assert near.mean.item() == pytest.approx((start + 1) / 2)
    assert (far.variance - near.variance).item() == pytest.approx(4 * 0.01 * share, abs=1e-9)
