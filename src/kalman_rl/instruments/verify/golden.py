"""Our compositions against the recorded outputs of published implementations.

A record holds for every method whose ratio and trust region are of its kind: the same functions, the same
components up to numbers. It is replayed with the numbers of the record, not with the method's defaults.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.instruments.verify.check import Check, relative_error
from kalman_rl.instruments.verify.place import CPU, Place
from kalman_rl.instruments.verify.record import TOLERANCE, Record, precision, records
from kalman_rl.objectives import aggregate, penalty, ratio, trust
from kalman_rl.objectives.advantage.group import (
    GroupZScore,
    LengthWeighted,
    group_centred,
    group_relative,
    leave_one_out,
)
from kalman_rl.objectives.loss import Method, policy_loss
from kalman_rl.objectives.rollouts import Rollouts

ABSOLUTE = 1e-12
"""Of the loss, a sum that nearly cancels."""

ADVANTAGE_TOLERANCE = 1e-6
"""verl computes advantages in float32."""


def _band(config: Record) -> trust.Clip:
    return trust.Clip(config["clip_ratio_low"], config["clip_ratio_high"], config.get("clip_ratio_c"))


def _verl_cap(config: Record) -> trust.Cap:
    return trust.Cap(high=1 + config["clip_ratio_high"], low=1 - config["clip_ratio_low"])


def _kpo(config: Record) -> tuple[Any, Any]:
    limits = _band(config) if config["is_clip"] else trust.unclipped
    return ratio.KalmanFiltered(config["kalman_Q"], config["kalman_R"], 0.0), limits


def _dppo(distance: trust.Divergence) -> Callable[[Record], tuple[Any, Any]]:
    return lambda config: (
        ratio.BehaviourToken(),
        trust.DivergenceMask(
            distance, config["clip_ratio_low"], config["clip_ratio_high"], config["clip_ratio_c"]
        ),
    )


def _vaco(config: Record) -> tuple[Any, Any]:
    bound, cap = config["rho_mask_upper_bound"], config["rho_clamp_upper_bound"]
    distance = trust.Averaged(trust.ratio_distance)
    return ratio.BehaviourToken(), trust.DivergenceMask(distance, bound, bound, cap)


def _bapo(config: Record) -> tuple[Any, Any]:
    ends = {
        f"{ours}{suffix}": config[f"ratio_{theirs}_{key}"]
        for ours, theirs in (("low", "lower"), ("high", "upper"))
        for suffix, key in (("", "start"), ("_end", "max"), ("_step", "step"))
    }
    dual = config["clip_ratio_c"]
    return ratio.token, trust.Balance(config["adv_ratio_target"], "quotient", "low", dual=dual, **ends)


def _quadratic(config: Record) -> tuple[Any, Any]:
    by_probability = config["penalty_mu_weighted"]
    transform = ratio.BehaviourToken() if by_probability else ratio.token
    return transform, trust.Quadratic(config["drpo_epsilon"], by_probability)


PARTS: dict[str, Callable[[Record], tuple[Any, Any]]] = {
    "ppo_clip": lambda config: (ratio.token, _band(config)),
    "gspo": lambda config: (ratio.sequence_mean, _band(config)),
    "cispo": lambda config: (ratio.token, _verl_cap(config)),
    "kpo": _kpo,
    "gmpo": lambda config: (
        ratio.token,
        trust.GeometricClip(config["clip_ratio_low"], config["clip_ratio_high"]),
    ),
    "sapo": lambda config: (ratio.token, trust.SoftGate(config["tau_pos"], config["tau_neg"])),
    "gpg": lambda config: (ratio.one, trust.log_likelihood),
    "dro": lambda config: (ratio.one, trust.log_likelihood),
    "dppo_tv": _dppo(trust.binary_tv),
    "dppo_kl": _dppo(trust.binary_kl),
    "bapo": _bapo,
    "vespo": lambda config: (
        ratio.token,
        trust.Gamma(config["k_pos"], config["lambda_pos"], config["k_neg"], config["lambda_neg"]),
    ),
    "drpo": _quadratic,
    "cfpo": _quadratic,
    "cppo": lambda config: (
        ratio.BehaviourToken(),
        trust.PrefixBudget(config["cppo_delta"], config["cppo_delta_b"], config["cppo_w_min"]),
    ),
    "m2po": lambda config: (ratio.BehaviourToken(), trust.SecondMoment(config["m2_threshold"])),
    "vaco": _vaco,
    "a3po": lambda config: (
        ratio.Lagged(),
        trust.Decoupled(trust.Clip(config["eps_clip"], config["eps_clip"]), config["upper"]),
    ),
}
"""Recorded method -> our ratio transform and trust region."""

AGGREGATE: dict[str, Callable[[int], Any]] = {
    "token-mean": lambda length: aggregate.token_mean,
    "seq-mean-token-mean": lambda length: aggregate.sequence_mean,
    "seq-mean-token-sum": lambda length: aggregate.SequenceSum(1.0),
    "seq-mean-token-sum-norm": lambda length: aggregate.SequenceSum(float(length)),
}
"""Recorded aggregation, given the width of the batch, -> ours."""

OTHER_AGGREGATION = ("dppo_tv", "dppo_kl", "cfpo")
"""Recorded with another aggregation than the method's only."""

ADVANTAGE: dict[str, Callable[..., Tensor]] = {
    "grpo": GroupZScore(epsilon=1e-6),
    "dr_grpo": group_centred,
    "rloo": leave_one_out,
    "opo": LengthWeighted(),
    "maxrl": group_relative,
}
"""Recorded advantage -> ours. The record's completions all have the same length."""


class Comparison(NamedTuple):
    """Errors of loss and gradient, relative to the loss and the largest gradient; whether the same tokens
    have none; the tolerance."""

    value: float
    gradient: float
    same_zeros: bool
    tolerance: float

    @property
    def error(self) -> float:
        """The larger error; infinite if another set of tokens lost its gradient."""
        return max(self.value, self.gradient) if self.same_zeros else math.inf


def composition(record: Record) -> Method:
    """Our composition of the recorded loss, with the record's numbers."""
    transform, limits = PARTS[record["method"]](record["config"])
    reduce = AGGREGATE[record["aggregation"]](len(record["mask"][0]))
    pull = None
    if record["method"] == "dro":
        pull = penalty.SquaredLogRatio(record["config"]["policy_loss"]["dro_beta"])
    return Method(record["method"], group_centred, transform, limits, reduce, pull)


def compare_loss(record: Record, place: Place = CPU) -> Comparison:
    """Loss and gradient of our composition against the record."""

    def tensor(key: str) -> Tensor:
        return place.put(torch.tensor(record[key], dtype=torch.float64))

    old = tensor("old_log_prob")
    period = record["config"].get("lag_period", 1)
    lag = torch.arange(old.shape[1], device=old.device).remainder(period).expand_as(old)
    # recorded with behaviour policy = old policy
    rollouts = Rollouts(old, tensor("mask"), logp_behaviour=old, lag=lag)
    logp = tensor("log_prob").requires_grad_()
    loss = policy_loss(composition(record), rollouts, logp, advantage=tensor("advantages"))
    loss.value.backward()
    expected = tensor("grad_log_prob")
    gradient = torch.full_like(expected, math.nan) if logp.grad is None else logp.grad
    tolerance = place.tolerance(TOLERANCE[precision(record)])
    scale = max(abs(record["loss"]), ABSOLUTE / tolerance)
    return Comparison(
        abs(loss.value.item() - record["loss"]) / scale,
        relative_error(gradient, expected),
        torch.equal(gradient == 0, expected == 0),
        tolerance,
    )


def compare_advantage(record: Record, place: Place = CPU) -> float:
    """Error of our advantages. verl gives the reward itself to a group of one; ours must be 0 there."""
    group = place.put(torch.tensor(record["group"]))
    rewards = place.put(torch.tensor(record["rewards"], dtype=torch.float64))
    estimate = ADVANTAGE[record["method"]]
    more = {"length": torch.full_like(group, 7)} if "length" in getattr(estimate, "inputs", ()) else {}
    ours = estimate(rewards, group, **more).cpu()
    alone = torch.tensor([record["group"].count(number) == 1 for number in record["group"]])
    if (ours[alone] != 0).any():
        return math.inf
    return relative_error(ours[~alone], torch.tensor(record["advantage"], dtype=torch.float64)[~alone])


def kind_of(part: object) -> tuple[Any, ...]:
    """A component without its numbers, for comparison; an infinite number is another kind."""
    if not dataclasses.is_dataclass(part):
        return (part,)
    values = [getattr(part, spec.name) for spec in dataclasses.fields(part) if spec.init]
    numbers = (int, float, type(None))
    return (
        type(part),
        *(
            math.inf if value == math.inf else None
            for value in values
            if isinstance(value, numbers) and not isinstance(value, bool)
        ),
        *(value for value in values if isinstance(value, bool) or not isinstance(value, numbers)),
    )


def records_for(method: Method) -> list[Record]:
    """The recorded losses that speak for a method."""
    found = []
    for record in records()["policy_losses"]:
        ours = composition(record)
        same = all(
            kind_of(getattr(ours, part)) == kind_of(getattr(method, part))
            for part in ("ratio", "trust", "aggregate", "penalty")
        )
        elsewhere = record["method"] in OTHER_AGGREGATION
        if same or (elsewhere and kind_of(ours.trust) == kind_of(method.trust)):
            found.append(record)
    return found


def checks(method: Method, place: Place = CPU) -> Iterator[Check]:
    """One check per recorded source of the method's loss, one for its advantage if that was recorded."""
    found = [(record["source"], compare_loss(record, place)) for record in records_for(method)]
    for source in dict.fromkeys(source for source, _ in found):
        results = [result for name, result in found if name == source]
        worst = max(results, key=lambda result: result.error / result.tolerance)
        title = f"recorded loss and gradient, {len(results)} batches: {source}"
        yield Check(method.name, title, worst.error, worst.tolerance)
    kind = kind_of(method.advantage)
    relevant = [r for r in records()["advantages"] if kind_of(ADVANTAGE[r["method"]]) == kind]
    if relevant:
        error = max(compare_advantage(record, place) for record in relevant)
        title = f"recorded advantages, {len(relevant)} batches: {relevant[0]['source']}"
        yield Check(method.name, title, error, place.tolerance(ADVANTAGE_TOLERANCE))
