"""From a name and options to a method that verl's loss can run, or a sentence with the reason why it cannot.

verl hands a policy loss the log-probabilities under the old and the current policy, advantages and a mask, one
micro-batch at a time; its batch also holds those of the rollout. What a method needs beyond that, it does not get here,
and nothing stands in for it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from kalman_rl.errors import ConfigError, quote
from kalman_rl.methods import make_method
from kalman_rl.methods.aliases import translated
from kalman_rl.objectives.inputs import PARTS, check_provided, missing
from kalman_rl.objectives.loss import Method

AGGREGATIONS = ("verl", "method")

ADVICE = {
    "top_behaviour": "take kalman_rl/dppo_tv or kalman_rl/dppo_kl, which look at the sampled token only",
    "lag": "verl does not tell the loss how many steps ago a token was sampled",
}
"""What a method may ask for and verl's loss does not get -> what to do."""


class SelectedMethod(NamedTuple):
    """What the settings of a run come to: the ``method``, and who aggregates."""

    method: Method
    aggregation: str = "verl"


def choose(name: str, options: Mapping[str, Any], *, aggregation: str = "verl") -> SelectedMethod:
    """The method to run as a policy loss of verl.

    Args:
        name: a key of METHODS or ``module:function``, without the prefix.
        options: its options, hosts' names for them included.
        aggregation: "verl", by ``loss_agg_mode``, or "method", as the method was published.

    Raises: ConfigError for an unknown name or option, an input that verl does not provide,
    and an option without effect in the loss.

    >>> choose("kpo", {"kalman_Q": 1e-4}).method.ratio.process_noise
    0.0001
    """
    if aggregation not in AGGREGATIONS:
        raise ConfigError(f"aggregation: got {quote(aggregation)}, expected one of {', '.join(AGGREGATIONS)}")
    try:
        return _chosen(name, tuple(options.items()), aggregation)
    except TypeError:  # an option that is a list
        return _chosen.__wrapped__(name, tuple(options.items()), aggregation)


@functools.lru_cache(maxsize=64)
def _chosen(name: str, options: tuple[tuple[str, Any], ...], aggregation: str) -> SelectedMethod:
    """Remembered, because verl's loss asks for every micro-batch."""
    known: dict[str, Any] = translated(name, dict(options))
    method = make_method(name, **known)
    _check_provided(method)
    _check_effect(name, known, aggregation)
    return SelectedMethod(method, aggregation)


def _check_provided(method: Method) -> None:
    """Refuse a method whose loss looks at more than verl hands over. What is learned, ``learning.py`` takes from verl's
    engine. Whether the rollout keeps its log-probabilities stands elsewhere in verl's configuration, see
    ``preflight.py``."""
    provided = {"advantage", "aggregate", "past_steps", "whole_step", "logp_behaviour"}
    advice = dict.fromkeys(ADVICE.get(name, "train it with TRL") for name in missing(method, provided))
    check_provided(method, provided, "verl's policy loss", "; ".join(advice))


def parts_moved(name: str, option: str, value: Any) -> set[str]:
    """Which parts of a method an option changes; empty if the value is the default.

    >>> parts_moved("kpo", "epsilon", 0.1), parts_moved("kpo", "low", 0.1)
    ({'advantage'}, {'trust'})
    """
    plain, moved = make_method(name), make_method(name, **{option: value})
    return {part for part in PARTS if getattr(plain, part) != getattr(moved, part)}


def _check_effect(name: str, options: Mapping[str, Any], aggregation: str) -> None:
    """Refuse options that the loss would silently ignore."""
    for option, value in options.items():
        moved = parts_moved(name, option, value)
        if moved == {"advantage"}:
            raise ConfigError(
                f"policy_loss.options {option}: got {quote(value)} for kalman_rl/{name}, expected an option of "
                f"the loss because verl computes advantages before it; set +algorithm.kalman_rl.{option} with "
                f"algorithm.adv_estimator=kalman_rl/{name}"
            )
        if moved == {"aggregate"} and aggregation == "verl":
            raise ConfigError(
                f"policy_loss.options {option}: got {quote(value)} for kalman_rl/{name}, expected nothing because "
                "actor.loss_agg_mode aggregates; set policy_loss.aggregation=method, or verl's "
                "loss_agg_mode=seq-mean-token-sum-norm with loss_scale_factor"
            )
