"""The simulation of beliefs runs, and says what no honest one could hide."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.beliefs.allocation import Pool
from benchmarks.beliefs.rivals import BUDGET, best, falling, play, rivals, variance
from benchmarks.beliefs.selection import Bank
from benchmarks.beliefs.selection import play as choose
from benchmarks.beliefs.tasks import Task, perform


def gain(row: dict, name: str) -> float:
    """Mean error of the group mean over that of a method."""
    return float(row["rows"][name]["gain"].mean)


def test_estimates_at_noisy_rewards() -> None:
    """At G = 8 and noise 2 KRPO as published is worse than the group mean, a belief much better, and it beats the
    constant that knows no prompts."""
    row = perform(Task(4, "clean", {"group": 8, "noise": 2.0, "walk": 0.3}, 1))
    assert gain(row, "krpo") < 0.6
    assert gain(row, "ours") > 4.0
    assert gain(row, "ours") > gain(row, "const")


def test_the_log_det_rule_never_reads_a_reward() -> None:
    """The published rule stops every prompt after the same number of samples."""
    for row in perform(Task(6, "log_det", {"prompts": 4}, 1))["rows"]:
        counts = [row[f"p={p}"] for p in ("0.01", "0.5", "0.99")]
        assert counts[0] == counts[1] == counts[2] and counts[0][1] == 0.0, row


def test_the_oracle_divides_as_trying_everything_does() -> None:
    """Three prompts, six completions: of all 28 divisions the one with the least variance."""
    v = np.array([[0.25, 0.09, 0.01]])
    every = [(i, j, 6 - i - j) for i in range(7) for j in range(7 - i)]
    least = min(variance(v, np.array([n]))[0] for n in every)
    found = best(falling(v), 6)
    assert found.sum() == 6 and variance(v, found)[0] == pytest.approx(least)


@pytest.mark.parametrize("late", [False, True])
def test_rules_spend_one_budget_and_none_beats_the_oracle(late: bool) -> None:
    pool = Pool("small", prompts=64, batch=16)
    for rule in rivals():
        found = play(rule, pool, range(2), late=late)
        assert found["completions"] == pytest.approx(BUDGET), rule.name
        assert late or (found["regret"] >= -1e-9).all(), rule.name
        assert late or rule.name != "oracle" or found["regret"] == pytest.approx(0.0, abs=1e-9)
        assert (found["hard"].mean() < 0.8) == late  # what is dropped is dropped of hard prompts


def test_the_stream_finds_what_teaches_and_leaves_nothing_out() -> None:
    """Draws by the belief carry more signal than uniform ones, less than the best, and see more of the pool."""
    bank = Bank(prompts=256, count=16, steps=48)
    found = {rule: choose(rule, bank, 0) for rule in ("uniform", "stream", "greedy", "oracle")}
    assert found["uniform"][0] + 0.1 < found["stream"][0] < found["oracle"][0]
    assert found["greedy"][1] + 0.1 < found["stream"][1]
