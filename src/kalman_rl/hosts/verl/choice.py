"""From a name and options to a method that verl's loss can run, or a sentence that says why it cannot.

verl hands a policy loss the log-probabilities under the old and the current policy, advantages and a mask, one
micro-batch at a time. What a method needs beyond that, it does not get here, and nothing stands in for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kalman_rl.errors import ConfigError
from kalman_rl.methods import make_method
from kalman_rl.methods.aliases import translated
from kalman_rl.objectives.loss import Method, needs_of

AGGREGATIONS = ("verl", "method")

UNAVAILABLE = {
    "logp_behaviour": "log-probabilities under the sampler, and verl hands the loss only those of the old policy; "
    "where they are the sampler's (algorithm.rollout_correction.bypass_mode=true) say so with "
    "policy_loss.old_is_sampler=true",
    "top_behaviour": "the sampler's log-probabilities of its top tokens, which verl's rollout does not keep; "
    "kalman_rl/dppo_tv and kalman_rl/dppo_kl look at the sampled token only",
    "top_logp": "the current log-probabilities of the sampler's top tokens, which verl's loss does not get",
    "step": "the step of each token in the last layer (its hidden state, Adam's moments), which verl's loss does "
    "not get; train it with TRL",
}
"""What a method may need and verl's loss does not get -> what that is, and what to do."""

LEARNED = {
    "kpo_auto": ("process_noise", "observation_noise"),
    "kpo_robust": ("observation_noise",),
    "kpo_noise": ("floor", "scale"),
}
"""Methods that learn over optimizer steps -> the start values, which stay what they are under verl."""


class Choice(NamedTuple):
    """What the settings of a run come to: the ``method``, who aggregates, and whose log-probabilities the old
    ones are."""

    method: Method
    aggregation: str = "verl"
    old_is_sampler: bool = False


def choose(
    name: str, options: Mapping[str, Any], *, aggregation: str = "verl", old_is_sampler: bool = False
) -> Choice:
    """The method to run as a policy loss of verl.

    Args:
        name: a key of METHODS, without the prefix.
        options: its options, hosts' names for them included.
        aggregation: "verl", by ``loss_agg_mode``, or "method", as the method was published.
        old_is_sampler: the old log-probabilities are the sampler's.

    Raises: ConfigError for an unknown name or option, a need that verl cannot meet, a noise that would have to
    be learned, and an option without effect in the loss.

    >>> choose("kpo", {"kalman_Q": 1e-4}).method.ratio.process_noise
    0.0001
    """
    if aggregation not in AGGREGATIONS:
        raise ConfigError(f"aggregation: got {aggregation!r}, expected one of {', '.join(AGGREGATIONS)}")
    known: dict[str, Any] = translated(name, options)
    method = make_method(name, **known)
    _check_needs(name, method, old_is_sampler)
    _check_learned(name, method, known)
    _check_effect(name, known, aggregation)
    return Choice(method, aggregation, old_is_sampler)


def _check_needs(name: str, method: Method, old_is_sampler: bool) -> None:
    """Refuse a method whose loss looks at more than verl hands over, naming first what no setting can supply."""
    parts = (method.ratio, method.trust, method.aggregate, method.penalty)
    needs = {need for part in parts for need in needs_of(part)} - (
        {"logp_behaviour"} if old_is_sampler else set()
    )
    for need in sorted(needs, key=lambda need: (need == "logp_behaviour", need)):
        raise ConfigError(
            f"kalman_rl/{name}: got verl's policy loss, expected a trainer that provides {need}: "
            f"{UNAVAILABLE.get(need, 'verl does not hand it to the loss')}"
        )


def _check_learned(name: str, method: Method, options: Mapping[str, Any]) -> None:
    """Methods that learn their noise run with a given one only."""
    if name == "kpo_noise" and not getattr(method.ratio, "behaviour", False):
        return  # it learns nothing without the sampler's log-probabilities
    missing = [option for option in LEARNED.get(name, ()) if option not in options]
    if missing:
        raise ConfigError(
            f"kalman_rl/{name}: got no {' and '.join(missing)}, expected a value because verl's loss does not see "
            "where an optimizer step ends, so nothing is learned there; give the noise (it stays as it is), or "
            "take kalman_rl/kpo_diffuse"
        )


def parts_moved(name: str, option: str, value: Any) -> set[str]:
    """Which parts of a method an option changes; empty if the value is the default.

    >>> parts_moved("kpo", "epsilon", 0.1), parts_moved("kpo", "low", 0.1)
    ({'advantage'}, {'trust'})
    """
    plain, moved = make_method(name), make_method(name, **{option: value})
    parts = ("advantage", "ratio", "trust", "aggregate", "penalty", "correction")
    return {part for part in parts if getattr(plain, part) != getattr(moved, part)}


def _check_effect(name: str, options: Mapping[str, Any], aggregation: str) -> None:
    """Refuse options that the loss would silently ignore."""
    for option, value in options.items():
        moved = parts_moved(name, option, value)
        if moved == {"advantage"}:
            raise ConfigError(
                f"policy_loss.options {option}: got {value!r} for kalman_rl/{name}, expected an option of the loss "
                f"because verl computes advantages before it; set +algorithm.kalman_rl.{option} with "
                f"algorithm.adv_estimator=kalman_rl/{name}"
            )
        if moved == {"aggregate"} and aggregation == "verl":
            raise ConfigError(
                f"policy_loss.options {option}: got {value!r} for kalman_rl/{name}, expected nothing because "
                "actor.loss_agg_mode aggregates; set policy_loss.aggregation=method, or verl's "
                "loss_agg_mode=seq-mean-token-sum-norm with loss_scale_factor"
            )
