"""KRPO's and K-Score's filters against loops of their published recursions, and what they do wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError
from kalman_rl.objectives.advantage.filtered import BatchFilter, GroupFilter
from kalman_rl.objectives.advantage.group import leave_one_out

quick = settings(max_examples=50, deadline=None, derandomize=True)
numbers = st.one_of(st.floats(-20, 20), st.sampled_from([0.0, 1.0]), st.just(math.nan))
batches = st.lists(st.tuples(numbers, st.integers(-2, 2)), min_size=1, max_size=16)
PARTS: list[Any] = [
    GroupFilter(),
    GroupFilter(invariant=True),
    BatchFilter(),
    BatchFilter(adapt=0.9, final=True),
]
each = pytest.mark.parametrize("part", PARTS)


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_group(values: list[float], part: Any = GroupFilter()) -> list[float]:  # noqa: B008
    return part(double(values), torch.zeros(len(values), dtype=torch.long)).tolist()


# ---- KRPO


def naive_krpo(reward: list[float], group: list[int], q: float, r: float, p0: float) -> list[float]:
    """A filter per group, started anew, one reward after another; missing ones do not happen."""
    state: dict[int, tuple[float, float]] = {}
    out = []
    for value, own in zip(reward, group):
        if math.isnan(value):
            out.append(0.0)
            continue
        mean, variance = state.get(own, (0.0, p0))
        variance += q
        gain = variance / (variance + r)
        mean += gain * (value - mean)
        variance *= 1 - gain
        state[own] = mean, variance
        out.append((value - mean) / (math.sqrt(variance) + 1e-8))
    return out


@quick
@given(
    batch=batches,
    q=st.sampled_from([0.0, 1e-5, 0.3]),
    r=st.sampled_from([1e-2, 1.0]),
    p0=st.sampled_from([1.0, 0.1, 50.0]),
)
def test_group_filter_against_a_loop(batch: list[tuple[float, int]], q: float, r: float, p0: float) -> None:
    reward, group = [x for x, _ in batch], [g for _, g in batch]
    ours = GroupFilter(q, r, p0)(double(reward), torch.tensor(group))
    expected = naive_krpo(reward, group, q, r, p0)
    # (1 - K) (r - m) / sqrt(P) with 1 - K = 0.02: the loop loses two digits itself
    torch.testing.assert_close(ours, double(expected), rtol=1e-7, atol=1e-8)


def test_published_constants() -> None:
    """Prefactors of twelve completions by their place in the list: 0.10 to 31.0."""
    gains, prefactors, variance = [], [], 1.0
    for _ in range(12):
        variance += 1e-5
        gain = variance / (variance + 1e-2)
        variance *= 1 - gain
        gains.append(gain)
        prefactors.append((1 - gain) / math.sqrt(variance))
    assert gains[:3] == pytest.approx([0.990, 0.498, 0.333], abs=6e-4)
    assert gains[-1] == pytest.approx(0.087, abs=6e-4)
    found = []
    for place in range(12):  # a success that nothing precedes but failures: m = 0
        reward = [0.0] * 12
        reward[place] = 1.0
        found.append(one_group(reward)[place])
    assert found == pytest.approx(prefactors, rel=1e-6)
    assert found[0] == pytest.approx(0.10, abs=0.005) and found[-1] == pytest.approx(31.0, abs=0.1)
    assert found[-1] / found[0] == pytest.approx(310, rel=0.01)
    assert np.mean(prefactors) == pytest.approx(19.5, abs=0.1)


def test_a_single_success_first_or_last() -> None:
    first = one_group([1.0] + [0.0] * 11)
    assert first[0] == pytest.approx(0.10, abs=0.005)
    assert first[1] == pytest.approx(-7.1, abs=0.1) and first[-1] == pytest.approx(-2.8, abs=0.1)
    assert sum(first) == pytest.approx(-45, abs=0.5)
    last = one_group([0.0] * 11 + [1.0])
    assert last[:11] == [0.0] * 11 and last[-1] == pytest.approx(31.0, abs=0.1)


def test_equal_rewards_are_not_zero_unless_they_are_all_zero() -> None:
    alike = one_group([1.0] * 12)
    assert alike == sorted(alike, reverse=True)
    assert alike[0] == pytest.approx(0.10, abs=0.005) and alike[-1] == pytest.approx(0.03, abs=0.003)
    assert one_group([0.0] * 12) == [0.0] * 12
    assert one_group([2.0])[0] == pytest.approx(2 * 0.0995, abs=1e-3)


def test_published_filter_depends_on_order() -> None:
    assert one_group([1.0, 0.0, 0.0])[0] != pytest.approx(one_group([0.0, 0.0, 1.0])[2], rel=0.5)


# ---- the invariant form


@quick
@given(batch=batches, r=st.sampled_from([0.25, 1e-2]), p0=st.sampled_from([0.25, 3.0]))
def test_invariant_form_is_the_posterior_given_the_others(
    batch: list[tuple[float, int]], r: float, p0: float
) -> None:
    """By the normal equations of a common mean with prior N(0, P0), one completion at a time."""
    reward, group = [x for x, _ in batch], [g for _, g in batch]
    ours = GroupFilter(0.0, r, p0, invariant=True)(double(reward), torch.tensor(group)).tolist()
    for i, value in enumerate(reward):
        others = [x for j, (x, g) in enumerate(batch) if j != i and g == group[i] and not math.isnan(x)]
        precision = 1 / p0 + len(others) / r
        mean = math.fsum(others) / r / precision
        expected = 0.0 if math.isnan(value) else (value - mean) / math.sqrt(1 / precision + r)
        assert ours[i] == pytest.approx(expected, rel=1e-12, abs=1e-13)


def test_own_reward_never_moves_the_own_baseline_by_a_bit() -> None:
    g = torch.Generator().manual_seed(0)
    reward, group = torch.randn(24, generator=g, dtype=torch.float64), torch.arange(24) % 4
    known = torch.ones(24, dtype=torch.bool)
    part = GroupFilter(0.0, 0.25, 0.25, invariant=True)
    plain = part._given_the_others(reward, known, group)[0]
    for i in range(24):
        for own in (0.0, 1e-9, 1.0, -1e12):
            changed = reward.clone()
            changed[i] = own
            baseline, variance = part._given_the_others(changed, known, group)
            assert baseline[i] == plain[i]
            assert torch.equal(baseline[group != group[i]], plain[group != group[i]])
            advantage = part(changed, group)[i].item()
            assert advantage == ((own - baseline[i]) / (variance[i] + 0.25).sqrt()).item()


def test_invariant_form_under_permutations_and_new_names() -> None:
    g = torch.Generator().manual_seed(1)
    reward, group = torch.randn(30, generator=g, dtype=torch.float64), torch.randint(5, (30,), generator=g)
    reward[3] = math.nan
    part = GroupFilter(0.0, 0.25, 0.25, invariant=True)
    plain = part(reward, group)
    for seed in range(5):
        order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(part(reward[order], group[order]), plain[order], rtol=1e-12, atol=1e-13)
    assert torch.equal(part(reward, 10**12 - 7 * group), plain)


def test_a_wide_prior_is_rloo_up_to_scale() -> None:
    g = torch.Generator().manual_seed(2)
    reward, group = torch.randn(24, generator=g, dtype=torch.float64), torch.arange(24) % 4
    ours = GroupFilter(0.0, 0.25, 1e12, invariant=True)(reward, group)
    torch.testing.assert_close(
        ours * math.sqrt(0.25 / 5 + 0.25), leave_one_out(reward, group), rtol=1e-9, atol=1e-9
    )


# ---- K-Score


def naive_kscore(
    reward: list[float], q: float, r: float, p0: float, adapt: float, final: bool
) -> list[float]:
    mean, variance, noise, states = 0.0, p0, r, []
    for value in reward:
        if not math.isnan(value):
            prior = variance + q
            gain = prior / (prior + noise)
            nu = value - mean
            mean, variance = mean + gain * nu, (1 - gain) * prior
            noise = adapt * noise + (1 - adapt) * nu**2
        states.append((mean, variance))
    if final:
        states = [states[-1]] * len(states)
    return [0.0 if math.isnan(x) else (x - m) / (math.sqrt(p) + 1e-8) for x, (m, p) in zip(reward, states)]


@quick
@given(
    batch=batches,
    q=st.sampled_from([0.0, 1e-2]),
    adapt=st.sampled_from([1.0, 0.9, 0.3]),
    final=st.booleans(),
)
def test_batch_filter_against_a_loop(
    batch: list[tuple[float, int]], q: float, adapt: float, final: bool
) -> None:
    """Groups are interleaved and play no part."""
    reward, group = [x for x, _ in batch], [g for _, g in batch]
    ours = BatchFilter(q, 0.1, 1.0, adapt, final)(double(reward), torch.tensor(group))
    expected = naive_kscore(reward, q, 0.1, 1.0, adapt, final)
    torch.testing.assert_close(ours, double(expected), rtol=1e-9, atol=1e-9)


def test_batch_filter_settles_at_the_quoted_steady_variance() -> None:
    q, r, count = 1e-2, 1e-1, 500
    g = torch.Generator().manual_seed(3)
    reward = torch.randn(count, generator=g, dtype=torch.float64)
    group = torch.zeros(count, dtype=torch.long)
    advantage = BatchFilter(q, r, 1.0, final=True)(reward, group)
    steady = (math.sqrt(q * q + 4 * q * r) - q) / 2
    scale = (reward[0] - reward[1]) / (advantage[0] - advantage[1])
    assert scale.item() == pytest.approx(math.sqrt(steady), rel=1e-6)


def test_still_batch_filter_with_a_wide_prior_is_the_running_mean() -> None:
    g = torch.Generator().manual_seed(4)
    reward = torch.randn(50, generator=g, dtype=torch.float64)
    part = BatchFilter(0.0, 1.0, 1e12)
    advantage = part(reward, torch.zeros(50, dtype=torch.long))
    count = torch.arange(1, 51).double()
    running = reward.cumsum(0) / count
    torch.testing.assert_close(advantage, (reward - running) * count.sqrt(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adapt", [0.5, 0.9])
@pytest.mark.parametrize("size", [1e-200, 1e30, 1e200, -1e200])
def test_extreme_rewards_stay_finite(adapt: float, size: float) -> None:
    part = BatchFilter(adapt=adapt)
    advantage = part(double([size, 0.0, size, size]), torch.zeros(4, dtype=torch.long))
    assert torch.isfinite(advantage).all()


@pytest.mark.parametrize("count", [3, 20_000])
def test_noise_that_adapts_away_leaves_numbers(count: int) -> None:
    """Equal rewards: nu, R and P shrink to nothing."""
    for q in (0.0, 1e-2):
        part = BatchFilter(process_noise=q, adapt=0.5, epsilon=1e-8)
        assert torch.isfinite(part(torch.ones(count).double(), torch.zeros(count).long())).all()


# ---- both


@each
def test_missing_rewards_empty_batches_and_types(part: Any) -> None:
    reward, group = double([1.0, math.nan, 0.5, 0.0]), torch.tensor([0, 0, 1, 0])
    known = torch.tensor([True, False, True, True])
    ours = part(reward, group)
    assert ours[1] == 0
    torch.testing.assert_close(ours[known], part(reward[known], group[known]), rtol=1e-12, atol=0)
    assert part(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    nothing = part(torch.full((3,), math.nan), torch.tensor([0, 1, 0]))
    assert nothing.tolist() == [0.0, 0.0, 0.0]
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.int64, torch.float32)):
        assert part(torch.tensor([1, 0]).to(dtype), torch.tensor([0, 0])).dtype == expected
    assert not part(torch.ones(2, requires_grad=True), torch.tensor([0, 0])).requires_grad


@pytest.mark.parametrize("part", PARTS[:2])
def test_interleaving_of_groups_does_not_matter(part: Any) -> None:
    g = torch.Generator().manual_seed(5)
    reward, group = torch.randn(12, generator=g, dtype=torch.float64), torch.tensor([0, 1, 2] * 4)
    together = torch.argsort(group, stable=True)
    torch.testing.assert_close(part(reward, group)[together], part(reward[together], group[together]))


@each
def test_bad_rewards(part: Any) -> None:
    with pytest.raises(NumericError, match=r"^reward: got inf at row 1"):
        part(torch.tensor([0.0, math.inf]), torch.tensor([0, 0]))
    with pytest.raises(ShapeError, match=r"^reward, group: got shapes"):
        part(torch.zeros(3), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    "kind, name, bad",
    [
        (kind, name, bad)
        for kind in (GroupFilter, BatchFilter)
        for name, values in {
            "process_noise": (-1.0, math.nan, math.inf),
            "observation_noise": (0.0, -1.0, math.nan, math.inf),
            "initial_variance": (0.0, math.nan, math.inf),
            "epsilon": (-1e-9, math.nan),
        }.items()
        for bad in values
    ]
    + [(BatchFilter, "adapt", bad) for bad in (0.0, 1.1, math.nan)],
)
def test_bad_settings(kind: Any, name: str, bad: float) -> None:
    with pytest.raises(NumericError, match=rf"^{name}: got {bad}, expected"):
        kind(**{name: bad})
