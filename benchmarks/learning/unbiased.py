"""Is the expected gradient that of the expected reward? Exact answers for every estimator and method.

A tabular softmax policy over short sequences that end early or late, one or more prompts, and *all* batches
of groups that it can produce. Each batch has a probability, so mean and variance of an estimate are sums, not
Monte Carlo. With g the true gradient and m the estimate's mean:

    scale = m'g / g'g        residual = |m - scale g| / |scale g|        angle between m and g
    variance = tr Cov(estimate) / scale^2, relative to leave-one-out under a plain sum

"exact" means m = g, "scaled" means m = scale g. What is scaled for one prompt but "biased" for two weighs
prompts unequally. Run ``python -m benchmarks.learning.unbiased``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from kalman_rl.beliefs.advantage import JamesStein, Tracked
from kalman_rl.methods import METHODS, make_method
from kalman_rl.objectives import advantage, aggregate, ratio, trust
from kalman_rl.objectives.loss import Method, estimate_advantage, policy_loss
from kalman_rl.objectives.rollouts import Current, LastLayerStep, Rollouts

RESULTS = Path(__file__).parents[1] / "results" / "learning" / "unbiased.json"
TOLERANCE = 1e-12
"""Relative; what counts as equal."""


@dataclass(frozen=True)
class World:
    """A tabular policy: S possible sequences of at most T tokens for each of N prompts, P parameters.

    ``logp`` and ``sum_pi_squared`` (N, S, T); ``every`` (N, S, T, V) log-probabilities of all tokens; ``score``
    (N, S, T, P) gradient of ``logp``; ``mask`` (S, T); ``reward`` (N, S); ``group`` completions a prompt.
    """

    logp: Tensor
    every: Tensor
    score: Tensor
    mask: Tensor
    reward: Tensor
    group: int

    @property
    def probability(self) -> Tensor:
        """(N, S) of each sequence."""
        return torch.where(self.mask, self.logp, 0.0).sum(-1).exp()

    @property
    def true_gradient(self) -> Tensor:
        """(P,) of the mean over prompts of the expected reward."""
        whole = torch.where(self.mask[None, :, :, None], self.score, 0.0).sum(2)
        return ((self.probability * self.reward)[..., None] * whole).sum((0, 1)) / len(self.reward)

    @cached_property
    def batches(self) -> tuple[Tensor, Tensor, list[Rollouts]]:
        """All batches: sequence numbers (K, B), probabilities (K,), rollouts; rows 0..G-1 are prompt 0."""
        prompts, sequences = self.reward.shape
        rows = prompts * self.group
        chosen = torch.tensor(list(itertools.product(range(sequences), repeat=rows)))
        rollouts = [self.rollouts(row) for row in chosen]
        return chosen, self.probability[self.prompt, chosen].prod(1), rollouts

    @property
    def prompt(self) -> Tensor:
        """(B,) prompt of each row."""
        return torch.arange(len(self.reward)).repeat_interleave(self.group)

    def rollouts(self, chosen: Tensor) -> Rollouts:
        """The batch of these sequences (B,), on-policy."""
        logp, every = self.logp[self.prompt, chosen], self.every[self.prompt, chosen]
        return Rollouts(
            logp,
            self.mask[chosen],
            self.reward[self.prompt, chosen],
            self.prompt,
            logp_behaviour=logp,
            top_behaviour=every,
            sum_pi_squared=every.exp().square().sum(-1),
            lag=torch.zeros_like(logp),
        )


def make_world(
    seed: int, *, vocabulary: int = 3, length: int = 2, prompts: int = 1, group: int = 3, scale: float = 0.8
) -> World:
    """A random policy; the last token ends a sequence, and so does the length. Rewards are 0, 0.3 or 1."""
    g = torch.Generator().manual_seed(seed)
    end = vocabulary - 1
    going = [p for n in range(length) for p in itertools.product(range(end), repeat=n)]
    texts = [(*p, end) for p in going]
    texts += list(itertools.product(range(end), repeat=length))
    theta = scale * torch.randn(prompts, len(going), vocabulary, generator=g, dtype=torch.float64)
    table = theta.log_softmax(-1)
    sizes = (prompts, len(texts), length)
    logp = torch.zeros(sizes, dtype=torch.float64)
    every = torch.full((*sizes, vocabulary), -math.log(vocabulary), dtype=torch.float64)
    score = torch.zeros(*sizes, *theta.shape, dtype=torch.float64)
    mask = torch.zeros(sizes[1:], dtype=torch.bool)
    for s, text in enumerate(texts):
        for t, token in enumerate(text):
            context = going.index(text[:t])
            mask[s, t] = True
            logp[:, s, t], every[:, s, t] = table[:, context, token], table[:, context]
            for p in range(prompts):
                score[p, s, t, p, context] = -table[p, context].exp()
                score[p, s, t, p, context, token] += 1
    reward = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)[
        torch.randint(3, (prompts, len(texts)), generator=g)
    ]
    return World(logp, every, score.flatten(3), mask, reward, group)


Estimator = Callable[[Rollouts], Tensor]
"""What stands on each token's score (B, T)."""


def plain_sum(estimate: Callable[..., Tensor]) -> Estimator:
    """An advantage alone: ``A / B`` on every token of a completion."""
    carrier = Method("alone", estimate, ratio.one, trust.unclipped, aggregate.SequenceSum(1.0))

    def coefficients(rollouts: Rollouts) -> Tensor:
        value = estimate_advantage(carrier, rollouts)
        value = value if value.dim() == 2 else value[:, None]
        return torch.where(rollouts.mask, value, 0.0) / len(rollouts.mask)

    return coefficients


def on_policy(method: Method) -> Estimator:
    """A method as it stands, its own aggregation included, at the policy that sampled."""

    def coefficients(rollouts: Rollouts) -> Tensor:
        logp = rollouts.logp_old.clone().requires_grad_()
        still = LastLayerStep(torch.zeros_like(rollouts.logp_old), torch.zeros_like(rollouts.logp_old), 0.0)
        policy_loss(method, rollouts, Current(logp, rollouts.top_behaviour, still)).value.backward()
        assert logp.grad is not None
        return -logp.grad

    return coefficients


def _rloo(how: Callable[..., Tensor]) -> Estimator:
    return on_policy(Method("rloo", advantage.leave_one_out, ratio.one, trust.unclipped, how))


ADVANTAGES: dict[str, Estimator] = {
    "leave_one_out (RLOO)": plain_sum(advantage.leave_one_out),
    "batch_leave_one_out": plain_sum(advantage.batch_leave_one_out),
    "constant 0 (REINFORCE)": plain_sum(advantage.ConstantBaseline()),
    "constant 0.5": plain_sum(advantage.ConstantBaseline(0.5)),
    "group_centred (Dr.GRPO)": plain_sum(advantage.group_centred),
    "group z-score (GRPO)": plain_sum(advantage.GroupZScore()),
    "group relative (MaxRL)": plain_sum(advantage.group_relative),
    "rescaled (GPG)": plain_sum(advantage.Rescaled()),
    "rescaled by zeros (GPG, published)": plain_sum(advantage.Rescaled(by_zeros=True)),
    "length weighted (OPO)": plain_sum(advantage.LengthWeighted()),
    "optimal token baseline": plain_sum(advantage.OptimalTokenBaseline()),
    "optimal token baseline, loud tail": plain_sum(advantage.OptimalTokenBaseline(silent_tail=False)),
    "group filter (KRPO)": plain_sum(advantage.GroupFilter()),
    "group filter, invariant": plain_sum(advantage.GroupFilter(0.0, 0.25, 0.25, invariant=True)),
    "James-Stein": plain_sum(JamesStein()),
    "tracked, auto (K-GRPO), first batch": plain_sum(Tracked("auto")),
    "tracked, gaussian, first batch": plain_sum(Tracked("gaussian")),
    "tracked, beta, first batch": plain_sum(Tracked("beta")),
    "tracked, spo (SPO), first batch": plain_sum(Tracked("spo")),
    "batch filter (K-Score)": plain_sum(advantage.BatchFilter()),
    "batch filter (K-Score, published)": plain_sum(advantage.BatchFilter(adapt=0.9, final=True)),
}
AGGREGATIONS: dict[str, Estimator] = {
    "RLOO, sequence sum": _rloo(aggregate.SequenceSum(1.0)),
    "RLOO, constant length": _rloo(aggregate.SequenceSum(7.0)),
    "RLOO, token mean": _rloo(aggregate.token_mean),
    "RLOO, sequence mean": _rloo(aggregate.sequence_mean),
}


def methods() -> dict[str, Estimator]:
    """Every method of the package with its defaults."""
    return {name: on_policy(make_method(name)) for name in METHODS}


@dataclass(frozen=True)
class Finding:
    """One estimator in one world; the numbers of the module's docstring."""

    name: str
    kind: str
    world: str
    verdict: str
    scale: float
    residual: float
    angle: float
    error: float
    variance: float


def moments(world: World, estimate: Estimator) -> tuple[Tensor, float]:
    """Mean (P,) and trace of the covariance of an estimate, over all batches."""
    chosen, probability, rollouts = world.batches
    found = torch.stack([estimate(batch) for batch in rollouts])
    score = world.score[world.prompt, chosen]
    gradients = torch.einsum("kbt,kbtp->kp", found, score)
    mean = probability @ gradients
    return mean, float(probability @ gradients.square().sum(1) - mean.square().sum())


def judge(world: World, estimate: Estimator, name: str = "", kind: str = "", where: str = "") -> Finding:
    """Compare an estimate's mean with the true gradient; ``variance`` is absolute here, after rescaling."""
    true = world.true_gradient
    mean, spread = moments(world, estimate)
    scale = float(mean @ true / (true @ true))
    residual = float((mean - scale * true).norm() / (scale * true).norm())
    error = float((mean - true).norm() / true.norm())
    verdict = "exact" if error < TOLERANCE else "scaled" if residual < TOLERANCE else "biased"
    angle = math.degrees(math.atan2(residual, math.copysign(1.0, scale)))
    return Finding(name, kind, where, verdict, scale, residual, angle, error, spread / scale**2)


WORLDS: dict[str, World] = {
    "one prompt": make_world(10, vocabulary=3, length=2, prompts=1, group=3),
    "two prompts": make_world(5, vocabulary=2, length=3, prompts=2, group=2),
    "three prompts": make_world(5, vocabulary=2, length=2, prompts=3, group=2),
}
"""The worlds of the published table: 343, 256 and 729 batches. Three prompts are the fewest with a spread of
the others' means, which shrinkage learns from."""


def survey(worlds: dict[str, World], kinds: dict[str, dict[str, Estimator]]) -> list[Finding]:
    """Every estimator in every world, variance relative to leave-one-out under a plain sum."""
    found = []
    for where, world in worlds.items():
        unit = judge(world, ADVANTAGES["leave_one_out (RLOO)"]).variance
        for kind, estimators in kinds.items():
            for name, estimate in estimators.items():
                one = judge(world, estimate, name, kind, where)
                found.append(Finding(**(asdict(one) | {"variance": one.variance / unit})))
    return found


def table(findings: list[Finding]) -> str:
    """The findings as text."""
    lines = [
        f"{'world':13} {'kind':12} {'estimator':36} {'verdict':7} {'scale':>10} {'angle':>8} {'error':>9} "
        f"{'variance':>9}"
    ]
    lines += [
        f"{f.world:13} {f.kind:12} {f.name:36} {f.verdict:7} {f.scale:10.4g} {f.angle:7.2f}° {f.error:9.2e} "
        f"{f.variance:9.3g}"
        for f in findings
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table and write ``results/unbiased.json``."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    kinds = {"advantage": ADVANTAGES, "aggregation": AGGREGATIONS, "method": methods()}
    findings = survey(WORLDS, kinds)
    print(table(findings))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([asdict(f) for f in findings], indent=1) + "\n")


if __name__ == "__main__":
    main()
