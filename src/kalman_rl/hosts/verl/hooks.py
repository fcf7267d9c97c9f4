"""The names inside verl's trainer that our losses, estimators and trainer rely on.

In four lists: every worker loads the losses, the driver the trainer, an actor the engine, and ``VERL_PLATFORM=cpu`` the
platform.
"""

from __future__ import annotations

from kalman_rl.hooks import HookedMethod, Host

VERL = Host(
    "verl",
    "==0.9.*",
    {
        "verl.trainer.ppo.core_algos": {
            "POLICY_LOSS_REGISTRY": None,
            "ADV_ESTIMATOR_REGISTRY": None,
            "register_policy_loss": HookedMethod(("name",)),
            "register_adv_est": HookedMethod(("name_or_enum",)),
            "agg_loss": HookedMethod(
                (),
                (
                    "loss_mat",
                    "loss_mask",
                    "loss_agg_mode",
                    "dp_size",
                    "batch_num_tokens",
                    "global_batch_size",
                ),
            ),
        },
        "verl.utils.config": {
            "validate_config": HookedMethod(("config",)),
            "omega_conf_to_dataclass": HookedMethod(("config",)),
        },
        "verl.workers.utils.losses": {
            "ppo_loss": HookedMethod(("config", "model_output", "data", "dp_group"))
        },
        "verl.utils.import_utils": {"is_trl_available": HookedMethod()},
        "verl.workers.config": {"ActorConfig": None, "PolicyLossConfig": None},
        "verl.trainer.config": {"AlgoConfig": None},
    },
)
TRAINER = Host(
    "verl",
    "==0.9.*",
    {
        "verl.utils.dataset.rl_dataset": {"collate_fn": HookedMethod(("data_list",))},
        "verl.trainer.ppo.v1": {"register_trainer": HookedMethod(("name",))},
        "verl.trainer.ppo.v1:PPOTrainerSync": {
            "__init__": HookedMethod(("config",)),
            "_init_dataloader": HookedMethod(()),
            "_next_train_batch": HookedMethod(("num_prompts",)),
            "_step_once": HookedMethod(("metrics", "timing_raw", "sample_batch_size")),
            "_compute_advantage": HookedMethod(("batch", "metrics")),
            "_update_actor": HookedMethod(("batch", "metrics")),
            "_save_checkpoint": HookedMethod(),
            "_load_checkpoint": HookedMethod(),
            "global_steps": None,
            "train_dataset": None,
            "trainer_mode": None,
        },
    },
)
ENGINE = Host(
    "verl",
    "==0.9.*",
    {
        "verl.workers.engine.base:EngineRegistry": {"new": HookedMethod(("model_type", "backend"))},
        "verl.workers.engine.base:BaseEngine": {
            "train_batch": HookedMethod(("data", "loss_function")),
            "infer_batch": HookedMethod(("data", "loss_function")),
            "save_checkpoint": HookedMethod(("local_path",)),
            "load_checkpoint": HookedMethod(("local_path",)),
            "get_data_parallel_group": HookedMethod(),
        },
        "verl.utils.device": {"get_device_id": HookedMethod()},
    },
    otherwise="methods that learn take every micro-batch for a step of its own, and keep the noises they start with",
)
CPU = Host(
    "verl",
    "==0.9.*",
    {
        "verl.plugin.platform": {"PlatformBase": None},
        "verl.plugin.platform:PlatformRegistry": {"register": HookedMethod(("platform",))},
        "verl.utils.distributed": {
            "initialize_global_process_group_ray": HookedMethod((), ("timeout_second", "backend"))
        },
        "verl.utils.fsdp_utils": {"CPUOffloadPolicy": None},
        "verl.workers.rollout.base": {"_ROLLOUT_REGISTRY": None},
        "verl.workers.rollout.base:BaseRollout": {
            "resume": HookedMethod(("tags",)),
            "release": HookedMethod(),
            "update_weights": HookedMethod(("weights", "wire_format")),
        },
        "verl.workers.rollout.replica": {"TokenOutput": None},
        "verl.workers.rollout.replica:RolloutReplica": {
            "launch_servers": HookedMethod(),
            "max_concurrency": None,
            "_server_handle": None,
            "_server_address": None,
        },
        "verl.workers.rollout.replica:RolloutReplicaRegistry": {"register": HookedMethod(("name", "loader"))},
    },
    otherwise="VERL_PLATFORM=cpu does not work",
)
