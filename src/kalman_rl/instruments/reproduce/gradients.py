"""Experiments on one gradient: how much of it is signal at the start policy, and whether its mean is right."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kalman_rl.beliefs.advantage import Tracked
from kalman_rl.instruments.reproduce.claim import Claim, ratio, value
from kalman_rl.instruments.reproduce.experiment import Experiment
from kalman_rl.instruments.reproduce.policy import Policy, Replies
from kalman_rl.instruments.reproduce.pool import MATHS, World, draw_pool
from kalman_rl.methods import make_method

BATCH, BATCHES = 128, 60


@dataclass(frozen=True)
class Quality:
    """A trial: ``c^2 / (1 - c^2)``, c the mean cosine of a batch's gradient with that of the exact mean accuracy.

    It is proportional to the number of independent completions that a batch is worth.

    Args:
        group: completions a question, of 128 in all.
        advantage: of this method; "true" = reward minus the exact success.
        who: questions "uniform", or drawn by the exact ``v = p (1 - p)``.
        candidates: questions among which the 128 completions are divided in proportion to ``sqrt v``; 0 = no division.
    """

    group: int
    advantage: str
    who: Literal["uniform", "v"] = "uniform"
    candidates: int = 0

    def run(self, worlds: Callable[[], World], seed: int) -> dict[str, Any]:
        start, world = time.monotonic(), worlds()
        policy = world.policy
        policy.load(world.start)
        pool = draw_pool(world, MATHS, 256, seed)
        generator = torch.Generator().manual_seed(seed)
        p = policy.success(pool.rows)
        answers = policy.answers(pool.rows)
        logp = torch.where(answers.mask, policy.logp(answers), 0.0).sum(1)
        exact = _gradient(policy, (p.float() * logp).mean())
        cosines = []
        for _ in range(BATCHES):
            places = self._places(p, generator)
            replies = policy.sample([pool.rows[i] for i in places.tolist()], generator)
            found = _gradient(policy, self._surrogate(policy, replies, places, p))
            cosines.append(torch.nn.functional.cosine_similarity(found, exact, dim=0).item())
        mean = sum(cosines) / len(cosines)
        worth = mean * mean / (1 - mean * mean)
        return {"cosine": mean, "worth": worth, "seconds": time.monotonic() - start}

    def variants(self) -> dict[str, Quality]:
        """Nothing to choose."""
        return {}

    def _places(self, p: Tensor, generator: torch.Generator) -> Tensor:
        """(128,) place in the pool of the question of each completion."""
        variance = p * (1 - p)
        if self.candidates:
            among = torch.randperm(len(p), generator=generator)[: self.candidates]
            shares = variance[among].sqrt()
            return (
                among[torch.multinomial(shares, BATCH, replacement=True, generator=generator)].sort().values
            )
        weight = variance if self.who == "v" else torch.ones_like(p)
        chosen = torch.multinomial(weight, BATCH // self.group, generator=generator)
        return chosen.repeat_interleave(self.group)

    def _surrogate(self, policy: Policy, replies: Replies, places: Tensor, p: Tensor) -> Tensor:
        reward = replies.right.double()
        if self.advantage == "true":
            advantage = reward - p[places]
        else:
            advantage = make_method(self.advantage).advantage(reward, places)
        logp = torch.where(replies.mask, policy.logp(replies), 0.0).sum(1)
        return (advantage.float() * logp).mean()


def _gradient(policy: Policy, value: Tensor) -> Tensor:
    found = torch.autograd.grad(value, list(policy.parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in found if part is not None])


_WHO = {
    "16 x 8, GRPO": Quality(8, "grpo"),
    "16 x 8, leave-one-out": Quality(8, "rloo"),
    "64 x 2, leave-one-out": Quality(2, "rloo"),
    "16 x 8, batch mean": Quality(8, "batch_mean"),
    "128 x 1, batch mean": Quality(1, "batch_mean"),
    "16 x 8, true p": Quality(8, "true"),
    "128 x 1, true p": Quality(1, "true"),
    "16 candidates, ~ sqrt v, true p": Quality(1, "true", candidates=16),
    "64 candidates, ~ sqrt v, true p": Quality(1, "true", candidates=64),
    "drawn ~ v, groups of 8, GRPO": Quality(8, "grpo", who="v"),
    "drawn ~ v, groups of 2, true p": Quality(2, "true", who="v"),
}


def _worth(text: str, source: str, ours: str, other: str, low: float) -> Claim:
    return Claim(text, source, ratio(ours, other, "worth"), low=low, factor=True)


QUALITY = Experiment(
    "quality",
    "What is a completion worth for the gradient of the mean accuracy, at the start policy?",
    "256 questions, 40 % hopeless, 30 % in between, 30 % solved; "
    f"{BATCHES} batches of {BATCH} completions, no training",
    _WHO,
    (
        _worth(
            "With perfect baselines, single completions are worth over 2 times those of groups of 8.",
            "project",
            "128 x 1, true p",
            "16 x 8, true p",
            2.0,
        ),
        _worth(
            "A perfect baseline with single completions is worth over 2 times GRPO.",
            "project",
            "128 x 1, true p",
            "16 x 8, GRPO",
            2.0,
        ),
        _worth(
            "A perfect baseline reduces the gradient's noise by an order of magnitude.",
            "K-GRPO",
            "128 x 1, true p",
            "16 x 8, GRPO",
            10.0,
        ),
        _worth(
            "Perfect selection and a perfect baseline are worth over 5 times GRPO.",
            "project",
            "drawn ~ v, groups of 2, true p",
            "16 x 8, GRPO",
            5.0,
        ),
        _worth(
            "Dividing completions among 64 candidates is worth over 2 times dividing them among 16.",
            "project",
            "64 candidates, ~ sqrt v, true p",
            "16 candidates, ~ sqrt v, true p",
            2.0,
        ),
    ),
    seeds=3,
)


@dataclass(frozen=True)
class Enumeration:
    """A trial: the expected gradient of an advantage over *all* batches of two prompts with two completions each.

    A tabular softmax policy with three replies a prompt, whose rewards are 0, 0.3 and 1. ``residual`` is the part of
    the mean that does not point along the true gradient, ``|m - s g| / |s g|`` with the best scale s; ``bias`` the
    same with s = 1. A tracked advantage has a belief that has seen both prompts before.
    """

    advantage: str

    def run(self, worlds: Callable[[], World], seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        probability = torch.randn(2, 3, generator=generator, dtype=torch.float64).softmax(-1)
        reward = torch.stack(
            [torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)[order] for order in _orders(generator)]
        )
        score = torch.zeros(2, 3, 2, 3, dtype=torch.float64)
        for i, reply in itertools.product(range(2), range(3)):
            score[i, reply, i] = -probability[i]
            score[i, reply, i, reply] += 1
        truth = ((probability * reward)[..., None, None] * score).sum((0, 1)) / 2
        prompt = torch.tensor([0, 0, 1, 1])
        estimate = self._estimator(prompt)
        mean = torch.zeros_like(truth)
        for replies in itertools.product(range(3), repeat=4):
            chosen = torch.tensor(replies)
            advantage = estimate(reward[prompt, chosen]).double()
            batch = (advantage[:, None, None] * score[prompt, chosen]).mean(0)
            mean += probability[prompt, chosen].prod() * batch
        scale = (mean * truth).sum() / truth.square().sum()
        residual = (mean - scale * truth).norm() / (scale * truth).norm()
        return {
            "residual": residual.item(),
            "bias": ((mean - truth).norm() / truth.norm()).item(),
            "seconds": 0.0,
        }

    def variants(self) -> dict[str, Enumeration]:
        """Nothing to choose."""
        return {}

    def _estimator(self, prompt: Tensor) -> Callable[[Tensor], Tensor]:
        part = make_method(self.advantage).advantage
        if not isinstance(part, Tracked):
            return lambda reward: part(reward, prompt)
        belief, ids = part.make(), prompt.tolist()
        belief.update(ids, torch.tensor([0.3, 1.0, 0.0, 0.3]), step=0)
        return lambda reward: belief.advantages(ids, reward, step=1).advantage


def _orders(generator: torch.Generator) -> list[Tensor]:
    return [torch.randperm(3, generator=generator) for _ in range(2)]


_RIGHT = {
    "tracked": "k_grpo",
    "James-Stein": "james_stein",
    "batch mean": "batch_mean",
    "leave-one-out": "rloo",
}
_WRONG = {"GRPO's z-score": "grpo", "KRPO": "krpo"}
UNBIASED = Experiment(
    "unbiased",
    "Does the expected gradient point along that of the expected reward?",
    "all 81 batches of two prompts with two completions each, exactly",
    {name: Enumeration(method) for name, method in (_RIGHT | _WRONG).items()},
    (
        *(
            Claim(
                f"The gradient of {name} points along the true one.",
                "project",
                value(name, "residual"),
                high=1e-9,
            )
            for name in _RIGHT
        ),
        *(
            Claim(
                f"The gradient of {name} does not point along the true one.",
                "project",
                value(name, "residual"),
                low=0.01,
            )
            for name in _WRONG
        ),
    ),
    quick_seeds=5,
)

GRADIENTS = (QUALITY, UNBIASED)
