"""Every setting of verl that a method or estimator of ours could replace: honoured, refused, or not ours."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("verl", exc_type=ImportError)
from omegaconf import OmegaConf
from verl.trainer.config import AlgoConfig, FilterGroupsConfig, KLControlConfig, RolloutCorrectionConfig
from verl.workers.config import ActorConfig, FSDPActorConfig, McoreActorConfig, PolicyLossConfig
from verl.workers.config.actor import TorchTitanActorConfig, VeOmniActorConfig

from kalman_rl.errors import ConfigError
from kalman_rl.hosts.verl import KalmanPolicyLossConfig
from kalman_rl.hosts.verl.estimators import make_estimator
from kalman_rl.hosts.verl.losses import choice_for
from kalman_rl.hosts.verl.settings import (
    OF_ACTOR,
    OF_ALGORITHM,
    OF_BYPASS,
    OF_LOSS,
    check_actor,
    check_algorithm,
    check_bypass,
)


def words(text: str) -> set[str]:
    return set(text.split())


HONOURED = {
    # the loss reads them, or hands them on to verl's aggregation
    ActorConfig: words("policy_loss loss_agg_mode loss_scale_factor global_batch_info use_dynamic_bsz"),
    PolicyLossConfig: words("loss_mode"),
    # the trainer reads them, or verl acts on them before it calls the estimator
    AlgoConfig: words("adv_estimator use_kl_in_reward kl_penalty kl_ctrl filter_groups rollout_correction"),
    KLControlConfig: words("type kl_coef horizon target_kl"),
    FilterGroupsConfig: words("enable metric max_num_gen_batches max_inflight_gen_batches"),
    RolloutCorrectionConfig: words(
        "bypass_mode rollout_is rollout_is_threshold rollout_is_batch_normalize rollout_rs rollout_rs_threshold"
    ),
}
REFUSED = {
    ActorConfig: set(OF_ACTOR),
    PolicyLossConfig: set(OF_LOSS),
    AlgoConfig: set(OF_ALGORITHM),
    RolloutCorrectionConfig: set(OF_BYPASS),  # in bypass mode
}
IRRELEVANT = {
    # terms that verl adds to the loss; how it runs, batches, optimizes and saves the model
    ActorConfig: words(
        "entropy_coeff use_kl_loss kl_loss_coef kl_loss_type calculate_entropy calculate_sum_pi_squared "
        "strategy ppo_mini_batch_size ppo_micro_batch_size ppo_micro_batch_size_per_gpu "
        "ppo_infer_micro_batch_size_per_gpu ppo_max_token_len_per_gpu ppo_infer_max_token_len_per_gpu "
        "freeze_vision_tower use_prefix_grouper use_torch_compile ppo_epochs shuffle data_loader_seed checkpoint "
        "optim use_fused_kernels profiler engine rollout_n model_config qat grad_clip fsdp_config megatron veomni "
        "torchtitan profile ulysses_sequence_parallel_size entropy_from_logits_with_chunking "
        "entropy_from_logits_chunk_size entropy_checkpointing pad_to_length use_remove_padding "
        "use_rollout_log_probs"
    ),
    AlgoConfig: words("pf_ppo"),  # read with use_pf_ppo
}
SUBCLASSES = (FSDPActorConfig, McoreActorConfig, VeOmniActorConfig, TorchTitanActorConfig)
WALKED = (*HONOURED, *SUBCLASSES)


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)} - {"_target_"}  # the class itself, for Hydra


def known(kind: type) -> set[str]:
    base = ActorConfig if kind in SUBCLASSES else kind
    return HONOURED[base] | REFUSED.get(base, set()) | IRRELEVANT.get(base, set())


@pytest.mark.parametrize("kind", WALKED)
def test_every_field_of_verl_is_known(kind: type) -> None:
    """A field of a new verl fails here, by its name: does a method of ours take its place?"""
    assert sorted(names(kind) - known(kind)) == []


def test_no_list_knows_a_field_that_verl_does_not_have() -> None:
    for base in HONOURED:
        kinds = (base, *SUBCLASSES) if base is ActorConfig else (base,)
        assert known(base) <= set().union(*map(names, kinds))


def test_what_they_hold_is_walked_too() -> None:
    """A dataclass behind a field that is not irrelevant has a list of its own."""
    for base in HONOURED:
        for field in dataclasses.fields(base):
            held = [kind for kind in HONOURED if kind.__name__ in str(field.type)]
            configured = "Config" in str(field.type)
            if configured and field.name not in IRRELEVANT.get(base, set()):
                assert held, f"{base.__name__}.{field.name}"


CHANGED: dict[str, Any] = {
    "clip_ratio": 0.1, "clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 5.0, "tau_pos": 1.3,
    "tau_neg": 2.0, "clip_cov_ratio": 0.1, "clip_cov_lb": 0.5, "clip_cov_ub": 6.0, "kl_cov_ratio": 0.1,
    "ppo_kl_coef": 0.2, "dro_beta": 0.3, "rollout_correction": RolloutCorrectionConfig(rollout_is="token"),
    "gamma": 0.99, "lam": 0.95, "norm_adv_by_std_in_grpo": False, "use_pf_ppo": True,
    "gdpo_reward_keys": ["format"], "gdpo_reward_weights": [1.0], "rollout_is": "token",
    "rollout_rs": "seq_mean_k1", "loss_type": "reinforce",
}  # fmt: skip


def actor(policy: PolicyLossConfig, **fields: Any) -> FSDPActorConfig:
    return FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy, **fields)


@pytest.mark.parametrize("name", OF_ACTOR)
def test_settings_of_verls_losses_are_refused(name: str) -> None:
    config = actor(PolicyLossConfig(), **{name: CHANGED[name]})
    with pytest.raises(ConfigError, match=rf"^actor.{name}: got "):
        choice_for("kpo", config)
    with pytest.raises(ConfigError, match=rf"^actor.{name}: got "):  # as the trainer reads it
        check_actor(
            "kpo", OmegaConf.create({name: CHANGED[name], "policy_loss": {"loss_mode": "kalman_rl/kpo"}})
        )


@pytest.mark.parametrize("name", OF_LOSS)
def test_settings_beside_the_loss_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^actor.policy_loss.{name}: got "):
        choice_for("kpo", actor(PolicyLossConfig(**{name: CHANGED[name]})))
    with pytest.raises(ConfigError, match=rf"^actor.policy_loss.{name}: got "):
        KalmanPolicyLossConfig(loss_mode="kalman_rl/kpo", **{name: CHANGED[name]})


def test_the_option_to_set_instead_is_named() -> None:
    with pytest.raises(ConfigError, match=r"set \+actor_rollout_ref.actor.policy_loss.options.dro_beta=0.3"):
        KalmanPolicyLossConfig(loss_mode="kalman_rl/dro", dro_beta=0.3)
    with pytest.raises(ConfigError, match="`kalman-rl methods kpo` shows its options"):
        KalmanPolicyLossConfig(loss_mode="kalman_rl/kpo", dro_beta=0.3)
    method = KalmanPolicyLossConfig(loss_mode="kalman_rl/dro", options={"dro_beta": 0.3}).choice().method
    assert "0.3" in repr(method)


@pytest.mark.parametrize("name", list(OF_ALGORITHM))
def test_settings_of_verls_estimators_are_refused(name: str) -> None:
    for config in (AlgoConfig(**{name: CHANGED[name]}), OmegaConf.create({name: CHANGED[name]})):
        with pytest.raises(ConfigError, match=rf"^algorithm.{name}: got .*kalman_rl/grpo"):
            make_estimator("grpo")(torch.ones(2, 3), torch.ones(2, 3), config=config, index=["a", "a"])


@pytest.mark.parametrize("name", list(OF_BYPASS))
def test_corrections_in_bypass_mode_are_refused(name: str) -> None:
    asked = {"rollout_is": None, "rollout_rs": None, "bypass_mode": True} | {name: CHANGED[name]}
    with pytest.raises(ConfigError, match=rf"^algorithm.rollout_correction.{name}: got "):
        check_bypass(OmegaConf.create(asked))
    check_bypass(OmegaConf.create(asked | {"bypass_mode": False}))


def test_defaults_are_accepted() -> None:
    check_actor("kpo", actor(PolicyLossConfig()))
    check_algorithm("kpo", AlgoConfig())
    check_algorithm("kpo", None)
    check_bypass(None)
    check_bypass(OmegaConf.create({"bypass_mode": True, "rollout_is": None, "loss_type": "ppo_clip"}))
