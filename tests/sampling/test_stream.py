"""The stream of prompts: exact probabilities, unbiased weights, the floor, its scores, its state, its cost."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.beliefs import make_belief
from kalman_rl.beliefs.beta import BetaBelief
from kalman_rl.beliefs.gaussian import GaussianBelief
from kalman_rl.errors import ConfigError, NumericError, ShapeError
from kalman_rl.sampling import stream as module
from kalman_rl.sampling.learnability import read_signal
from kalman_rl.sampling.stream import PromptStream, mean_draws, points, some_of, systematic

quick = settings(max_examples=60, deadline=None, derandomize=True)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- inclusion probabilities


@quick
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 40),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    most=st.sampled_from([1, 3]),
)
def test_mean_draws_are_bounded_shares_that_sum_to_the_batch(
    seed: int, size: int, spread: float, most: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    share = (spread * torch.randn(size, generator=g, dtype=torch.float64)).exp()
    count = int(torch.randint(1, most * size + 1, (), generator=g))
    found = mean_draws(share, count, most)
    assert found.sum().item() == pytest.approx(count, rel=1e-12)
    assert (found > 0).all() and (found <= most).all()
    # The definition: one factor c for all that are below the bound, and c q >= most for those at it.
    below = found < most - 1e-12
    if below.any():
        factor = found[below] / share[below]
        torch.testing.assert_close(factor, factor[:1].expand_as(factor), rtol=1e-9, atol=0.0)
        assert (share[~below] * factor[0] >= most - 1e-9).all()


def intervals(chance: Tensor, count: int) -> list[tuple[float, list[int]]]:
    """Every sample that systematic sampling in this order can give, with its probability: u is cut at the ends."""
    cuts = sorted({0.0, 1.0, *[float(e) % 1.0 for e in chance.cumsum(0)[:-1]]})
    return [
        (high - low, points(chance, count, (low + high) / 2).tolist())
        for low, high in itertools.pairwise(cuts)
        if high - low > 1e-12
    ]


@pytest.mark.parametrize(
    ("share", "count", "most"),
    [
        ((5.0, 1.0, 1.0, 0.5), 2, 1),
        ((1.0, 2.0, 3.0, 4.0), 3, 1),
        ((0.1, 0.1, 9.0), 1, 1),
        ((0.1, 0.3, 9.0, 2.0), 4, 3),
    ],
)
def test_every_prompt_is_drawn_exactly_as_often_as_it_should_be_and_the_weights_are_unbiased(
    share: tuple[float, ...], count: int, most: int
) -> None:
    """By enumeration: over every order and every start, for any numbers of the prompts."""
    share_of, size = double(*share), len(share)
    chance = mean_draws(share_of, count, most)
    value = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    included, estimate, total = torch.zeros(size, dtype=torch.float64), 0.0, 0.0
    for order in itertools.permutations(range(size)):
        there = torch.tensor(order)
        for probability, sample in intervals(chance[there], count):
            place = there[torch.tensor(sample)]
            often = torch.bincount(place, minlength=size)
            assert (often - chance).abs().max() < 1  # rounded up or down: different prompts where most is 1
            included += often.double() * probability / math.factorial(size)
            weight = count / (size * chance[place])
            estimate += probability * float((weight * value[place]).mean()) / math.factorial(size)
            total += probability * float(weight.mean()) / math.factorial(size)
    torch.testing.assert_close(included, chance, rtol=0.0, atol=1e-9)
    assert estimate == pytest.approx(float(value.mean()), abs=1e-9)
    assert total == pytest.approx(1.0, abs=1e-9)


def test_candidates_are_every_set_alike_probable() -> None:
    """Chi-square over the sets of 2 of 9, through the path of a large pool."""
    g = torch.Generator().manual_seed(0)
    seen = Counter(tuple(sorted(some_of(9, 2, g).tolist())) for _ in range(36 * 200))
    assert len(seen) == 36
    statistic = sum((n - 200) ** 2 / 200 for n in seen.values())
    assert statistic < 66  # 35 degrees of freedom: exceeded once in a thousand times
    for size, count in ((10, 10), (10, 7), (1000, 100), (5, 9)):
        found = some_of(size, count, g).tolist()
        assert len(set(found)) == len(found) == min(size, count) and set(found) <= set(range(size))


# ---- the stream


def taught(rates: dict[str, float], visits: int = 40) -> BetaBelief:
    """A belief that saw ``visits`` completions of each prompt at these rates of success."""
    belief = BetaBelief(forgetting=1.0, prior=(1.0, 1.0))
    for name, rate in rates.items():
        wins = round(rate * visits)
        belief.update([name] * visits, double(*[1.0] * wins, *[0.0] * (visits - wins)), step=0)
    return belief


@pytest.mark.parametrize(("score", "power"), [("stream", 1.0), ("stream", 2.0), ("sage", 1.0)])
def test_draws_follow_the_formula(score: str, power: float) -> None:
    """The chances a prompt had, recovered from its unbiased weight, are the docstring's."""
    rates = {"never": 0.0, "rare": 0.1, "half": 0.5, "often": 0.9, "always": 1.0}
    belief, names = taught(rates), list(rates)
    stream = PromptStream(belief, names, 2, score=score, power=power, weights="unbiased", seed=3)
    found = torch.zeros(5, dtype=torch.float64)
    for _ in range(60):
        drawn = stream.draw(step=1)
        found[drawn.place] = 2 / (5 * drawn.weight)
    signal = read_signal(belief, names, step=1)
    assert signal.a is not None and signal.b is not None
    if score == "stream":
        value = [float(v) for v in signal.variance]
    else:
        value = []
        for a, b in zip(signal.a.tolist(), signal.b.tolist()):
            m = float(mpmath.log(a / b))
            g = 1 / (1 + math.exp(m))
            spread = float(mpmath.psi(1, a) + mpmath.psi(1, b))
            value.append(0.0 if m < -3.0 else g**2 / (g * (1 - g) + 0.1) / (1 + spread))
    taught_ = np.array(value) ** power
    share = 0.9 * taught_ / taught_.sum() + 0.1 / 5
    expected = mean_draws(torch.from_numpy(share), 2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0.0)


def test_sage_leaves_the_hopeless_to_the_floor() -> None:
    belief = taught({"never": 0.0, "rare": 0.1, "half": 0.5})
    stream = PromptStream(belief, ["never", "rare", "half"], 1, score="sage", weights="unbiased")
    weight = {}
    for _ in range(400):
        drawn = stream.draw(step=1)
        weight[stream.pool[int(drawn.place)]] = float(drawn.weight)
    assert 1 / (3 * weight["never"]) == pytest.approx(0.1 / 3)
    assert weight["rare"] < weight["half"]  # confident errors are drawn more often


def test_every_prompt_returns() -> None:
    """However hopeless: each comes with probability >= floor B / N a batch, through candidates as well."""
    rates: dict[str, float] = {f"never{i}": 0.0 for i in range(95)} | {f"half{i}": 0.5 for i in range(5)}
    belief = taught(rates, visits=400)
    for count, batches in ((4, 2000), (20, 400)):  # 64 candidates of the 100; all of them
        stream = PromptStream(belief, list(rates), count, floor=0.2, seed=5)
        times = torch.zeros(100)
        for _ in range(batches):
            times[stream.draw(step=1).place] += 1
        least = 0.2 * count / 100 * batches  # 16
        assert times.min() > least - 4 * math.sqrt(least)
        assert times[95:].mean() > 3 * times[:95].mean()


def test_equal_weights_are_one_and_unbiased_ones_estimate_the_mean_of_the_pool() -> None:
    """With candidates: weights account for both draws. 4 standard errors over 1500 batches."""
    rates = {str(i): (i % 10) / 10 for i in range(90)}
    belief, value = taught(rates), torch.arange(90, dtype=torch.float64).sin()
    equal = PromptStream(belief, list(rates), 3)
    assert torch.equal(equal.draw(step=1).weight, torch.ones(3, dtype=torch.float64))
    stream = PromptStream(belief, list(rates), 3, weights="unbiased")
    assert module.CANDIDATES * 3 < 90
    means = []
    for _ in range(1500):
        drawn = stream.draw(step=1)
        assert len(set(drawn.place.tolist())) == 3
        means.append(float((drawn.weight * value[drawn.place]).mean()))
    error = np.std(means) / math.sqrt(len(means))
    assert abs(np.mean(means) - float(value.mean())) < 4 * error < 0.15


def test_draws_concentrate_where_few_prompts_teach() -> None:
    """40 draws, 3 prompts that teach: nearly a third of 90 % for each, up to the bound."""
    rates: dict[str, float] = {f"never{i}": 0.0 for i in range(97)} | {f"half{i}": 0.5 for i in range(3)}
    belief = taught(rates, visits=4000)
    for most, often in ((1, 1), (5, 5), (32, 11)):
        stream = PromptStream(belief, list(rates), 40, most=most)
        times = torch.stack([torch.bincount(stream.draw(step=1).place, minlength=100) for _ in range(50)])
        assert times.sum(1).eq(40).all() and times.max() <= often
        assert times[:, 97:].double().mean() > often - 1


# ---- graded rewards


def test_graded_rewards_count_what_the_policy_can_move() -> None:
    """Not our doubt about the value (P), and not the scorer's noise: R - noise where rewards are real, the bound
    m (1 - m) - P where they lie in [0, 1]."""
    ids = ["a"] * 4 + ["b"] * 4
    reward = double(-3.0, -1.0, 1.0, 3.0, 9.0, 11.0, 13.0, 7.0)
    real = GaussianBelief(process_noise=0.0, variance=100.0)
    real.update(ids, reward, step=0)
    within = (double(-3.0, -1.0, 1.0, 3.0).square().sum() + double(-1.0, 1.0, 3.0, -3.0).square().sum()) / 6
    names = ["a", "b", "new"]
    stream = PromptStream(real, names, 1, reward_range="real", reward_noise_variance=1.0)
    scores = stream._scores(names, 1, None)
    # One R for all three, though nothing is known about the value of "new".
    torch.testing.assert_close(scores, torch.full((3,), float(within) - 1.0, dtype=torch.float64))
    unit = BetaBelief(forgetting=1.0, prior=(1.0, 1.0))
    unit.update(["a"] * 4, double(0.25, 0.75, 0.5, 0.5), step=0)
    value = unit.predict(["a"], step=1)
    bound = value.mean * (1 - value.mean) - value.variance
    torch.testing.assert_close(PromptStream(unit, ["a"], 1)._scores(["a"], 1, None), bound)


def test_a_pool_that_teaches_nothing_is_drawn_uniformly() -> None:
    belief = GaussianBelief(observation_noise=0.5)
    stream = PromptStream(
        belief, list("abcd"), 2, reward_range="real", reward_noise_variance=0.5, weights="unbiased"
    )
    torch.testing.assert_close(stream.draw(step=0).weight, torch.ones(2, dtype=torch.float64))


# ---- state


def test_a_loaded_stream_draws_the_same_prompts() -> None:
    belief, names = taught({str(i): i / 200 for i in range(200)}), [str(i) for i in range(200)]
    one = PromptStream(belief, names, 4, seed=1)
    for _ in range(3):
        one.draw(step=1)
    two = PromptStream(belief, names, 4, seed=2)
    two.load_state_dict(one.state_dict())
    before = torch.random.get_rng_state()
    for _ in range(3):
        assert torch.equal(one.draw(step=1).place, two.draw(step=1).place)
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator is not touched
    other = PromptStream(belief, names[:-1], 4)
    with pytest.raises(ConfigError, match=r"^pool: got 199 prompts that are not the 200 the run began with"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ConfigError, match=r"^pool: got 200 prompts that are not"):
        PromptStream(belief, names[::-1], 4).load_state_dict(one.state_dict())
    long = ["x" * 300 + end for end in "ab"]  # ids that differ late differ
    with pytest.raises(ConfigError, match=r"^pool: got 2 prompts that are not"):
        PromptStream(belief, long[::-1], 1).load_state_dict(PromptStream(belief, long, 1).state_dict())


@pytest.mark.parametrize(
    ("pool", "count", "options", "error", "text"),
    [
        ([], 1, {}, ConfigError, "pool: got no prompts"),
        ("ab", 1, {}, ShapeError, "pool: got str"),
        (["a", "a"], 1, {}, ConfigError, "pool: got 2 ids, 1 different"),
        (["a", "b"], 3, {}, ConfigError, "count: got 3 prompts per batch, expected 1 to the pool's 2"),
        (["a", "b"], 0, {}, ConfigError, "count: got 0"),
        (["a"], 1, {"floor": 0.0}, ConfigError, "select_floor: got 0.0"),
        (["a"], 1, {"power": -1.0}, ConfigError, "select_power: got -1.0"),
        (["a"], 1, {"most": 0}, ConfigError, "most: got 0"),
        (["a"], 1, {"weights": "unbaised"}, ConfigError, "select_weights: got 'unbaised'"),
        (["a"], 1, {"score": "saga"}, ConfigError, "score: got 'saga'"),
        (["a"], 1, {"score": "sage", "reward_range": "real"}, ConfigError, "select: got 'sage' with real"),
    ],
)
def test_bad_input_is_one_sentence(
    pool: Any, count: int, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        PromptStream(BetaBelief(), pool, count, **options)
    assert str(caught.value).startswith(text)


def test_bad_shares_and_counts_are_refused() -> None:
    with pytest.raises(NumericError, match="^share: "):
        mean_draws(double(1.0, 0.0), 1)
    with pytest.raises(ConfigError, match="^count: got 3"):
        mean_draws(double(1.0, 1.0), 3)
    with pytest.raises(ConfigError, match=r"^count: got 9"):
        PromptStream(BetaBelief(), ["a"], 1).draw(step=0, count=9)


def test_systematic_samples_have_the_size_of_the_batch() -> None:
    g = torch.Generator().manual_seed(0)
    for size, count in ((70_000, 65_536), (1, 1), (300, 299)):
        chance = mean_draws(torch.rand(size, generator=g).double() + 0.01, count)
        place = systematic(chance, g)
        assert len(place) == count and len(set(place.tolist())) == count


def test_a_batch_of_a_million_prompts_takes_at_most_20_ms() -> None:
    """A belief that has seen a hundred thousand of them; best of five, 128 prompts a batch."""
    belief = make_belief("auto")
    for start in range(0, 100_000, 20_000):
        names = list(range(start, start + 20_000))
        belief.update(names, torch.rand(20_000).round().double(), step=start // 20_000)
    stream = PromptStream(belief, range(1_000_000), 128)
    took = []
    for step in range(5):
        begun = time.process_time()
        stream.draw(step=6 + step)
        took.append(time.process_time() - begun)
    assert min(took) < 0.020


@pytest.mark.parametrize("count", [3, 9])
def test_some_of_is_drawn_from_the_generator_alone(count: int) -> None:
    first, again = (some_of(20, count, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
