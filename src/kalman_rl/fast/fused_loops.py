"""Loss, gradient and metrics of a fused method in one pass over the tokens, compiled for the CPU.

A *run* is one sequence, a row or a segment of a packed row, as in ``filter_loops``; arrays are flat. Its tokens
from the first trained one to the last are taken by chunks, in buffers that stay in the first-level cache. Each
loop over a chunk does one thing, so that it becomes vector instructions in the type of the log-probabilities, and
goes on to a multiple of their width, over tokens that count as masked. States of the filter and sums of chunks are
float64; the sums alone may be reordered.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from kalman_rl.fast import filter_loops, jit
from kalman_rl.fast.filter_loops import ones
from kalman_rl.fast.recipe import CAP, CLIP, FILTERED, LOG_LIKELIHOOD, SEQUENCE, TOKEN

CHUNK, WIDTH = 512, 64  # WIDTH: tokens that a loop over numbers of four bytes takes at once
BUFFERS = 11  # weight, advantage, surrogate; two exponentials: power of 2, remainder, tail; log-ratio, log-weight
COUNT, KEPT, LOW, CAPPED, PAIRS, RAW_SWITCH, USED_SWITCH = range(7)
SURROGATE, WEIGHT, SQUARES, KL, LARGEST = range(5)
RAW, RAW_SQUARES, RAW_AROUND, USED, USED_SQUARES, USED_AROUND = range(5, 11)
LIMIT = 20.0  # kalman_rl.trust.LOG_WEIGHT_CAP

# Of a type: 1 / log 2; 1.5 2^(bits of the mantissa), which added to a number makes its last bits the nearest
# integer; log 2 in two parts, the first with zeros at its end; where exp is 0 to every digit a loss can show.
SINGLE = (1.4426950408889634, 12582912.0, 0.693359375, -2.12194440e-4, -87.0)
DOUBLE = (1.4426950408889634, 6755399441055744.0, 6.93147180369123816490e-01, 1.90821492927058770002e-10, -708.0)

OPTIONS = {"nogil": True, "error_model": "numpy"}
PRIVATE = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # half the time to compile
exact = numba.njit(fastmath={"contract", "nsz"}, **OPTIONS, **PRIVATE)
loose = numba.njit(fastmath={"contract", "nsz", "reassoc"}, **OPTIONS, **PRIVATE)
find_runs = jit.inner(filter_loops.find_runs)
means_by_table = jit.inner(filter_loops.means_by_table)
means_with_holes = jit.inner(filter_loops.means_with_holes)


def constants(dtype: Any) -> Any:
    """What ``_exponential`` needs, in the type of the log-probabilities: the five above, the cap, and 1 / k!
    from 1 / 2 on to the last that its digits can show."""
    single = dtype == np.float32
    factors = [1 / math.factorial(k) for k in range(2, 8 if single else 14)]
    return np.array([*(SINGLE if single else DOUBLE), LIMIT, *factors], dtype)


def kernel(function: Any) -> Any:
    """A function that Python calls, its machine code kept on disk where that is possible."""
    options = {"fastmath": {"contract", "nsz"}, **OPTIONS}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the source's directory nor the user's cache can be written
        return numba.njit(**options)(function)


@kernel
def fused(
    logp, old, mask, advantage, segment, rows, length, kinds, limits, model, tokens, sequences, numbers, table,
    log_ratio, log_weight, gain, coefficient, kept, gradient, sums, metrics, runs, order, first, tiles, work, bits,
    flags,
):  # fmt: skip
    """Fill the outputs; False if a number at a trained token is not finite.

    ``kinds``: ratio, trust, aggregate, 1 if there is an advantage a token and 0 if a row. ``limits``: low, high, dual (inf for none), in the type of ``logp``. ``model``: Q / R,
    P0 / R, where ``table`` has the gains, if holes may share divisions, and length for SEQUENCE_SUM. ``tokens`` and
    ``sequences``: of the optimizer step, negative: those of this batch. ``gain`` is empty without a filter. The last seven are scratch: ``bits`` shows ``work`` as integers.
    """
    fine = _observe(logp, old, mask, log_ratio)
    clean = find_runs(mask, segment, rows, length, runs, order)
    total = order[-1]
    if kinds[0] == FILTERED:
        fine &= means_by_table(log_ratio, table, 0.0, runs, order, 0, clean, first, tiles, log_weight)
        if model[2] == 1.0:
            fine &= means_with_holes(log_ratio, mask, model[0], model[1], 0.0, runs, order, clean, total,
                                     first, tiles, log_weight, gain)  # fmt: skip
        else:
            for g in range(clean, total):
                i = 5 * order[g]
                a, b = runs[i + 2], runs[i + 3]
                _means_alone(log_ratio[a:b], mask[a:b], model[0], model[1], log_weight[a:b], gain[a:b])
    counts = np.zeros(7, np.int64)
    if tokens < 0:
        tokens, sequences = 0.0, 0.0
        for g in range(total):
            n = ones(mask[runs[5 * g + 2] : runs[5 * g + 3]])
            tokens += n
            sequences += n > 0
    for g in range(total):
        begin, end, start = runs[5 * g], runs[5 * g + 1], runs[5 * g + 2]
        stop, hole = runs[5 * g + 3], runs[5 * g + 4]
        for lower, upper in ((begin, start), (stop, end)):
            _zero(coefficient[lower:upper])
            _zero(gradient[lower:upper])
            _zero(kept[lower:upper])
            if kinds[0] != TOKEN:
                _zero(log_weight[lower:upper])
            if kinds[0] == FILTERED:
                _zero(gain[lower:upper])
        n = ones(mask[start:stop])
        if n == 0:
            continue
        if kinds[0] == FILTERED and hole == 0:
            own = gain[start:stop]
            for t in range(len(own)):
                own[t] = table[t]
        mean = 0.0
        if kinds[0] == SEQUENCE:
            mean = _mean(log_ratio[start:stop], n)
        counts[COUNT] += n
        whole = 1.0 / (max(tokens, 1.0) if kinds[2] == 1 else max(sequences, 1.0) * model[3])
        share = logp.dtype.type(whole / n if kinds[2] == 0 else whole)
        if math.isnan(sums[RAW_AROUND]):  # sums around the first trained token's value do not cancel
            sums[RAW_AROUND] = log_ratio[start]
            sums[USED_AROUND] = log_ratio[start] if kinds[0] == TOKEN else mean
            if kinds[0] == FILTERED:
                sums[USED_AROUND] = log_weight[start]
        row = begin // length
        work[9, 0], work[10, 0], flags[0, 0] = 0, 0, 0  # what stands before the first token
        for t in range(start, stop, CHUNK):
            e = min(t + CHUNK, stop)
            m = e - t
            n = (m + WIDTH - 1) // WIDTH * WIDTH
            z, used, seen, keep = work[9, 1 : n + 1], work[10, 1 : n + 1], flags[0, 1 : n + 1], flags[1, :n]
            _fill(log_ratio[t:e], z)
            _fill(mask[t:e], seen)
            if kinds[0] == TOKEN:
                _fill(z, used)
            elif kinds[0] == FILTERED:
                _fill(log_weight[t:e], used)
            else:
                _same(logp.dtype.type(mean), used)
            if kinds[0] != TOKEN and (hole != 0 or kinds[0] != FILTERED):
                _where_seen(used, seen)
                _fill(used[:m], log_weight[t:e])
            if kinds[3] == 1:
                _fill(advantage[t:e], work[1, :n])
            else:
                _same(advantage[row], work[1, :n])
            _where_seen(work[1, :n], seen)
            _trust(logp[t:e], used, seen, kinds, limits, numbers, work, bits, keep)
            _weigh(work[0], keep, coefficient[t:e])
            _fill(keep[:m], kept[t:e])
            _gradient(share, coefficient[t:e], work[1], gradient[t:e])
            at = 3
            if kinds[0] != TOKEN:
                at = 6
                _exponential(z, numbers, work[6], bits[6], work[7], work[8])
            _sums(z, used, seen, work, bits, at, share, sums)
            _counts(used, keep, counts)
            counts[PAIRS] += _pairs(flags[0, : n + 1])
            counts[RAW_SWITCH] += _switches(work[9, : n + 1])
            if kinds[0] != TOKEN:
                counts[USED_SWITCH] += _switches(work[10, : n + 1])
            work[9, 0], work[10, 0], flags[0, 0] = z[m - 1], used[m - 1], seen[m - 1]
    if kinds[0] == TOKEN:
        counts[USED_SWITCH] = counts[RAW_SWITCH]
    _metrics(counts, sums, metrics)
    return fine & math.isfinite(sums[SURROGATE])


@exact
def _zero(values):
    for t in range(len(values)):
        values[t] = 0


@loose
def _total(values):
    """In the type of the values, as the other sums over a chunk: it adds eight numbers to each place of a
    vector, then the places."""
    total = values.dtype.type(0)
    for t in range(len(values)):
        total += values[t]
    return total


@loose
def _mean(values, n):
    total = 0.0
    for t in range(len(values)):
        total += np.float64(values[t])
    return total / n


@exact
def _observe(logp, old, mask, log_ratio):
    """Log-ratios, 0 under the mask."""
    bad = 0
    for t in range(len(mask)):
        z = logp[t] - old[t] if mask[t] != 0 else logp.dtype.type(0)
        bad += not abs(z) < math.inf
        log_ratio[t] = z
    return bad == 0


@exact
def _means_alone(z, mask, process, variance, mean, gain):
    """One run with holes at any Q / R, infinity included, from a state of 0; R = 1."""
    state = 0.0
    for t in range(len(z)):
        variance += process
        k = 0.0
        if mask[t] != 0:
            k, keep = (1.0, 0.0) if variance == math.inf else (variance / (variance + 1.0), 1.0 / (variance + 1.0))
            state = keep * state + k * z[t]
            variance = k
        mean[t], gain[t] = state, k


@exact
def _fill(values, out):
    """Values, then zeros."""
    for j in range(len(values)):
        out[j] = values[j]
    for j in range(len(values), len(out)):
        out[j] = 0


@exact
def _same(value, out):
    for j in range(len(out)):
        out[j] = value


@exact
def _where_seen(values, seen):
    zero = values.dtype.type(0)
    for j in range(len(values)):
        values[j] = values[j] if seen[j] != 0 else zero


@exact
def _exponential(x, numbers, power, bits, rest, tail):
    """``exp(min(x, 20)) = power (1 + rest + tail)``: rest is what is left of x after the nearest multiple of
    log 2, |rest| < 0.35, and tail the Taylor polynomial of ``exp(rest) - 1 - rest``."""
    inverse, shift, high, low = numbers[0], numbers[1], numbers[2], numbers[3]
    smallest, limit = numbers[4], numbers[5]
    for j in range(len(x)):
        clamped = min(max(x[j], smallest), limit)
        shifted = clamped * inverse + shift
        n = shifted - shift
        power[j] = shifted
        rest[j] = clamped - n * high - n * low
    if len(numbers) == 12:  # the exponent's place and that of 2^0, written out: a shift by a variable is slow
        for j in range(len(x)):
            bits[j] = (bits[j] << 23) + (127 << 23)
    else:
        for j in range(len(x)):
            bits[j] = (bits[j] << 52) + (1023 << 52)
    c2, c3, c4, c5, c6, c7 = numbers[6], numbers[7], numbers[8], numbers[9], numbers[10], numbers[11]
    if len(numbers) == 12:
        for j in range(len(x)):
            r = rest[j]
            tail[j] = r * r * (((((c7 * r + c6) * r + c5) * r + c4) * r + c3) * r + c2)
    else:
        c8, c9, c10, c11, c12, c13 = numbers[12], numbers[13], numbers[14], numbers[15], numbers[16], numbers[17]
        for j in range(len(x)):
            r = rest[j]
            p = ((((c13 * r + c12) * r + c11) * r + c10) * r + c9) * r + c8
            tail[j] = r * r * ((((((p * r + c7) * r + c6) * r + c5) * r + c4) * r + c3) * r + c2)


@exact
def _trust(logp, used, seen, kinds, limits, numbers, work, bits, kept):
    """Weights (work[0]) and surrogate (work[2]) from advantages (work[1]), and which tokens are kept."""
    n, zero, kind = len(used), logp.dtype.type(0), kinds[1]
    low, high, dual = limits[0], limits[1], limits[2]
    weight, a, surrogate, power, rest, tail = work[0], work[1], work[2], work[3], work[4], work[5]
    _exponential(used, numbers, power, bits[3], rest, tail)
    smallest = numbers[4]
    for j in range(n):
        weight[j] = power[j] + power[j] * (rest[j] + tail[j]) if used[j] >= smallest else zero
    if kind == CLIP:
        for j in range(n):
            drop = ((a[j] > 0) & (weight[j] > high)) | ((a[j] < 0) & ((weight[j] < low) | (weight[j] > dual)))
            kept[j] = (seen[j] != 0) & (not drop)
        for j in range(n):
            loss = max(-a[j] * weight[j], -a[j] * min(max(weight[j], low), high))
            surrogate[j] = min(loss, -a[j] * dual) if a[j] < 0 else loss
        return
    if kind == CAP:
        for j in range(n):
            weight[j] = min(max(weight[j], low), high)
    for j in range(n):
        kept[j] = seen[j] != 0
    for j in range(n):
        surrogate[j] = -a[j] * weight[j]
    if kind in (CAP, LOG_LIKELIHOOD):
        for j in range(len(logp)):
            surrogate[j] *= logp[j] if seen[j] != 0 else zero


@exact
def _weigh(weight, kept, coefficient):
    zero = weight.dtype.type(0)
    for j in range(len(coefficient)):
        coefficient[j] = weight[j] if kept[j] != 0 else zero


@exact
def _gradient(share, coefficient, advantage, gradient):
    for j in range(len(gradient)):
        gradient[j] = -(share * coefficient[j] * advantage[j])


@exact
def _sums(z, used, seen, work, bits, at, share, sums):
    """Add a chunk to the sums; the exponential of z stands from work[at] on. The surrogate is overwritten."""
    sums[SURROGATE] += np.float64(share) * np.float64(_total(work[2, : len(z)]))
    total, squares = _moments(work[0], seen, 0.0)
    sums[WEIGHT] += total
    sums[SQUARES] += squares
    sums[KL] += _divergence(z, work[at], work[at + 1], work[at + 2])
    total, squares = _moments(z, seen, sums[RAW_AROUND])
    sums[RAW] += total
    sums[RAW_SQUARES] += squares
    if at == 6:
        total, squares = _moments(used, seen, sums[USED_AROUND])
    sums[USED] += total
    sums[USED_SQUARES] += squares
    sums[LARGEST] = max(sums[LARGEST], np.float64(_largest(z, work[2], bits[2, : len(z)])))


@loose
def _moments(values, seen, around):
    """Sums of the differences from ``around`` and of their squares, where tokens are trained."""
    zero, centre = values.dtype.type(0), values.dtype.type(around)
    total, squares = zero, zero
    for j in range(len(seen)):
        d = values[j] - centre if seen[j] != 0 else zero
        total += d
        squares += d * d
    return total, squares


@loose
def _divergence(z, power, rest, tail):
    """Sum of ``exp(l) - 1 - l``; the parts of l cancel before what is small is added."""
    total, one = z.dtype.type(0), z.dtype.type(1)
    for j in range(len(z)):
        total += _move(z[j], power[j], rest[j], tail[j], one)
    return total


@exact
def _move(z, power, rest, tail, one):
    return (power * rest - z) + (power - one) + power * tail


@exact
def _largest(values, sizes, bits):
    """Largest absolute value. ``bits`` shows ``sizes`` as integers, which have the same order and, unlike
    numbers that might be NaN, become vectors."""
    for j in range(len(values)):
        sizes[j] = abs(values[j])
    largest = bits[0]
    for j in range(len(bits)):
        largest = max(largest, bits[j])
    bits[0] = largest
    return sizes[0]


@exact
def _counts(used, kept, counts):
    low, capped = np.int32(0), np.int32(0)
    for j in range(len(used)):
        low += np.int32((used[j] < 0) & (kept[j] == 0))
    for j in range(len(used)):
        capped += np.int32(used[j] > LIMIT)
    counts[KEPT] += ones(kept)
    counts[LOW] += low
    counts[CAPPED] += capped


@exact
def _pairs(seen):
    pairs = np.int32(0)
    for j in range(len(seen) - 1):
        pairs += np.int32(seen[j + 1] & seen[j])
    return pairs


@exact
def _switches(values):
    """Neighbours whose signs differ; masked tokens are 0 and have none."""
    switches = np.int32(0)
    for j in range(len(values) - 1):
        a, b = values[j], values[j + 1]
        switches += np.int32(((a > 0) & (b < 0)) | ((a < 0) & (b > 0)))
    return switches


@exact
def _metrics(counts, sums, out):
    """The numbers of ``METRICS`` in ``recipe.py`` from the sums over tokens."""
    n, pairs = max(counts[COUNT], 1), max(counts[PAIRS], 1)
    size = n * sums[SQUARES]
    out[0] = max(sums[RAW_SQUARES] / n - (sums[RAW] / n) ** 2, 0.0)
    out[1] = max(sums[USED_SQUARES] / n - (sums[USED] / n) ** 2, 0.0)
    out[2] = sums[WEIGHT] ** 2 / size if size > 0 else 1.0
    out[3] = sums[LARGEST]
    out[4] = counts[CAPPED] / n
    out[5] = counts[RAW_SWITCH] / pairs
    out[6] = counts[USED_SWITCH] / pairs
    out[7] = sums[LARGEST] == 0
    out[8] = counts[KEPT] / n
    out[9] = counts[LOW] / n
    out[10] = (counts[COUNT] - counts[KEPT] - counts[LOW]) / n
    out[11] = sums[KL] / n
