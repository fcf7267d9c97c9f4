"""Loss, gradient and metrics of a fused method for CUDA tensors, in Triton.

One program takes one row block by block: log-ratio, filter (see ``kernels/filter/cuda_kernels``), exp, trust region,
gradient, and the row's sums behind the metrics, which plain torch adds up in float64. Sums are per row and
then over rows in a fixed order, so that a result repeats to the bit. Importing this module imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kalman_rl.kernels.filter.cuda import BLOCK, WARPS, numbers_of, on, spans, table_size
from kalman_rl.kernels.filter.cuda_kernels import block_gains, last_of, mean_maps
from kalman_rl.kernels.loss import plan as kinds
from kalman_rl.kernels.loss.plan import Fused, Plan

ONE, TOKEN = tl.constexpr(kinds.ONE), tl.constexpr(kinds.TOKEN)
SEQUENCE, FILTERED = tl.constexpr(kinds.SEQUENCE), tl.constexpr(kinds.FILTERED)
CLIP, CAP, LOG_LIKELIHOOD = (
    tl.constexpr(kinds.CLIP),
    tl.constexpr(kinds.CAP),
    tl.constexpr(kinds.LOG_LIKELIHOOD),
)
LIMIT = tl.constexpr(20.0)  # kalman_rl.objectives.trust.clip.LOG_WEIGHT_CAP
STATISTICS = 16
(COUNT, KEPT, LOW, CAPPED, PAIRS, RAW_SWITCH, USED_SWITCH, SURROGATE, WEIGHT, SQUARES, KL, LARGEST, RAW, RAW_SPREAD,
 USED, USED_SPREAD) = range(STATISTICS)  # fmt: skip


@triton.jit
def switches(values, before, place, BLOCK: tl.constexpr):
    """Neighbours of opposite sign in a block, where ``before`` is the sign of the value before it; the last
    sign. Masked tokens are 0."""
    sign = (values > 0).to(tl.int32) - (values < 0).to(tl.int32)
    shifted = tl.gather(sign, tl.maximum(place - 1, 0), 0)
    shifted = tl.where(place == 0, before, shifted)
    return tl.sum((sign * shifted < 0).to(tl.int32)), tl.sum(tl.where(place == BLOCK - 1, sign, 0))


@triton.jit
def merged(n, mean, spread, values, observed, m):
    """Count, mean and sum of squared deviations, with a block of ``m`` observed values added."""
    own = tl.sum(tl.where(observed, values, 0.0)) / tl.maximum(m, 1)
    off = tl.where(observed, values - own, 0.0)
    total = tl.maximum(n + m, 1)
    delta = own - mean
    return mean + delta * m / total, spread + tl.sum(off * off) + delta * delta * n * m / total


@triton.jit
def kl_of(ratio):
    """``expm1(min(l, 20)) - l``; a series where the difference would cancel."""
    x = tl.minimum(ratio, LIMIT)
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040)))))
    return tl.where(tl.abs(x) < 0.3, series, tl.exp(x) - 1.0 - ratio)


@triton.jit
def fused_kernel(
    logp, old, mask, advantage, first, count, whole, constants, table, limits,
    log_ratio, log_weight, gains, coefficient, kept, gradient, statistics, T, TABLE, ADVANTAGE,
    RATIO: tl.constexpr, TRUST: tl.constexpr, SHARED: tl.constexpr, HOLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. ADVANTAGE: distance between a row's advantages, 0 for one number a row. SHARED: the weight
    ``whole`` of a sequence is divided by its tokens."""
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    q, k0, m0 = tl.load(constants), tl.load(constants + 1), tl.load(constants + 2)
    low, high, dual = tl.load(limits), tl.load(limits + 1), tl.load(limits + 2)
    zero = 0.0 * q
    tokens = tl.load(count + row)
    share = tl.load(whole) / tl.maximum(tokens, 1) if SHARED else tl.load(whole)
    share = share.to(q.dtype)
    mean_of_row = zero
    if RATIO == SEQUENCE:
        for t0 in range(0, T, BLOCK):
            t = t0 + place
            observed = tl.load(mask + row * T + t, mask=t < T, other=0) != 0
            now = tl.load(logp + row * T + t, mask=observed, other=0.0)
            mean_of_row += tl.sum(now - tl.load(old + row * T + t, mask=observed, other=0.0))
        mean_of_row = mean_of_row / tl.maximum(tokens, 1)
    p, x = k0, m0
    n, n_kept, n_low, n_capped, pairs, raw_switch, used_switch = 0, 0, 0, 0, 0, 0, 0
    loss, total, squares, kl, largest = zero, zero, zero, zero, zero
    raw, raw_spread, used_mean, used_spread = zero, zero, zero, zero
    raw_sign, used_sign, before = 0, 0, 0
    for t0 in range(0, T, BLOCK):
        t = t0 + place
        inside = t < T
        at = row * T + t
        observed = tl.load(mask + at, mask=inside, other=0) != 0
        now = tl.load(logp + at, mask=observed, other=0.0)
        ratio = now - tl.load(old + at, mask=observed, other=0.0)
        if RATIO == FILTERED:
            observed, begins, opens, gain, keep, p = block_gains(
                mask, first, table, t, inside, row, T, TABLE, p, q, k0, HOLES, False, BLOCK
            )
            a, b = mean_maps(ratio, observed, begins, opens, gain, keep, k0, m0)
            states = a * x + b
            x = last_of(states, BLOCK)
            used = tl.where(observed, states, 0.0)
            tl.store(gains + at, gain, mask=inside)
        elif RATIO == TOKEN:
            used = ratio
        else:
            used = tl.where(observed, mean_of_row, 0.0)
        a = tl.load(advantage + row * ADVANTAGE + t, mask=observed, other=0.0) if ADVANTAGE > 0 else tl.where(
            observed, tl.load(advantage + row), 0.0)  # fmt: skip
        weight = tl.exp(tl.minimum(used, LIMIT))
        keeps = observed
        surrogate = -a * weight
        if TRUST == CLIP:
            drop = ((a > 0) & (weight > high)) | ((a < 0) & ((weight < low) | (weight > dual)))
            keeps = observed & ~drop
            surrogate = tl.maximum(surrogate, -a * tl.minimum(tl.maximum(weight, low), high))
            surrogate = tl.where(a < 0, tl.minimum(surrogate, -a * dual), surrogate)
        if TRUST == CAP:
            weight = tl.minimum(tl.maximum(weight, low), high)
        if (TRUST == CAP) | (TRUST == LOG_LIKELIHOOD):
            surrogate = -a * weight * now
        c = tl.where(keeps, weight, 0.0)
        tl.store(log_ratio + at, ratio, mask=inside)
        if RATIO != TOKEN:
            tl.store(log_weight + at, used, mask=inside)
        tl.store(coefficient + at, c, mask=inside)
        tl.store(kept + at, keeps.to(tl.uint8), mask=inside)
        tl.store(gradient + at, -(share * c * a), mask=inside)
        # what the metrics are made of
        m = tl.sum(observed.to(tl.int32))
        raw, raw_spread = merged(n, raw, raw_spread, ratio, observed, m)
        used_mean, used_spread = merged(n, used_mean, used_spread, used, observed, m)
        n += m
        n_kept += tl.sum(keeps.to(tl.int32))
        n_low += tl.sum((observed & ~keeps & (used < 0)).to(tl.int32))
        n_capped += tl.sum((used > LIMIT).to(tl.int32))
        seen = observed.to(tl.int32)
        previous = tl.where(place == 0, before, tl.gather(seen, tl.maximum(place - 1, 0), 0))
        pairs += tl.sum(seen * previous)
        before = tl.sum(tl.where(place == BLOCK - 1, seen, 0))
        found, raw_sign = switches(ratio, raw_sign, place, BLOCK)
        raw_switch += found
        found, used_sign = switches(used, used_sign, place, BLOCK)
        used_switch += found
        loss += tl.sum(tl.where(observed, surrogate, 0.0))
        seen_weight = tl.where(observed, weight, 0.0)
        total += tl.sum(seen_weight)
        squares += tl.sum(seen_weight * seen_weight)
        kl += tl.sum(kl_of(ratio))
        largest = tl.maximum(largest, tl.max(tl.abs(ratio)))
    to = statistics + row * 16
    tl.store(to + 0, n)
    tl.store(to + 1, n_kept)
    tl.store(to + 2, n_low)
    tl.store(to + 3, n_capped)
    tl.store(to + 4, pairs)
    tl.store(to + 5, raw_switch)
    tl.store(to + 6, used_switch)
    tl.store(to + 7, share * loss)
    tl.store(to + 8, total)
    tl.store(to + 9, squares)
    tl.store(to + 10, kl)
    tl.store(to + 11, largest)
    tl.store(to + 12, raw)
    tl.store(to + 13, raw_spread)
    tl.store(to + 14, used_mean)
    tl.store(to + 15, used_spread)


def run(
    plan: Plan,
    logp: Tensor,
    old: Tensor,
    mask: Tensor,
    advantage: Tensor,
    segment: Tensor | None,
    step: Any,
) -> Fused | None:
    """:func:`kalman_rl.kernels.loss.dispatch.run` for CUDA tensors. Packed rows are not taken."""
    if segment is not None or not mask.numel():
        return None
    logp, old = logp.detach().contiguous(), old.detach().contiguous()
    seen, dtype, (rows, length) = mask.contiguous().view(torch.uint8), logp.dtype, mask.shape
    advantage = advantage.detach().to(dtype)
    stride = 0
    if advantage.dim() == 2 and advantage.stride(1) == 0:
        advantage = advantage[:, 0]
    if advantage.dim() == 2:
        advantage, stride = advantage.contiguous(), length
    first, last, count = spans(seen)
    whole = _whole(plan, count, step).to(dtype)
    filtered = plan.ratio == kinds.FILTERED
    numbers = (plan.process, 1.0, 0.0, plan.start) if filtered else (0.0, 1.0, 0.0, 0.0)
    constants, table = numbers_of(*numbers, table_size(length if filtered else 1), dtype, logp.device)
    limits = torch.tensor([plan.low, plan.high, plan.dual], dtype=dtype, device=logp.device)
    log_ratio, coefficient, gradient = (torch.empty_like(logp) for _ in range(3))
    log_weight = log_ratio if plan.ratio == kinds.TOKEN else torch.empty_like(logp)
    gain = torch.empty_like(logp) if filtered else None
    kept = torch.empty_like(seen)
    statistics = torch.empty((rows, STATISTICS), dtype=dtype, device=logp.device)
    with on(logp):
        fused_kernel[(rows,)](
            logp, old, seen, advantage.contiguous(), first, count, whole, constants, table, limits,
            log_ratio, log_weight, gradient if gain is None else gain, coefficient, kept, gradient, statistics,
            length, table.shape[1], stride,
            RATIO=plan.ratio, TRUST=plan.trust, SHARED=plan.aggregate == kinds.SEQUENCE_MEAN,
            HOLES=filtered and bool((last - first > count).any()), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    metrics, parts, value = _metrics(statistics.double())
    if not bool(torch.stack((value, metrics[-1].double())).isfinite().all()):  # the KL sees every log-ratio
        return None
    return Fused(
        value.to(dtype),
        gradient,
        log_ratio,
        log_weight,
        gain,
        coefficient,
        kept.view(torch.bool),
        metrics,
        parts,
    )


def _whole(plan: Plan, count: Tensor, step: tuple[float, float] | None) -> Tensor:
    """The weight of a token or sequence, (1,) float64, from the counts of the step or of this batch."""
    if step is None:
        tokens, sequences = count.sum().double(), (count > 0).sum().double()
    else:
        tokens, sequences = torch.tensor(step, dtype=torch.float64, device=count.device).unbind()
    if plan.aggregate == kinds.TOKEN_MEAN:
        return 1 / tokens.clamp(min=1.0)[None]
    length = plan.length if plan.aggregate == kinds.SEQUENCE_SUM else 1.0
    return 1 / (length * sequences.clamp(min=1.0)[None])


def _metrics(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of ``METRICS``, float32, the sums behind them, and the loss, from the statistics of every row."""
    sums = rows.sum(0)
    n, pairs = sums[COUNT].clamp(min=1.0), sums[PAIRS].clamp(min=1.0)

    def moments(mean: int, spread: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sum, sum of squares, variance."""
        total = (rows[:, COUNT] * rows[:, mean]).sum()
        off = sums[spread] + (rows[:, COUNT] * (rows[:, mean] - total / n).square()).sum()
        return total, off + total.square() / n, off / n

    raw, raw_squares, raw_variance = moments(RAW, RAW_SPREAD)
    used, used_squares, used_variance = moments(USED, USED_SPREAD)

    largest = rows[:, LARGEST].amax()
    size = n * sums[SQUARES]
    sample = torch.where(size > 0, sums[WEIGHT].square() / size.clamp(min=1e-300), 1.0)
    dropped_high = sums[COUNT] - sums[KEPT] - sums[LOW]
    values = (
        raw_variance,
        used_variance,
        sample,
        largest,
        sums[CAPPED] / n,
        sums[RAW_SWITCH] / pairs,
        sums[USED_SWITCH] / pairs,
        (largest == 0).double(),
        sums[KEPT] / n,
        sums[LOW] / n,
        dropped_high / n,
        sums[KL] / n,
    )
    zero = torch.zeros_like(largest)
    counts = torch.stack([sums[PAIRS] if i in (5, 6) else sums[COUNT] for i in range(len(values))])
    totals = (
        raw,
        used,
        sums[WEIGHT],
        zero,
        sums[CAPPED],
        sums[RAW_SWITCH],
        sums[USED_SWITCH],
        zero,
        sums[KEPT],
        sums[LOW],
        dropped_high,
        sums[KL],
    )
    squares = torch.stack((raw_squares, used_squares, sums[SQUARES], *(zero,) * 9))
    tops = torch.stack((*(zero,) * 3, largest, *(zero,) * 3, largest, *(zero,) * 4))
    parts = torch.stack((counts, torch.stack(totals), squares, tops), dim=1)
    return torch.stack(values).float(), parts, sums[SURROGATE]
