"""The published methods, each a composition: advantage x ratio x trust x aggregate.

Read this file first. ``METHODS`` is the table that the command line, the trainers and every invariance
test go through; a new method is one function here.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

from kalman_rl import advantage, aggregate, ratio, trust
from kalman_rl.errors import ConfigError, unknown_name
from kalman_rl.objective import Method


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


def gspo(*, low: float = 3e-4, high: float = 4e-4, epsilon: float = 1e-4) -> Method:
    """GSPO: the sequence's mean log-ratio at every token, tightly clipped. Source: arXiv 2507.18071."""
    return Method(
        "gspo",
        advantage.GroupZScore(epsilon),
        ratio.sequence_mean,
        trust.Clip(low, high),
        aggregate.sequence_mean,
    )


def cispo(*, high: float = 5.0, low: float = 0.0, epsilon: float = 1e-4) -> Method:
    """CISPO: cap the token weight, drop no token. Source: arXiv 2506.13585.

    ``high`` and ``low`` are the bounds themselves, as in TRL; in verl they are distances from 1.
    """
    return Method(
        "cispo", advantage.GroupZScore(epsilon), ratio.token, trust.Cap(high, low), aggregate.token_mean
    )


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
    low: float = 3e-4,
    high: float = 4e-4,
    epsilon: float = 1e-4,
) -> Method:
    """KPO with a diffuse start (P0 = inf): believes the first token, then averages. A causal GSPO.

    Ours; only the initial variance differs from :func:`kpo`. Q = 0 is the running mean of the log-ratios.
    """
    return Method(
        "kpo_diffuse",
        advantage.GroupZScore(epsilon),
        ratio.KalmanFiltered(process_noise, observation_noise, float("inf")),
        trust.Clip(low, high),
        aggregate.sequence_mean,
    )


def ratio_one(*, low: float = 3e-4, high: float = 4e-4, epsilon: float = 1e-4) -> Method:
    """The control "ratio := 1 with the same clip": what remains of KPO when the filter passes nothing."""
    return Method(
        "ratio_one", advantage.GroupZScore(epsilon), ratio.one, trust.Clip(low, high), aggregate.sequence_mean
    )


METHODS: dict[str, Callable[..., Method]] = {
    make.__name__: make
    for make in (
        reinforce,
        rloo,
        grpo,
        dr_grpo,
        dapo,
        gspo,
        cispo,
        kpo,
        kpo_unclipped,
        kpo_diffuse,
        ratio_one,
    )
}


def make_method(name: str, **options: float | None) -> Method:
    """Build a method of the table by name, with its options.

    Raises: ConfigError for an unknown name or option, naming the nearest one; NumericError for a value
    out of range.

    >>> make_method("kpo", low=0.05, high=0.05).trust
    Clip(low=0.05, high=0.05, dual=None)
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    known = inspect.signature(METHODS[name]).parameters
    for option, value in options.items():
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            choice = f"one of {', '.join(known)}" if known else "none, it has no options"
            raise ConfigError(f"method option: got {option!r} for {name}, expected {choice}{hint}")
        if value is None and known[option].default is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"method option {option}: got {value!r} for {name}, expected a number")
    return METHODS[name](**options)
