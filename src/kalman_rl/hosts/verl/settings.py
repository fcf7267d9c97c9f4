"""Settings of verl that a method or an estimator of ours takes the place of: changing one is refused.

Whatever verl reads itself, before or after it calls us, is verl's and stays as it is. The tests walk through verl's
dataclasses and know every field, so a new one is looked at before it is ignored.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from kalman_rl.errors import ConfigError, quote
from kalman_rl.methods.aliases import FOREIGN

PREFIX = "kalman_rl/"

OF_ACTOR = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg")
"""Fields of ActorConfig that are knobs of verl's own losses."""
OF_LOSS = (
    "clip_cov_ratio",
    "clip_cov_lb",
    "clip_cov_ub",
    "kl_cov_ratio",
    "ppo_kl_coef",
    "dro_beta",
    "rollout_correction",
)
"""Fields of PolicyLossConfig that are; ``rollout_correction`` is read by verl's loss_mode=bypass_mode alone."""
OF_ALGORITHM = {
    "gamma": "rewards of a completion are summed",
    "lam": "there is no critic",
    "norm_adv_by_std_in_grpo": "the estimator decides this; kalman_rl/dr_grpo does not divide",
    "use_pf_ppo": "it belongs to adv_estimator=gae",
    "gdpo_reward_keys": "it belongs to adv_estimator=gdpo",
    "gdpo_reward_weights": "it belongs to adv_estimator=gdpo",
}
"""Fields of AlgoConfig that are knobs of verl's own estimators, and why ours do not read them."""
OF_BYPASS = {"rollout_is": None, "rollout_rs": None, "loss_type": "ppo_clip"}
"""Fields of algorithm.rollout_correction that in bypass mode only verl's own loss acts on, and their values then."""


def check_actor(name: str, config: Any) -> None:
    """Raise ConfigError if a setting of verl's losses was changed, which method NAME does not read."""
    from verl.workers.config import ActorConfig

    _check_loss(name, config, ActorConfig, OF_ACTOR, "actor")
    check_policy_loss(name, _get(config, "policy_loss"))


def check_policy_loss(name: str, config: Any) -> None:
    """The same for the fields of ``actor.policy_loss``."""
    from verl.workers.config import PolicyLossConfig

    _check_loss(name, config, PolicyLossConfig, OF_LOSS, "actor.policy_loss")


def _check_loss(name: str, config: Any, kind: type, fields: tuple[str, ...], place: str) -> None:
    for field, value, default in _changed(config, kind, fields):
        if field in FOREIGN.get(name, {}):
            advice = f"set +actor_rollout_ref.actor.policy_loss.options.{field}={value}"
        else:
            advice = f"`kalman-rl methods {name}` shows its options"
        raise ConfigError(
            f"{place}.{field}: got {value}, expected verl's default {default} because {PREFIX}{name} decides this; "
            f"{advice}"
        )


def check_algorithm(name: str, config: Any) -> None:
    """Raise ConfigError if a setting of verl's estimators was changed, which the estimator NAME does not read."""
    from verl.trainer.config import AlgoConfig

    for field, value, default in _changed(config, AlgoConfig, tuple(OF_ALGORITHM)):
        raise ConfigError(
            f"algorithm.{field}: got {value}, expected verl's default {default} with "
            f"adv_estimator={PREFIX}{name}: {OF_ALGORITHM[field]}"
        )


def check_bypass(config: Any) -> None:
    """Raise ConfigError if ``algorithm.rollout_correction`` asks for a correction in bypass mode, where only verl's own
    loss would make it."""
    if config is None or not _get(config, "bypass_mode"):
        return
    for field, without in OF_BYPASS.items():
        value = _get(config, field)
        if value is not None and value != without:
            raise ConfigError(
                f"algorithm.rollout_correction.{field}: got {quote(value)} in bypass mode, expected "
                f"{quote(without)} because "
                "only verl's loss_mode=bypass_mode acts on it; leave it out, or set bypass_mode=false"
            )


def _changed(config: Any, kind: type, fields: tuple[str, ...]) -> list[tuple[str, Any, Any]]:
    """Fields with another value than verl's default: (field, value, default)."""
    found = [(name, _get(config, name), default) for name, default in _defaults(kind, fields)]
    return [change for change in found if change[1] is not None and change[1] != change[2]]


@functools.cache
def _defaults(kind: type, fields: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    """Remembered, because verl's loss asks for every micro-batch."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    return tuple(
        (
            name,
            known[name].default if (make := known[name].default_factory) is dataclasses.MISSING else make(),
        )
        for name in fields
    )


def _get(config: Any, name: str) -> Any:
    """A setting of a dataclass of verl's, a mapping of OmegaConf's, or nothing."""
    return (
        config.get(name)
        if isinstance(config, Mapping) or hasattr(config, "get")
        else getattr(config, name, None)
    )
