"""Loss, gradient and metrics of a fused method for CPU tensors; the loops are in ``fused_loops``.

Importing this module imports numba.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kalman_rl.fast.fused_loops import (
    CAPPED,
    CHUNK,
    COUNT,
    KEPT,
    KL,
    LARGEST,
    LOW,
    PAIRS,
    RAW,
    RAW_AROUND,
    RAW_SQUARES,
    RAW_SWITCH,
    SQUARES,
    SURROGATE,
    USED,
    USED_SQUARES,
    USED_SWITCH,
    WEIGHT,
    fused,
    totals,
)  # fmt: skip
from kalman_rl.fast.recipe import FILTERED, SEQUENCE_MEAN, SEQUENCE_SUM, TOKEN, TOKEN_MEAN, Fused, Recipe

NOTHING = np.empty((0, 0), np.int64)


def run(
    recipe: Recipe,
    logp: Tensor,
    old: Tensor,
    mask: Tensor,
    advantage: Tensor,
    segment: Tensor | None,
    step: Any,
) -> Fused | None:
    """:func:`kalman_rl.fast.fused.run` for CPU tensors."""
    logp, old, mask = (x.detach().contiguous() for x in (logp, old, mask))
    dtype, shape = logp.dtype, tuple(mask.shape)
    advantage = advantage.detach().to(dtype)
    if advantage.dim() == 1:
        advantage = advantage[:, None]
    elif advantage.shape[1] > 1 and advantage.stride(1) == 0:
        advantage = advantage[:, :1]
    marks = NOTHING if segment is None else segment.detach().long().contiguous().numpy()
    tokens, sequences = totals(mask.numpy(), marks) if step is None else step
    whole = 1.0 / max(sequences, 1.0)
    if recipe.aggregate == TOKEN_MEAN:
        whole = 1.0 / max(tokens, 1.0)
    elif recipe.aggregate == SEQUENCE_SUM:
        whole = 1.0 / (recipe.length * max(sequences, 1.0))
    outputs = [torch.empty(shape, dtype=dtype) for _ in range(4)]
    kept = torch.empty(shape, dtype=torch.bool)
    gain = torch.empty(shape if recipe.ratio == FILTERED else (0, 0), dtype=dtype)
    counts, sums, work = np.zeros(7, np.int64), np.zeros(11), np.zeros((6, CHUNK + 1))
    sums[RAW_AROUND] = math.nan
    arrays = [x.numpy() for x in (logp, old, mask, advantage.contiguous())]
    kinds = np.array([recipe.ratio, recipe.trust, recipe.aggregate != SEQUENCE_MEAN])
    limits = np.array([recipe.low, recipe.high, recipe.dual], arrays[0].dtype)
    log_ratio, log_weight, coefficient, gradient = outputs
    fine = fused(
        *arrays, marks, kinds, limits, np.array([recipe.process, recipe.start]), whole,
        log_ratio.numpy(), log_weight.numpy(), gain.numpy(), coefficient.numpy(), kept.numpy(), gradient.numpy(),
        counts, sums, work, work.view(np.int64), np.empty((2, CHUNK + 1), arrays[0].dtype),
        np.empty(CHUNK + 1, np.uint8), np.empty((2, CHUNK + 1), np.int8),
        np.empty((3, -(-shape[1] // CHUNK) * CHUNK if recipe.ratio == FILTERED else 1)),
    )  # fmt: skip
    if not fine:
        return None
    return Fused(
        torch.tensor(sums[SURROGATE], dtype=dtype),
        gradient,
        log_ratio,
        log_ratio if recipe.ratio == TOKEN else log_weight,
        gain if recipe.ratio == FILTERED else None,
        coefficient,
        kept,
        torch.from_numpy(metrics(counts, sums)),
    )


def metrics(counts: Any, sums: Any) -> Any:
    """The numbers of ``METRICS`` from the sums over tokens."""
    n, pairs = max(counts[COUNT], 1), max(counts[PAIRS], 1)
    size = n * sums[SQUARES]
    found = (
        max(sums[RAW_SQUARES] / n - (sums[RAW] / n) ** 2, 0.0),
        max(sums[USED_SQUARES] / n - (sums[USED] / n) ** 2, 0.0),
        sums[WEIGHT] ** 2 / size if size > 0 else 1.0,
        sums[LARGEST],
        counts[CAPPED] / n,
        counts[RAW_SWITCH] / pairs,
        counts[USED_SWITCH] / pairs,
        sums[LARGEST] == 0,
        counts[KEPT] / n,
        counts[LOW] / n,
        (counts[COUNT] - counts[KEPT] - counts[LOW]) / n,
        sums[KL] / n,
    )
    return np.array(found, np.float32)
