"""The objective: one formula for every method.

    grad L = - sum_t  weights_t * c_t * A_t * grad logp_t,        c_t = keep_t * weight_t   (detached)

A method is four choices, an optional penalty and an optional correction:

    advantage   (reward, group) -> A              who did better than expected
    ratio       (logp, rollouts) -> log-weight    how much this token still counts off-policy
    trust       (ratio, A, current, rollouts) -> keep, weight   which tokens may still move
    aggregate   (rollouts, totals) -> weights     how tokens become one number
    penalty     (logp, rollouts) -> per token     what else is paid for (KL to the reference)
    correction  (rollouts) -> factor              what a behaviour policy other than the old policy costs
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl.checks import expect_tensor
from kalman_rl.errors import ConfigError, quote
from kalman_rl.kernels.loss.dispatch import attach, enabled
from kalman_rl.kernels.loss.dispatch import run as run_fused
from kalman_rl.kernels.loss.plan import METRICS
from kalman_rl.objectives import diagnostics
from kalman_rl.objectives.aggregate import Totals, totals_of
from kalman_rl.objectives.fused import plan_of
from kalman_rl.objectives.inputs import PARTS, inputs_of, required
from kalman_rl.objectives.protocol import Learns
from kalman_rl.objectives.ratio.transforms import Ratio
from kalman_rl.objectives.rollouts import Current, Rollouts, masked_logp, prepared
from kalman_rl.objectives.trust.clip import LOG_WEIGHT_CAP, Trust, TrustRegion


@dataclass(frozen=True)
class Method:
    """A policy objective as a composition; see the module's formula. Its ``repr`` shows every setting."""

    name: str
    advantage: Callable[..., Tensor]
    ratio: Callable[[Tensor, Rollouts], Ratio]
    trust: TrustRegion
    aggregate: Callable[[Rollouts, Totals], Tensor]
    penalty: Callable[[Tensor, Rollouts], Tensor] | None = None
    correction: Callable[[Rollouts], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.correction is not None and "logp_behaviour" in inputs_of(self.ratio):
            raise ConfigError(
                f"correction: got {quote(self.correction)} beside the ratio {self.ratio} of {self.name}, expected None "
                "because that ratio is already taken to the behaviour policy; the mismatch would count twice"
            )

        trust = self.learns.get("trust")
        if trust is not None and trust.memory != 0:
            raise ConfigError(
                f"trust: got memory {trust.memory} for {self.name}, expected 0 because bounds are chosen on one "
                "optimizer step; drop the memory"
            )

    @functools.cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of what the parts ask for beyond log-probabilities; see :data:`kalman_rl.objectives.inputs.INPUTS`."""
        return tuple(sorted({name for part in PARTS for name in inputs_of(getattr(self, part))}))

    @functools.cached_property
    def learns(self) -> dict[str, Learns]:
        """The parts that learn, by name: ``ratio`` from past optimizer steps, ``trust`` from the one under way."""
        parts: dict[str, object] = {"ratio": self.ratio, "trust": self.trust}
        # The first question is there for speed: a protocol's check takes 7 us, and hosts ask for every micro-batch.
        return {k: part for k, part in parts.items() if hasattr(part, "fitted") and isinstance(part, Learns)}


class Tokens(NamedTuple):
    """What happened to each token, (B, T), detached: the observed log-ratio, the log-weight used, the
    filter's gain (None without a filter), the coefficient ``c_t`` on the gradient, and if it was kept."""

    log_ratio: Tensor
    log_weight: Tensor
    gain: Tensor | None
    coefficient: Tensor
    kept: Tensor


class Loss(NamedTuple):
    """``value`` to call ``backward`` on, ``metrics`` (detached scalars by name) and ``tokens`` to look at.

    ``sums`` are what the metrics over tokens are made of, by name: add those of several batches up with
    :func:`kalman_rl.objectives.diagnostics.joined` and divide once with ``diagnostics.metric``.
    """

    value: Tensor
    metrics: dict[str, Tensor]
    tokens: Tokens
    sums: dict[str, Tensor]


def policy_loss(
    method: Method,
    rollouts: Rollouts,
    logp: Tensor | Current,
    *,
    advantage: Tensor | None = None,
    totals: Totals | None = None,
    fused: bool | None = None,
) -> Loss:
    """The loss of a method on a batch.

        L = sum_t weights_t (f_t surrogate_t + penalty_t)
        grad L = sum_t weights_t (-f_t c_t A_t grad logp_t + grad penalty_t)

    with the correction's factor f = 1 where there is none.

    The value is the surrogate that TRL and verl report; the gradient is the formula of this module.

    Args:
        method: the composition.
        rollouts: the batch; ``reward`` and ``group`` are needed only if ``advantage`` is not given.
        logp: (B, T) log-probabilities (nats) of the sampled tokens under the current policy, from a
            float32 log-softmax. What stands outside the mask is never read, NaN included. Methods with
            more inputs take a :class:`kalman_rl.objectives.Current` here.
        advantage: (B,) or (B, T), if it was computed before (on the whole groups, for example).
        totals: counts of the whole optimizer step when this batch is a part of it; default: this batch.
        fused: False always takes the parts one after another, which is the definition. True and the default
            take one compiled pass where :func:`kalman_rl.objectives.fused.plan_of` knows the method; the default
            also asks the environment (``KALMAN_RL_FUSED=0`` switches it off).

    Returns:
        Loss. Metrics: ``objective/surrogate``, ``ratio/*``, ``trust/*``, ``policy/kl_old``, and
        ``objective/fused``: 1 after the compiled pass, else 0.

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
    logp = logp if isinstance(logp, Current) else Current(logp)
    _check_types(method, rollouts, logp, advantage)
    if (
        logp.logp.dtype != torch.float64
    ):  # once, so that the gradients of all terms are added before narrowing
        logp = logp._replace(logp=logp.logp.float())
    if advantage is None:
        advantage = estimate_advantage(method, rollouts)
    loss = None
    if fused if fused is not None else enabled():
        loss = _fused(method, rollouts, logp, advantage, totals)
    if loss is None:
        loss = _composed(method, rollouts, logp, advantage, totals)
    if method.penalty is None:
        return loss
    clean = masked_logp("logp", logp.logp, rollouts.mask)
    weights = method.aggregate(rollouts, totals or totals_of(rollouts)).to(clean.dtype)
    penalty = (weights * torch.where(rollouts.mask, method.penalty(clean, rollouts), 0.0)).sum()
    return loss._replace(
        value=loss.value + penalty, metrics=loss.metrics | {"objective/penalty": penalty.detach()}
    )


def _check_types(method: Method, rollouts: Rollouts, current: Current, advantage: Tensor | None) -> None:
    for name, value, kind in (("method", method, Method), ("rollouts", rollouts, Rollouts)):
        if not isinstance(value, kind):
            raise ConfigError(f"{name}: got {type(value).__name__}, expected a {kind.__name__}")
    expect_tensor("logp", current.logp, "a tensor (B, T), or a Current")
    if advantage is not None:
        expect_tensor("advantage", advantage, "a tensor (B,) or (B, T)")


def _composed(
    method: Method, rollouts: Rollouts, current: Current, advantage: Tensor, totals: Totals | None
) -> Loss:
    """The definition, without the penalty: part after part, each a pass over the tokens."""
    mask = rollouts.mask
    logp, current, advantage = prepared(rollouts, current, advantage)
    weights = method.aggregate(rollouts, totals or totals_of(rollouts)).to(logp.dtype)

    ratio = method.ratio(current.logp, rollouts)
    trust = method.trust(ratio, advantage, current, rollouts)
    factor = (
        torch.ones_like(weights) if method.correction is None else method.correction(rollouts).to(weights)
    )
    coefficient = torch.where(mask & trust.keep, factor * trust.weight, 0.0)
    surrogate = (weights * torch.where(mask, factor * trust.surrogate, 0.0)).sum()

    carrier = -(weights * coefficient * advantage * logp).sum()
    value = surrogate + (carrier - carrier.detach())
    sums = _sums(ratio, trust, rollouts)
    if method.correction is not None:
        sums["correction/mean"] = sums["correction/effective_sample_size"] = diagnostics.sums_of(factor, mask)
    metrics = {name: diagnostics.metric(name, value).float() for name, value in sums.items()}
    metrics |= {"objective/surrogate": surrogate, "objective/fused": torch.zeros((), device=mask.device)}
    gain = None if ratio.info is None else ratio.info.gain
    tokens = Tokens(ratio.log_ratio, ratio.log_weight, gain, coefficient, mask & trust.keep)
    return Loss(value, metrics, tokens, sums)


def _fused(
    method: Method, rollouts: Rollouts, current: Current, advantage: Tensor, totals: Totals | None
) -> Loss | None:
    """The same numbers from one pass, or None where the method, the types or a bad number do not allow it."""
    logp, mask = current.logp, rollouts.mask
    plan = plan_of(method.ratio, method.trust, method.aggregate) if method.correction is None else None
    if plan is None or logp.shape != mask.shape or advantage.shape not in (mask.shape[:1], mask.shape):
        return None
    result = run_fused(plan, logp, rollouts.logp_old, mask, advantage, rollouts.segment, totals)
    if result is None:
        return None
    metrics = dict(zip(METRICS, result.metrics.unbind()))
    metrics |= {
        "objective/surrogate": result.value,
        "objective/fused": torch.ones((), device=mask.device),
    }
    tokens = Tokens(result.log_ratio, result.log_weight, result.gain, result.coefficient, result.kept)
    sums = dict(zip(METRICS, result.sums.unbind()))
    return Loss(attach(logp, result.value, result.gradient), metrics, tokens, sums)


def estimate_advantage(method: Method, rollouts: Rollouts) -> Tensor:
    """The method's advantages (B,) or (B, T) from the rewards of a batch that holds whole groups."""
    reward = required("reward", rollouts.reward, method.name)
    group = required("group", rollouts.group, method.name)
    if rollouts.segment is not None:
        raise ConfigError(
            "advantage: got None for packed rows (segment is set), expected (B, T) values because a row "
            "holds several completions; compute them per completion and pass advantage="
        )
    extra = {
        name: required(name, getattr(rollouts, name, None), method.name)
        for name in inputs_of(method.advantage)
    }
    return method.advantage(reward, group, **extra)


def _sums(ratio: Ratio, trust: Trust, rollouts: Rollouts) -> dict[str, Tensor]:
    """The sums behind ``METRICS``, (4,) each."""
    mask, sequence = rollouts.mask, rollouts.sequence_index
    dropped = mask & ~trust.keep
    below = ratio.log_weight < 0
    moved = diagnostics.sums_of(ratio.log_ratio.abs(), mask)
    values = {
        "ratio/raw_log_variance": ratio.log_ratio,
        "ratio/filtered_log_variance": ratio.log_weight,
        "ratio/effective_sample_size": trust.weight,
        "ratio/capped": ratio.log_weight > LOG_WEIGHT_CAP,
        "trust/kept": trust.keep,
        "trust/clipped_low": dropped & below,
        "trust/clipped_high": dropped & ~below,
        "policy/kl_old": diagnostics.divergence(ratio.log_ratio),
    }
    return {name: diagnostics.sums_of(value, mask) for name, value in values.items()} | {
        "ratio/max_abs_log_ratio": moved,
        "ratio/noop": moved,
        "ratio/raw_sign_switch": diagnostics.switches(ratio.log_ratio, mask, sequence),
        "ratio/filtered_sign_switch": diagnostics.switches(ratio.log_weight, mask, sequence),
    }
