"""The settings of a cluster's command line that a CPU cannot take, replaced and named one by one."""

from __future__ import annotations

import os
from typing import Any

from omegaconf import OmegaConf

from kalman_rl.errors import ConfigError, quote
from kalman_rl.terminal import tell

ENGINE = "transformers"
"""Name of our rollout in ``rollout.name``."""
ACTOR, ROLLOUT, RAY = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "ray_kwargs.ray_init"
FLOAT = "fsdp_config.mixed_precision.param_dtype"
SDPA = "override_config.attn_implementation"
CPU: dict[str, Any] = {
    "trainer.n_gpus_per_node": 1,
    "trainer.nnodes": 1,
    f"{ACTOR}.strategy": "fsdp2",  # FSDP1 refuses parameters on a CPU
    f"{ACTOR}.use_torch_compile": False,
    f"{ACTOR}.{FLOAT}": "fp32",
    f"actor_rollout_ref.ref.{FLOAT}": "fp32",
    f"actor_rollout_ref.model.{SDPA}": "sdpa",  # verl's default needs flash-attention
    f"{ROLLOUT}.name": ENGINE,
    f"{ROLLOUT}.tensor_model_parallel_size": 1,
    f"{ROLLOUT}.n_gpus_per_node": 1,
    f"{ROLLOUT}.agent.num_workers": 1,
    "reward.num_workers": 1,
    "data.dataloader_num_workers": 0,
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    f"{RAY}.address": "local",
    f"{RAY}.num_cpus": 16,  # logical ones: verl's actors ask for more than a laptop has
    f"{RAY}.num_gpus": 1,
    f"{RAY}.include_dashboard": False,
}
"""What replaces a setting of the command line."""


def fit(config: Any) -> None:
    """Replace what needs an accelerator in verl's whole configuration, and print each replacement.

    Raises: ConfigError for what has no counterpart on a CPU.
    """
    strategy = config.actor_rollout_ref.actor.strategy
    if not str(strategy).startswith("fsdp"):
        raise ConfigError(
            f"{ACTOR}.strategy: got {quote(strategy)} with VERL_PLATFORM=cpu, expected fsdp or fsdp2; try the "
            "same settings without Megatron's"
        )
    if OmegaConf.select(config, "reward.reward_model.enable", default=False):
        raise ConfigError(
            "reward.reward_model.enable: got true with VERL_PLATFORM=cpu, expected false because a reward model needs "
            "a rollout engine; try with reward.custom_reward_function"
        )
    if config.trainer.v1.trainer_mode in ("colocate_async", "separate_async"):
        raise ConfigError(
            f"trainer.v1.trainer_mode: got {quote(config.trainer.v1.trainer_mode)} with VERL_PLATFORM=cpu, "
            "expected sync or kalman_rl because the rollout on a CPU waits for its trainer"
        )
    model = config.actor_rollout_ref.model
    rank = model.get("lora_rank", 0) or OmegaConf.select(model, "lora.rank", default=0)
    more = {"actor_rollout_ref.model.lora.merge": True} if rank else {}
    replaced = []
    for place, value in (CPU | more).items():
        before = OmegaConf.select(config, place)
        if before != value:
            OmegaConf.update(config, place, value, force_add=True)
            replaced.append(f"{place}={value}" + ("" if before is None else f" (was {before})"))
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # Ray counts the names in it, and an empty one has none
    if replaced:
        tell("\n  ".join(["kalman_rl: VERL_PLATFORM=cpu sets", *replaced]))
