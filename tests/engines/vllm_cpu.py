"""A real vLLM on a CPU for TRL's colocate mode: one engine per model folder, its weights in torch's layout.

vLLM packs the weights of linear layers for its CPU kernels and forgets how to load them, so TRL's weight sync fails.
Here they stay as they are and `torch.nn.functional.linear` uses them. Nothing is compiled, which saves half a minute.
"""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class Engines:
    """In the place of `vllm.LLM` in TRL: each model folder is loaded once; what was sampled is kept in ``said``."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.said: list[tuple[list[int], list[int], list[float]]] = []
        self._by_model: dict[str, Any] = {}

    def __call__(self, model: str, **settings: Any) -> Engines:
        if model not in self._by_model:
            from vllm import LLM

            settings |= {"enforce_eager": True, "dtype": self.dtype, "max_model_len": 64}
            self._by_model[model] = LLM(model, **settings)
        self._current = self._by_model[model]
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._current, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._current.generate(*args, **kwargs)
        for output in outputs:
            (one,) = output.outputs
            chosen = [table[token].logprob for token, table in zip(one.token_ids, one.logprobs, strict=True)]
            self.said.append((list(output.prompt_token_ids), list(one.token_ids), chosen))
        return outputs


def install(patch: pytest.MonkeyPatch, dtype: str) -> Engines:
    """Give TRL the engines of this module, until ``patch`` is undone."""
    with socket.create_server(("127.0.0.1", 0)) as free:  # TRL's own choice is one for all processes
        patch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    for name, value in SETTINGS.items():
        patch.setenv(name, value)
    import trl.generation.vllm_generation as trl_vllm
    import vllm.model_executor.layers.utils as layers

    def keep_weight(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    engines = Engines(dtype)
    patch.setattr(layers, "dispatch_cpu_unquantized_gemm", keep_weight)
    patch.setattr(trl_vllm, "LLM", engines)
    return engines
