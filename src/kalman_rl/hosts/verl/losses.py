"""verl calls, :func:`kalman_rl.objectives.policy_loss` answers: one adapter for every method.

Aggregation is verl's: its five modes are aggregations of ours with the counts of the whole step, so that a method
takes its compiled pass. What is left asks ``agg_loss`` itself, which is linear in the token losses: its gradient at 0
is the weight of every token. Micro-batches and data-parallel ranks then scale as they do for verl's losses.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss

from kalman_rl.errors import ConfigError
from kalman_rl.hosts.verl.choice import SelectedMethod
from kalman_rl.hosts.verl.config import choice_for
from kalman_rl.hosts.verl.learning import STEP
from kalman_rl.hosts.verl.metrics import parts, weighted
from kalman_rl.hosts.verl.settings import PREFIX
from kalman_rl.objectives.aggregate import SequenceSum, Totals, sequence_mean, token_mean
from kalman_rl.objectives.diagnostics import metrics_of, sample_sizes
from kalman_rl.objectives.learning import bound_metrics, step_statistics, with_bounds
from kalman_rl.objectives.loss import Method, policy_loss
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.terminal import logger

DROPPED = ("objective/surrogate", "objective/penalty")
"""Parts of a sum over micro-batches, which verl would average; their sum is verl's ``actor/pg_loss``."""

BATCH: ContextVar[Any] = ContextVar("BATCH", default=None)
"""The micro-batch that verl's ``ppo_loss`` is called with, of which it hands on only a part; set by the plugin."""
Aggregate = Callable[[Rollouts, Totals], Tensor]
PolicyLossFn = Callable[..., tuple[Tensor, dict[str, float]]]


def make_loss(name: str) -> PolicyLossFn:
    """The policy loss ``kalman_rl/NAME`` with verl's signature.

    It takes verl's tensors (B, T), returns the loss to call ``backward`` on and metrics as numbers. Advantages are
    used as given. ``rollout_is_weights`` multiply coefficient and surrogate of every token, and leave penalties
    alone.

    Gradient: through ``log_prob`` only. Raises: ConfigError for settings that do not go together.
    """

    def kalman_policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        choice = choice_for(name, config)
        info = dict(getattr(config, "global_batch_info", None) or {})
        method, totals = aggregated(choice, loss_agg_mode, info, length=response_mask.shape[1])
        if rollout_is_weights is not None:
            method = dataclasses.replace(method, correction=Given(rollout_is_weights.detach()))
        rollouts = Rollouts(
            old_log_prob,
            response_mask.bool(),
            logp_behaviour=_behaviour(method),
            allow_empty=True,
        )
        step = STEP.get()
        if step is not None and step.looking:
            step.look(method, rollouts, log_prob, advantages)
            return log_prob.new_zeros(()), {}
        if step is not None:
            method = step.applied(method)
            step.learned.observe(log_prob, rollouts)
        else:  # outside verl's engines this call is the optimizer step
            method = with_bounds(method, step_statistics(method, rollouts, log_prob, advantage=advantages))
        loss = policy_loss(method, rollouts, log_prob, advantage=advantages, totals=totals)
        sizes = sample_sizes(loss.tokens.log_ratio, loss.tokens.coefficient, rollouts)
        numbers, sums = as_numbers(loss.metrics | metrics_of(sizes), loss.sums | sizes)
        trained, total, *_ = sums["ratio/raw_log_variance"]
        numbers["actor/ppo_kl"] = -total / max(trained, 1.0)
        numbers["actor/pg_clipfrac"] = 1 - numbers["trust/kept"]
        reported = weighted(
            {name: value for name, value in numbers.items() if name not in DROPPED} | bound_metrics(method),
            tokens=int(trained),
            rows=len(response_mask),
            info=info,
            dynamic=bool(getattr(config, "use_dynamic_bsz", False)),
        )
        return loss.value, reported | parts(sums)

    kalman_policy_loss.__name__ = kalman_policy_loss.__qualname__ = f"policy_loss_{name}"
    kalman_policy_loss.kalman_rl = name  # type: ignore[attr-defined]
    return kalman_policy_loss


def _behaviour(method: Method) -> Tensor | None:
    """The log-probabilities (B, T) of the policy that sampled, where the method asks for them."""
    if "logp_behaviour" not in method.inputs:
        return None
    batch = BATCH.get()
    if batch is None or "rollout_log_probs" not in batch.keys():  # noqa: SIM118 of a TensorDict
        raise ConfigError(
            f"logp_behaviour: got none for {PREFIX}{method.name}, expected the rollout's log-probabilities in verl's "
            "batch; set actor_rollout_ref.rollout.calculate_log_probs=true"
        )
    found: Tensor = batch.select("rollout_log_probs").to_padded_tensor()["rollout_log_probs"]
    return found


@dataclasses.dataclass(frozen=True)
class AsVerl:
    """Weights (B, T) of verl's aggregation, divided by a constant.

    Args:
        mode: a ``loss_agg_mode``.
        info: keyword arguments of ``agg_loss`` about the whole optimizer step.
        length: > 0, divides every weight.
    """

    mode: str
    info: Mapping[str, Any]
    length: float = 1.0

    def __call__(self, rollouts: Rollouts, totals: Totals) -> Tensor:
        token_losses = torch.zeros_like(rollouts.logp_old)
        if not rollouts.mask.any():
            return token_losses  # verl would divide 0 by 0
        with torch.enable_grad():
            token_losses.requires_grad_()
            total = agg_loss(
                loss_mat=token_losses, loss_mask=rollouts.mask, loss_agg_mode=self.mode, **self.info
            )
            (weights,) = torch.autograd.grad(total, token_losses)
        return weights / self.length


@dataclasses.dataclass(frozen=True)
class Given:
    """Importance factors (B, T) that verl computed."""

    weights: Tensor

    def __call__(self, rollouts: Rollouts) -> Tensor:
        return self.weights


def own_mode(method: Method) -> tuple[str, float] | None:
    """verl's name for the method's own aggregation, and the constant length it divides by; None if verl has none."""
    if method.aggregate is token_mean:
        return "token-mean", 1.0
    if method.aggregate is sequence_mean:
        return "seq-mean-token-mean", 1.0
    if isinstance(method.aggregate, SequenceSum):
        return "seq-mean-token-sum", method.aggregate.length
    return None


def in_our_words(
    mode: str, info: Mapping[str, Any], length: float, width: int
) -> tuple[Aggregate, Totals] | None:
    """A mode of verl's as an aggregation of ours with its totals, which a compiled pass knows.

    Args: mode, info, length: as in :class:`AsVerl`. width: T of the micro-batch.

    None where verl counts less than one token or sequence per rank, or takes them from the micro-batch.
    """
    ranks = info.get("dp_size") or 1
    tokens, rows = info.get("batch_num_tokens"), info.get("global_batch_size")
    found: tuple[Aggregate, Totals] | None = None
    if mode == "token-sum":
        found = token_mean, Totals(length / ranks, 1.0)
    elif mode == "token-mean" and tokens is not None:
        found = token_mean, Totals(length * tokens / ranks, 1.0)
    elif mode == "seq-mean-token-mean" and rows is not None and length == 1:
        found = sequence_mean, Totals(1.0, rows / ranks)
    elif mode == "seq-mean-token-sum" and rows is not None:
        found = SequenceSum(length), Totals(1.0, rows / ranks)
    elif mode == "seq-mean-token-sum-norm" and rows is not None:
        scale = info.get("loss_scale_factor")
        found = SequenceSum(length * (width if scale is None else scale)), Totals(1.0, rows / ranks)
    return None if found is None or min(found[1]) < 1 else found


def aggregated(
    choice: SelectedMethod, mode: str, info: Mapping[str, Any], *, length: int
) -> tuple[Method, Totals | None]:
    """The method with verl's aggregation: by verl's mode, or by the mode that the method was published with.

    Args: length: T of the micro-batch.

    Raises: ConfigError for a method whose own aggregation verl does not have, where that is asked for.
    """
    published, constant = own_mode(choice.method), 1.0
    if choice.aggregation == "method":
        if published is None:
            raise ConfigError(
                f"policy_loss.aggregation: got 'method' for {PREFIX}{choice.method.name}, expected 'verl' because verl "
                "has no such aggregation"
            )
        mode, constant = published
    elif published is not None and mode != published[0]:
        _say_mode(choice.method.name, mode, published[0])
    ours, totals = in_our_words(mode, info, constant, length) or (AsVerl(mode, info, constant), None)
    return dataclasses.replace(choice.method, aggregate=ours), totals


@functools.cache
def _say_mode(name: str, mode: str, own: str) -> None:
    logger.warning(
        "loss_agg_mode: got %r for %s%s, which was published with %r; set actor.loss_agg_mode=%s, or "
        "policy_loss.aggregation=method",
        mode,
        PREFIX,
        name,
        own,
        own,
    )


def as_numbers(
    metrics: Mapping[str, Tensor], sums: Mapping[str, Tensor]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics and sums (4,) as Python numbers, fetched from the device at once."""
    values = torch.cat([torch.stack(list(metrics.values())).double(), *sums.values()]).tolist()
    behind = zip(*[iter(values[len(metrics) :])] * 4, strict=True)
    return dict(zip(metrics, values, strict=False)), {
        name: list(four) for name, four in zip(sums, behind, strict=True)
    }
