"""Sampling in rounds: exact expectations over everything that can happen, budgets, and what rules imply."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from benchmarks.beliefs.implied import Implied, StopRule, implied_weight, never, when_mixed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.beliefs import make_belief
from kalman_rl.beliefs.beta import BetaBelief
from kalman_rl.beliefs.gaussian import GaussianBelief
from kalman_rl.beliefs.protocol import Belief
from kalman_rl.errors import ConfigError, NumericError, ShapeError
from kalman_rl.objectives.advantage.group import leave_one_out
from kalman_rl.sampling.allocate import allocate, least_counts
from kalman_rl.sampling.coverage import Coverage
from kalman_rl.sampling.gains import mixed_group_gain
from kalman_rl.sampling.learnability import read_signal
from kalman_rl.sampling.price import Price
from kalman_rl.sampling.rounds import RoundPlan, Sampled

# ---- a tabular softmax policy, and every course that sampling can take

THETA = torch.tensor([[-1.0, 0.4, 0.8], [-0.4, 0.9, -1.2]], dtype=torch.float64)
BINARY = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
GRADED = torch.tensor([[1.0, 0.0, 0.35], [0.1, 0.9, 0.4]], dtype=torch.float64)
PROBABILITY = torch.softmax(THETA, 1)
SCORE = torch.eye(3, dtype=torch.float64)[None] - PROBABILITY[:, None]  # [prompt, action, theta]


def exact_gradients(reward: Tensor) -> Tensor:
    """(prompts, actions): gradient of each prompt's expected reward in its own logits, by autograd."""
    theta = THETA.clone().requires_grad_()
    (torch.softmax(theta, 1) * reward).sum().backward()
    assert theta.grad is not None
    return theta.grad


def courses(plan: RoundPlan, reward: Tensor) -> Iterator[tuple[float, list[int], Sampled]]:
    """Probability, actions in the order told, and result, of every course of sampling."""
    request = plan.next_round()
    if request is None:
        yield 1.0, [], plan.result()
        return
    told = [name for name, k in request for _ in range(k)]
    for actions in itertools.product(range(3), repeat=len(told)):
        branch = copy.deepcopy(plan)
        branch.tell(told, reward[told, list(actions)])
        chance = math.prod(PROBABILITY[i, a].item() for i, a in zip(told, actions))
        for rest, more, result in courses(branch, reward):
            yield chance * rest, [*actions, *more], result


def expectations(plan: RoundPlan, reward: Tensor, naive: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Per prompt: E[sum_j A_j s_j], E[tau], and E[mean over completions of w_j A_j s_j].

    naive: with A_j = (r_j - mean of all own rewards) / tau instead.
    """
    total, weighted, tau = torch.zeros_like(THETA), torch.zeros_like(THETA), torch.zeros(2).double()
    chances = 0.0
    for chance, actions, result in courses(plan, reward):
        prompt = torch.tensor(result.ids)
        size = torch.bincount(prompt, minlength=2).double()
        advantage = result.advantage
        if naive:
            mean = torch.zeros(2).double().index_add(0, prompt, result.reward) / size.clamp(min=1)
            advantage = (result.reward - mean[prompt]) / size[prompt]
        terms = advantage[:, None] * SCORE[prompt, actions]
        total.index_add_(0, prompt, chance * terms)
        weighted.index_add_(0, prompt, chance * result.weight[:, None] * terms / len(prompt))
        tau += chance * size
        chances += chance
    assert chances == pytest.approx(1.0, abs=1e-12)
    return total, tau, weighted


def warm(kind: str) -> Belief:
    """A belief with a past, so that its prior, its noise and its scale are not the trivial ones."""
    makers = {"beta": lambda: BetaBelief(prior=(0.6, 0.6)), "gaussian": GaussianBelief}
    belief: Belief = makers.get(kind, lambda: make_belief(kind))()
    for step, rewards in enumerate(([1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 1.0])):
        belief.update([0, 0, 0, 1, 1], torch.tensor(rewards), step=step)
    return belief


def scale_of(belief: Belief, step: int = 3) -> Tensor:
    return belief.advantages([0, 1], torch.full((2,), math.nan), step=step).scale


PLANS = {
    "total": {"total": 5, "rounds": (1,), "n_min": 1, "n_max": 4},
    "total, mixed groups": {"total": 5, "rounds": (1, 2), "n_min": 0, "n_max": 4, "aim": "mixed_groups"},
    "price": {"price": Price(3.0, value=0.035), "rounds": (1,), "n_min": 1, "n_max": 3},
    "price, mixed groups": {
        "price": Price(3.0, value=0.2),
        "rounds": (1,),
        "n_max": 3,
        "aim": "mixed_groups",
    },
}
plans = pytest.mark.parametrize("name", PLANS)


@plans
@pytest.mark.parametrize("kind, reward", [("beta", BINARY), ("gaussian", GRADED), ("auto", BINARY)])
def test_the_sum_over_rounds_is_exactly_the_expected_tau_times_the_gradient(
    name: str, kind: str, reward: Tensor
) -> None:
    belief = warm(kind)
    scale = scale_of(belief)
    assert kind == "beta" or scale != 1, "the scale must not be trivial"
    plan = RoundPlan(belief, [0, 1], step=3, **copy.deepcopy(PLANS[name]))
    total, tau, weighted = expectations(plan, reward)
    assert (tau - tau.round()).abs().max() > 0.02, "tau does not depend on rewards: the test shows nothing"
    gradient = exact_gradients(reward)
    torch.testing.assert_close(scale * total, tau[:, None] * gradient, rtol=1e-12, atol=1e-13)
    if "total" in PLANS[name]:  # then the mean over completions is exact too, with weight E[tau] / total
        torch.testing.assert_close(
            scale * weighted, tau[:, None] / PLANS[name]["total"] * gradient, rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize("weighting, exact", [("equal", True), ("mean", False)])
def test_equal_weighting_is_exactly_unbiased_and_own_tau_is_not(weighting: str, exact: bool) -> None:
    belief = warm("beta")
    options = copy.deepcopy(PLANS["price"]) | {"weighting": weighting}
    weighted = expectations(RoundPlan(belief, [0, 1], step=3, **options), BINARY)[2]
    ratio = scale_of(belief) * weighted / (exact_gradients(BINARY) / 2)
    if exact:
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-12, atol=0)
    else:
        assert (ratio - 1).abs().max() > 0.01


@pytest.mark.parametrize("kind, reward", [("beta", BINARY), ("gaussian", GRADED), ("auto", BINARY)])
@pytest.mark.parametrize("due", [0, 1])
@pytest.mark.parametrize("total", [1, 3])
def test_the_gradient_of_the_candidates_that_were_chosen_is_exact(
    kind: str, reward: Tensor, due: int, total: int
) -> None:
    """With counts fixed before sampling the estimate is the mean gradient of the prompts in the batch, and a candidate
    that was passed over has no part in it, whether the belief or the floor has chosen."""
    belief, coverage = warm(kind), Coverage(every=2, share=0.1)
    coverage.visit([1 - due], step=3)
    sizes = {"total": total, "n_min": 0, "n_max": total}
    plan = RoundPlan(belief, [0, 1], step=3, coverage=coverage, weighting="equal", **sizes)
    _, tau, weighted = expectations(plan, reward)
    chosen = (tau > 0.5).double()
    assert tau.sum() == pytest.approx(total) and tau[due] > 0.99 and (total > 1 or chosen.sum() == 1)
    expected = chosen[:, None] * exact_gradients(reward) / chosen.sum()
    torch.testing.assert_close(scale_of(belief) * weighted, expected, rtol=1e-12, atol=1e-13)


def test_the_naive_mean_over_tau_with_the_group_mean_is_biased() -> None:
    """Stop at the first mixed group: the naive estimate has the weights that ``implied_weight`` says."""
    options = {"price": Price(3.0, value=1e-9), "rounds": (2,), "n_max": 6, "aim": "mixed_groups"}
    weights, rule = [], StopRule(when_mixed, k=2, cap=6, estimate="group-mean")
    for prompt in (0, 1):
        plan = RoundPlan(warm("beta"), [prompt], step=3, **copy.deepcopy(options))
        weight = expectations(plan, BINARY, naive=True)[0][prompt] / exact_gradients(BINARY)[prompt]
        p = (PROBABILITY * BINARY).sum(1)[prompt].item()
        assert weight.tolist() == pytest.approx([implied_weight(p, rule).weight] * 3, rel=1e-10)
        weights.append(weight[0].item())
    assert weights[0] / weights[1] > 1.08, "the hard prompt weighs more"


def test_the_naive_estimate_of_graded_rewards_even_points_elsewhere() -> None:
    options = {"price": Price(3.0, value=0.017), "rounds": (2, 1), "n_max": 4}
    for prompt in (0, 1):
        plan = RoundPlan(warm("gaussian"), [prompt], step=3, **copy.deepcopy(options))
        naive = expectations(plan, GRADED, naive=True)[0][prompt]
        cosine = torch.cosine_similarity(naive, exact_gradients(GRADED)[prompt], dim=0)
        assert cosine < 1 - 1e-6


def test_own_reward_never_moves_own_baseline() -> None:
    def baselines(first: float) -> Tensor:
        plan = RoundPlan(warm("beta"), [0, 1], step=3, total=8, rounds=(2,), n_max=8)
        rewards = [torch.tensor([first, 1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])]
        while (request := plan.next_round()) is not None:
            told = [name for name, k in request for _ in range(k)]
            plan.tell(told, rewards.pop(0)[: len(told)])
        result = plan.result()
        return (result.reward - result.advantage * scale_of(warm("beta")))[:4]

    low, high = baselines(0.0), baselines(1.0)
    assert low[0] == high[0], "to the last bit"
    assert low[1] != high[1]


# ---- budgets


SUCCESS = torch.tensor([0.0, 0.03, 0.1, 0.3, 0.5, 0.8, 0.97, 1.0])


def drive(plan: RoundPlan, generator: torch.Generator, missing: float = 0.0) -> tuple[Sampled, list[int]]:
    """Run a plan over prompts 0 .. 7; returns the result and the completions of each round."""
    sizes = []
    while (request := plan.next_round()) is not None:
        told = torch.tensor([name for name, k in request for _ in range(k)])
        told = told[torch.randperm(len(told), generator=generator)]  # any order will do
        reward = (torch.rand(len(told), generator=generator) < SUCCESS[told]).double()
        reward[torch.rand(len(told), generator=generator) < missing] = math.nan
        plan.tell(told.tolist(), reward)
        sizes.append(len(told))
    return plan.result(), sizes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    n_min=st.integers(0, 3),
    room=st.integers(0, 9),
    fill=st.floats(0, 1),
    rounds=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    aim=st.sampled_from(["gradient", "mixed_groups"]),
    weighting=st.sampled_from(["tau", "equal", "mean"]),
    max_rounds=st.sampled_from([None, 1, 2]),
    missing=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_a_total_is_used_exactly_and_caps_hold(
    seed: int,
    n_min: int,
    room: int,
    fill: float,
    rounds: list[int],
    aim: str,
    weighting: str,
    max_rounds: int | None,
    missing: float,
) -> None:
    n_max = max(n_min + room, 1)
    total = max(round(8 * (n_min + fill * (n_max - n_min))), 1)
    options = {
        "n_min": n_min,
        "n_max": n_max,
        "rounds": rounds,
        "aim": aim,
        "weighting": weighting,
        "max_rounds": max_rounds,
    }
    plan = RoundPlan(BetaBelief(), range(8), step=0, total=total, **options)
    result, sizes = drive(plan, torch.Generator().manual_seed(seed), missing)
    assert sum(sizes) == len(result.ids) == result.tau.sum() == total
    assert n_min <= result.tau.min() and result.tau.max() <= n_max
    assert max_rounds is None or len(sizes) <= max_rounds
    assert torch.bincount(torch.tensor(result.ids), minlength=8).equal(result.tau)
    known = ~result.reward.isnan()
    assert (result.advantage[~known] == 0).all() and (result.weight[~known] == 0).all()
    if known.any():
        assert result.weight[known].mean().item() == pytest.approx(1.0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    budget=st.floats(0.5, 30),
    n_min=st.integers(0, 3),
    aim=st.sampled_from(["gradient", "mixed_groups"]),
)
def test_caps_hold_at_any_price(seed: int, budget: float, n_min: int, aim: str) -> None:
    generator, price, belief = torch.Generator().manual_seed(seed), Price(budget), BetaBelief()
    for step in range(3):
        low, high = price.window(torch.full((8,), n_min), torch.full((8,), 11))
        plan = RoundPlan(belief, range(8), step=step, price=price, n_min=n_min, n_max=11, aim=aim)
        result, _ = drive(plan, generator)
        assert n_min <= result.tau.min() and result.tau.max() <= 11
        assert set(result.stop_reason) <= {"gain", "mixed", "n_max", "skipped", "budget"}
        assert low <= result.tau.sum() <= high


def test_price_meets_the_budget_and_spends_where_it_pays() -> None:
    belief, price, generator = BetaBelief(), Price(8.0), torch.Generator().manual_seed(0)
    taus = []
    for step in range(40):
        result, _ = drive(RoundPlan(belief, range(8), step=step, price=price, rounds=(2,)), generator)
        taus.append(result.tau)
    mean = torch.stack(taus[-25:]).double().mean(0)
    assert mean.mean().item() == pytest.approx(8.0, rel=0.1)
    assert mean[4] > 1.3 * mean[2] > 1.3 * mean[0] and mean[4] > 2 * mean[7]


def test_that_aim_stops_at_mixed_groups_and_gives_up_on_hopeless_ones() -> None:
    belief, price, generator = BetaBelief(), Price(6.0), torch.Generator().manual_seed(0)
    taus, reasons = [], []
    for step in range(40):
        plan = RoundPlan(belief, range(8), step=step, price=price, rounds=(2,), aim="mixed_groups", n_min=0)
        result, _ = drive(plan, generator)
        taus.append(result.tau)
        reasons += [reason for reason, tau in zip(result.stop_reason, result.tau.tolist()) if tau]
        for name, reason in enumerate(result.stop_reason):
            own = result.reward[torch.tensor(result.ids) == name]
            assert reason != "mixed" or len(own.unique()) == 2
    mean = torch.stack(taus[-25:]).double().mean(0)
    assert mean[2] > 1.2 * mean[4] and mean[2] > 1.5 * mean[0]
    assert {"mixed", "gain"} <= set(reasons)


def gradient_cosine(adaptive: bool, seed: int) -> float:
    """Mean cosine of batch gradients: 32 prompts, each p (1 - p) along its own axis, 8 completions each."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.sigmoid(5 * torch.randn(128, generator=generator, dtype=torch.float64))
    belief, cosines = BetaBelief(), []
    for step in range(20):
        ids = torch.randperm(128, generator=generator)[:32]
        options = {"max_rounds": 2} if adaptive else {"n_min": 8, "n_max": 8}
        plan = RoundPlan(belief, ids.tolist(), step=step, total=256, **options)
        while (request := plan.next_round()) is not None:
            told = torch.tensor([name for name, k in request for _ in range(k)])
            plan.tell(told.tolist(), (torch.rand(len(told), generator=generator) < p[told]).double())
        result = plan.result()
        rows = torch.tensor(result.ids)
        advantage = result.advantage if adaptive else leave_one_out(result.reward, rows)
        terms = result.weight * advantage * (result.reward - p[rows])
        estimate = torch.zeros(128, dtype=torch.float64).index_add(0, rows, terms)[ids]
        cosines.append(torch.cosine_similarity(estimate, (p * (1 - p))[ids], dim=0).item())
    return sum(cosines[8:]) / 12


def test_two_rounds_beat_groups_of_eight_at_the_same_cost() -> None:
    """cos^2 / (1 - cos^2), squared signal over squared error, against leave-one-out groups."""
    quality = {}
    for adaptive in (False, True):
        cosine = sum(gradient_cosine(adaptive, seed) for seed in range(3)) / 3
        quality[adaptive] = cosine**2 / (1 - cosine**2)
    assert quality[True] > 1.4 * quality[False]


def test_rounds_adapt_to_rewards_seen_in_the_same_step() -> None:
    """Unknown prompts, one of which shows both rewards in the first round: it gets what is left."""
    plan = RoundPlan(BetaBelief(prior=(0.3, 0.3)), ["x", "y", "z"], step=0, total=15, rounds=(2, 2))
    assert plan.next_round() == [("x", 2), ("y", 2), ("z", 2)]
    plan.tell(["x", "x", "y", "y", "z", "z"], torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 1.0]))
    while (request := plan.next_round()) is not None:
        told = [n for n, k in request for _ in range(k)]
        plan.tell(told, torch.tensor([0.0 if n == "x" else 1.0 for n in told]))
    tau = dict(zip(plan.result().prompts, plan.result().tau.tolist()))
    assert tau["y"] > max(tau["x"], tau["z"])


def test_coverage_and_features_and_real_rewards() -> None:
    coverage = Coverage(every=3)
    belief = GaussianBelief(observation_noise=1.0, mean=0.0, variance=4.0)
    visits = {name: 0 for name in "abcd"}
    for step in range(6):
        plan = RoundPlan(
            belief,
            list("abcd"),
            step=step,
            total=6,
            n_min=0,
            n_max=6,
            reward_range="real",
            coverage=coverage,
            features=torch.eye(4, dtype=torch.float64),
        )
        while (request := plan.next_round()) is not None:
            told = [name for name, k in request for _ in range(k)]
            plan.tell(told, torch.linspace(-5, 5, len(told)))
        result = plan.result()
        for name, tau in zip(result.prompts, result.tau.tolist()):
            visits[name] += tau > 0
    assert min(visits.values()) >= 2
    assert result.advantage.abs().max() > 0


def test_the_belief_has_absorbed_everything_once() -> None:
    """What it believes at the end is what one batch with all rewards would have taught it."""
    belief, whole = BetaBelief(prior=(1.0, 1.0)), BetaBelief(prior=(1.0, 1.0))
    result, sizes = drive(
        RoundPlan(belief, range(8), step=0, total=64), torch.Generator().manual_seed(3), missing=0.1
    )
    assert len(sizes) > 2
    whole.update(result.ids, result.reward, step=0)
    torch.testing.assert_close(belief.predict(range(8), step=1), whole.predict(range(8), step=1))
    assert result.round.tolist() == [i for i, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize("source", [None, lambda name: name % 2])
@pytest.mark.parametrize("name", ["auto", "beta", "gaussian", "spo"])
def test_every_belief_by_name_can_be_sampled_by(name: str, source: object) -> None:
    belief, generator = make_belief(name, source=source), torch.Generator().manual_seed(0)
    for step in range(3):
        result, _ = drive(RoundPlan(belief, range(8), step=step, total=64, max_rounds=3), generator)
    assert result.tau.sum() == 64 and result.tau[4] > result.tau[7]
    assert result.advantage.isfinite().all()


def test_the_same_plan_twice_is_the_same() -> None:
    one, two = (
        drive(RoundPlan(warm("beta"), range(8), step=3, total=64), torch.Generator().manual_seed(5))[0]
        for _ in range(2)
    )
    for a, b in zip(one, two):
        assert torch.equal(a, b) if isinstance(a, Tensor) and not a.isnan().any() else True
    assert one.ids == two.ids and one.stop_reason == two.stop_reason


# ---- bad input


@pytest.mark.parametrize(
    "ids, options, message",
    [
        ([], {"total": 4}, "ids: got an empty pool"),
        (["a", "a"], {"total": 4}, "prompt 'a' twice"),
        (["a"], {"total": 0}, "total: got 0 completions for 1 prompts, expected 2 to 32"),
        (["a", "b"], {"total": 3}, "total: got 3 completions for 2 prompts, expected 4 to 64"),
        (["a", "b"], {"total": 65}, "expected 4 to 64"),
        (["a"], {"total": 0, "n_min": 0}, "expected 1 to 32"),
        (["a"], {"total": 4.0}, "total: got 4.0"),
        (["a"], {}, "expected exactly one"),
        (["a"], {"total": 4, "budget": 4.0}, "expected exactly one"),
        (["a"], {"budget": 0.0}, "budget: got 0.0"),
        (["a"], {"total": 4, "rounds": ()}, "rounds: got"),
        (["a"], {"total": 4, "rounds": (2, 0)}, "rounds: got"),
        (["a"], {"total": 4, "n_min": -1}, "n_min, n_max: got -1"),
        (["a"], {"total": 4, "weighting": "taus"}, "did you mean 'tau'"),
        (["a"], {"total": 4, "aim": "lite"}, "aim: got 'lite'"),
        (["a"], {"budget": 4.0, "max_rounds": 2}, "together with total"),
        (["a"], {"total": 4, "max_rounds": 0}, "max_rounds: got 0"),
    ],
)
def test_plans_that_cannot_be(ids: list[str], options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RoundPlan(BetaBelief(), ids, step=0, **options)


def test_the_order_of_calls() -> None:
    plan = RoundPlan(BetaBelief(), ["a", "b"], step=0, total=4)
    with pytest.raises(ConfigError, match="expected next_round"):
        plan.tell(["a"], torch.ones(1))
    plan.next_round()
    with pytest.raises(ConfigError, match="before tell"):
        plan.next_round()
    with pytest.raises(ConfigError, match="before the plan is finished"):
        plan.result()
    plan.tell(["b", "a", "a", "b"], torch.ones(4))
    assert plan.next_round() is None and plan.next_round() is None
    assert plan.result().ids == ["b", "a", "a", "b"]


@pytest.mark.parametrize(
    "ids, reward, error, message",
    [
        (["a", "a", "b"], torch.ones(3), ConfigError, "got 1 completions of prompt 'b', expected 2"),
        (["a", "a", "b", "c"], torch.ones(4), ConfigError, "completions of prompt"),
        (["a", "a", "b", "b"], torch.ones(3), ShapeError, "reward: got \\(3,\\)"),
        (["a", "a", "b", "b"], [1.0] * 4, ShapeError, "reward: got list"),
        (
            ["a", "a", "b", "b"],
            torch.tensor([1.0, 0, 2, 0]),
            NumericError,
            "got 2.0 at row 2.*reward_range='real'",
        ),
        (["a", "a", "b", "b"], torch.tensor([1.0, 0, -math.inf, 0]), NumericError, "got -inf at row 2"),
    ],
)
def test_bad_answers_change_nothing(ids: list, reward: Tensor, error: type, message: str) -> None:
    belief = BetaBelief()
    plan = RoundPlan(belief, ["a", "b"], step=0, total=8)
    plan.next_round()
    with pytest.raises(error, match=message):
        plan.tell(ids, reward)
    assert len(belief) == 0
    plan.tell(["a", "a", "b", "b"], torch.tensor([1.0, 0, 1, math.nan]))
    assert len(belief) == 2


# ---- implied weights


def brute_force(p: float, rule: StopRule) -> Implied:
    """Every sequence of ``cap`` rewards, each sampled as far as the rule goes."""
    weight = tau = 0.0
    for rewards in itertools.product((0, 1), repeat=rule.cap):
        n = next(
            n for n in range(rule.k, rule.cap + 1, rule.k) if n == rule.cap or rule.stop(n, sum(rewards[:n]))
        )
        chance, r = math.prod(p if x else 1 - p for x in rewards), rewards[:n]
        tau += chance * n
        if rule.estimate == "round-causal":
            terms = 0.0
            for j, x in enumerate(r):
                seen = r[: (j // rule.k + 1) * rule.k]
                others = rule.prior[0] + sum(seen) - x
                terms += (x - others / (sum(rule.prior) + len(seen) - 1)) * (x - p)
        else:
            mean = sum(r) / n
            spread = math.sqrt(sum((x - mean) ** 2 for x in r) / (n - 1))
            divisor = {"leave-one-out": (n - 1) / n, "group-mean": 1.0, "z-score": spread}[rule.estimate]
            terms = sum((x - mean) * (x - p) for x in r) / n / divisor if divisor else 0.0
        weight += chance * terms
    return Implied(weight / (p * (1 - p)), tau)


@pytest.mark.parametrize("estimate", ["leave-one-out", "group-mean", "z-score", "round-causal"])
@pytest.mark.parametrize("stop", [when_mixed, never, lambda n, s: s >= 1])
def test_implied_weight_by_brute_force(estimate: str, stop: object) -> None:
    for p in (0.07, 0.5, 0.8):
        rule = StopRule(stop, k=2, cap=8, estimate=estimate, prior=(0.5, 1.5))
        assert implied_weight(p, rule) == pytest.approx(brute_force(p, rule), abs=1e-12)


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_implied_weights_with_closed_forms(p: float) -> None:
    fixed = StopRule(never, k=8, cap=8)
    assert implied_weight(p, fixed) == pytest.approx((1.0, 8.0), abs=1e-12)
    assert implied_weight(p, StopRule(never, 8, 8, "group-mean")).weight == pytest.approx(7 / 8, abs=1e-12)
    uniform = sum(p ** (4 * m) + (1 - p) ** (4 * m) for m in range(1, 8))  # still uniform after m rounds
    causal = implied_weight(p, StopRule(estimate="round-causal", prior=(0.3, 2.0)))
    assert causal == pytest.approx((4 + 4 * uniform, 4 + 4 * uniform), rel=1e-12)


SIMULATED = [  # p; fixed 8 z-score; stop at mixed: leave-one-out over tau, E[tau]: from 20 simulated seeds
    (0.02, 2.42, 2.39, 24.51),
    (0.1, 2.17, 1.66, 11.25),
    (0.3, 1.84, 1.19, 5.30),
    (0.5, 1.74, 1.10, 4.54),
    (0.7, 1.83, 1.19, 5.30),
    (0.9, 2.18, 1.67, 11.22),
    (0.98, 2.41, 2.38, 24.52),
]


@pytest.mark.parametrize("p, z_score, own_tau, tau", SIMULATED)
def test_implied_weights_against_an_independent_simulation(
    p: float, z_score: float, own_tau: float, tau: float
) -> None:
    """The simulation's own error shows where p and 1 - p, equal by symmetry, differ: .01, and .03 in tau."""
    assert implied_weight(p, StopRule()) == pytest.approx((own_tau, tau), abs=0.03)
    assert implied_weight(p, StopRule()).weight == pytest.approx(own_tau, abs=0.015)
    assert implied_weight(p, StopRule(never, 8, 8, "z-score")).weight == pytest.approx(z_score, abs=0.015)


def test_bad_rules() -> None:
    with pytest.raises(ConfigError, match="k, cap: got 4, 30"):
        StopRule(k=4, cap=30)
    with pytest.raises(ConfigError, match="estimate: got 'loo'"):
        StopRule(estimate="loo")
    with pytest.raises(ConfigError, match="prior: got"):
        StopRule(prior=(0.0, 1.0))
    for p in (0.0, 1.0, math.nan):
        with pytest.raises(NumericError, match="p: got"):
            implied_weight(p, StopRule())


POOLS = {
    "alike": [0.5] * 16,
    "easy": [0.97] * 16,
    "hopeless": [0.0] * 16,
    "mixed": [i / 15 for i in range(16)],
    "few": [0.5, 0.5, 0.0, 0.0],
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("aim", ["gradient", "mixed_groups"])
@pytest.mark.parametrize("how", ["allocate", "tau", "equal"])
@pytest.mark.parametrize("budget", [8.0, 2.5])
def test_a_budget_holds_from_the_tenth_batch_on(pool: str, aim: str, how: str, budget: float) -> None:
    """A price alone took 0, 32, 0, 32 completions where prompts are alike."""
    success, generator = torch.tensor(POOLS[pool]), torch.Generator().manual_seed(0)
    belief, price, ids, means = BetaBelief(), Price(budget), list(range(len(success))), []

    def rewards(told: Tensor) -> Tensor:
        return (torch.rand(len(told), generator=generator) < success[told]).double()

    for step in range(20):
        if how == "allocate":
            options = {"price": price, "aim": aim, "n_min": 0}
            tau = allocate(belief, ids, step=step, **options).counts
            told = torch.repeat_interleave(torch.arange(len(ids)), tau)
            belief.update(told.tolist(), rewards(told), step=step)
        else:
            plan = RoundPlan(belief, ids, step=step, price=price, aim=aim, n_min=0, weighting=how)
            while (request := plan.next_round()) is not None:
                told = torch.tensor([name for name, k in request for _ in range(k)])
                plan.tell(told.tolist(), rewards(told))
            tau = plan.result().tau
        means.append(tau.double().mean().item())
    assert 0.9 * budget <= min(means[9:]) <= max(means[9:]) <= 1.1 * budget
    assert sum(means[9:]) / len(means[9:]) == pytest.approx(budget, rel=0.02)


def test_constant_rewards_teach_nothing_in_rounds_either() -> None:
    belief, ids = make_belief("auto"), list(range(8))
    for step in range(60):
        plan = RoundPlan(belief, ids, step=step, total=40)
        while (request := plan.next_round()) is not None:
            told = [name for name, k in request for _ in range(k)]
            plan.tell(told, torch.full((len(told),), 0.1))
        assert (plan.result().advantage == 0).all()


# ---- values that faults survived


@pytest.mark.parametrize(("aim", "visit"), [("gradient", 1), ("mixed_groups", 2)])
@pytest.mark.parametrize(("n_min", "n_max"), [(0, 8), (1, 8), (3, 8), (0, 1)])
def test_a_prompt_that_is_due_gets_what_a_visit_takes(aim: str, visit: int, n_min: int, n_max: int) -> None:
    """Two completions where only a mixed group counts, one otherwise, within the bounds."""
    least = least_counts(["a", "b"], 5, n_min, n_max, None, aim, Coverage(3))
    assert least.tolist() == [min(max(n_min, visit), n_max)] * 2


def test_rewards_between_success_and_failure_count_as_failures() -> None:
    plan = RoundPlan(GaussianBelief(), ["a", "b", "c", "d"], step=0, total=8, n_min=2, n_max=2)
    told = [name for name, k in plan.next_round() for _ in range(k)]
    value = {"a": 0.5, "b": 0.51, "c": 0.0, "d": 1.0}
    plan.tell(told, torch.tensor([value[name] for name in told]))
    success, failure = plan._outcomes()
    assert success.tolist() == [False, True, False, True] and failure.tolist() == [True, False, True, False]
    assert plan.next_round() is None and plan.result().stop_reason == ["n_max"] * 4


def test_a_plan_reads_its_belief_with_the_features_it_was_given() -> None:
    belief, features = make_belief("auto"), torch.eye(4, 3)
    belief.update(list("abcd") * 2, torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]), step=0,
                  features=features.repeat(2, 1))  # fmt: skip
    plan = RoundPlan(belief, ["e", "f"], step=9, total=4, features=features[:2])
    for found, want, other in zip(
        plan._signal(),
        read_signal(belief, ["e", "f"], step=9, features=features[:2]),
        read_signal(belief, ["e", "f"], step=9),
    ):
        assert torch.equal(found, want) and not torch.equal(found, other)


def test_a_price_starts_from_one_completion_at_least() -> None:
    gains = torch.tensor([[0.3, 0.1], [0.7, 0.2]])
    one = torch.ones(2)
    none, all_of_them = torch.zeros(2, dtype=torch.long), torch.full((2,), 2)
    assert Price(0.1).start(gains, none, all_of_them) == pytest.approx(0.7)
    with pytest.raises(NumericError, match=r"^failures: got -1.0 at \(1,\), expected"):
        mixed_group_gain(one, one, one, torch.tensor([1.0, -1.0]), k=2)
