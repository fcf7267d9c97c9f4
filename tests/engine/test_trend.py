"""The sentence about the training reward: silent on noise, loud on a fall."""

from __future__ import annotations

import random

from kalman_rl.engine.trend import course, fall, rewards_of


def series(*levels: tuple[int, float], noise: float = 0.05, seed: int = 0) -> list[tuple[int, float]]:
    draw = random.Random(seed)
    values = [level + draw.gauss(0, noise) for count, level in levels for _ in range(count)]
    return [(step, value) for step, value in enumerate(values, start=1)]


def test_a_fall_is_said_with_its_steps() -> None:
    rewards = series((10, 0.2), (10, 0.8), (10, 0.3))
    said = course(rewards)
    assert said.startswith(f"warning: {fall(rewards)}; try") and "fell: mean 0." in said
    begin, end = (int(word.strip("),;")) for word in said.partition("(steps ")[2].split()[:3:2])
    assert begin >= 11 and end <= 20


def test_noise_and_growth_are_no_fall() -> None:
    fallen = sum(course(series((40, 0.5), seed=seed)).startswith("warning") for seed in range(200))
    assert fallen <= 10
    assert "fell" not in course(series((10, 0.2), (10, 0.5), (10, 0.8)))


def test_too_little_says_nothing() -> None:
    assert course([]) == course(series((5, 0.5))) == ""
    assert (
        course(series((6, 0.5), noise=0))
        == "training reward: mean 0.500 over the first 3 batches, 0.500 over the last"
    )


def test_only_batches_with_a_reward_count() -> None:
    rows = [
        {"kind": "eval", "step": 0, "reward": 1.0},
        {"kind": "train", "step": 1, "reward": 0.5},
        {"kind": "train", "step": 2},
        {"kind": "train", "step": 3, "reward": None},
    ]
    assert rewards_of(rows) == [(1, 0.5)]
