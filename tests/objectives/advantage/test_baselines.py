"""OPO, GPG and the optimal token baseline against loops, and against verl where it is installed."""

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
from kalman_rl.methods import make_method
from kalman_rl.objectives.advantage.group import LengthWeighted, OptimalTokenBaseline, Rescaled, group_centred
from kalman_rl.objectives.loss import estimate_advantage
from kalman_rl.objectives.rollouts import Rollouts

quick = settings(max_examples=50, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
numbers = st.one_of(st.floats(-20, 20), st.sampled_from([0.0, 1.0]), st.just(math.nan))
batches = st.lists(st.tuples(numbers, st.integers(-2, 2), st.integers(0, 9)), min_size=1, max_size=14)


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mates(batch: list[tuple[float, int, int]], own: int) -> list[tuple[float, int]]:
    return [(r, n) for r, g, n in batch if g == own and not math.isnan(r)]


# ---- OPO


@quick
@given(batch=batches)
def test_length_weighted_against_a_loop(batch: list[tuple[float, int, int]]) -> None:
    reward, group, length = zip(*batch)
    ours = LengthWeighted()(double(list(reward)), torch.tensor(group), length=torch.tensor(length)).tolist()
    for i, (r, g, _) in enumerate(batch):
        known = mates(batch, g)
        total = sum(n for _, n in known)
        alike = len({x for x, _ in known}) <= 1
        baseline = math.fsum(x * n for x, n in known) / total if total else 0.0
        expected = 0.0 if math.isnan(r) or alike else r - baseline
        assert ours[i] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_equal_lengths_are_dr_grpo() -> None:
    g = torch.Generator().manual_seed(0)
    reward, group = torch.randn(12, generator=g, dtype=torch.float64), torch.arange(12) % 3
    ours = LengthWeighted()(reward, group, length=torch.full((12,), 7))
    torch.testing.assert_close(ours, group_centred(reward, group))


@pytest.mark.parametrize("length", [torch.ones(3, 1), torch.ones(2), torch.tensor(4.0)])
def test_length_shape(length: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"^length: got shape .*expected \(3,\)"):
        LengthWeighted()(torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3).long(), length=length)


# ---- GPG


@quick
@given(batch=batches, by_zeros=st.booleans(), norm=st.sampled_from([1.0, 0.3]))
def test_rescaled_against_a_loop(batch: list[tuple[float, int, int]], by_zeros: bool, norm: float) -> None:
    reward, group = [r for r, _, _ in batch], [g for _, g, _ in batch]
    ours = Rescaled(norm, by_zeros)(double(reward), torch.tensor(group)).tolist()
    known = [(r, g) for r, g in zip(reward, group) if not math.isnan(r)]
    alike = {g: len({x for x, _ in mates(batch, g)}) <= 1 for g in group}
    teaching = sum(r != 0 if by_zeros else not alike[g] for r, g in known)
    for i, (r, g) in enumerate(zip(reward, group)):
        values = [x for x, _ in mates(batch, g)]
        expected = 0.0
        if not math.isnan(r) and not alike[g]:
            expected = len(known) / max(teaching, 1) * (r - math.fsum(values) / len(values)) / norm
        assert ours[i] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_counting_zeros_breaks_under_a_shift_and_counting_groups_does_not() -> None:
    reward, group = double([1.0, 0.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    ours, published = Rescaled(), Rescaled(by_zeros=True)
    torch.testing.assert_close(ours(reward + 0.5, group), ours(reward, group))
    torch.testing.assert_close(ours(reward, group), 1.5 * group_centred(reward, group))
    torch.testing.assert_close(published(reward, group), 2.0 * group_centred(reward, group))
    torch.testing.assert_close(published(reward + 0.5, group), group_centred(reward, group))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_norm(bad: float) -> None:
    with pytest.raises(NumericError, match=f"^norm: got {bad}, expected"):
        Rescaled(bad)


# ---- optimal token baseline


def token_case(seed: int, rows: int = 6, length: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=g) < 0.7
    mask[:, 2] = True
    score_norm_squared = torch.rand(rows, length, generator=g, dtype=torch.float64) + 0.01
    reward = torch.randn(rows, generator=g, dtype=torch.float64)
    return reward, torch.randint(2, (rows,), generator=g), torch.where(mask, score_norm_squared, 0.0), mask


def naive_otb(
    reward: Tensor, group: Tensor, score_norm_squared: Tensor, mask: Tensor, silent: bool
) -> np.ndarray:
    """Each completion squeezed to its trained tokens; then position by position."""
    squeezed = [np.cumsum(e[m].numpy()) for e, m in zip(score_norm_squared, mask)]
    out = np.zeros(mask.shape)
    for i in range(len(reward)):
        members = [j for j in range(len(reward)) if group[j] == group[i] and not math.isnan(reward[j])]
        if math.isnan(reward[i]) or len({reward[j].item() for j in members}) <= 1:
            continue
        for place, t in enumerate(np.flatnonzero(mask[i].numpy())):
            alive = [j for j in members if len(squeezed[j]) > place]
            if len(alive) == 1:
                out[i, t] = 0.0 if silent else reward[i].item()
                continue
            weight = np.array([squeezed[j][place] for j in alive])
            values = np.array([reward[j].item() for j in alive])
            out[i, t] = reward[i].item() - (weight * values).sum() / weight.sum()
    return out


@quick
@given(seed=seeds, silent=st.booleans(), missing=st.booleans())
def test_optimal_token_baseline_against_a_loop(seed: int, silent: bool, missing: bool) -> None:
    reward, group, score_norm_squared, mask = token_case(seed)
    if missing:
        reward[1] = math.nan
    ours = OptimalTokenBaseline(silent)(reward, group, score_norm_squared=score_norm_squared, mask=mask)
    expected = naive_otb(reward, group, score_norm_squared, mask, silent)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12, atol=1e-13)


def test_padding_and_holes_shift_nothing() -> None:
    reward, group, score_norm_squared, mask = token_case(5)
    plain = OptimalTokenBaseline()(reward, group, score_norm_squared=score_norm_squared, mask=mask)
    wide = torch.zeros(6, 20, dtype=torch.bool)
    wide[:, 3:19:2] = mask
    poison = torch.full((6, 20), math.nan, dtype=torch.float64)
    poison[:, 3:19:2] = score_norm_squared
    poison = torch.where(wide, poison, math.nan)
    ours = OptimalTokenBaseline()(reward, group, score_norm_squared=poison, mask=wide)
    torch.testing.assert_close(ours[:, 3:19:2], plain)
    assert (ours[~wide] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_optimal_token_baseline_against_verl(seed: int) -> None:
    algos = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
    reward, _, _, _ = token_case(seed)
    group = torch.tensor([0, 1, 0, 1, 0, 1])
    length = torch.tensor([8, 5, 8, 5, 3, 2])  # two longest in each group: nobody is alone at the end
    mask = torch.arange(8) < length[:, None]
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 8, 5, generator=g, dtype=torch.float64)
    logp = torch.log_softmax(logits, -1)
    sampled = torch.randint(5, (6, 8), generator=g)
    old = logp.gather(-1, sampled[..., None])[..., 0]
    squares = logp.exp().square().sum(-1)
    token_reward = torch.zeros(6, 8, dtype=torch.float64)
    token_reward[torch.arange(6), length - 1] = reward
    theirs, _ = algos.compute_optimal_token_baseline_advantage(
        token_level_rewards=token_reward,
        response_mask=mask.double(),
        index=group.numpy(),
        old_log_probs=old,
        sum_pi_squared=squares,
    )
    rollouts = Rollouts(old, mask, reward=reward, group=group, sum_pi_squared=squares)
    ours = estimate_advantage(make_method("otb"), rollouts)
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-6)


def test_score_norm_squared_is_that_of_the_score() -> None:
    logits = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampled = torch.tensor([[0, 5, 2, 2]])
    pi = torch.softmax(logits, -1)
    score = torch.nn.functional.one_hot(sampled, 6) - pi
    logp = pi.log().gather(-1, sampled[..., None])[..., 0]
    rollouts = Rollouts(logp, torch.ones(1, 4), sum_pi_squared=pi.square().sum(-1))
    torch.testing.assert_close(rollouts.score_norm_squared, score.square().sum(-1))


@pytest.mark.parametrize("scale", [10.0, 30.0, 60.0])
def test_certain_tokens_have_an_energy_in_float32(scale: float) -> None:
    """Where 1 - 2p + sum p^2 is all rounding: positive, and right within a factor of two."""
    g = torch.Generator().manual_seed(1)
    exact = scale * torch.randn(20, 40, 30, generator=g, dtype=torch.float64)
    sampled = exact.argmax(-1)
    pi = torch.softmax(exact.float(), -1)
    logp = torch.log_softmax(exact.float(), -1).gather(-1, sampled[..., None])[..., 0]
    score_norm_squared = Rollouts(
        logp, torch.ones(20, 40), sum_pi_squared=pi.square().sum(-1)
    ).score_norm_squared
    assert score_norm_squared is not None and (score_norm_squared >= 0).all()
    rest = -torch.expm1(logp.double())  # 1 - p as the input has it
    assert (score_norm_squared >= rest.square() * 0.999).all() and (
        score_norm_squared <= 2.001 * rest.square()
    ).all()


def test_completions_that_start_almost_surely_still_have_a_baseline() -> None:
    """Four tokens of p = 1 - 1e-5 each: weights of about 1e-10, not of 0."""
    logp = torch.full((4, 3), math.log1p(-1e-5))
    rollouts = Rollouts(
        logp,
        torch.ones(4, 3),
        reward=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        group=torch.zeros(4).long(),
        sum_pi_squared=(2 * logp).exp(),
    )
    advantage = estimate_advantage(make_method("otb"), rollouts)
    torch.testing.assert_close(advantage[:, 0], torch.tensor([0.25, 0.25, 0.25, -0.75]))


@pytest.mark.parametrize("name", ["score_norm_squared", "mask"])
def test_token_shapes(name: str) -> None:
    reward, group, score_norm_squared, mask = token_case(0)
    given: dict[str, Any] = {"score_norm_squared": score_norm_squared, "mask": mask}
    given[name] = given[name][:, :4]
    with pytest.raises(ShapeError, match=r"^score_norm_squared, mask: got shapes .*expected \(6, T\) both"):
        OptimalTokenBaseline()(reward, group, **given)
