"""Methods that differ in the advantage: who did better than expected.

Options of most: ``low``, ``high`` >= 0, distances of the clip's ends from a ratio of 1; ``dual`` > 1 or None, see
:class:`kalman_rl.objectives.trust.Clip`; ``epsilon`` >= 0, reward units, added to the group's standard deviation.
Here ``process_noise``, ``observation_noise`` and ``initial_variance`` are variances of rewards, in squared reward
units (:mod:`kalman_rl.objectives.advantage.filtered`). NumericError for a value outside its range.
"""

from __future__ import annotations

from kalman_rl.beliefs.advantage import JamesStein, Tracked
from kalman_rl.objectives import advantage, aggregate, ratio, trust
from kalman_rl.objectives.loss import Method


def reinforce(*, baseline: float = 0.0) -> Method:
    """REINFORCE: no ratio, no trust region, a constant baseline. Source: Williams (1992)."""
    return Method(
        "reinforce", advantage.ConstantBaseline(baseline), ratio.one, trust.unclipped, aggregate.sequence_mean
    )


def rloo() -> Method:
    """RLOO: REINFORCE with the leave-one-out mean of the group. Source: arXiv 2402.14740.

    Deviations: per-token mean instead of the sequence sum; a group of one gets advantage 0.
    """
    return Method("rloo", advantage.leave_one_out, ratio.one, trust.unclipped, aggregate.sequence_mean)


def grpo(*, low: float = 0.2, high: float = 0.2, dual: float | None = None, epsilon: float = 1e-4) -> Method:
    """GRPO: group z-score, token ratio, PPO clip. Source: arXiv 2402.03300.

    ``epsilon`` is TRL's 1e-4 (verl: 1e-6). Equals TRL's ``loss_type="grpo"``; the KL penalty is off.
    """
    return Method(
        "grpo",
        advantage.GroupZScore(epsilon),
        ratio.token,
        trust.Clip(low, high, dual),
        aggregate.sequence_mean,
    )


def dr_grpo(*, low: float = 0.2, high: float = 0.2, length: float = 1024.0) -> Method:
    """Dr.GRPO: no division by the group's std nor by the completion's length. Source: arXiv 2503.20783.

    ``length`` is the constant that replaces the length (tokens): the longest completion allowed.
    """
    return Method(
        "dr_grpo",
        advantage.group_centred,
        ratio.token,
        trust.Clip(low, high),
        aggregate.SequenceSum(length),
    )


def dapo(*, low: float = 0.2, high: float = 0.28, epsilon: float = 1e-4) -> Method:
    """DAPO's objective: GRPO with a higher upper clip and a mean over tokens. Source: arXiv 2503.14476.

    Deviations: its dynamic sampling and overlong penalty are not part of the objective.
    """
    return Method(
        "dapo", advantage.GroupZScore(epsilon), ratio.token, trust.Clip(low, high), aggregate.token_mean
    )


def maxrl(*, low: float = 0.2, high: float = 0.2) -> Method:
    """MaxRL: the group's mean reward divides the advantage, instead of its std. Source: arXiv 2602.02710.

    For rewards >= 0. Ratio, clip and aggregation are GRPO's; the paper's are plain policy gradient's.
    """
    return Method(
        "maxrl", advantage.group_relative, ratio.token, trust.Clip(low, high), aggregate.sequence_mean
    )


def opo(*, low: float = 0.2, high: float = 0.2) -> Method:
    """OPO: baseline weighted by completion length. Source: arXiv 2505.23585.

    Deviations: the paper is exactly on-policy, where ratio and clip do nothing; they are GRPO's here.
    """
    return Method("opo", advantage.LengthWeighted(), ratio.token, trust.Clip(low, high), aggregate.token_mean)


def otb(*, low: float = 0.2, high: float = 0.2) -> Method:
    """Optimal token baseline: one per position, weighted by the score's squared norm. Source: verl 0.9.1.

    Needs ``sum_pi_squared`` of every old next-token distribution.
    """
    return Method(
        "otb", advantage.OptimalTokenBaseline(), ratio.token, trust.Clip(low, high), aggregate.token_mean
    )


def gpg(*, norm: float = 1.0) -> Method:
    """GPG: plain policy gradient, scaled up by the share of groups that teach nothing. arXiv 2504.02546."""
    return Method("gpg", advantage.Rescaled(norm), ratio.one, trust.log_likelihood, aggregate.token_mean)


def gpg_published(*, norm: float = 1.0) -> Method:
    """GPG as in verl: alpha counts zero rewards instead of degenerate groups. Source: verl 0.9.1.

    With 0/1 rewards the step size is inversely proportional to accuracy. Prefer :func:`gpg`.
    """
    return Method(
        "gpg_published",
        advantage.Rescaled(norm, by_zeros=True),
        ratio.one,
        trust.log_likelihood,
        aggregate.token_mean,
    )


def krpo(
    *,
    process_noise: float = 1e-5,
    observation_noise: float = 1e-2,
    initial_variance: float = 1.0,
    low: float = 0.2,
    high: float = 0.2,
) -> Method:
    """KRPO as published: a Kalman filter over the group's rewards in list order. Source: arXiv 2505.07527.

    Depends on the order of the list and is not centred; see :class:`kalman_rl.objectives.advantage.GroupFilter`.
    Deviations: the published 0.01 k3 penalty is off (TRL: ``beta=0.01``).
    """
    return Method(
        "krpo",
        advantage.GroupFilter(process_noise, observation_noise, initial_variance),
        ratio.token,
        trust.Clip(low, high),
        aggregate.sequence_mean,
    )


def krpo_invariant(
    *, observation_noise: float = 0.25, initial_variance: float = 0.25, low: float = 0.2, high: float = 0.2
) -> Method:
    """KRPO without order: the baseline is the posterior given the other rewards of the group. Ours.

    ``initial_variance`` to infinity is RLOO up to scale. R = P0 = 1/4 suit rewards in [0, 1].
    """
    return Method(
        "krpo_invariant",
        advantage.GroupFilter(0.0, observation_noise, initial_variance, invariant=True),
        ratio.token,
        trust.Clip(low, high),
        aggregate.sequence_mean,
    )


def k_score(
    *,
    process_noise: float = 1e-2,
    observation_noise: float = 1e-1,
    initial_variance: float = 1.0,
    adapt: float = 1.0,
    final: bool = False,
    low: float = 0.2,
    high: float = 0.2,
) -> Method:
    """K-Score: rewards normalised by a filter that runs over the batch. Source: arXiv 2604.23056.

    ``adapt=0.9, final=1`` is the published code. Deviations: outcome rewards of a batch instead of an
    episode's returns; TRL's or verl's aggregation instead of an actor-critic.
    """
    return Method(
        "k_score",
        advantage.BatchFilter(process_noise, observation_noise, initial_variance, adapt, final),
        ratio.token,
        trust.Clip(low, high),
        aggregate.sequence_mean,
    )


def batch_mean() -> Method:
    """The control "no groups, no memory": the mean of all other completions of the batch as baseline. Ours.

    Hard to beat where prompts are alike in difficulty.
    """
    return Method(
        "batch_mean", advantage.batch_leave_one_out, ratio.one, trust.unclipped, aggregate.sequence_mean
    )


def james_stein() -> Method:
    """Group means drawn towards each other as far as their noise allows, without memory. Source: arXiv 2511.03710."""
    return Method("james_stein", JamesStein(), ratio.one, trust.unclipped, aggregate.sequence_mean)


def spo(
    *, rho: float | None = None, low: float = 0.2, high: float = 0.28, dual: float | None = 10.0
) -> Method:
    """SPO: a success count per prompt that fades, its prediction as baseline; works with groups of one.

    Source: arXiv 2509.13232. ``rho`` is the memory per visit, None for 0.96. Deviations: see
    :class:`kalman_rl.beliefs.SPOBelief`; its prioritised prompts and KL-driven memory are not part of the objective.
    """
    options = () if rho is None else (("rho", rho),)
    return Method(
        "spo", Tracked("spo", options), ratio.token, trust.Clip(low, high, dual), aggregate.token_mean
    )


def k_grpo(*, low: float = 0.2, high: float = 0.2) -> Method:
    """K-GRPO: a Kalman belief about every prompt's value as baseline, GRPO's ratio and clip. Ours.

    The advantage is leave-one-out and exactly unbiased; noise, drift and prior are learned from the rewards. The
    published code of that name has no policy update; its rule for stopping is in ``kalman_rl.sampling``.
    """
    return Method("k_grpo", Tracked("auto"), ratio.token, trust.Clip(low, high), aggregate.sequence_mean)
