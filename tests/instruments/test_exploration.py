"""Scores that explore: the formulas, unbiased weights, resumed draws, and lengths with beliefs of their own."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from kalman_rl.beliefs.beta import BetaBelief
from kalman_rl.instruments.reproduce.exploration import TRIED, Explored, Exploring, Rule, lead_closed
from kalman_rl.sampling.stream import mean_draws, points

NAMES = ["never", "rare", "half", "always", "new"]
RULES: tuple[Rule, ...] = ("thompson", "upper", "doubt", "gain")


def stream(rule: Rule, *, count: int = 2, weights: str = "unbiased", seed: int = 0) -> Exploring:
    belief = BetaBelief(forgetting=1.0, prior=(1.0, 1.0))
    for name, wins in zip(NAMES, (0, 1, 5, 10)):
        reward = torch.tensor([1.0] * wins + [0.0] * (10 - wins), dtype=torch.float64)
        belief.update([name] * 10, reward, step=0)
    found = Exploring(belief, NAMES, count, weights=weights, seed=seed)
    found.rule, found.c = rule, 0.5
    return found


def scores(rule: Rule, seed: int) -> list[float]:
    """The docstring in plain numbers, for Beta(1 + wins, 1 + losses)."""
    noise = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    found = []
    for wins, seen, z in zip((0, 1, 5, 10, 0), (10, 10, 10, 10, 0), noise):
        a, total = 1 + wins, 2 + seen
        mean = a / total
        variance = mean * (1 - mean) / (total + 1)
        known = mean * (1 - mean) - variance
        if rule == "thompson":
            p = min(max(mean + math.sqrt(variance) * z, 0.0), 1.0)
            found.append(p * (1 - p))
        elif rule == "upper":
            width = 0.5 * math.sqrt(variance)
            p = min(max(min(max(0.5, mean - width), mean + width), 0.0), 1.0)
            found.append(p * (1 - p))
        elif rule == "doubt":
            found.append(known + 0.5 * math.sqrt(variance))
        else:  # a 0/1 reward has the variance m (1 - m), of which the value's is P
            found.append(known + 0.5 * variance**2 / (mean * (1 - mean)))
    return found


def chances(rule: Rule, seed: int, count: int = 2) -> torch.Tensor:
    score = torch.tensor(scores(rule, seed), dtype=torch.float64)
    return mean_draws(0.9 * score / score.sum() + 0.1 / len(score), count)


@pytest.mark.parametrize("rule", RULES)
def test_the_best_share_what_the_floor_leaves(rule: Rule) -> None:
    for seed in range(20):
        drawing = stream(rule, seed=seed)
        drawing.best = True
        drawn = drawing.draw(step=0)
        best = sorted(range(5), key=lambda i: -scores(rule, seed)[i])[:2]
        share = torch.full((5,), 0.1 / 5, dtype=torch.float64).index_add(
            0, torch.tensor(best), torch.full((2,), 0.45, dtype=torch.float64)
        )
        expected = 2 / (5 * mean_draws(share, 2)[drawn.place])
        torch.testing.assert_close(drawn.weight, expected)


@pytest.mark.parametrize("rule", RULES)
def test_draws_follow_the_formula(rule: Rule) -> None:
    """The chance of each prompt, recovered from its unbiased weight, for many sampled p."""
    for seed in range(20):
        drawn = stream(rule, seed=seed).draw(step=0)
        expected = chances(rule, seed)[drawn.place]
        torch.testing.assert_close(2 / (5 * drawn.weight), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("rule", RULES)
def test_unbiased_weights_give_the_mean_of_the_pool(rule: Rule) -> None:
    """By enumeration of every order and start, given the sampled p; hence also on average over p."""
    value = torch.tensor([0.3, -1.0, 2.0, 0.7, 5.0], dtype=torch.float64)
    for seed in range(3):
        chance, estimate = chances(rule, seed), 0.0
        for order in itertools.permutations(range(5)):
            there = torch.tensor(order)
            cuts = sorted({0.0, 1.0, *[float(e) % 1.0 for e in chance[there].cumsum(0)[:-1]]})
            for low, high in itertools.pairwise(cuts):
                if high - low > 1e-12:
                    place = there[points(chance[there], 2, (low + high) / 2)]
                    estimate += (
                        (high - low)
                        * float((2 / (5 * chance[place]) * value[place]).mean())
                        / math.factorial(5)
                    )
        assert estimate == pytest.approx(float(value.mean()), abs=1e-9)


def test_draws_of_sampled_p_estimate_the_mean_of_the_pool() -> None:
    value = torch.tensor([0.3, -1.0, 2.0, 0.7, 5.0], dtype=torch.float64)
    one = stream("thompson")
    found = torch.stack([(d.weight * value[d.place]).mean() for d in (one.draw(step=0) for _ in range(3000))])
    assert abs(float(found.mean() - value.mean())) < 4 * float(found.std()) / math.sqrt(len(found))


@pytest.mark.parametrize("rule", RULES)
def test_a_loaded_stream_draws_the_same_prompts(rule: Rule) -> None:
    one, two = stream(rule, weights="equal", seed=1), stream(rule, weights="equal", seed=2)
    for _ in range(3):
        one.draw(step=1)
    two.load_state_dict(one.state_dict())
    for _ in range(5):
        assert torch.equal(one.draw(step=1).place, two.draw(step=1).place)


def test_what_is_not_known_comes_up_more_often() -> None:
    """Two prompts of the same mean, one seen 30 times: the new one leads by its doubt."""
    for rule in ("doubt", "gain"):
        plain, found = scores_of("mean"), scores_of(rule)
        assert found[1] - plain[1] > found[0] - plain[0] > 0


def scores_of(rule: Rule) -> list[float]:
    belief = BetaBelief(forgetting=1.0, prior=(1.0, 1.0))
    belief.update(["seen"] * 30, torch.tensor([0.0, 1.0] * 15, dtype=torch.float64), step=0)
    found = Exploring(belief, ["seen", "new"], 1)
    found.rule = rule
    scores: list[float] = found._scores(["seen", "new"], 0, None).tolist()
    return scores


def test_an_arm_says_how_it_draws() -> None:
    assert len({repr(way) for _, way in TRIED}) == len(TRIED)  # a finished run is found by it
    rows = [{"prompt_id": "a", "prompt": "123>"}, {"prompt_id": "b", "prompt": "12345>"}]
    assert Explored().source(rows) is None
    length = Explored(by_length=True).source(rows)
    assert length is not None and length("a") != length("b")
    made = Explored("doubt", c=2.0, most=4, power=2.0).stream(BetaBelief(), NAMES, 2, 0)
    assert isinstance(made, Exploring)
    assert (made.rule, made.c, made.most, made.power, made.floor) == ("doubt", 2.0, 4, 2.0, 0.1)


def test_half_of_a_lead() -> None:
    records = {"a": {0: {"mean": 0.7}}, "b": {0: {"mean": 0.5}}, "best": {0: {"mean": 0.8}}}
    assert lead_closed("a", "b", "best")(records) == pytest.approx([0.05])


def test_the_docs_have_the_numbers_that_were_measured() -> None:
    docs = Path(__file__).parents[2] / "docs"
    oracle, best, _ = json.loads((docs / "evidence" / "exploration.json").read_text())["claims"]
    text = " ".join((docs / "beliefs.md").read_text().split())
    for row, claim in (("knowing every success probability", oracle), ("`select_power` of 2", best)):
        assert (
            f"| {row} | {claim['value']:+.3f} ({claim['interval'][0]:.3f} to {claim['interval'][1]:.3f}) |"
            in text
        )
