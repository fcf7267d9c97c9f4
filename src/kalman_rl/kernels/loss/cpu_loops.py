"""Loss, gradient and metrics of a fused method in one pass over the tokens, compiled for the CPU.

A *segment* is one sequence, a row or a part of a packed row, as in ``segments``; arrays are flat. Its tokens
from the first trained one to the last are taken by chunks, in buffers that stay in the cache; the loops
over them, in ``cpu_chunk``, go on to a multiple of a vector's width, over tokens that count as masked. States of the
filter and sums of chunks are float64; the sums alone may be reordered.
"""

from __future__ import annotations

import math

import numpy as np

from kalman_rl.kernels import jit
from kalman_rl.kernels.filter import cpu_loops as filter_loops
from kalman_rl.kernels.filter import segments as filter_segments
from kalman_rl.kernels.filter.segments import ones, total
from kalman_rl.kernels.loss import cpu_chunk as chunk
from kalman_rl.kernels.loss.cpu_chunk import (
    CAPPED,
    CHUNK,
    COUNT,
    KEPT,
    KL,
    LARGEST,
    LOW,
    NEAR,
    PAIRS,
    RAW,
    RAW_AROUND,
    RAW_SQUARES,
    RAW_SWITCH,
    SQUARES,
    SURROGATE,
    USED,
    USED_AROUND,
    USED_SQUARES,
    USED_SWITCH,
    WEIGHT,
    WIDTH,
    exact,
)  # fmt: skip
from kalman_rl.kernels.loss.plan import FILTERED, SEQUENCE, SEQUENCE_MEAN, TOKEN, TOKEN_MEAN

find_segments = jit.inner(filter_segments.find_segments)
means_by_table = jit.inner(filter_loops.means_by_table)
means_with_holes = jit.inner(filter_loops.means_with_holes)


def fused(
    logp, old, mask, advantage, segment, rows, length, kinds, limits, model, tokens, sequences, numbers, table,
    log_ratio, log_weight, gain, coefficient, kept, gradient, sums, metrics, parts, segments, order, first, tiles, work,
    bits, flags,
):  # fmt: skip
    """Fill the outputs; False if a number at a trained token is not finite.

    ``kinds``: ratio, trust, aggregate, 1 if there is an advantage a token and 0 if a row. ``limits``: low, high,
    dual (inf for none), in the type of ``logp``. ``model``: Q / R, P0 / R, if holes may share divisions, length
    for SEQUENCE_SUM; ``table``: gains of a segment without holes. ``tokens`` and ``sequences``: of the optimizer
    step, negative: those of this batch. ``gain`` is empty without a filter. From ``segments`` on everything is scratch:
    ``bits`` shows ``work`` as integers.
    """
    clean = find_segments(mask, segment, rows, length, segments, order)
    all_segments = order[-1]
    counts = np.zeros(7, np.int64)
    if tokens < 0:
        tokens, sequences = 0.0, 0.0
        for g in range(all_segments):
            n = ones(mask[segments[5 * g + 2] : segments[5 * g + 3]])
            tokens += n
            sequences += n > 0
    fine, group = True, 0
    while (
        group < all_segments
    ):  # eight segments at a time: what one step writes is still near when the next reads it
        after = min(group + 8, clean if group < clean else all_segments)
        for g in range(group, after):
            i = 5 * order[g]
            a, b = segments[i], segments[i + 1]
            fine &= _observe(logp[a:b], old[a:b], mask[a:b], log_ratio[a:b])
        if kinds[0] == FILTERED and group < clean:
            fine &= means_by_table(
                log_ratio, table, 0.0, segments, order, group, after, first, tiles, log_weight
            )
        elif kinds[0] == FILTERED and model[2] == 1.0:
            fine &= means_with_holes(
                log_ratio, mask, model[0], model[1], 0.0, segments, order, group, after, first, tiles, log_weight, gain
            )  # fmt: skip
        elif kinds[0] == FILTERED:
            for g in range(group, after):
                i = 5 * order[g]
                a, b = segments[i + 2], segments[i + 3]
                _means_alone(log_ratio[a:b], mask[a:b], model[0], model[1], log_weight[a:b], gain[a:b])
        for g in range(group, after):
            _run(
                5 * order[g], logp, mask, advantage, length, kinds, limits, model, tokens, sequences, numbers, table,
                log_ratio, log_weight, gain, coefficient, kept, gradient, sums, counts, segments, work, bits, flags,
            )  # fmt: skip
        group = after
    if kinds[0] == TOKEN:
        counts[USED_SWITCH] = counts[RAW_SWITCH]
    _metrics(counts, sums, metrics)
    _parts(counts, sums, parts)
    return fine & math.isfinite(sums[SURROGATE])


@exact
def _run(
    i, logp, mask, advantage, length, kinds, limits, model, tokens, sequences, numbers, table, log_ratio, log_weight,
    gain, coefficient, kept, gradient, sums, counts, segments, work, bits, flags,
):  # fmt: skip
    """One segment, whose log-ratios are there, and the filter's means."""
    begin, end, start = segments[i], segments[i + 1], segments[i + 2]
    stop, hole = segments[i + 3], segments[i + 4]
    for lower, upper in ((begin, start), (stop, end)):
        chunk.clear(coefficient[lower:upper])
        chunk.clear(gradient[lower:upper])
        chunk.clear(kept[lower:upper])
        if kinds[0] != TOKEN:
            chunk.clear(log_weight[lower:upper])
        if kinds[0] == FILTERED:
            chunk.clear(gain[lower:upper])
    n = ones(mask[start:stop])
    if n == 0:
        return
    if kinds[0] == FILTERED and hole == 0:
        own = gain[start:stop]
        for t in range(len(own)):
            own[t] = table[t]
    mean = 0.0
    if kinds[0] == SEQUENCE:
        mean = total(log_ratio[start:stop]) / n
    counts[COUNT] += n
    whole = 1.0 / (max(tokens, 1.0) if kinds[2] == TOKEN_MEAN else max(sequences, 1.0) * model[3])
    share = logp.dtype.type(whole / n if kinds[2] == SEQUENCE_MEAN else whole)
    if math.isnan(sums[RAW_AROUND]):  # sums around the first trained token's value do not cancel
        sums[RAW_AROUND] = log_ratio[start]
        sums[USED_AROUND] = log_ratio[start] if kinds[0] == TOKEN else mean
        if kinds[0] == FILTERED:
            sums[USED_AROUND] = log_weight[start]
    row = begin // length
    work[9, WIDTH - 1] = work[10, WIDTH - 1] = 0.0  # what stands before the first token
    flags[0, WIDTH - 1] = 0
    for t in range(start, stop, CHUNK):
        e = min(t + CHUNK, stop)
        m = e - t
        n = (m + WIDTH - 1) // WIDTH * WIDTH
        z, used = work[9, WIDTH : WIDTH + n], work[10, WIDTH : WIDTH + n]
        seen, keep = flags[0, WIDTH : WIDTH + n], flags[1, :n]
        chunk.fill(log_ratio[t:e], z)
        chunk.fill(mask[t:e], seen)
        if kinds[0] == TOKEN:
            chunk.fill(z, used)
        elif kinds[0] == FILTERED:
            chunk.fill(log_weight[t:e], used)
        else:
            chunk.spread(logp.dtype.type(mean), used)
        if kinds[0] != TOKEN and (hole != 0 or kinds[0] != FILTERED):
            chunk.where_seen(used, seen)
            chunk.fill(used[:m], log_weight[t:e])
        if kinds[3] == 1:
            chunk.fill(advantage[t:e], work[1, :n])
        else:
            chunk.spread(advantage[row], work[1, :n])
        chunk.where_seen(work[1, :n], seen)
        largest = np.float64(chunk.largest_size(z, work[2], bits[2, :n]))
        near, at = largest < NEAR, 3
        sums[LARGEST] = max(sums[LARGEST], largest)
        # No log-weight exceeds the largest log-ratio, and a filter's mostly stay far below.
        near_used = near or (kinds[0] != TOKEN and chunk.largest_size(used, work[2], bits[2, :n]) < NEAR)
        chunk.find_weights(used, numbers, near_used, work, bits)
        if kinds[0] != TOKEN:
            at = 6
            if near:
                chunk.exponential_tail(z, numbers, work[8])
            else:
                chunk.exponential(z, numbers, work[6], bits[6], work[7], work[8])
        chunk.apply_trust(logp[t:e], used, seen, kinds[1], limits, work, keep)
        chunk.find_coefficient(work[0], keep, coefficient[t:e])
        chunk.fill(keep[:m], kept[t:e])
        chunk.find_gradient(share, coefficient[t:e], work[1], gradient[t:e])
        chunk.add_sums(z, used, seen, near, work, at, share, sums)
        chunk.add_counts(used, keep, kinds[1], largest, counts)
        counts[PAIRS] += chunk.count_pairs(flags[0, WIDTH - 1 : WIDTH + n])
        counts[RAW_SWITCH] += chunk.count_switches(work[9, WIDTH - 1 : WIDTH + n])
        if kinds[0] != TOKEN:
            counts[USED_SWITCH] += chunk.count_switches(work[10, WIDTH - 1 : WIDTH + n])
        work[9, WIDTH - 1], work[10, WIDTH - 1], flags[0, WIDTH - 1] = z[m - 1], used[m - 1], seen[m - 1]


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
    """One segment with holes at any Q / R, infinity included, from a state of 0; R = 1."""
    state = 0.0
    for t in range(len(z)):
        variance += process
        k = 0.0
        if mask[t] != 0:
            k, keep = (
                (1.0, 0.0) if variance == math.inf else (variance / (variance + 1.0), 1.0 / (variance + 1.0))
            )
            state = keep * state + k * z[t]
            variance = k
        mean[t], gain[t] = state, k


@exact
def _metrics(counts, sums, out):
    """The numbers of ``METRICS`` in ``plan.py`` from the sums over tokens."""
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


@exact
def _parts(counts, sums, out):
    """Behind each of these numbers: how many tokens or pairs, the sum of the values, of their squares, the largest."""
    n, raw, used = counts[COUNT], sums[RAW_AROUND], sums[USED_AROUND]
    out[:] = 0.0
    out[:, 0] = n
    out[5, 0] = out[6, 0] = counts[PAIRS]
    if n == 0:
        return
    out[0, 1] = sums[RAW] + n * raw
    out[0, 2] = sums[RAW_SQUARES] + 2 * raw * sums[RAW] + n * raw**2
    out[1, 1] = sums[USED] + n * used
    out[1, 2] = sums[USED_SQUARES] + 2 * used * sums[USED] + n * used**2
    out[2, 1], out[2, 2] = sums[WEIGHT], sums[SQUARES]
    out[3, 3] = out[7, 3] = sums[LARGEST]
    out[4, 1] = counts[CAPPED]
    out[5, 1], out[6, 1] = counts[RAW_SWITCH], counts[USED_SWITCH]
    out[8, 1], out[9, 1] = counts[KEPT], counts[LOW]
    out[10, 1] = n - counts[KEPT] - counts[LOW]
    out[11, 1] = sums[KL]
