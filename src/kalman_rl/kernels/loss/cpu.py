"""Loss, gradient and metrics of a fused method for CPU tensors; the loops are in ``cpu_loops``.

Importing this module imports numba.
"""

from __future__ import annotations

import functools
import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kalman_rl.kernels.filter.cpu import RATIO_LIMIT, gains, room_for_segments, scratch
from kalman_rl.kernels.jit import EXACT, compiled
from kalman_rl.kernels.loss.cpu_chunk import BUFFERS, CHUNK, RAW_AROUND, SURROGATE, WIDTH, constants
from kalman_rl.kernels.loss.cpu_loops import fused
from kalman_rl.kernels.loss.plan import FILTERED, METRICS, SEQUENCE_SUM, TOKEN, Fused, Plan

NO_TABLE = np.empty(0)
NUMPY: dict[Any, Any] = {torch.float32: np.dtype("float32"), torch.float64: np.dtype("float64")}


def run(
    plan: Plan,
    logp: Tensor,
    old: Tensor,
    mask: Tensor,
    advantage: Tensor,
    segment: Tensor | None,
    step: Any,
) -> Fused | None:
    """:func:`kalman_rl.kernels.loss.dispatch.run` for CPU tensors."""
    (rows, length), dtype = mask.shape, logp.dtype
    filtered = plan.ratio == FILTERED
    advantage = advantage.detach().to(dtype)
    if advantage.dim() == 2 and advantage.stride(1) == 0 and length > 0:
        advantage = advantage[:, 0]
    marks, segments, order = room_for_segments(rows, segment)
    kinds, limits, model, numbers = _settings(plan, dtype, advantage.dim() == 2)
    tokens, sequences = (-1.0, -1.0) if step is None else step
    log_ratio, log_weight, coefficient, gradient = (torch.empty(rows, length, dtype=dtype) for _ in range(4))
    gain = torch.empty(rows if filtered else 0, length, dtype=dtype)
    kept, found = torch.empty(rows, length, dtype=torch.bool), np.empty(len(METRICS), np.float32)
    parts = np.empty((len(METRICS), 4))
    sums, (work, flags) = np.zeros(11), _buffers(numbers.dtype)
    sums[RAW_AROUND] = math.nan
    fine = compiled(fused, EXACT)(
        _flat(logp), _flat(old), _flat(mask).view(np.uint8), _flat(advantage), marks, rows, length, kinds, limits,
        model, float(tokens), float(sequences), numbers,
        gains(plan.process, 1.0, plan.start, length) if filtered else NO_TABLE,
        *(_flat(x) for x in (log_ratio, log_weight, gain, coefficient)), _flat(kept).view(np.uint8),
        _flat(gradient), sums, found, parts, segments, order, *scratch(), work, work.view(f"i{work.itemsize}"),
        flags,
    )  # fmt: skip
    if not fine:
        return None
    return Fused(
        torch.from_numpy(np.array(sums[SURROGATE], numbers.dtype)),
        gradient,
        log_ratio,
        log_ratio if plan.ratio == TOKEN else log_weight,
        gain if filtered else None,
        coefficient,
        kept,
        torch.from_numpy(found),
        torch.from_numpy(parts),
    )


@functools.lru_cache(maxsize=64)
def _settings(plan: Plan, dtype: torch.dtype, per_token: bool) -> tuple[Any, Any, Any, Any]:
    """``kinds, limits, model, numbers`` of the kernel."""
    kind = NUMPY[dtype]
    kinds = (plan.ratio, plan.trust, plan.aggregate, per_token)
    divisor = plan.length if plan.aggregate == SEQUENCE_SUM else 1.0
    return (
        np.array(kinds, np.int64),
        np.array([plan.low, plan.high, plan.dual], kind),
        np.array([plan.process, plan.start, plan.process <= RATIO_LIMIT, divisor]),
        constants(kind),
    )


_kept = threading.local()


def _buffers(kind: Any) -> tuple[Any, Any]:
    """Buffers and flags of this thread, each row at the beginning of a line of the cache."""
    if not hasattr(_kept, kind.name):
        row = CHUNK + WIDTH
        block = torch.empty(BUFFERS * row * kind.itemsize + 2 * row, dtype=torch.uint8).numpy()
        work, flags = block[: -2 * row].view(kind), block[-2 * row :]
        setattr(_kept, kind.name, (work.reshape(BUFFERS, row), flags.reshape(2, row)))
    found: tuple[Any, Any] = getattr(_kept, kind.name)
    return found


def _flat(tensor: Tensor) -> Any:
    """One-dimensional numpy array on the same memory, or on that of a copy where it is not contiguous."""
    return tensor.detach().numpy().reshape(-1)
