"""Methods that differ in the trust region: which tokens may still move.

Options of most: ``epsilon`` >= 0, reward units, added to the group's standard deviation. ``low`` and ``high`` mean
what the method bounds: distances from a ratio of 1 (capo), of the log-ratio from 0 (gmpo), the bounds of the weight
themselves (cispo), divergence (dppo_*, vaco). NumericError for a value outside its range.
"""

from __future__ import annotations

from kalman_rl.objectives import advantage, aggregate, penalty, ratio, trust
from kalman_rl.objectives.loss import Method


def cispo(*, high: float = 5.0, low: float = 0.0, epsilon: float = 1e-4) -> Method:
    """CISPO: cap the token weight, drop no token. Source: arXiv 2506.13585.

    ``high`` and ``low`` are the bounds themselves, as in TRL; in verl they are distances from 1.
    """
    return Method(
        "cispo", advantage.GroupZScore(epsilon), ratio.token, trust.Cap(high, low), aggregate.token_mean
    )


def gmpo(*, low: float = 0.4, high: float = 0.4, epsilon: float = 1e-4) -> Method:
    """GMPO: geometric mean of token ratios, clipped token by token in log space. Source: arXiv 2507.20673."""
    return Method(
        "gmpo",
        advantage.GroupZScore(epsilon),
        ratio.token,
        trust.GeometricClip(low, high),
        aggregate.sequence_mean,
    )


def sapo(*, positive: float = 1.0, negative: float = 1.05, epsilon: float = 1e-4) -> Method:
    """SAPO: a sigmoid gate on the token ratio instead of a clip. Source: arXiv 2511.20347."""
    return Method(
        "sapo",
        advantage.GroupZScore(epsilon),
        ratio.token,
        trust.SoftGate(positive, negative),
        aggregate.sequence_mean,
    )


def vespo(
    *,
    positive_power: float = 2.0,
    positive_decay: float = 3.0,
    negative_power: float = 3.0,
    negative_decay: float = 2.0,
    behaviour: bool = False,
    epsilon: float = 1e-4,
) -> Method:
    """VESPO: a Gamma-shaped weight of the whole sequence's ratio instead of a clip. Source: arXiv 2602.10693.

    With ``behaviour`` the ratios are to the behaviour policy, so a sampler's mismatch is inside the product.
    ``*_power`` and ``*_decay`` are k and lambda of :class:`kalman_rl.objectives.trust.Gamma`.
    """
    return Method(
        "vespo",
        advantage.GroupZScore(epsilon),
        ratio.BehaviourToken() if behaviour else ratio.token,
        trust.Gamma(positive_power, positive_decay, negative_power, negative_decay),
        aggregate.token_mean,
    )


def dro(*, beta: float = 0.1, epsilon: float = 1e-4) -> Method:
    """DRO: policy gradient with a quadratic penalty on the log-ratio, no clip. Source: arXiv 2405.19107.

    ``-A logp + beta (logp - logp_old)^2 / 2``. Deviations: verl's form, a token at a time and with a group
    baseline, instead of a learned value and the sequence's log-ratio.
    """
    return Method(
        "dro",
        advantage.GroupZScore(epsilon),
        ratio.one,
        trust.log_likelihood,
        aggregate.token_mean,
        penalty.SquaredLogRatio(beta),
    )


def _dppo(
    name: str, distance: trust.Divergence, low: float, high: float, cap: float, length: float
) -> Method:
    return Method(
        name,
        advantage.group_centred,
        ratio.BehaviourToken(),
        trust.DivergenceMask(distance, low, high, cap),
        aggregate.SequenceSum(length),
    )


def dppo_tv(*, low: float = 0.15, high: float = 0.15, cap: float = 1e4, length: float = 1024.0) -> Method:
    """DPPO, binary total variation: drop a token that moved too much probability away from the behaviour policy.

    Source: arXiv 2602.04879. Dr.GRPO's advantage and constant ``length`` (tokens), as its authors recommend.
    """
    return _dppo("dppo_tv", trust.binary_tv, low, high, cap, length)


def dppo_kl(*, low: float = 0.05, high: float = 0.05, cap: float = 1e4, length: float = 1024.0) -> Method:
    """DPPO, binary KL(behaviour policy || current policy) in nats. Source: arXiv 2602.04879. See :func:`dppo_tv`."""
    return _dppo("dppo_kl", trust.binary_kl, low, high, cap, length)


def dppo_topk_tv(
    *, low: float = 0.15, high: float = 0.15, cap: float = 1e4, length: float = 1024.0
) -> Method:
    """DPPO, total variation on the behaviour policy's top tokens and the rest. Source: arXiv 2602.04879.

    The number of tokens is the trainer's (``top_k``); the published value is not known to us.
    """
    return _dppo("dppo_topk_tv", trust.top_k_tv, low, high, cap, length)


def dppo_topk_kl(
    *, low: float = 0.05, high: float = 0.05, cap: float = 1e4, length: float = 1024.0
) -> Method:
    """DPPO, KL on the behaviour policy's top tokens and the rest, nats. arXiv 2602.04879. See :func:`dppo_topk_tv`."""
    return _dppo("dppo_topk_kl", trust.top_k_kl, low, high, cap, length)


def vaco(*, low: float = 0.2, high: float = 0.2, cap: float = 2.0, epsilon: float = 1e-4) -> Method:
    """VACO: as DPPO, with the whole sequence's mean ``|w - 1|`` for the divergence. Source: arXiv 2603.01365.

    A token that moves towards the behaviour policy is never dropped. The form for language models is open-instruct's.
    """
    return Method(
        "vaco",
        advantage.GroupZScore(epsilon),
        ratio.BehaviourToken(),
        trust.DivergenceMask(trust.Averaged(trust.ratio_distance), low, high, cap),
        aggregate.token_mean,
    )


def cppo(*, bound: float = 0.2, rate: float = 0.02, least: float = 0.8) -> Method:
    """CPPO: as DPPO with TV, less for early tokens and with a budget for the prefix. Source: arXiv 2606.10968."""
    return Method(
        "cppo",
        advantage.group_centred,
        ratio.BehaviourToken(),
        trust.PrefixBudget(bound, rate, least),
        aggregate.token_mean,
    )


def drpo(*, bound: float = 12.5, length: float = 1024.0) -> Method:
    """DRPO: a quadratic price on the probability a token moved instead of a clip. Source: arXiv 2606.09821.

    Probabilities differ by less than 1, so the published ``bound`` of 12.5 never reverses a token; 0.2 does.
    """
    return Method(
        "drpo",
        advantage.group_centred,
        ratio.BehaviourToken(),
        trust.Quadratic(bound, by_probability=True),
        aggregate.SequenceSum(length),
    )


def cfpo(*, bound: float = 0.2, epsilon: float = 1e-4) -> Method:
    """CFPO: a quadratic price on the ratio instead of a clip. Source: arXiv 2601.22801.

    The loss is that of Simple Policy Optimization (arXiv 2401.16025); :func:`kalman_rl.methods.by_advantage.spo` is
    another method with the same letters.
    """
    return Method(
        "cfpo",
        advantage.GroupZScore(epsilon),
        ratio.token,
        trust.Quadratic(bound),
        aggregate.sequence_mean,
    )


def m2po(*, bound: float = 0.04, epsilon: float = 1e-4) -> Method:
    """M2PO: drop the tokens that moved farthest until the rest has a small mean square. Source: arXiv 2510.01161.

    ``bound`` in nats squared, on the log-ratios to the behaviour policy of the whole optimizer step.
    """
    return Method(
        "m2po",
        advantage.GroupZScore(epsilon),
        ratio.BehaviourToken(),
        trust.SecondMoment(bound),
        aggregate.token_mean,
    )


def bapo(
    *, target: float = 0.4, gradient: bool = False, dual: float | None = None, epsilon: float = 1e-4
) -> Method:
    """BAPO, paper: raise the upper, then the lower clip bound until positives have a share. arXiv 2510.18927.

    Bounds 0.6..0.9 and 1.2..3.0, chosen once per optimizer step on the whole batch. ``gradient=1`` measures
    the share of the gradient instead of the loss value, which raising the lower bound would lower.
    """
    return Method(
        "bapo",
        advantage.GroupZScore(epsilon),
        ratio.token,
        trust.Balance(target, gradient=gradient, dual=dual),
        aggregate.token_mean,
    )


def bapo_published(*, target: float = 0.5, dual: float | None = 3.0, epsilon: float = 1e-4) -> Method:
    """BAPO as in its published code: the quotient S+/S-, lower bound first, dual clip. arXiv 2510.18927.

    ``target=0.5`` is its script's (README 0.5, configuration 1.0). Deviation: bounds of the whole step, not
    of each micro-batch.
    """
    return Method(
        "bapo_published",
        advantage.GroupZScore(epsilon),
        ratio.token,
        trust.Balance(target, "quotient", "low", dual=dual),
        aggregate.token_mean,
    )


def capo(
    *,
    objective: float = 1e-2,
    policy: float = 1e-4,
    low: float = 0.2,
    high: float = 0.2,
    epsilon: float = 1e-4,
) -> Method:
    """CAPO: drop tokens whose own optimizer step would bend objective or policy too far. arXiv 2510.00819.

    Bounds for a 5x higher learning rate than usual; they scale with its square.
    """
    return Method(
        "capo",
        advantage.GroupZScore(epsilon),
        ratio.token,
        trust.CurvatureMask(objective, policy, trust.Clip(low, high)),
        aggregate.sequence_mean,
    )
