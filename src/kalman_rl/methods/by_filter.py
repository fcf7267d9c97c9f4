"""Methods that differ in the filter over the ratios: how the noise of a token's ratio is taken out.

Options of all: ``process_noise`` Q >= 0 per token, ``observation_noise`` R > 0 and ``initial_variance`` P0 >= 0 or
inf, variances of log-ratios in nats^2 (:class:`kalman_rl.objectives.ratio.KalmanFiltered`); ``low``, ``high`` >= 0,
distances of the clip's ends from a filtered ratio of 1; ``epsilon`` >= 0, reward units, added to the group's standard
deviation; ``memory`` in [0, 1), the share of past statistics that an optimizer step keeps. NumericError outside.
"""

from __future__ import annotations

from kalman_rl.objectives import advantage, aggregate, ratio, trust
from kalman_rl.objectives.loss import Method


def kpo(
    *,
    process_noise: float = 1e-6,
    observation_noise: float = 1.0,
    initial_variance: float = 0.0,
    low: float = 3e-4,
    high: float = 4e-4,
    epsilon: float = 1e-4,
) -> Method:
    """KPO as published: Kalman-filtered token ratio from a zero start, tightly clipped. arXiv 2602.10609.

    With ``initial_variance = 0`` the ratio is pinned to 1 for about ``1 / sqrt(Q/R)`` tokens: on
    completions much shorter than that this *is* plain policy gradient. Prefer :func:`kpo_diffuse` there.
    Deviations from the published code: exact gains for every Q/R, holes are missing observations.
    """
    return Method(
        "kpo",
        advantage.GroupZScore(epsilon),
        ratio.KalmanFiltered(process_noise, observation_noise, initial_variance),
        trust.Clip(low, high),
        aggregate.sequence_mean,
    )


def kpo_unclipped(
    *,
    process_noise: float = 1e-4,
    observation_noise: float = 1.0,
    initial_variance: float = 0.0,
    epsilon: float = 1e-4,
) -> Method:
    """KPO without clip: the filtered weight on every token. Source: arXiv 2602.10609 (Q = 1e-4)."""
    return Method(
        "kpo_unclipped",
        advantage.GroupZScore(epsilon),
        ratio.KalmanFiltered(process_noise, observation_noise, initial_variance),
        trust.unclipped,
        aggregate.sequence_mean,
    )


def kpo_diffuse(
    *,
    process_noise: float = 1e-6,
    observation_noise: float = 1.0,
    low: float = 0.03,
    high: float = 0.03,
    epsilon: float = 1e-4,
) -> Method:
    """KPO with a diffuse start (P0 = inf): believes the first token, then averages. A causal GSPO.

    Ours; the initial variance differs from :func:`kpo`, and the clip, which was chosen on stale samples: there it
    keeps 88 % of the tokens, the published one 72 %. Those completions had up to 15 tokens; on about 100 tokens it
    collapsed, and 3e-4 to 1e-3 was best. Q = 0 is the running mean of the log-ratios.
    """
    return Method(
        "kpo_diffuse",
        advantage.GroupZScore(epsilon),
        ratio.KalmanFiltered(process_noise, observation_noise, float("inf")),
        trust.Clip(low, high),
        aggregate.sequence_mean,
    )


def kpo_auto(
    *,
    process_noise: float = 1e-6,
    observation_noise: float = 1.0,
    memory: float = 0.9,
    low: float = 0.05,
    high: float = 0.05,
    epsilon: float = 1e-4,
) -> Method:
    """KPO from a diffuse start with Q and R learned from past batches by maximum likelihood. Ours.

    The noises are the start values; where a host does not carry the state from step to step they stay, and
    the method is :func:`kpo_diffuse` with this clip. Learned Q = 0 is a causal GSPO, learned Q/R >= 100 is
    GRPO's token ratio, both with this clip.

    The clip must match the scale of the filtered ratio. A fixed small Q/R gives sequence-mean ratios and
    kpo_diffuse's 0.03; a learned one may leave token-sized movements, of which it would drop more, while
    0.2 is too wide for a smoothed ratio. 0.05 lies between; tune it first.
    """
    return Method(
        "kpo_auto",
        advantage.GroupZScore(epsilon),
        ratio.AutoFiltered(process_noise, observation_noise, memory),
        trust.Clip(low, high),
        aggregate.sequence_mean,
    )


def kpo_noise(
    *,
    floor: float = 0.1,
    scale: float = 1.0,
    process_noise: float = 1e-6,
    behaviour: bool = False,
    memory: float = 0.9,
    low: float = 0.03,
    high: float = 0.03,
    epsilon: float = 1e-4,
) -> Method:
    """KPO from a diffuse start with token noise ``R_t = floor + scale (1 - p_t)^2``. Ours.

    ``scale = 0`` is :func:`kpo_diffuse` with R = floor. Only ``floor : scale : Q`` matters to the weights.
    With ``behaviour`` the ratio is to the behaviour policy, and floor and scale are learned from how trainer and
    behaviour policy disagree on the same policy (``memory``); without, they are the given values, for example what
    :func:`kalman_rl.objectives.ratio.calibrate` found. The clip is kpo_diffuse's, for Q is as small.
    """
    return Method(
        "kpo_noise",
        advantage.GroupZScore(epsilon),
        ratio.NoiseFiltered(floor, scale, process_noise, behaviour=behaviour, memory=memory),
        trust.Clip(low, high),
        aggregate.sequence_mean,
    )


def kpo_robust(
    *,
    process_noise: float = 1e-6,
    observation_noise: float = 1.0,
    initial_variance: float = 1.0,
    threshold: float = 2.0,
    memory: float = 0.9,
    low: float = 0.03,
    high: float = 0.03,
    epsilon: float = 1e-4,
) -> Method:
    """KPO that clips innovations at ``threshold`` predicted deviations, started from N(0, R). Ours.

    ``threshold = inf`` is :func:`kpo` with this P0 and clip, and :func:`kpo_diffuse` with ``initial_variance = inf``,
    where a spike on the first token would get through. The variances are start values: a host that carries
    the state rescales them by what past batches show, otherwise give R the noise there is, since the
    threshold is counted in it. The clip is kpo_diffuse's, for Q is as small against R.
    """
    return Method(
        "kpo_robust",
        advantage.GroupZScore(epsilon),
        ratio.RobustFiltered(process_noise, observation_noise, initial_variance, threshold, memory),
        trust.Clip(low, high),
        aggregate.sequence_mean,
    )
