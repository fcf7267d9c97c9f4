"""Pools of questions whose difficulty is known: hopeless, in between and solved, by the start model's exact success.

The task is sorting 4 to 14 digits. The warm start sees few questions of more than 8, so that difficulty runs from
solved to hopeless as in the pools of mathematics RL.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl.engine.models.load import Progress, load_model
from kalman_rl.engine.tasks.sorting import exact_reply
from kalman_rl.engine.tasks.task import Row, Task, make_prompt_id
from kalman_rl.errors import ConfigError
from kalman_rl.instruments.reproduce.policy import CausalPolicy, Policy

NAME, LENGTHS, EASY = "sort_pool", range(4, 15), 8
RARE = 0.1  # each further digit comes that much less often in the warm start
WARM_START = 500
BANK = 12_000
KINDS = ("hopeless", "between", "solved")
Mix = tuple[float, float, float]
MATHS: Mix = (0.4, 0.3, 0.3)
"""Shares of hopeless, in between and solved questions, as in the pools of mathematics RL."""


@dataclass(frozen=True)
class Limits:
    """Success below ``hopeless`` (never right), within ``between``, above ``solved`` (always right)."""

    hopeless: float = 0.01
    between: tuple[float, float] = (0.03, 0.95)
    solved: float = 0.97


class World(NamedTuple):
    """A start policy, questions with their exact success (N,) under it, and what makes one hopeless or solved."""

    policy: Policy
    start: dict[str, Tensor]
    bank: list[Row]
    success: Tensor
    limits: Limits = Limits()


class Pool(NamedTuple):
    """Questions to train on and as many held out, with the kind (N,) of each, a place in ``KINDS``."""

    rows: list[Row]
    kind: Tensor
    held_out: list[Row]


def tiny_world(cache: Path, progress: Progress) -> World:
    """The tiny model after its warm start, and a bank of questions it was not taught on."""
    loaded = load_model("tiny", cache=cache, task=sorting_pool(), progress=progress)
    end = loaded.tokenizer.eos_token_id
    policy = CausalPolicy(loaded.model, loaded.tokenizer, end=end, longest=LENGTHS[-1] + 1)
    bank = questions(BANK, "bank", lambda digits: 1.0)
    parts = [policy.success(bank[i : i + 1000]) for i in range(0, len(bank), 1000)]
    return World(policy, policy.state(), bank, torch.cat(parts))


def sorting_pool() -> Task:
    """Sorting 4 to 14 digits, long questions rare in the warm start."""

    def weight(digits: int) -> float:
        return RARE ** max(digits - EASY, 0)

    return Task(
        name=NAME,
        train=questions(64, "train", weight),
        test=questions(64, "test", weight),
        reward=exact_reply,
        max_completion_tokens=LENGTHS[-1] + 1,
        fresh=lambda count, seed: questions(count, f"train {seed}", weight),
        warm_start=WARM_START,
    )


def questions(count: int, stream: str, weight: Callable[[int], float]) -> list[Row]:
    """``count`` different questions; a length comes with probability proportional to ``weight(digits)``."""
    rng = random.Random(f"{NAME} {stream}")
    weights = [weight(digits) for digits in LENGTHS]
    found: dict[str, Row] = {}
    while len(found) < count:
        question = "".join(rng.choices("0123456789", k=rng.choices(LENGTHS, weights)[0]))
        answer = "".join(sorted(question))
        found[question] = {
            "prompt": f"{question}>",
            "prompt_id": make_prompt_id(NAME, question),
            "answer": answer,
        }
    return list(found.values())


def draw_pool(world: World, mix: Mix, size: int, seed: int) -> Pool:
    """A pool with these shares of each kind, and a disjoint one of the same mix held out.

    Questions in between are spread evenly over their range of success.

    Raises: ConfigError if the bank has too few of a kind.
    """
    rng, limits = random.Random(f"pool {seed}"), world.limits
    counts = [round(share * size) for share in mix[:2]]
    counts.append(size - sum(counts))
    chosen: tuple[list[int], list[int]] = ([], [])
    kinds: list[int] = []
    for kind, count in enumerate(counts):
        places = _spread(world.success, *limits.between, 2 * count, rng) if kind == 1 else None
        if places is None:
            outside = world.success < limits.hopeless if kind == 0 else world.success > limits.solved
            places = _sample(outside.nonzero().flatten().tolist(), 2 * count, rng, KINDS[kind])
        chosen[0].extend(places[::2])
        chosen[1].extend(places[1::2])
        kinds += [kind] * count
    rows, held_out = ([world.bank[i] for i in side] for side in chosen)
    return Pool(rows, torch.tensor(kinds), held_out)


def _spread(success: Tensor, low: float, high: float, count: int, rng: random.Random) -> list[int]:
    """``count`` places whose success is spread evenly from low to high, neighbours beside each other."""
    strips = torch.linspace(low, high, max(min(count // 8, 20), 1) + 1, dtype=success.dtype)
    places: list[int] = []
    for strip, (left, right) in enumerate(itertools.pairwise(strips.tolist())):
        inside = ((success >= left) & (success < right)).nonzero().flatten().tolist()
        wanted = 2 * round(count / 2 * (strip + 1) / (len(strips) - 1)) - len(places)
        places += _sample(inside, wanted, rng, f"between {left:.2f} and {right:.2f}")
    return places


def _sample(places: Sequence[int], count: int, rng: random.Random, kind: str) -> list[int]:
    if len(places) < count:
        raise ConfigError(
            f"pool: got {len(places)} questions that are {kind}, expected at least {count}; ask for a smaller pool, "
            "or for another mix"
        )
    return rng.sample(places, count)
