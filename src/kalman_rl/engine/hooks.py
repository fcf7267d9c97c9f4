"""The private names of torch that the engine asks for."""

from __future__ import annotations

from kalman_rl.hooks import Host, Method

TORCH = Host(
    "torch",
    ">=2.7",
    {"torch.cpu": {"_is_avx512_bf16_supported": Method(), "_is_amx_tile_supported": Method()}},
    otherwise="training on a CPU takes float32 where bfloat16 may be faster",
)
