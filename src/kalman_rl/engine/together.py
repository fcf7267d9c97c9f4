"""Settings that are each in order, looked at together: do the names exist, does one setting need another?

Apart from the settings themselves, because the names bring in torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kalman_rl.beliefs import make_belief
from kalman_rl.engine.method import chosen_method
from kalman_rl.engine.settings import MODELS, REPORTERS, StressConfig, TrainConfig
from kalman_rl.engine.strict import show
from kalman_rl.engine.tasks.table import TASKS
from kalman_rl.errors import ConfigError, KalmanRLError, quote, unknown_name
from kalman_rl.methods import make_method
from kalman_rl.objectives.inputs import check_group_size
from kalman_rl.sampling.budget import Budget, check_belief_only, check_prior, check_select


def check_train(config: TrainConfig) -> None:
    """Names, files, and settings that need or exclude each other. Raises: ConfigError."""
    _check_method(config.method, config.method_options)
    if config.advantage == "tracked" or config.belief != TrainConfig.belief:
        _check_belief(config.belief, config.belief_options)
    _check_group_size(config)
    _check_model(config.model)
    if config.report_to not in REPORTERS:
        raise unknown_name("report_to", config.report_to, REPORTERS)
    if config.data is None and config.task not in TASKS:
        raise unknown_name("task", config.task, TASKS)
    if config.data is not None and not os.path.isfile(config.data):
        raise ConfigError(
            f"data: got {show(str(config.data))}, expected a JSONL, Parquet or CSV file that exists"
        )
    _check_rewards(config)
    _check_words(config)
    where = f"with advantage={quote(config.advantage)}"
    check_belief_only(config, config.advantage == "tracked", where, "set advantage = 'tracked'")
    check_prior(config.prior_column, config.measure_prior, config.prompt_features)
    if config.reward_noise:
        check_select(config.select, config.select_weights, "real")
    if config.belief_options and config.advantage != "tracked":
        raise ConfigError(
            f"belief_options: got {show(config.belief_options)} with advantage={quote(config.advantage)}, "
            "expected none because no belief is read; set advantage = 'tracked'"
        )
    if config.aim == "mixed_groups" and config.reward_noise:
        raise ConfigError(
            f"aim: got 'mixed_groups' with reward_noise = {config.reward_noise}, expected gradient; noisy groups are "
            "mixed from the second completion on"
        )
    _check_sampler(config)
    Budget.of(config).chooses_among(config.prompts, config.prompts * config.group_size)
    prompts, group = config.prompts, config.group_size
    updates, micro = config.updates_per_generation, config.gradient_accumulation
    batch = f"{prompts} prompts * {group} completions = {prompts * group}"
    if prompts * group % updates:
        raise ConfigError(f"updates_per_generation: got {updates}, expected a divisor of {batch}")
    if prompts * group // updates % micro:
        raise ConfigError(
            f"gradient_accumulation: got {micro}, expected a divisor of {prompts * group // updates} "
            f"(completions per optimizer step: {batch}, over {updates} updates)"
        )


def _check_rewards(config: TrainConfig) -> None:
    for name in config.reward:
        if not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", name):
            raise ConfigError(f"reward: got {show(name)}, expected MODULE:FUNCTION, e.g. 'my_rewards:exact'")
        if config.reward.count(name) > 1:
            raise ConfigError(
                f"reward: got {show(name)} twice, expected each function once; weigh it with reward_weights"
            )
    weights = config.reward_weights
    if weights and len(weights) != len(config.reward):
        raise ConfigError(
            f"reward_weights: got {len(weights)} for {len(config.reward)} reward functions, expected one for each"
        )
    if weights and not any(weights):
        raise ConfigError(f"reward_weights: got {show(weights)}, expected one that is not 0")
    if config.reward_noise and (weights or len(config.reward) > 1):
        raise ConfigError(
            f"reward_noise: got {config.reward_noise} with several rewards or weights, expected one reward of weight 1"
        )


def _check_words(config: TrainConfig) -> None:
    """Texts that must say something."""
    if "" in config.stop:
        raise ConfigError("stop: got '', expected texts of at least one character")
    if config.system is not None and not config.system.strip():
        raise ConfigError(f"system: got {show(config.system)}, expected a message; leave it out for none")
    targets = config.lora_target_modules
    if config.lora_rank and (not targets or "" in targets or ("all-linear" in targets and len(targets) > 1)):
        raise ConfigError(
            f"lora_target_modules: got {show(targets)}, expected names of layers, or all-linear alone; lora_rank = 0 "
            "trains every weight"
        )


def _check_sampler(config: TrainConfig) -> None:
    if config.sampler_bits == 1:
        raise ConfigError("sampler_bits: got 1, expected 2 or more, or 0 for the weights as they are")
    if config.sampler_lag and config.save_every:
        raise ConfigError(
            f"sampler_lag: got {config.sampler_lag} with save_every = {config.save_every}, expected save_every = 0 "
            "because checkpoints hold no older weights to go on from"
        )


def check_stress(config: StressConfig) -> None:
    """The same for a study. Raises: ConfigError."""
    for name, values in (("conditions", config.conditions), ("methods", config.methods)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{name}: got {show(list(values))}, expected one or more, each once")
    for method in config.methods:
        _check_method(method, {})
    rollouts, minibatch = config.rollouts, config.minibatch
    if rollouts % 8:
        raise ConfigError(f"rollouts: got {rollouts}, expected a multiple of 8")
    if rollouts % minibatch:
        raise ConfigError(f"minibatch: got {minibatch}, expected a divisor of rollouts = {rollouts}")
    if minibatch % 8 and any(name.startswith("lag") for name in config.conditions):
        raise ConfigError(
            f"minibatch: got {minibatch}, expected a multiple of 8 because under lag it is the generation batch"
        )


def _check_method(name: str, options: Mapping[str, float]) -> None:
    with _naming(f"method_options of {name}"):
        make_method(name, **options)


def _check_belief(name: str, options: Mapping[str, Any]) -> None:
    with _naming(f"belief_options of {name}"):
        make_belief(name, **options)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (KalmanRLError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{what}: {error}") from None


def _check_group_size(config: TrainConfig) -> None:
    method = chosen_method(
        config.method, config.method_options, config.advantage, config.belief, config.belief_options
    )
    check_group_size(method, config.group_size, "completions_per_prompt", "advantage = 'tracked'")


def _check_model(model: str) -> None:
    if model in MODELS or os.path.isdir(model):
        return
    if model.startswith(("/", ".", "~")):
        raise ConfigError(f"model: got {show(model)}, expected a directory that exists, or OWNER/NAME")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}/[\w.-]{1,100}", model, re.ASCII):
        raise ConfigError(f"{unknown_name('model', model, MODELS)}; or a directory, or a hub id OWNER/NAME")
