"""Choosing a fused pass by the tensors' device, and putting its gradient into autograd."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kalman_rl.errors import ConfigError, quote
from kalman_rl.kernels import jit, triton_support
from kalman_rl.kernels.loss.plan import Fused, Plan

SWITCH = "KALMAN_RL_FUSED"
"""Environment variable: ``0`` turns fused passes off, ``1`` (the default) uses them where they fit."""

TYPES = (torch.float32, torch.float64)
"""Types of log-probabilities with a fused pass; narrower ones are widened before."""


def enabled() -> bool:
    """Whether fused passes may be used, by the environment.

    Raises: ConfigError for another value than 0 or 1.
    """
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise ConfigError(f"{SWITCH}: got {quote(value)}, expected 0 (off) or 1 (on)")
    return value == "1"


def backend(*tensors: Tensor) -> ModuleType | None:
    """The module with the fused pass for these tensors, or None: other devices, no compiler, not plain memory."""
    if jit.usable(*tensors):
        return jit.module("loss.cpu")
    if triton_support.usable(*tensors):
        return jit.module("loss.cuda")
    return None


def run(
    plan: Plan,
    logp: Tensor,
    old: Tensor,
    mask: Tensor,
    advantage: Tensor,
    segment: Tensor | None,
    totals: tuple[float, float] | None,
) -> Fused | None:
    """One fused pass, or None where there is no compiler for these tensors or a number is not finite (the
    composed objective then reports which).

    Args:
        logp: (B, T) float32 or float64, contiguous or not, on one device with all others; no gradient.
        old: (B, T), same type. mask: (B, T) bool.
        advantage: (B,) or (B, T), any floating type; not read under the mask.
        segment: (B, T) integers or None.
        totals: trained tokens and non-empty sequences of the optimizer step; None: of this batch.
    """
    if logp.dtype not in TYPES or old.dtype != logp.dtype:
        return None
    module = backend(logp, old, mask, advantage, *(() if segment is None else (segment,)))
    if module is None:
        return None
    result: Fused | None = module.run(plan, logp, old, mask, advantage, segment, totals)
    return result


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None


def attach(logp: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value`` as a function of ``logp`` whose gradient is the constant ``gradient``.

    As in the composed objective, the gradient depends on ``logp`` through constants only: a second derivative
    with respect to ``logp`` is 0.
    """
    call: Callable[..., Tensor] = _Attach.apply
    return call(logp, value, gradient)
