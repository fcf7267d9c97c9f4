"""What is wrong with the settings of a run, said before Ray starts.

verl's command line first calls ``validate_config``. It builds what has a ``_target_`` and leaves names of losses,
estimators and trainers to the workers, which come up minutes later. The plugin puts :func:`check_run` in front of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable
from typing import Any

from kalman_rl.errors import ConfigError, quote, unknown_name
from kalman_rl.hosts.lengths import notes_on_length
from kalman_rl.hosts.sampling import NEUTRAL, biased, refusals
from kalman_rl.hosts.verl.choice import SelectedMethod, choose
from kalman_rl.hosts.verl.estimators import (
    TRACKED,
    TRACKED_IN_VERL,
    check_remembered,
    method_for,
    options_in,
    remembers,
)
from kalman_rl.hosts.verl.settings import PREFIX, check_actor, check_algorithm, check_bypass
from kalman_rl.hosts.verl.tracker import make_tracking, read_settings
from kalman_rl.methods import make_method
from kalman_rl.objectives.inputs import check_group_size
from kalman_rl.terminal import logger

MODE = "kalman_rl"
"""Name of our trainer in ``trainer.v1.trainer_mode``."""
VERLS_MODES = ("sync", "colocate_async", "separate_async")
HOMES = ("kalman_rl.hosts.verl.plugin", "kalman_rl.hosts.verl.trainer")
"""The plugin first: modules of the trainer ask verl for a platform, and it may be ours."""
MODULES = "VERL_USE_EXTERNAL_MODULES"
TARGET = "actor_rollout_ref.actor.policy_loss._target_=kalman_rl.hosts.verl.KalmanPolicyLossConfig"


def check_run(config: Any) -> None:
    """Raise ConfigError for the first setting of ours that cannot run; ``config`` is verl's whole configuration.

    A run without any name of ours passes.
    """
    check_loss(config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout)
    check_rollout(config.actor_rollout_ref)
    check_estimator(config)
    check_mode(config)


def own_name(setting: str, value: Any, known: Iterable[str]) -> str | None:
    """NAME of ``kalman_rl/NAME``, or None for a name that is none of ours.

    Args:
        setting: where the value stands.
        known: names in verl's table, ours with their prefix.

    Raises: ConfigError for a name that was meant to be ours.

    >>> known = ["vanilla", "kalman_rl/kpo"]
    >>> own_name("loss_mode", "kalman_rl/kpo", known), own_name("loss_mode", "vanilla", known)
    ('kpo', None)
    >>> own_name("loss_mode", "kpo", known)
    Traceback (most recent call last):
    kalman_rl.errors.ConfigError: loss_mode: got 'kpo', expected 'kalman_rl/kpo'
    """
    text, names = str(value), set(known)
    if text in names:
        return text.removeprefix(PREFIX) if text.startswith(PREFIX) else None
    ours = sorted(name for name in names if name.startswith(PREFIX))
    if text.startswith(PREFIX) and ":" in text:
        raise ConfigError(
            f"{setting}: got {quote(text)}, expected a method that every process registers; call "
            f"kalman_rl.hosts.verl.register({quote(text.removeprefix(PREFIX))}) in a module and name it in {MODULES}"
        )
    bare = PREFIX + text.rpartition("/")[2]
    if bare in names:
        raise ConfigError(f"{setting}: got {quote(text)}, expected {quote(bare)}")
    if text.startswith(PREFIX) or difflib.get_close_matches(text, ours, n=1, cutoff=0.8):
        raise unknown_name(setting, text, ours)
    return None


def check_loss(actor: Any, rollout: Any) -> None:
    """The same for ``actor_rollout_ref.actor``: the name of the loss, its options, settings of verl's losses, and
    whether the rollout keeps what the loss asks for."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
    from verl.workers.config import PolicyLossConfig

    policy = actor.policy_loss
    name = own_name("actor.policy_loss.loss_mode", policy.loss_mode, POLICY_LOSS_REGISTRY)
    if str(policy.get("_target_", "")).rpartition(".")[2] == "KalmanPolicyLossConfig":
        chosen = _built(policy)
    elif name is not None:
        fields = {field.name for field in dataclasses.fields(PolicyLossConfig)}
        for option in [key for key in policy if key not in fields]:
            raise ConfigError(
                f"actor.policy_loss.{option}: got it beside verl's own class, which has no such field, expected "
                f"{TARGET}"
            )
        chosen = choose(name, {})
    if name is not None:
        check_actor(name, actor)
        if "logp_behaviour" in chosen.method.inputs and not rollout.calculate_log_probs:
            raise ConfigError(
                f"actor_rollout_ref.rollout.calculate_log_probs: got false with {PREFIX}{name}, expected true because "
                "its ratio is to the policy that sampled"
            )
        for text in notes_on_length(chosen.method, rollout.response_length):
            logger.warning("%s", text)


def check_rollout(models: Any) -> None:
    """The same for ``rollout``: a loss with a ratio needs samples from the whole distribution."""
    policy = models.actor.policy_loss
    loss = str(policy.loss_mode)
    if not loss.startswith(PREFIX) or policy.get("allow_biased_sampling", False):
        return
    method = make_method(loss.removeprefix(PREFIX))
    found = biased({name: models.rollout.get(name, None) for name in NEUTRAL})
    for text in refusals(found, "actor_rollout_ref.rollout.", method):
        raise ConfigError(f"{text}; leave it out, or set {TARGET} and policy_loss.allow_biased_sampling=true")


def _built(policy: Any) -> SelectedMethod:
    """Build the settings of a loss, and raise our own sentence without Hydra's around it."""
    from verl.utils.config import omega_conf_to_dataclass

    try:
        chosen: SelectedMethod = omega_conf_to_dataclass(policy).choice()
        return chosen
    except Exception as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise


def check_estimator(config: Any) -> None:
    """The same for ``algorithm``: the name of the estimator and its options, and whether it gets what it compares."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    algorithm = config.algorithm
    name = own_name("algorithm.adv_estimator", algorithm.adv_estimator, ADV_ESTIMATOR_REGISTRY)
    options = options_in(algorithm)
    if name is None:
        if options:
            raise ConfigError(
                f"algorithm.kalman_rl: got {', '.join(options)} with adv_estimator={algorithm.adv_estimator}, expected "
                f"nothing because no estimator of verl reads it; set algorithm.adv_estimator={PREFIX}NAME"
            )
        return
    check_algorithm(name, algorithm)
    if remembers(name):
        trainer = config.trainer
        if not trainer.get("use_v1", True) or trainer.v1.trainer_mode in VERLS_MODES:
            check_remembered(name, None)
        make_tracking(name, read_settings(options))
    else:
        method = method_for(name, options)
        check_group_size(
            method,
            int(config.actor_rollout_ref.rollout.n),
            "actor_rollout_ref.rollout.n",
            TRACKED_IN_VERL,
        )


def check_mode(config: Any) -> None:
    """The same for ``trainer.v1.trainer_mode``; our trainer is named to Ray's workers, which then import it."""
    mode = str(config.trainer.v1.trainer_mode)
    if mode == MODE:
        check_trainer(config)
        _bring_trainer(config)
    elif mode not in VERLS_MODES and difflib.get_close_matches(mode, [MODE], cutoff=0.7):
        raise unknown_name("trainer.v1.trainer_mode", mode, [*VERLS_MODES, MODE])


def _bring_trainer(config: Any) -> None:
    """verl imports the modules of an environment variable in every process, and Ray hands the variables of
    ``runtime_env`` to its workers, on this machine and on a cluster that already runs."""
    from omegaconf import OmegaConf

    place = f"ray_kwargs.ray_init.runtime_env.env_vars.{MODULES}"
    found = OmegaConf.select(config, place) or os.environ.get(MODULES, "")
    modules = [module for module in found.split(",") if module and module not in HOMES]
    OmegaConf.update(config, place, ",".join([HOMES[0], *modules, HOMES[1]]), force_add=True)


def check_trainer(config: Any) -> str:
    """The name of the estimator. Raises: ConfigError for settings that beliefs do not go with."""
    estimator = str(config.algorithm.adv_estimator)
    name = estimator.removeprefix(PREFIX)
    if not estimator.startswith(PREFIX) or not remembers(name):
        choices = ", ".join(PREFIX + each for each in (TRACKED, "k_grpo", "spo"))
        raise ConfigError(
            f"algorithm.adv_estimator: got {quote(estimator)} with trainer_mode=kalman_rl, expected one of {choices}; "
            "with other estimators verl's own trainers do the same"
        )
    check_algorithm(name, config.algorithm)
    groups = config.algorithm.get("filter_groups", None)
    if groups is not None and groups.get("enable", False):
        raise ConfigError(
            "algorithm.filter_groups.enable: got true with trainer_mode=kalman_rl, expected false because a belief "
            "that never sees groups of equal rewards takes hard prompts for easier ones; "
            "allocation=predictive spends less on such prompts instead"
        )
    if (
        config.algorithm.use_kl_in_reward
        and options_in(config.algorithm).get("reward_range", "unit") == "unit"
    ):
        raise ConfigError(
            "algorithm.use_kl_in_reward: got true with rewards declared to lie in [0, 1], expected "
            "+algorithm.kalman_rl.reward_range=real because the penalty moves them out of it; or actor.use_kl_loss=true"
        )
    loss = str(config.actor_rollout_ref.actor.policy_loss.loss_mode)
    if loss.startswith(PREFIX):
        check_actor(loss.removeprefix(PREFIX), config.actor_rollout_ref.actor)
        check_bypass(config.algorithm.get("rollout_correction", None))
    return name
