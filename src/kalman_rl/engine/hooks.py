"""The private names of torch, transformers and TRL that the engine asks for."""

from __future__ import annotations

from kalman_rl.hooks import HookedMethod, Host

TORCH = Host(
    "torch",
    ">=2.7",
    {"torch.cpu": {"_is_avx512_bf16_supported": HookedMethod(), "_is_amx_tile_supported": HookedMethod()}},
    otherwise="training on a CPU takes float32 where bfloat16 may be faster",
)
TRANSFORMERS = Host(
    "transformers",
    ">=5.5.3,<6",
    {
        "transformers:Trainer": {
            "_save_checkpoint": HookedMethod(("model", "trial")),
            "_load_from_checkpoint": HookedMethod(("resume_from_checkpoint",)),
        }
    },
    otherwise="a run stopped in its last evaluation cannot be resumed",
)
TRL = Host(
    "trl",
    "==1.16.*",
    {
        "trl:GRPOTrainer": {
            "_generate": HookedMethod(("prompts",)),
            "_generate_single_turn": HookedMethod(
                ("prompt_ids", "images", "multimodal_fields", "num_generations")
            ),
            "_metrics": None,
            "_tokenizer": None,
        }
    },
    otherwise="completions do not end at stop texts of several characters",
)
