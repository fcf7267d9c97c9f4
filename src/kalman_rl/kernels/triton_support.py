"""When the Triton kernels can run."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from kalman_rl.kernels import jit

SWITCH = "KALMAN_RL_NO_TRITON"
"""Environment variable: ``1`` switches every Triton kernel off."""


def usable(*tensors: Any) -> bool:
    """True if Triton is there and every tensor is plain memory of one CUDA device, or of this machine under
    Triton's interpreter (``TRITON_INTERPRET=1``, for tests)."""
    if os.environ.get(SWITCH, "0") not in ("", "0") or torch.compiler.is_compiling():
        return False
    found = [x for x in tensors if isinstance(x, torch.Tensor)]
    kind = "cpu" if interpreted() else "cuda"
    return bool(found) and all(_plain(x, kind, found[0].device) for x in found) and _triton()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; decided when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _plain(tensor: torch.Tensor, kind: str, device: torch.device) -> bool:
    known = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return known and tensor.device.type == kind and tensor.device == device and not tensor.is_neg()


@functools.cache
def _triton() -> bool:
    try:
        import triton  # noqa: F401
    except Exception:  # not installed, or without a driver for this machine
        return False
    return True


def means(*arguments: Any, gradient: bool = False) -> Any:
    """:func:`kalman_rl.kernels.filter.cuda.means`, differentiable if ``gradient``; None where Triton cannot."""
    if not usable(*arguments):
        return None
    module = jit.module("filter.cuda")
    return module.CudaMeans.apply(*arguments) if gradient else module.means(*arguments)
