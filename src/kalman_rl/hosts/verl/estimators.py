"""Advantages of our methods as verl's estimators.

An estimator of verl sees rewards, a mask and a fresh number for every prompt of the batch: enough for groups,
not for memory. What remembers prompts runs inside :class:`~kalman_rl.hosts.verl.trainer.KalmanPPOTrainer`,
which leaves the way to its belief in ``TRACKER`` while verl calls the estimator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from kalman_rl.beliefs.advantage import Tracked
from kalman_rl.errors import ConfigError, quote
from kalman_rl.hosts.verl.choice import parts_moved
from kalman_rl.hosts.verl.settings import check_algorithm
from kalman_rl.methods import make_method
from kalman_rl.methods.aliases import translated
from kalman_rl.objectives.inputs import check_group_size, inputs_of
from kalman_rl.objectives.loss import Method
from kalman_rl.objectives.rollouts import score_norm_squared

TRACKED = "tracked"
"""Name of the estimator whose belief is chosen by ``algorithm.kalman_rl.belief``."""
TRACKED_IN_VERL = f"algorithm.adv_estimator=kalman_rl/{TRACKED} with trainer.v1.trainer_mode=kalman_rl"
TRACKER: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("TRACKER", default=None)
"""Rewards (B,) of verl's rows, NaN = missing -> advantages (B,), set by our trainer around verl's own computation."""

Estimator = Callable[..., tuple[Tensor, Tensor]]


def make_estimator(name: str) -> Estimator:
    """The advantage of method NAME with verl's signature, or the tracked one.

    A completion's reward is the sum of its ``token_level_rewards``. Rows without trained tokens (verl's padding,
    rejected completions) are left out of every baseline and belief. Returns (advantages, returns), both (B, T), 0
    outside the mask.

    Raises: ConfigError for options that do not act on the advantage, for settings of verl's own estimators, and for
    what verl does not hand over.
    """

    def kalman_advantage(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        config: Any = None,
        index: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        check_algorithm(name, config)
        mask = response_mask.bool()
        reward = token_level_rewards.sum(dim=-1).masked_fill(~mask.any(dim=1), torch.nan)
        if remembers(name):
            found = _tracker(name)(reward)
        else:
            method = method_for(name, options_in(config))
            group = _groups(index, name)
            single = len(group) > 0 and len(group.unique()) == len(group)
            if single:  # verl does not tell an estimator its rollout.n
                check_group_size(method, 1, "actor_rollout_ref.rollout.n", TRACKED_IN_VERL)
            found = method.advantage(reward, group, **_extra(method, mask, others))
        found = found if found.dim() == 2 else found[:, None].expand(mask.shape)
        advantages = torch.where(mask, found.to(token_level_rewards), 0.0)
        return advantages, advantages

    kalman_advantage.__name__ = kalman_advantage.__qualname__ = f"advantage_{name}"
    kalman_advantage.kalman_rl = name  # type: ignore[attr-defined]
    return kalman_advantage


def remembers(name: str) -> bool:
    """Whether an estimator needs a belief that lives longer than a batch."""
    return name == TRACKED or isinstance(make_method(name).advantage, Tracked)


def options_in(config: Any) -> dict[str, Any]:
    """What stands under ``algorithm.kalman_rl``, as plain Python."""
    found: Any = config.get("kalman_rl") if config is not None else None
    if found is None:
        return {}
    if not isinstance(found, dict):
        from omegaconf import OmegaConf

        found = OmegaConf.to_container(found, resolve=True)
    options: dict[str, Any] = dict(found)
    return options


def method_for(name: str, options: Mapping[str, Any]) -> Method:
    """The method with its options, all of which must act on the advantage. Raises: ConfigError."""
    known: dict[str, Any] = translated(name, options)
    for option, value in known.items():
        moved = parts_moved(name, option, value)
        if moved and "advantage" not in moved:
            raise ConfigError(
                f"algorithm.kalman_rl.{option}: got {quote(value)} for adv_estimator=kalman_rl/{name}, "
                "expected an option "
                "of the advantage; options of the loss belong to actor_rollout_ref.actor.policy_loss.options"
            )
    return make_method(name, **known)


def _groups(index: Any, name: str) -> Tensor:
    """Numbers (B,) of the prompts that verl's uids name."""
    if index is None:
        raise ConfigError(f"index: got None for kalman_rl/{name}, expected verl's uid of every row")
    names = index.tolist() if hasattr(index, "tolist") else list(index)
    numbers = {uid: i for i, uid in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[uid] for uid in names], dtype=torch.long)


def _extra(method: Method, mask: Tensor, others: Mapping[str, Any]) -> dict[str, Tensor]:
    """What an advantage asks for beside rewards and groups."""
    extra: dict[str, Tensor] = {}
    for name in inputs_of(method.advantage):
        if name == "mask":
            extra[name] = mask
        elif name == "length":
            extra[name] = mask.sum(dim=1)
        elif name == "score_norm_squared" and {"old_log_probs", "sum_pi_squared"} <= others.keys():
            norms = score_norm_squared(others["old_log_probs"], others["sum_pi_squared"])
            extra[name] = torch.where(mask, norms, 0.0)
        else:
            raise ConfigError(
                f"kalman_rl/{method.name}: got no {name}, expected it from verl, which hands sum_pi_squared to its own "
                "estimator only; take adv_estimator=optimal_token_baseline (the same formula) with "
                f"loss_mode=kalman_rl/{method.name}"
            )
    return extra


def _tracker(name: str) -> Callable[[Tensor], Tensor]:
    return check_remembered(name, TRACKER.get())


def check_remembered(name: str, tracker: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    """The tracker. Raises: ConfigError where the trainer has none for the estimator NAME."""
    if tracker is None:
        raise ConfigError(
            f"adv_estimator: got kalman_rl/{name} under verl's own trainer, expected trainer.v1.trainer_mode=kalman_rl "
            "because its beliefs are kept by prompt and verl's estimators see no names of prompts"
        )
    return tracker
