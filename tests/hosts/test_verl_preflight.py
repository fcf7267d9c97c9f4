"""What is wrong with a run's settings is said by the first thing that verl's command line does."""

from __future__ import annotations

import copy
import functools
import re
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("verl", exc_type=ImportError)
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from verl.utils.config import validate_config

from kalman_rl.errors import ConfigError
from kalman_rl.hosts.verl.preflight import HOMES, MODULES

P = "actor_rollout_ref.actor.policy_loss"
KPO, TARGET = (
    f"{P}.loss_mode=kalman_rl/kpo",
    f"{P}._target_=kalman_rl.hosts.verl.KalmanPolicyLossConfig",
)
ESTIMATOR, GRPO = "algorithm.adv_estimator=kalman_rl/kpo", "algorithm.adv_estimator=grpo"
TRACKED = "algorithm.adv_estimator=kalman_rl/tracked"
OURS = "trainer.v1.trainer_mode=kalman_rl"
DPPO = f"{P}.loss_mode=kalman_rl/dppo_tv"
PLUGIN, TRAINER = HOMES
COMMON = (
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.n=8",
)


@functools.cache
def defaults() -> Any:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", list(COMMON))


def composed(*overrides: str) -> Any:
    """verl's configuration with settings as the command line takes them; Hydra itself composes once."""
    config = copy.deepcopy(defaults())
    for key, value in (override.lstrip("+").split("=", 1) for override in overrides):
        (parsed,) = OmegaConf.from_dotlist([f"value={value}"]).values()
        OmegaConf.update(config, key, parsed, force_add=True)
    return config


def validate(*overrides: str) -> Any:
    config = composed(*overrides)
    validate_config(config, use_reference_policy=False, use_critic=False)
    return config


WRONG = {
    "loss": ([f"{P}.loss_mode=kalman_rl/kpo_difuse"], "loss_mode: got .*did you mean 'kalman_rl/kpo_diffuse'"),
    "loss without prefix": ([f"{P}.loss_mode=kpo"], "loss_mode: got 'kpo', expected 'kalman_rl/kpo'"),
    "loss with another prefix": ([f"{P}.loss_mode=kalman-rl/kpo"], "got 'kalman-rl/kpo', expected 'kalman_rl/kpo'"),
    "prefix and loss": ([f"{P}.loss_mode=kalmanrl/kpo_difuse"], "did you mean 'kalman_rl/kpo_diffuse'"),
    "loss of a module": ([f"{P}.loss_mode=kalman_rl/mine:soft"], rf"register\('mine:soft'\).*{MODULES}"),
    "loss that verl cannot run": ([f"{P}.loss_mode=kalman_rl/capo"], "train it with TRL"),
    "no behaviour": ([DPPO, "actor_rollout_ref.rollout.calculate_log_probs=false"], "calculate_log_probs: got false"),
    "option without a class": ([KPO, f"+{P}.low=0.05"], rf"policy_loss.low: got it .*expected {re.escape(TARGET)}"),
    "option": ([KPO, TARGET, f"+{P}.options.proces_noise=1"], "did you mean 'process_noise'"),
    "clip": ([KPO, "actor_rollout_ref.actor.clip_ratio=0.1"], "actor.clip_ratio: got 0.1"),
    "clip with a class": ([KPO, TARGET, "actor_rollout_ref.actor.clip_ratio=0.1"], "actor.clip_ratio: got 0.1"),
    "top-p": ([KPO, "actor_rollout_ref.rollout.top_p=0.9"], r"rollout.top_p: got 0.9 .*biases every weight"),
    "top-k": ([KPO, TARGET, "actor_rollout_ref.rollout.top_k=20"], r"rollout.top_k: got 20 .*allow_biased_sampling"),
    "penalty": ([KPO, "actor_rollout_ref.rollout.repetition_penalty=1.1"], "rollout.repetition_penalty: got 1.1"),
    "estimator": (["algorithm.adv_estimator=kalman_rl/trakced"], "adv_estimator: .*did you mean 'kalman_rl/tracked'"),
    "estimator without prefix": (["algorithm.adv_estimator=tracked"], "expected 'kalman_rl/tracked'"),
    "estimator's option": ([ESTIMATOR, "+algorithm.kalman_rl.epsilom=1"], "did you mean 'epsilon'"),
    "verl's estimator": ([GRPO, "+algorithm.kalman_rl.belief=auto"], "got belief with adv_estimator=grpo"),
    "setting of verl's": (["algorithm.adv_estimator=kalman_rl/grpo", "algorithm.lam=0.9"], "algorithm.lam: got 0.9"),
    "one completion": (["algorithm.adv_estimator=kalman_rl/grpo", "actor_rollout_ref.rollout.n=1"], "rollout.n: got 1"),
    "no trainer": ([TRACKED], "expected trainer.v1.trainer_mode=kalman_rl"),
    "an older trainer": ([TRACKED, OURS, "trainer.use_v1=false"], "expected trainer.v1.trainer_mode=kalman_rl"),
    "trainer": ([TRACKED, "trainer.v1.trainer_mode=kalman-rl"], "trainer_mode: .*did you mean 'kalman_rl'"),
    "no belief": ([GRPO, OURS], "adv_estimator: got 'grpo' with trainer_mode=kalman_rl"),
    "belief": ([TRACKED, OURS, "+algorithm.kalman_rl.belief=gausian"], "did you mean 'gaussian'"),
    "allocation": ([TRACKED, OURS, "+algorithm.kalman_rl.allocation=predictiv"], "allocation: got 'predictiv'"),
    "its name": ([TRACKED, OURS, "+algorithm.kalman_rl.allocaton=fixed"], "did you mean 'allocation'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_one_sentence_before_anything_starts(case: str) -> None:
    overrides, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        validate(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["algorithm.adv_estimator=grpo", f"{P}.loss_mode=gspo"],
        [f"{P}.loss_mode=my_own_loss", "algorithm.adv_estimator=my_own_estimator"],  # verl asks its workers
        [KPO, "algorithm.adv_estimator=kalman_rl/kpo"],
        [f"{P}.loss_mode=kalman_rl/reinforce", "actor_rollout_ref.rollout.top_p=0.9"],  # no ratio
        [KPO, TARGET, f"+{P}.allow_biased_sampling=true", "actor_rollout_ref.rollout.top_p=0.9"],
        ["trainer.v1.trainer_mode=my_own_mode", TRACKED],  # a subclass of our trainer
    ],
)
def test_other_runs_are_left_alone(overrides: list[str]) -> None:
    assert validate(*overrides) == composed(*overrides)


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ("", None, f"{PLUGIN},{TRAINER}"),
        ("my_setup", None, f"{PLUGIN},my_setup,{TRAINER}"),
        ("my_setup", "their_setup", f"{PLUGIN},their_setup,{TRAINER}"),
        (f"{TRAINER},my_setup", None, f"{PLUGIN},my_setup,{TRAINER}"),
    ],
)
def test_rays_workers_are_told_where_the_trainer_is(
    monkeypatch: pytest.MonkeyPatch, environment: str, given: str | None, expected: str
) -> None:
    monkeypatch.setenv(MODULES, environment)
    place = f"ray_kwargs.ray_init.runtime_env.env_vars.{MODULES}"
    config = validate(TRACKED, OURS, *([] if given is None else [f"+{place}={given}"]))
    assert OmegaConf.select(config, place) == expected


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_command_line_stops_at_the_sentence() -> None:
    """In a process of its own, as a user runs it: no Ray was started, and the last error is ours."""
    command = [sys.executable, "-W", "ignore", "-m", "verl.trainer.main_ppo", *COMMON, f"{P}.loss_mode=kpo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=390, check=False)
    assert done.returncode != 0
    assert "ConfigError: actor.policy_loss.loss_mode: got 'kpo', expected 'kalman_rl/kpo'" in done.stderr
    assert "ray init kwargs" not in done.stdout


def test_a_clip_too_wide_for_the_response_length_is_said(caplog: pytest.LogCaptureFixture) -> None:
    diffuse = f"{P}.loss_mode=kalman_rl/kpo_diffuse"
    validate(diffuse, "data.max_response_length=50")
    assert "clip" not in caplog.text
    validate(diffuse, "data.max_response_length=512")
    assert "kpo_diffuse: got a clip of 0.03 for a ratio averaged over up to 512 tokens" in caplog.text
