"""Experiments on the stream's draws where few questions teach: a score that explores, and draws that concentrate.

The scores live here, not in ``sampling``: none of them has won.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from kalman_rl.beliefs.protocol import Belief
from kalman_rl.engine.tasks.task import Row
from kalman_rl.instruments.reproduce.claim import Claim, Measure, difference
from kalman_rl.instruments.reproduce.experiment import Experiment
from kalman_rl.instruments.reproduce.loop import FLOOR, Training
from kalman_rl.instruments.reproduce.pools import HARD_POOL, MATHS, STREAM, TRUE, small
from kalman_rl.sampling.stream import PromptStream

Rule = Literal["mean", "thompson", "upper", "doubt", "gain"]


class Exploring(PromptStream):
    """A stream of 0/1 rewards whose score counts what is not known of a question, from the belief N(m, P), noise R:

    thompson    ``v(p)``, p drawn from N(m, P) for every batch and cut to [0, 1]
    doubt       ``E[v] + c sqrt(P)``
    upper       the largest v that p within ``c sqrt(P)`` of m allows
    gain        ``E[v] + c P^2 / (P + R)``, the variance of p that one more reward takes away

    ``best`` gives the best of a batch's size the same score and the others none, so that only the floor draws these.
    """

    rule: Rule = "mean"
    c: float = 1.0
    best: bool = False

    def _scores(self, ids: list[Hashable], step: int, features: Tensor | None) -> Tensor:
        found = self._values(ids, step, features)
        if not self.best:
            return found
        return torch.zeros_like(found).index_fill(0, found.topk(min(self.count, len(ids))).indices, 1.0)

    def _values(self, ids: list[Hashable], step: int, features: Tensor | None) -> Tensor:
        if self.rule == "mean":
            return super()._scores(ids, step, features)
        mean, variance = self.belief.predict(ids, step=step, features=features)
        if self.rule == "thompson":
            noise = torch.randn(len(ids), generator=self._generator, dtype=torch.float64)
            p = (mean + variance.sqrt() * noise).clamp(0.0, 1.0)
            return p * (1 - p)
        if self.rule == "upper":
            width = self.c * variance.sqrt()
            p = torch.maximum(torch.minimum(torch.full_like(mean, 0.5), mean + width), mean - width)
            p = p.clamp(0.0, 1.0)
            return p * (1 - p)
        known = super()._scores(ids, step, features)
        if self.rule == "doubt":
            return known + self.c * variance.sqrt()
        total = self.belief.predictive(ids, step=step, features=features).variance
        return known + self.c * variance.square() / total.clamp(min=1e-12)


@dataclass(frozen=True)
class Explored:
    """How an arm draws: score, settings of the stream, and whether questions of a length have a belief of their own."""

    rule: Rule = "mean"
    c: float = 1.0
    floor: float = FLOOR
    power: float = 1.0
    most: int = 1
    best: bool = False
    by_length: bool = False

    def stream(self, belief: Belief, names: Sequence[Hashable], count: int, seed: int) -> PromptStream:
        """The stream of a run."""
        found = Exploring(belief, names, count, floor=self.floor, power=self.power, most=self.most, seed=seed)
        found.rule, found.c, found.best = self.rule, self.c, self.best
        return found

    def source(self, rows: Sequence[Row]) -> Callable[[Hashable], Hashable] | None:
        """Id -> length of the question, where that counts."""
        if not self.by_length:
            return None
        length = {row["prompt_id"]: len(row["prompt"]) for row in rows}
        return lambda name: length[name]


@dataclass(frozen=True)
class Exploration(Training):
    """A trial whose way to draw is chosen on tuning seeds among ``tried``."""

    tried: tuple[tuple[str, Explored], ...] = field(default=(), repr=False)

    def variants(self) -> dict[str, Training]:
        """One trial for each way."""
        return {name: Training(self.setting, replace(self.arm, draw=way)) for name, way in self.tried}


TRIED = (
    ("as it is", Explored()),
    ("Thompson", Explored("thompson")),
    ("doubt", Explored("doubt", c=0.25)),
    ("gain", Explored("gain")),
    ("by length", Explored(by_length=True)),
    ("most 2", Explored(most=2)),
    ("best by mean", Explored(best=True)),
    ("best by Thompson", Explored("thompson", best=True)),
    ("best by upper bound", Explored("upper", best=True)),
    ("power 2", Explored(power=2.0)),
    ("floor 0.2", Explored(floor=0.2)),
)


def lead_closed(arm: str, other: str, oracle: str) -> Measure:
    """``arm`` minus the middle of ``other`` and ``oracle``, paired by seed: > 0 where half of the lead is closed."""
    ahead, behind = difference(arm, other), difference(arm, oracle)
    return lambda records: [(a + b) / 2 for a, b in zip(ahead(records), behind(records))]


ARM = small(STREAM)
EXPLORATION = Experiment(
    "exploration",
    "Where one question in ten teaches, does a score that explores find them faster?",
    "256 questions, 60 % hopeless, 10 % in between, 30 % solved; 8192 completions, 64 a batch, 4 updates; rate 1e-4",
    {
        "stream": Training(HARD_POOL, ARM),
        "stream, best of tried": Exploration(HARD_POOL, replace(ARM, draw=Explored(power=2.0)), tried=TRIED),
        "true p, groups of 2": Training(HARD_POOL, small(TRUE)),
    },
    (
        Claim(
            "Perfect knowledge of every success probability would add to the stream.",
            "project",
            difference("true p, groups of 2", "stream"),
            low=0.0,
        ),
        Claim(
            "The variant that was best on tuning seeds beats the stream as it is.",
            "project",
            difference("stream, best of tried", "stream"),
            low=0.0,
        ),
        Claim(
            "It closes half of the lead of perfect knowledge.",
            "project",
            lead_closed("stream, best of tried", "stream", "true p, groups of 2"),
            low=0.0,
        ),
    ),
    tuning_seeds=(900, 901, 902, 903),
    quick_seeds=0,
)

MOST = 32
"""Draws of one question in a batch, the package's default."""
CONCENTRATION = Experiment(
    "concentration",
    f"Does it pay to draw one question up to {MOST} times a batch?",
    "256 questions, 30 % solved, 10 % (harder pool) or 30 % (mixed pool) in between, the others hopeless; 8192 "
    "completions, 64 a batch, 4 updates; rate 1e-4",
    {
        f"{name}, {where} pool": Training(setting, replace(ARM, draw=draw))
        for where, setting in {"harder": HARD_POOL, "mixed": MATHS}.items()
        for name, draw in {"different questions": Explored(), f"up to {MOST}": Explored(most=MOST)}.items()
    },
    (
        Claim(
            f"In the harder pool up to {MOST} draws of one question beat draws of different questions.",
            "project",
            difference(f"up to {MOST}, harder pool", "different questions, harder pool"),
            low=0.0,
        ),
        Claim(
            "In the mixed pool the two are alike.",
            "project",
            difference(f"up to {MOST}, mixed pool", "different questions, mixed pool"),
            low=-0.02,
            high=0.02,
        ),
    ),
    quick_seeds=0,
)
