"""The objective: one formula for every method.

    grad L = - sum_t  weights_t * c_t * A_t * grad logp_t,        c_t = keep_t * weight_t   (detached)

A method is four choices, and an optional penalty:

    advantage   (reward, group) -> A              who did better than expected
    ratio       (logp, rollouts) -> log-weight    how much this token still counts off-policy
    trust       (ratio, A, logp) -> keep, weight  which tokens may still move
    aggregate   (rollouts, totals) -> weights     how tokens become one number
    penalty     (logp, rollouts) -> per token     what else is paid for (KL to the reference)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl import diagnosis
from kalman_rl.aggregate import Totals, totals_of
from kalman_rl.errors import ConfigError, ShapeError
from kalman_rl.ratio import Ratio
from kalman_rl.rollouts import Rollouts, masked_finite, masked_logp
from kalman_rl.trust import LOG_WEIGHT_CAP, Trust


@dataclass(frozen=True)
class Method:
    """A policy objective as a composition; see the module's formula. Its ``repr`` shows every setting."""

    name: str
    advantage: Callable[[Tensor, Tensor], Tensor]
    ratio: Callable[[Tensor, Rollouts], Ratio]
    trust: Callable[[Ratio, Tensor, Tensor], Trust]
    aggregate: Callable[[Rollouts, Totals], Tensor]
    penalty: Callable[[Tensor, Rollouts], Tensor] | None = None


class Tokens(NamedTuple):
    """What happened to each token, (B, T), detached: the observed log-ratio, the log-weight used, the
    filter's gain (None without a filter), the coefficient ``c_t`` on the gradient, and if it was kept."""

    log_ratio: Tensor
    log_weight: Tensor
    gain: Tensor | None
    coefficient: Tensor
    kept: Tensor


class Loss(NamedTuple):
    """``value`` to call ``backward`` on, ``metrics`` (detached scalars by name) and ``tokens`` to look at."""

    value: Tensor
    metrics: dict[str, Tensor]
    tokens: Tokens


def policy_loss(
    method: Method,
    rollouts: Rollouts,
    logp: Tensor,
    *,
    advantage: Tensor | None = None,
    totals: Totals | None = None,
) -> Loss:
    """The loss of a method on a batch.

        L = sum_t weights_t (surrogate_t + penalty_t)
        grad L = sum_t weights_t (-c_t A_t grad logp_t + grad penalty_t)

    The value is the surrogate that TRL and verl report; the gradient is the formula of this module.

    Args:
        method: the composition.
        rollouts: the batch; ``reward`` and ``group`` are needed only if ``advantage`` is not given.
        logp: (B, T) log-probabilities (nats) of the sampled tokens under the current policy, from a
            float32 log-softmax. What stands outside the mask is never read, NaN included.
        advantage: (B,) or (B, T), if it was computed before (on the whole groups, for example).
        totals: counts of the whole optimizer step when this batch is a part of it; default: this batch.

    Returns:
        Loss. Metrics: ``objective/surrogate``, ``ratio/*``, ``trust/*``, ``policy/kl_old``.

    Raises:
        ShapeError, NumericError: bad shapes, or NaN and infinity at trained positions.
        ConfigError: something the method needs was not given.

    Gradient: through ``logp`` only; advantages, weights and filter states are constants.

    >>> from kalman_rl.methods import make_method
    >>> old = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]])
    >>> logp = old.clone().requires_grad_()
    >>> r = Rollouts(old, torch.ones(2, 2), reward=torch.tensor([1.0, 0.0]), group=torch.tensor([0, 0]))
    >>> policy_loss(make_method("rloo"), r, logp).value.backward()
    >>> logp.grad
    tensor([[-0.2500, -0.2500],
            [ 0.2500,  0.2500]])
    """
    mask = rollouts.mask
    logp = masked_logp("logp", logp, mask)
    advantage = _per_token(method, rollouts, advantage).to(logp.dtype)
    weights = method.aggregate(rollouts, totals or totals_of(rollouts)).to(logp.dtype)

    ratio = method.ratio(logp.detach(), rollouts)
    trust = method.trust(ratio, advantage, logp.detach())
    coefficient = torch.where(mask & trust.keep, trust.weight, 0.0)
    surrogate = (weights * torch.where(mask, trust.surrogate, 0.0)).sum()

    carrier = -(weights * coefficient * advantage * logp).sum()
    value = surrogate + (carrier - carrier.detach())
    metrics = _metrics(ratio, trust, rollouts) | {"objective/surrogate": surrogate}
    if method.penalty is not None:
        penalty = (weights * torch.where(mask, method.penalty(logp, rollouts), 0.0)).sum()
        value = value + penalty
        metrics["objective/penalty"] = penalty.detach()
    gain = None if ratio.info is None else ratio.info.gain
    return Loss(
        value, metrics, Tokens(ratio.log_ratio, ratio.log_weight, gain, coefficient, mask & trust.keep)
    )


def _per_token(method: Method, rollouts: Rollouts, advantage: Tensor | None) -> Tensor:
    """Advantages as (B, T), 0 outside the mask."""
    shape = rollouts.mask.shape
    if advantage is None:
        if rollouts.reward is None or rollouts.group is None:
            missing = "reward" if rollouts.reward is None else "group"
            raise ConfigError(
                f"{missing}: got None, expected one value per completion because {method.name} computes its "
                f"advantage from rewards; put {missing} into Rollouts, or pass advantage="
            )
        if rollouts.segment is not None:
            raise ConfigError(
                "advantage: got None for packed rows (segment is set), expected (B, T) values because a row "
                "holds several completions; compute them per completion and pass advantage="
            )
        advantage = method.advantage(rollouts.reward, rollouts.group)
    if advantage.shape == shape[:1]:
        advantage = advantage[:, None].expand(shape)
    if advantage.shape != shape:
        raise ShapeError(
            f"advantage: got shape {tuple(advantage.shape)}, expected ({shape[0]},) or {tuple(shape)}"
        )
    return masked_finite(
        "advantage",
        advantage.detach(),
        rollouts.mask,
        "finite numbers where the mask is True; 0 skips a token",
    )


def _metrics(ratio: Ratio, trust: Trust, rollouts: Rollouts) -> dict[str, Tensor]:
    mask, sequence = rollouts.mask, rollouts.sequence_index
    dropped = mask & ~trust.keep
    below = ratio.log_weight < 0
    return {
        "ratio/raw_log_variance": diagnosis.masked_variance(ratio.log_ratio, mask),
        "ratio/filtered_log_variance": diagnosis.masked_variance(ratio.log_weight, mask),
        "ratio/effective_sample_size": diagnosis.effective_sample_size(trust.weight, mask),
        "ratio/max_abs_log_ratio": diagnosis.max_abs(ratio.log_ratio, mask),
        "ratio/capped": diagnosis.masked_mean(ratio.log_weight > LOG_WEIGHT_CAP, mask),
        "ratio/raw_sign_switch": diagnosis.sign_switch(ratio.log_ratio, mask, sequence),
        "ratio/filtered_sign_switch": diagnosis.sign_switch(ratio.log_weight, mask, sequence),
        "ratio/noop": (torch.where(mask, ratio.log_ratio, 0.0) == 0).all().float(),
        "trust/kept": diagnosis.masked_mean(trust.keep, mask),
        "trust/clipped_low": diagnosis.masked_mean(dropped & below, mask),
        "trust/clipped_high": diagnosis.masked_mean(dropped & ~below, mask),
        "policy/kl_old": diagnosis.kl_old(ratio.log_ratio, mask),
    }
