"""Advantages against loops over groups, and their bias by enumerating every possible batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError
from kalman_rl.methods import make_method
from kalman_rl.objectives.advantage.filtered import GroupFilter
from kalman_rl.objectives.advantage.group import (
    ConstantBaseline,
    GroupZScore,
    LengthWeighted,
    OptimalTokenBaseline,
    Rescaled,
    above_rounding,
    batch_leave_one_out,
    group_centred,
    group_relative,
    group_statistics,
    leave_one_out,
)
from kalman_rl.objectives.advantage.scaled import BatchScaled, NormalizeThenSum
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.rollouts import Rollouts

Estimator = Callable[[Tensor, Tensor], Tensor]
ESTIMATORS: dict[str, Estimator] = {
    "z-score": GroupZScore(),
    "centred": group_centred,
    "leave-one-out": leave_one_out,
    "batch-leave-one-out": batch_leave_one_out,
    "constant": ConstantBaseline(0.4),
}
RELATIVE = [name for name in ESTIMATORS if name != "constant"]
each = pytest.mark.parametrize("name", list(ESTIMATORS))
relative = pytest.mark.parametrize("name", RELATIVE)
quick = settings(max_examples=60, deadline=None, derandomize=True)

numbers = st.one_of(
    st.floats(-50, 50), st.sampled_from([0.0, 1.0, 0.35]), st.just(math.nan), st.integers(0, 1).map(float)
)
batches = st.lists(st.tuples(numbers, st.integers(-3, 3)), min_size=1, max_size=14)


def naive(name: str, reward: list[float], group: list[int]) -> list[float]:
    """One completion at a time, from the definitions."""
    out = []
    for i, (r, own) in enumerate(zip(reward, group)):
        mates = [
            (j, x)
            for j, (x, g) in enumerate(zip(reward, group))
            if (g == own or name == "batch-leave-one-out") and not math.isnan(x)
        ]
        values = [x for _, x in mates]
        others = [x for j, x in mates if j != i]
        if math.isnan(r):
            out.append(0.0)
        elif name == "constant":
            out.append(r - 0.4)
        elif not others or max(values) == min(values):
            out.append(0.0)
        elif name == "z-score":
            mean = math.fsum(values) / len(values)
            level = max(1.0, abs(mean))
            if max(values) - min(values) <= 1e-6 * level:
                out.append(0.0)
            else:
                out.append((r - mean) / (float(np.std(values, ddof=1)) + 1e-4))
        elif name == "centred":
            out.append(r - math.fsum(values) / len(values))
        else:
            out.append(r - math.fsum(others) / len(others))
    return out


@each
@quick
@given(batch=batches)
def test_ragged_interleaved_groups_with_missing_rewards(name: str, batch: list[tuple[float, int]]) -> None:
    reward, group = [r for r, _ in batch], [g for _, g in batch]
    ours = ESTIMATORS[name](torch.tensor(reward, dtype=torch.float64), torch.tensor(group))
    torch.testing.assert_close(
        ours, torch.tensor(naive(name, reward, group), dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


@quick
@given(batch=batches)
def test_group_statistics_against_numpy(batch: list[tuple[float, int]]) -> None:
    reward, group = np.array([r for r, _ in batch]), np.array([g for _, g in batch])
    ours = group_statistics(torch.from_numpy(reward), torch.from_numpy(group))
    for i, own in enumerate(group):
        known = reward[(group == own) & ~np.isnan(reward)]
        assert ours.size[i] == len(known)
        if len(known):
            assert ours.mean[i].item() == pytest.approx(known.mean(), abs=1e-12)
            assert ours.spread[i].item() == np.ptp(known)
        if len(known) > 1:
            assert ours.std[i].item() == pytest.approx(known.std(ddof=1), abs=1e-12)


@each
def test_type_gradient_and_empty_batch(name: str) -> None:
    group = torch.tensor([5, 5, 9])
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
    ):
        assert ESTIMATORS[name](torch.tensor([1, 0, 1]).to(dtype), group).dtype == expected
    leaky = torch.tensor([1.0, 0.0, 1.0], requires_grad=True)
    assert not ESTIMATORS[name](leaky, group).requires_grad
    assert ESTIMATORS[name](torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


# ---- invariances


@relative
@quick
@given(
    seed=st.integers(0, 1000),
    shift=st.sampled_from([-7.0, 0.5, 100.0]),
    scale=st.sampled_from([0.25, 1.0, 64.0]),
)
def test_shift_invariance_and_scale_equivariance(name: str, seed: int, shift: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(12, generator=generator, dtype=torch.float64)
    group = torch.randint(3, (12,), generator=generator)
    estimator = GroupZScore(epsilon=0.0) if name == "z-score" else ESTIMATORS[name]
    plain = estimator(reward, group)
    expected = plain if name == "z-score" else scale * plain
    torch.testing.assert_close(estimator(scale * reward + shift, group), expected, rtol=1e-9, atol=1e-10)


@each
def test_order_and_names_of_groups_do_not_matter(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(20, generator=generator, dtype=torch.float64)
    group = torch.randint(4, (20,), generator=generator)
    order = torch.randperm(20, generator=generator)
    plain = ESTIMATORS[name](reward, group)
    torch.testing.assert_close(ESTIMATORS[name](reward[order], group[order]), plain[order])
    torch.testing.assert_close(ESTIMATORS[name](reward, 10**12 - 7 * group), plain)


@pytest.mark.parametrize("name", ["z-score", "centred", "leave-one-out"])
def test_group_baselines_sum_to_zero_in_each_group(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    reward = torch.randn(30, generator=generator, dtype=torch.float64)
    group = torch.randint(5, (30,), generator=generator)
    advantage = ESTIMATORS[name](reward, group)
    totals = torch.zeros(5, dtype=torch.float64).index_add(0, group, advantage)
    torch.testing.assert_close(totals, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert advantage.abs().min() > 0


# ---- equal rewards, rounding residue, extremes


@relative
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.35, 1 / 3, -0.7, 1e30, -1e30, 1e-30, 123456.789])
def test_equal_rewards_give_exactly_zero(name: str, value: float, dtype: torch.dtype) -> None:
    for size in (1, 2, 3, 7, 8, 64):
        reward = torch.full((size,), value, dtype=dtype)
        assert (ESTIMATORS[name](reward, torch.zeros(size, dtype=torch.long)) == 0).all()


@pytest.mark.parametrize("name", ["z-score", "centred", "leave-one-out", "batch-scaled", "length-weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@quick
@given(
    parts=st.lists(st.integers(-40, 40), min_size=1, max_size=40),
    unit=st.sampled_from([20, 10, 3, 7]),
    copies=st.integers(1, 3),
)
def test_a_reward_is_at_its_mean_exactly_where_it_is_in_exact_arithmetic(
    name: str, dtype: torch.dtype, parts: list[int], unit: int, copies: int
) -> None:
    """Rewards such as 1.05 have no exact binary form; the residue of their mean is no advantage."""
    whole = [len(parts) * part for part in parts] + [sum(parts)] * copies  # the last are the mean of all
    group = torch.zeros(len(whole), dtype=torch.long)
    estimators = ESTIMATORS | {
        "batch-scaled": BatchScaled(),
        "length-weighted": partial(LengthWeighted(), length=torch.ones_like(group)),
    }
    advantage = estimators[name](torch.tensor([part / unit for part in whole], dtype=dtype), group)
    assert advantage.dtype == dtype
    assert advantage.sign().tolist() == [float(np.sign(part - sum(parts))) for part in whole]


def test_residues_at_a_constant_at_token_baselines_and_of_several_functions() -> None:
    tenths, group = torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3, dtype=torch.long)
    assert ConstantBaseline(0.2)(tenths, group).sign().tolist() == [-1, 0, 1]
    ones = torch.ones(3, 2)
    tokens = OptimalTokenBaseline()(tenths, group, score_norm_squared=ones, mask=ones.bool())
    assert tokens.sign().tolist() == [[-1, -1], [0, 0], [1, 1]]
    both = NormalizeThenSum()(tenths, group, rewards=torch.stack([tenths, tenths], dim=1))
    assert both.sign().tolist() == [-1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_difference_is_rounding_up_to_the_spacing_and_a_float64_step_a_reward(
    dtype: torch.dtype, size: int
) -> None:
    exact = torch.finfo(torch.float64).eps
    spacing = exact if dtype == torch.float64 else torch.finfo(torch.float32).eps
    bound = 2 * (spacing + size * exact)
    baseline = 2 + torch.tensor([bound, bound + 2 * exact, -bound, -bound - 4 * exact], dtype=torch.float64)
    reward = torch.full((4,), 2.0, dtype=dtype)
    found = above_rounding(reward, baseline, *torch.tensor([2.0, size]).double())
    assert (found != 0).tolist() == [False, True, False, True] and found.dtype == torch.float64


@pytest.mark.parametrize(
    "part", [group_centred, leave_one_out, group_relative, Rescaled(), GroupZScore(), BatchScaled()]
)
def test_equal_rewards_whose_sum_is_beyond_float64_give_zero(part: Callable[..., Tensor]) -> None:
    assert not part(torch.full((4,), 1e308, dtype=torch.float64), torch.zeros(4).long()).any()


@pytest.mark.parametrize("known", range(1, 9))
def test_zscore_ignores_rounding_residue(known: int) -> None:
    """Rewards that are equal but for how they were summed, in float32 and in float64."""
    group = torch.zeros(8, dtype=torch.long)
    for residue in (1e-8, -1e-8, 1e-16, float(np.float32(0.35)) - 0.35):
        reward = torch.full((8,), 0.35, dtype=torch.float64)
        reward[:known] += residue
        assert (GroupZScore()(reward, group) == 0).all()
        assert (GroupZScore()(reward.float(), group) == 0).all()
        assert group_centred(reward, group).abs().max() <= 2e-8
    reward = torch.full((8,), 1e6, dtype=torch.float64)
    reward[:known] += 1e-3  # relative to the level, not absolute
    assert (GroupZScore()(reward, group) == 0).all()


def test_zscore_keeps_small_but_real_differences() -> None:
    reward = torch.tensor([0.35, 0.35, 0.36, 0.35], dtype=torch.float64)
    advantage = GroupZScore()(reward, torch.zeros(4, dtype=torch.long))
    assert advantage[2] == pytest.approx(1.5, rel=0.03) and (advantage[[0, 1, 3]] < -0.4).all()
    loose = GroupZScore(tolerance=0.1)(reward, torch.zeros(4, dtype=torch.long))
    assert (loose == 0).all()


def test_huge_rewards_stay_finite() -> None:
    group = torch.zeros(4, dtype=torch.long)
    reward = torch.tensor([1e30, -1e30, 1e30, 0.0])
    for name, estimator in ESTIMATORS.items():
        assert torch.isfinite(estimator(reward, group)).all(), name
    expected = torch.tensor([0.75, -1.25, 0.75, -0.25]) / math.sqrt(11 / 12)
    torch.testing.assert_close(GroupZScore()(reward, group), expected)


def test_missing_rewards() -> None:
    nan = math.nan
    group = torch.tensor([0, 0, 0, 1, 1, 2])
    reward = torch.tensor([1.0, nan, 0.0, nan, nan, 3.0])
    assert group_centred(reward, group).tolist() == [0.5, 0.0, -0.5, 0.0, 0.0, 0.0]
    assert leave_one_out(reward, group).tolist() == [1.0, 0.0, -1.0, 0.0, 0.0, 0.0]
    assert batch_leave_one_out(reward, group).tolist() == [-0.5, 0.0, -2.0, 0.0, 0.0, 2.5]
    assert ConstantBaseline(1.0)(reward, group).tolist() == [0.0, 0.0, -1.0, 0.0, 0.0, 2.0]
    everything = torch.full((3,), nan)
    for name, estimator in ESTIMATORS.items():
        assert (estimator(everything, torch.tensor([0, 0, 1])) == 0).all(), name


# ---- errors


@each
@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_infinite_rewards_are_refused(name: str, bad: float) -> None:
    with pytest.raises(
        NumericError, match=rf"^reward: got {bad} at row 2, expected a finite number, or NaN for missing"
    ):
        ESTIMATORS[name](torch.tensor([0.0, 1.0, bad]), torch.tensor([0, 0, 0]))


@each
@pytest.mark.parametrize("reward, group", [((3,), (2,)), ((3, 1), (3, 1)), ((), ())])
def test_shapes(name: str, reward: tuple[int, ...], group: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"^reward, group: got shapes .*expected \(B,\) and \(B,\)"):
        ESTIMATORS[name](torch.zeros(reward), torch.zeros(group, dtype=torch.long))


# ---- bias: the expectation over every batch that could have been sampled


THETA = torch.tensor([[0.3, -0.8, 0.5], [-0.4, 0.9, -1.2]], dtype=torch.float64)
REWARD = torch.tensor([[1.0, 0.0, 0.25], [0.0, 1.0, -0.5]], dtype=torch.float64)
ACTIONS = THETA.shape[1]


def exact_gradient() -> Tensor:
    """Gradient of the mean over prompts of the expected reward of a softmax policy; (prompts, actions)."""
    theta = THETA.clone().requires_grad_()
    (torch.softmax(theta, 1) * REWARD).sum(1).mean().backward()
    assert theta.grad is not None
    return theta.grad


def expected_gradient(estimator: Estimator, size: int) -> Tensor:
    """Expectation of mean(A grad log pi) over all ``ACTIONS ** (prompts * size)`` batches, by enumeration."""
    prompts = len(THETA)
    prompt = torch.arange(prompts).repeat(size)  # interleaved groups
    probability = torch.softmax(THETA, 1)
    score = torch.eye(ACTIONS, dtype=torch.float64)[None] - probability[:, None]  # [prompt, action, theta]
    total = torch.zeros_like(THETA)
    for choice in itertools.product(range(ACTIONS), repeat=prompts * size):
        action = torch.tensor(choice)
        advantage = estimator(REWARD[prompt, action], prompt)
        terms = advantage[:, None] * score[prompt, action] / len(prompt)
        chance = probability[prompt, action].prod()
        total.index_add_(0, prompt, chance * terms)
    return total


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["leave-one-out", "batch-leave-one-out", "constant"])
def test_unbiased(name: str, size: int) -> None:
    torch.testing.assert_close(
        expected_gradient(ESTIMATORS[name], size), exact_gradient(), rtol=1e-12, atol=1e-14
    )


def test_baselines_that_need_no_group_are_unbiased_with_one_completion_per_prompt() -> None:
    for name in ("batch-leave-one-out", "constant"):
        torch.testing.assert_close(expected_gradient(ESTIMATORS[name], 1), exact_gradient())
    assert (expected_gradient(leave_one_out, 1) == 0).all()


@pytest.mark.parametrize("size", [2, 3])
def test_group_centred_is_unbiased_up_to_a_constant(size: int) -> None:
    expected = (size - 1) / size * exact_gradient()
    torch.testing.assert_close(expected_gradient(group_centred, size), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [2, 3])
def test_zscore_is_biased_even_up_to_a_constant(size: int) -> None:
    """At least 10 % of its length points elsewhere: no learning rate repairs that."""
    zscore, exact = expected_gradient(GroupZScore(), size), exact_gradient()
    best = (zscore * exact).sum() / exact.square().sum()
    assert (zscore - best * exact).norm() > 0.1 * zscore.norm()


@pytest.mark.parametrize("name, scale", [("rloo", 1.0), ("reinforce", 1.0), ("dr_grpo", 0.5)])
def test_unbiased_through_the_whole_objective(name: str, scale: float) -> None:
    """The same by ``policy_loss`` on one-token completions, differentiated down to the softmax's logits."""
    method = make_method(name, **({"length": 1.0} if name == "dr_grpo" else {}))
    prompt = torch.arange(2).repeat(2)
    probability = torch.softmax(THETA, 1)
    theta = THETA.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for choice in itertools.product(range(ACTIONS), repeat=4):
        action = torch.tensor(choice)
        logp = torch.log_softmax(theta, 1)[prompt, action][:, None]
        rollouts = Rollouts(logp, torch.ones(4, 1), reward=REWARD[prompt, action], group=prompt)
        total = total + probability[prompt, action].prod() * policy_loss(method, rollouts, logp).value
    total.backward()
    assert theta.grad is not None
    torch.testing.assert_close(theta.grad, -scale * exact_gradient(), rtol=1e-12, atol=1e-14)


def test_factors_are_float64_too() -> None:
    """Counts are integers, and an integer tensor over a number is float32: 3 / 7 would keep seven digits."""
    reward = torch.tensor([1.0, 0.0, 0.3, 2.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    expected = 7 / 3 * (reward - reward[:3].mean())
    torch.testing.assert_close(Rescaled()(reward, group)[:3], expected[:3], rtol=1e-14, atol=0.0)
    one_out = GroupFilter(0.0, 0.3, 0.7, invariant=True)(reward, group)
    variance = 1 / (1 / 0.7 + 2 / 0.3)
    assert one_out[0].item() == pytest.approx((1 - 0.3 / 0.3 * variance) / (variance + 0.3) ** 0.5, rel=1e-14)
