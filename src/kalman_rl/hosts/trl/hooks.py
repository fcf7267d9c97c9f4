"""The private names of TRL, transformers and torch that our trainer relies on.

Apart from the adapter, so that ``kalman-rl doctor`` can name the one that moved where the adapter refuses to load.
accelerate is used by its public names alone.
"""

from __future__ import annotations

from kalman_rl.hooks import HookedMethod, Host

TRL = Host(
    "trl",
    "==1.16.*",
    {
        "trl:GRPOTrainer": {
            # overridden or called
            "__init__": HookedMethod(
                ("model", "reward_funcs", "args"), ("train_dataset", "processing_class", "callbacks")
            ),
            "training_step": HookedMethod(("model", "inputs", "num_items_in_batch")),
            "_compute_loss": HookedMethod(("model", "inputs")),
            "_calculate_rewards": HookedMethod(("inputs", "prompts", "completions", "completion_ids_list")),
            "_generate_and_score_completions": HookedMethod(("inputs",)),
            "_prepare_inputs": HookedMethod(("generation_batch",)),
            "log": HookedMethod(("logs", "start_time")),
            "_save_checkpoint": HookedMethod(("model", "trial")),
            "_load_optimizer_and_scheduler": HookedMethod(("checkpoint",)),
            "_get_per_token_logps_and_entropies": HookedMethod(
                ("model", "input_ids", "attention_mask", "logits_to_keep"),
                ("compute_entropy", "compute_aux_loss"),
            ),
            "_tokenize_prompts": HookedMethod(("prompts",)),
            "_get_output_dir": HookedMethod(("trial",)),
            "_get_dataloader": HookedMethod(("dataset", "description", "batch_size"), ("is_training",)),
            "_get_train_sampler": HookedMethod((), ("dataset",)),
            "_set_signature_columns_if_needed": HookedMethod(()),
            "get_high_entropy_mask": HookedMethod(("entropies", "mask", "threshold")),
            "get_off_policy_mask": HookedMethod(
                (),
                (
                    "advantages",
                    "per_token_logps",
                    "sampling_per_token_logps",
                    "mask",
                    "off_policy_threshold",
                ),
            ),
            # read, or set on the class
            "_buffered_inputs": None,
            "_entropy_bonus_enabled": None,
            "_entropy_window_stats": None,
            "_last_world_entropy": None,
            "_logs": None,
            "_metrics": None,
            "_name": None,
            "_paper": None,
            "_signature_columns": None,
            "_step": None,
            "_tag_names": None,
            "_tokenizer": None,
        },
        "trl.trainer.utils": {
            "RepeatSampler": None,
            "split_pixel_values_by_grid": HookedMethod(("batch",)),
            "unsplit_pixel_values_by_grid": HookedMethod(("batch",)),
        },
        "trl:GRPOConfig": {"_VALID_DICT_FIELDS": None},  # texts of the command line that are read as JSON
    },
)
TRANSFORMERS = Host(
    "transformers",
    ">=5.5.3,<6",
    {
        "transformers:TrainingArguments": {"_setup_devices": None},  # replaced on one object, see ranks.py
        "transformers.integrations.integration_utils": {"INTEGRATION_TO_CALLBACK": None},
    },
)
TORCH = Host(
    "torch",
    ">=2.7",
    {"torch.distributed.distributed_c10d": {"_set_pg_timeout": HookedMethod(("timeout", "group"))}},
)
