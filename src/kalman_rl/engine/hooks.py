"""The private names of torch and transformers that the engine asks for."""

from __future__ import annotations

from kalman_rl.hooks import Host, Method

TORCH = Host(
    "torch",
    ">=2.7",
    {"torch.cpu": {"_is_avx512_bf16_supported": Method(), "_is_amx_tile_supported": Method()}},
    otherwise="training on a CPU takes float32 where bfloat16 may be faster",
)
TRANSFORMERS = Host(
    "transformers",
    ">=5.5.3,<6",
    {
        "transformers:Trainer": {
            "_save_checkpoint": Method(("model", "trial")),
            "_load_from_checkpoint": Method(("resume_from_checkpoint",)),
        }
    },
    otherwise="a run stopped in its last evaluation cannot be resumed",
)
