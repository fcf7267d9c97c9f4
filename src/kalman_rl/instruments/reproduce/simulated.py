"""Experiments in simulated pools, where every true value is known: error and honesty of beliefs, and when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kalman_rl.beliefs import make_belief
from kalman_rl.instruments.reproduce.claim import Claim, value
from kalman_rl.instruments.reproduce.experiment import Experiment
from kalman_rl.instruments.reproduce.loop import Training
from kalman_rl.instruments.reproduce.pool import World
from kalman_rl.instruments.reproduce.pools import MATHS, STREAM, TRACKED, small
from kalman_rl.numerics.feature_filter import KalmanPreferenceTracker
from kalman_rl.sampling.gains import NINETY
from kalman_rl.sampling.one_prompt.environment import SimulatedPreferenceEnv
from kalman_rl.sampling.one_prompt.loop import run_adaptive_sampling

QUESTIONS, BATCH, EPOCHS, SCORED = 512, 64, 10, 3
MEAN, SPREAD, WALK = -0.5, 2.0, 0.3


@dataclass(frozen=True)
class Estimation:
    """A trial: how well a belief knows the values of 512 questions that drift, visited once an epoch.

    Logits are N(-0.5, 2^2) and walk by 0.3 an epoch; a reward is Bernoulli plus N(0, noise^2). From the fourth epoch
    on: ``gain``, squared error of the group's mean over the belief's; ``over_constant``, that of the mean of all
    rewards so far over the belief's; ``coverage`` of the predicted 90 % intervals of a true value.
    """

    group: int
    noise: float
    belief: str = "auto"

    def run(self, worlds: Callable[[], World], seed: int) -> dict[str, Any]:
        start, generator = time.monotonic(), torch.Generator().manual_seed(seed)
        logit = MEAN + SPREAD * torch.randn(QUESTIONS, generator=generator, dtype=torch.float64)
        belief = make_belief(self.belief)
        per_epoch = QUESTIONS // BATCH
        errors, inside, total, count = torch.zeros(3, dtype=torch.float64), [], 0.0, 0
        for step in range(EPOCHS * per_epoch):
            if step % per_epoch == 0:
                order = torch.randperm(QUESTIONS, generator=generator)
            logit += (
                WALK / math.sqrt(per_epoch) * torch.randn(QUESTIONS, generator=generator, dtype=torch.float64)
            )
            places = order[step % per_epoch * BATCH :][:BATCH]
            truth = logit[places].sigmoid()
            reward = self._rewards(truth, generator)
            ids = places.tolist()
            scored = step >= SCORED * per_epoch
            if scored:
                told = belief.predict(ids, step=step)
                inside.append(
                    ((truth - told.mean).abs() <= NINETY * told.variance.sqrt()).double().mean().item()
                )
            belief.update([i for i in ids for _ in range(self.group)], reward.flatten(), step=step)
            total, count = total + reward.sum().item(), count + reward.numel()
            if scored:
                known = belief.predict(ids, step=step).mean
                guesses = (known, reward.mean(1), torch.full_like(truth, total / count))
                errors += torch.stack([(guess - truth).square().mean() for guess in guesses])
        ours, group, constant = errors.tolist()
        return {
            "gain": group / ours,
            "over_constant": constant / ours,
            "coverage": sum(inside) / len(inside),
            "seconds": time.monotonic() - start,
        }

    def variants(self) -> dict[str, Estimation]:
        """Nothing to choose."""
        return {}

    def _rewards(self, truth: Tensor, generator: torch.Generator) -> Tensor:
        """(N, group)"""
        shape = (len(truth), self.group)
        right = (torch.rand(shape, generator=generator, dtype=torch.float64) < truth[:, None]).double()
        return right + self.noise * torch.randn(shape, generator=generator, dtype=torch.float64)


_NOISES = {f"groups of {g}, sd {sd:g}": Estimation(g, sd) for g in (8, 2) for sd in (0.0, 0.5, 1.0, 2.0, 4.0)}
VARIANCE = Experiment(
    "variance",
    "How much smaller is a belief's error than that of the group's mean?",
    f"{QUESTIONS} simulated questions, {EPOCHS} visits each, rewards 0 or 1 plus N(0, sd)",
    _NOISES,
    (
        *(
            Claim(
                f"With {name} the belief's error is over 10 times smaller than the group mean's.",
                "K-GRPO",
                value(name, "gain"),
                low=10.0,
                factor=True,
            )
            for name in _NOISES
        ),
        Claim(
            "With groups of 8, sd 0 the belief's error is over 2 times smaller than the group mean's.",
            "project",
            value("groups of 8, sd 0", "gain"),
            low=2.0,
            factor=True,
        ),
        Claim(
            "With groups of 8, sd 4 its error is over 10 times smaller than that of one constant for all questions.",
            "K-GRPO",
            value("groups of 8, sd 4", "over_constant"),
            low=10.0,
            factor=True,
        ),
    ),
)

CALIBRATION = Experiment(
    "calibration",
    "Are beliefs as certain as they should be?",
    "simulated questions as in `variance`, and the training runs of `baseline` and `stream`",
    {
        "simulated, groups of 8": Estimation(8, 0.0),
        "simulated, groups of 2": Estimation(2, 0.0),
        "simulated, singles": Estimation(1, 0.0),
        "tracked, single": Training(MATHS, TRACKED),
        "stream, batch 64": Training(MATHS, small(STREAM)),
    },
    (
        *(
            Claim(
                f"With {kind} the predicted 90 % intervals hold 85 to 95 % of the true values.",
                "project",
                value(f"simulated, {kind}", "coverage"),
                low=0.85,
                high=0.95,
            )
            for kind in ("groups of 8", "groups of 2", "singles")
        ),
        *(
            Claim(
                f"In training ({arm}) squared errors of predicted rewards are 0.9 to 1.1 of what was expected.",
                "project",
                value(arm, "calibration"),
                low=0.9,
                high=1.1,
            )
            for arm in ("tracked, single", "stream, batch 64")
        ),
    ),
)


@dataclass(frozen=True)
class Stopping:
    """A trial: completions taken of 40 questions each with success 0.01, 0.5 and 0.99, of at most 32.

    ``published`` is the rule of K-GRPO's code: stop when the log-determinant of a ridge regression's covariance on
    random features of 64 dimensions falls below -19.5. Else :func:`run_adaptive_sampling` with its defaults.
    ``contrast`` is the mean count at 0.5 minus that at 0.01.
    """

    published: bool

    def run(self, worlds: Callable[[], World], seed: int) -> dict[str, Any]:
        start = time.monotonic()
        counts = {}
        for success in (0.01, 0.5, 0.99):
            taken = [self._taken(success, 1000 * seed + number) for number in range(40)]
            counts[success] = sum(taken) / len(taken)
        found = {f"taken at {success:g}": count for success, count in counts.items()}
        return found | {"contrast": counts[0.5] - counts[0.01], "seconds": time.monotonic() - start}

    def variants(self) -> dict[str, Stopping]:
        """Nothing to choose."""
        return {}

    def _taken(self, success: float, seed: int) -> int:
        env = SimulatedPreferenceEnv(success=success, dim=64, seed=seed)
        if not self.published:
            return run_adaptive_sampling(env, KalmanPreferenceTracker(dim=64, seed=seed))[0]
        generator = torch.Generator().manual_seed(seed)
        information = torch.eye(64, dtype=torch.float64)
        for count in range(1, 33):
            env.sample(1)
            features = 5.0 * torch.randn(64, generator=generator, dtype=torch.float64)
            information += features[:, None] * features / 0.01
            if -information.logdet().item() <= -19.5:
                return count
        return 32


STOPPING = Experiment(
    "stopping",
    "Does sampling stop early where the answer is clear?",
    "simulated questions with success 0.01, 0.5 and 0.99, at most 32 completions",
    {"published rule": Stopping(True), "run_adaptive_sampling": Stopping(False)},
    (
        Claim(
            "K-GRPO's published rule takes over 3 completions more at success 0.5 than at 0.01.",
            "K-GRPO",
            value("published rule", "contrast"),
            low=3.0,
        ),
        Claim(
            "run_adaptive_sampling takes over 3 completions more at success 0.5 than at 0.01.",
            "project",
            value("run_adaptive_sampling", "contrast"),
            low=3.0,
        ),
    ),
)

SIMULATED = (VARIANCE, CALIBRATION, STOPPING)
