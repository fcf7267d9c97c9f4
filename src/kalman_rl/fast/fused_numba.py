"""Loss, gradient and metrics of a fused method in one pass over the tokens, compiled for the CPU.

A *span* is one sequence: a row, or a segment of a packed row. Its tokens from the first trained one to the
last go through short buffers that stay in the first-level cache, and each loop over a buffer does one thing,
so that it becomes vector instructions. Only the filter's recursion is taken token by token. Sums are in
float64; the reductions alone may be reordered. Importing this module imports numba.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch

from kalman_rl.fast.recipe import (
    CAP,
    CLIP,
    FILTERED,
    LOG_LIKELIHOOD,
    SEQUENCE,
    SEQUENCE_MEAN,
    SEQUENCE_SUM,
    TOKEN,
    TOKEN_MEAN,
    Fused,
)

CHUNK = 512
BLOCK = CHUNK // 4
NOTHING = np.empty((0, 0), np.int64)
COUNT, KEPT, LOW, CAPPED, PAIRS, RAW_SWITCH, USED_SWITCH = range(7)
SURROGATE, WEIGHT, SQUARES, KL, RAW, RAW_SQUARES, USED, USED_SQUARES, LARGEST, RAW_AROUND, USED_AROUND = range(11)
LIMIT = 20.0  # kalman_rl.trust.LOG_WEIGHT_CAP
SMALLEST = -708.0  # below, exp is 0 to every digit that a loss can show
LOG2E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 6.93147180369123816490e-01, 1.90821492927058770002e-10
SHIFT = 6755399441055744.0  # 1.5 * 2^52: added to a number, its last bits become the nearest integer

OPTIONS = {"nogil": True, "error_model": "numpy"}
PRIVATE = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # half the time to compile
exact = numba.njit(fastmath={"contract", "nsz"}, **OPTIONS, **PRIVATE)
loose = numba.njit(fastmath={"contract", "nsz", "reassoc"}, **OPTIONS, **PRIVATE)
finite = numba.njit(fastmath={"nnan", "nsz", "reassoc"}, **OPTIONS, **PRIVATE)


def public(function):
    """A kernel that Python calls, its machine code kept on disk where that is possible."""
    options = {"fastmath": {"contract", "nsz"}, **OPTIONS}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the source's directory nor the user's cache can be written
        return numba.njit(**options)(function)


@public
def totals(mask, segment):
    """Trained tokens and non-empty sequences."""
    tokens, sequences = 0, 0
    for i in range(mask.shape[0]):
        start = 0
        while start < mask.shape[1]:
            stop = _span_end(segment, i, start, mask.shape[1])
            found = _count(mask[i, start:stop])
            tokens += found
            sequences += found > 0
            start = stop
    return tokens, sequences


@public
def fused(
    logp, old, mask, advantage, segment, kinds, limits, filter_, whole, log_ratio, log_weight, gain,
    coefficient, kept, gradient, counts, sums, work, bits, narrow, marks, signs, table,
):  # fmt: skip
    """Fill the outputs; False if a number at a trained token is not finite.

    ``kinds``: ratio, trust, 1 if every sequence has the weight ``whole`` and 0 if it shares it among its
    tokens. ``limits``: low, high, dual (inf for none), in the type of ``logp``. ``filter_``: Q / R, P0 / R.
    ``advantage``: (B, T) or (B, 1). ``segment``: (B, T) or empty. ``gain`` is empty without a filter. The
    last six are scratch: ``bits`` shows ``work`` as integers, ``table`` is (3, T) for a filter.
    """
    kind, length = kinds[0], mask.shape[1]
    gains, keeps, passes = table[0], table[1], table[2]
    if kind == FILTERED:
        _gain_table(filter_, gains, keeps, passes)
    fine = True
    for i in range(mask.shape[0]):
        start = 0
        while start < length:
            stop = _span_end(segment, i, start, length)
            n = _count(mask[i, start:stop])
            first, last = stop, stop
            if n > 0:
                first = start
                while not mask[i, first]:
                    first += 1
                while not mask[i, last - 1]:
                    last -= 1
            for t in range(start, stop):
                if t == first:
                    break
                _blank(i, t, log_ratio, log_weight, gain, coefficient, kept, gradient)
            for t in range(last, stop):
                _blank(i, t, log_ratio, log_weight, gain, coefficient, kept, gradient)
            if n > 0:
                counts[COUNT] += n
                share = logp.dtype.type(whole if kinds[2] == 1 else whole / n)
                mean = logp.dtype.type(0)
                if kind == SEQUENCE:
                    mean = _mean(logp[i], old[i], mask[i], first, last, n)
                state, variance, missed = 0.0, filter_[1], 0
                marks[0], signs[0, 0], signs[1, 0] = 0, 0, 0
                for t in range(first, last, CHUNK):
                    m = min(CHUNK, last - t)
                    now, used, keep = logp[i, t : t + m], log_weight[i, t : t + m], kept[i, t : t + m]
                    fine &= _observe(now, old[i, t : t + m], mask[i, t : t + m], log_ratio[i, t : t + m], work[0], marks)
                    if kind == FILTERED:
                        if n == last - first:
                            k = t - first
                            state = _filter_whole(work[0], work[1], gains[k:], keeps[k:], passes[k:], state, m)
                            _narrow(gains[k:], gain[i, t : t + m])
                        else:
                            state, variance, missed = _filter_holes(
                                work[0], work[1], marks, gain[i, t : t + m], filter_[0], state, variance, missed)  # fmt: skip
                    _use(kind, work[0], work[1], marks, mean, used)
                    _trust(now, advantage[i], t, marks, kinds[1], limits, share, work, bits, narrow,
                           coefficient[i, t : t + m], keep, gradient[i, t : t + m])  # fmt: skip
                    fine &= _tally(m, kind, marks, signs, work, bits, narrow, keep, share, counts, sums)
                    marks[0] = marks[m]
            start = stop
    return fine


@exact
def _span_end(segment, i, start, length):
    stop = length
    if segment.size > 0:
        stop = start + 1
        while stop < length and segment[i, stop] == segment[i, start]:
            stop += 1
    return stop


@exact
def _count(mask):
    n = 0
    for t in range(len(mask)):
        n += mask[t]
    return n


@loose
def _mean(logp, old, mask, first, last, n):
    total = 0.0
    for t in range(first, last):
        total += np.float64(logp[t] - old[t]) if mask[t] else 0.0
    return logp.dtype.type(total / n)


@exact
def _gain_table(filter_, gains, keeps, passes):
    """K_t, 1 - K_t and the product of the latter over a block, of a sequence without holes, R = 1."""
    p, share = filter_[1], 1.0
    for t in range(len(gains)):
        p += filter_[0]
        gains[t], keeps[t] = (1.0, 0.0) if p == math.inf else (p / (p + 1.0), 1.0 / (p + 1.0))
        p = gains[t]
        share = keeps[t] * (1.0 if t % BLOCK == 0 else share)
        passes[t] = share


@exact
def _blank(i, t, log_ratio, log_weight, gain, coefficient, kept, gradient):
    """Padding."""
    log_ratio[i, t] = log_weight[i, t] = coefficient[i, t] = gradient[i, t] = 0
    kept[i, t] = False
    if gain.size > 0:
        gain[i, t] = 0


@exact
def _observe(logp, old, mask, log_ratio, observed, marks):
    """Log-ratios, 0 under the mask, to the output and (float64, from place 1) to the buffer."""
    bad = 0
    for j in range(len(mask)):
        marks[j + 1] = mask[j]
    for j in range(len(mask)):
        z = logp[j] - old[j] if marks[j + 1] else logp.dtype.type(0)
        bad += not abs(z) < math.inf
        log_ratio[j] = z
    for j in range(len(mask)):
        observed[j + 1] = log_ratio[j]
    return bad == 0


@exact
def _filter_whole(observed, used, gains, keeps, passes, state, m):
    """A full chunk goes as four blocks side by side, each from state 0 and then given the state before it
    with its weight, since one recursion alone would wait for its own last product."""
    if m < CHUNK:
        for j in range(m):
            state = keeps[j] * state + gains[j] * observed[j + 1]
            used[j + 1] = state
        return state
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    for j in range(BLOCK):
        j2, j3, j4 = j + BLOCK, j + 2 * BLOCK, j + 3 * BLOCK
        a = keeps[j] * a + gains[j] * observed[j + 1]
        b = keeps[j2] * b + gains[j2] * observed[j2 + 1]
        c = keeps[j3] * c + gains[j3] * observed[j3 + 1]
        d = keeps[j4] * d + gains[j4] * observed[j4 + 1]
        used[j + 1], used[j2 + 1], used[j3 + 1], used[j4 + 1] = a, b, c, d
    for start in range(0, CHUNK, BLOCK):
        for j in range(start, start + BLOCK):
            used[j + 1] += passes[j] * state
        state = used[start + BLOCK]
    return state


@exact
def _filter_holes(observed, used, marks, gain, process, state, variance, missed):
    """Variances are in units of R. A missing token adds Q when the next one is observed."""
    for j in range(len(gain)):
        if marks[j + 1]:
            p = variance + (missed + 1) * process
            k, keep = (1.0, 0.0) if p == math.inf else (p / (p + 1.0), 1.0 / (p + 1.0))
            state = keep * state + k * observed[j + 1]
            variance, missed = k, 0
        else:
            missed += 1
            k = 0.0
        used[j + 1] = state
        gain[j] = k
    return state, variance, missed


@exact
def _narrow(wide, out):
    for j in range(len(out)):
        out[j] = wide[j]


@exact
def _use(kind, observed, used, marks, mean, log_weight):
    """The log-weight in the type of the output, and the same number in the buffer."""
    m = len(log_weight)
    if kind == TOKEN:
        for j in range(m):
            log_weight[j] = observed[j + 1]
    elif kind == FILTERED:
        for j in range(m):
            log_weight[j] = used[j + 1] if marks[j + 1] else 0.0
    else:
        for j in range(m):
            log_weight[j] = mean if marks[j + 1] else log_weight.dtype.type(0)
    for j in range(m):
        used[j + 1] = log_weight[j]


@exact
def _expm1(x, m, scratch, bits, scale, exponent, rest):
    """``exp(min(x, 20)) = scale (1 + rest)``, places 1..m; scale is a power of 2, rest = expm1(r) is small.

    r is what is left of x after the nearest multiple of log 2, |r| < 0.35, and rest its Taylor polynomial.
    """
    for j in range(1, m + 1):
        scratch[j] = min(max(x[j], SMALLEST), LIMIT) * LOG2E + SHIFT
    for j in range(1, m + 1):
        exponent[j] = (bits[j] << 52) + (1023 << 52)
    for j in range(1, m + 1):
        n = scratch[j] - SHIFT
        r = min(max(x[j], SMALLEST), LIMIT) - n * LN2_HIGH - n * LN2_LOW
        p = 1 / 6227020800.0
        p = p * r + 1 / 479001600.0
        p = p * r + 1 / 39916800.0
        p = p * r + 1 / 3628800.0
        p = p * r + 1 / 362880.0
        p = p * r + 1 / 40320.0
        p = p * r + 1 / 5040.0
        p = p * r + 1 / 720.0
        p = p * r + 1 / 120.0
        p = p * r + 1 / 24.0
        p = p * r + 1 / 6.0
        p = p * r + 0.5
        rest[j] = r + r * r * p


@exact
def _trust(logp, advantage, t, marks, kind, limits, share, work, bits, narrow, coefficient, kept, gradient):
    """Weights (narrow[0]), advantages (narrow[1]), surrogate (work[5]), coefficient, kept and gradient."""
    m, zero = len(coefficient), logp.dtype.type(0)
    low, high, dual = limits[0], limits[1], limits[2]
    used, scratch, scale, rest, surrogate = work[1], work[2], work[3], work[4], work[5]
    weight, a = narrow[0], narrow[1]
    _expm1(used, m, scratch, bits[2], scale, bits[3], rest)
    for j in range(1, m + 1):
        weight[j] = scale[j] + scale[j] * rest[j] if used[j] >= SMALLEST else 0.0
    if len(advantage) == 1:
        for j in range(1, m + 1):
            a[j] = advantage[0] if marks[j] else zero
    else:
        for j in range(1, m + 1):
            a[j] = advantage[t + j - 1] if marks[j] else zero
    if kind == CLIP:
        for j in range(1, m + 1):
            drop = ((a[j] > 0) & (weight[j] > high)) | ((a[j] < 0) & ((weight[j] < low) | (weight[j] > dual)))
            kept[j - 1] = (marks[j] != 0) & (not drop)
        for j in range(1, m + 1):
            loss = max(-a[j] * weight[j], -a[j] * min(max(weight[j], low), high))
            surrogate[j] = min(loss, -a[j] * dual) if a[j] < 0 else loss
    else:
        if kind == CAP:
            for j in range(1, m + 1):
                weight[j] = min(max(weight[j], low), high)
        for j in range(m):
            kept[j] = marks[j + 1] != 0
        if kind == CAP or kind == LOG_LIKELIHOOD:
            for j in range(1, m + 1):
                surrogate[j] = -a[j] * weight[j] * (logp[j - 1] if marks[j] else zero)
        else:
            for j in range(1, m + 1):
                surrogate[j] = -a[j] * weight[j]
    for j in range(m):
        coefficient[j] = weight[j + 1] if kept[j] else zero
    for j in range(m):
        gradient[j] = -(share * coefficient[j] * a[j + 1])


@exact
def _tally(m, kind, marks, signs, work, bits, narrow, kept, share, counts, sums):
    """Add the chunk to the counts and sums behind the metrics; False if an advantage is not finite."""
    observed, used, weight = work[0], work[1], narrow[0]
    n_kept, low, capped, pairs = 0, 0, 0, 0
    for j in range(m):
        n_kept += kept[j]
    for j in range(1, m + 1):
        capped += used[j] > LIMIT
    for j in range(1, m + 1):
        pairs += marks[j] & marks[j - 1]
    counts[KEPT] += n_kept
    counts[CAPPED] += capped
    counts[PAIRS] += pairs
    switches = _switches(observed, signs[0], m)
    counts[RAW_SWITCH] += switches
    counts[USED_SWITCH] += _switches(used, signs[1], m)
    for j in range(1, m + 1):
        low += (signs[1, j] < 0) & (not kept[j - 1])
    counts[LOW] += low
    signs[0, 0], signs[1, 0] = signs[0, m], signs[1, m]
    total, squares, surrogate = _weight_sums(weight, work[5], marks, m)
    sums[WEIGHT] += total
    sums[SQUARES] += squares
    sums[SURROGATE] += share * surrogate
    if kind != TOKEN:
        _expm1(observed, m, work[2], bits[2], work[3], bits[3], work[4])
    _kl(observed, work[3], work[4], m, work[2])
    sums[KL] += _moments(work[2], m)[0]
    sums[LARGEST] = max(sums[LARGEST], _largest(observed, m))
    if math.isnan(sums[RAW_AROUND]):  # sums around the first trained token's value do not cancel
        sums[RAW_AROUND], sums[USED_AROUND] = observed[1], used[1]
    _centre(observed, marks, sums[RAW_AROUND], m, work[2])
    raw, raw_squares = _moments(work[2], m)
    sums[RAW] += raw
    sums[RAW_SQUARES] += raw_squares
    if kind != TOKEN:
        _centre(used, marks, sums[USED_AROUND], m, work[2])
        raw, raw_squares = _moments(work[2], m)
    sums[USED] += raw
    sums[USED_SQUARES] += raw_squares
    return surrogate - surrogate == 0


@exact
def _switches(values, sign, m):
    """Neighbours whose signs differ; masked tokens and the place before a span have sign 0."""
    for j in range(1, m + 1):
        sign[j] = (values[j] > 0) - (values[j] < 0)
    switches = 0
    for j in range(1, m + 1):
        switches += sign[j] * sign[j - 1] < 0
    return switches


@loose
def _weight_sums(weight, surrogate, marks, m):
    total, squares, loss = 0.0, 0.0, 0.0
    for j in range(1, m + 1):
        w = np.float64(weight[j]) if marks[j] else 0.0
        total += w
        squares += w * w
        loss += surrogate[j] if marks[j] else 0.0
    return total, squares, loss


@exact
def _kl(observed, scale, rest, m, out):
    """``expm1(min(l, 20)) - l``; 0 where l = 0."""
    for j in range(1, m + 1):
        out[j] = scale[j] * rest[j] + (scale[j] - 1.0) - observed[j]


@exact
def _centre(values, marks, reference, m, out):
    for j in range(1, m + 1):
        out[j] = values[j] - reference if marks[j] else 0.0


@loose
def _moments(values, m):
    first, second = 0.0, 0.0
    for j in range(1, m + 1):
        first += values[j]
        second += values[j] * values[j]
    return first, second


@finite
def _largest(values, m):
    largest = 0.0
    for j in range(1, m + 1):
        size = abs(values[j])
        largest = size if size > largest else largest
    return largest


def run(recipe, logp, old, mask, advantage, segment, step):
    """:func:`kalman_rl.fast.fused.run` for CPU tensors."""
    logp, old, mask = (x.detach().contiguous() for x in (logp, old, mask))
    dtype, shape = logp.dtype, tuple(mask.shape)
    advantage = advantage.detach().to(dtype)
    if advantage.dim() == 1:
        advantage = advantage[:, None]
    elif advantage.shape[1] > 1 and advantage.stride(1) == 0:
        advantage = advantage[:, :1]
    segment = NOTHING if segment is None else segment.detach().long().contiguous().numpy()
    tokens, sequences = totals(mask.numpy(), segment) if step is None else step
    whole = 1.0 / max(sequences, 1.0)
    if recipe.aggregate == TOKEN_MEAN:
        whole = 1.0 / max(tokens, 1.0)
    elif recipe.aggregate == SEQUENCE_SUM:
        whole = 1.0 / (recipe.length * max(sequences, 1.0))
    outputs = [torch.empty(shape, dtype=dtype) for _ in range(4)]
    kept = torch.empty(shape, dtype=torch.bool)
    gain = torch.empty(shape if recipe.ratio == FILTERED else (0, 0), dtype=dtype)
    counts, sums, work = np.zeros(7, np.int64), np.zeros(11), np.empty((6, CHUNK + 1))
    sums[RAW_AROUND] = math.nan
    arrays = [x.numpy() for x in (logp, old, mask, advantage.contiguous())]
    kinds = np.array([recipe.ratio, recipe.trust, recipe.aggregate != SEQUENCE_MEAN])
    limits = np.array([recipe.low, recipe.high, recipe.dual], arrays[0].dtype)
    log_ratio, log_weight, coefficient, gradient = outputs
    fine = fused(
        *arrays, segment, kinds, limits, np.array([recipe.process, recipe.start]), whole,
        log_ratio.numpy(), log_weight.numpy(), gain.numpy(), coefficient.numpy(), kept.numpy(), gradient.numpy(),
        counts, sums, work, work.view(np.int64), np.empty((2, CHUNK + 1), arrays[0].dtype),
        np.empty(CHUNK + 1, np.uint8), np.empty((2, CHUNK + 1), np.int8),
        np.empty((3, shape[1] if recipe.ratio == FILTERED else 1)),
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


def metrics(counts, sums):
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
