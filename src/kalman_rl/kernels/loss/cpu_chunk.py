"""Loops over one chunk of tokens, the parts of the kernel in ``cpu_loops``.

Each does one thing, so that it becomes vector instructions in the type of the log-probabilities. Importing this
module imports numba.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from kalman_rl.kernels import jit
from kalman_rl.kernels.filter.segments import ones
from kalman_rl.kernels.loss.plan import CAP, CLIP, LOG_LIKELIHOOD

CHUNK, WIDTH = 1024, 64  # WIDTH: tokens that a loop over numbers of four bytes takes at once
BUFFERS = 11
"""Rows of ``work``: weight, advantage, surrogate; power of 2, remainder and tail of the exponential of the log-weight
(3 to 5) and of the log-ratio (6 to 8); log-ratio, log-weight."""

COUNT, KEPT, LOW, CAPPED, PAIRS, RAW_SWITCH, USED_SWITCH = range(7)
SURROGATE, WEIGHT, SQUARES, KL, LARGEST = range(5)
RAW, RAW_SQUARES, RAW_AROUND, USED, USED_SQUARES, USED_AROUND = range(5, 11)
LIMIT = 20.0  # kalman_rl.objectives.trust.clip.LOG_WEIGHT_CAP
NEAR = 0.34  # less than half of log 2

# Of a type: 1 / log 2; 1.5 2^(bits of the mantissa), which added to a number makes its last bits the nearest
# integer; log 2 in two parts, the first with zeros at its end; where exp is 0 to every digit a loss can show.
SINGLE = (1.4426950408889634, 12582912.0, 0.693359375, -2.12194440e-4, -87.0)
DOUBLE = (
    1.4426950408889634,
    6755399441055744.0,
    6.93147180369123816490e-01,
    1.90821492927058770002e-10,
    -708.0,
)

exact = functools.partial(jit.inner, freedoms=jit.EXACT)
loose = functools.partial(jit.inner, freedoms=jit.EXACT | {"reassoc"})


def constants(dtype: Any) -> Any:
    """What ``exponential`` needs, in the type of the log-probabilities: the five above, the cap, and 1 / k!
    from 1 / 2 on to the last that its digits can show."""
    single = dtype == np.float32
    factors = [1 / math.factorial(k) for k in range(2, 8 if single else 14)]
    return np.array([*(SINGLE if single else DOUBLE), LIMIT, *factors], dtype)


@exact
def clear(values):
    for t in range(len(values)):
        values[t] = 0


@exact
def fill(values, out):
    """Values, then zeros."""
    for j in range(len(values)):
        out[j] = values[j]
    for j in range(len(values), len(out)):
        out[j] = 0


@exact
def spread(value, out):
    for j in range(len(out)):
        out[j] = value


@exact
def where_seen(values, seen):
    zero = values.dtype.type(0)
    for j in range(len(values)):
        values[j] = values[j] if seen[j] != 0 else zero


@loose
def add(values):
    """In the type of the values, as the other sums over a chunk: it adds eight numbers to each place of a
    vector, then the places."""
    total = values.dtype.type(0)
    for t in range(len(values)):
        total += values[t]
    return total


@exact
def exponential(x, numbers, power, bits, rest, tail):
    """``exp(min(x, 20)) = power (1 + rest + tail)``: rest is what is left of x after the nearest multiple of
    log 2, |rest| < 0.35, and tail is ``exp(rest) - 1 - rest``."""
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
    exponential_tail(rest, numbers, tail)


@exact
def exponential_tail(x, numbers, tail):
    """``exp(x) - 1 - x`` for |x| < 0.35, to a part in 2^24 or 2^53 of 1, by Taylor's polynomial."""
    c2, c3, c4, c5, c6, c7 = numbers[6], numbers[7], numbers[8], numbers[9], numbers[10], numbers[11]
    if len(numbers) == 12:
        for j in range(len(x)):
            r = x[j]
            tail[j] = r * r * (((((c7 * r + c6) * r + c5) * r + c4) * r + c3) * r + c2)
    else:
        c8, c9, c10, c11, c12, c13 = (
            numbers[12],
            numbers[13],
            numbers[14],
            numbers[15],
            numbers[16],
            numbers[17],
        )
        for j in range(len(x)):
            r = x[j]
            p = ((((c13 * r + c12) * r + c11) * r + c10) * r + c9) * r + c8
            tail[j] = r * r * ((((((p * r + c7) * r + c6) * r + c5) * r + c4) * r + c3) * r + c2)


@exact
def find_weights(used, numbers, near, work, bits):
    """``exp(min(used, 20))`` to work[0], its parts to work[3:6]. ``near``: no log-ratio is beyond NEAR, so the
    power of 2 is 1 and what is left of x is x; the same numbers, in half the time."""
    weight, power, rest, tail = work[0], work[3], work[4], work[5]
    one, zero, smallest = weight.dtype.type(1), weight.dtype.type(0), numbers[4]
    if near:
        exponential_tail(used, numbers, tail)
        for j in range(len(used)):
            weight[j] = one + (used[j] + tail[j])
    else:
        exponential(used, numbers, power, bits[3], rest, tail)
        for j in range(len(used)):
            weight[j] = power[j] + power[j] * (rest[j] + tail[j]) if used[j] >= smallest else zero


@exact
def apply_trust(logp, used, seen, kind, limits, work, kept):
    """Surrogate (work[2]) from weights (work[0], which it may bound) and advantages (work[1]), and what is kept."""
    n, zero = len(used), logp.dtype.type(0)
    low, high, dual = limits[0], limits[1], limits[2]
    weight, a, surrogate = work[0], work[1], work[2]
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
def find_coefficient(weight, kept, coefficient):
    zero = weight.dtype.type(0)
    for j in range(len(coefficient)):
        coefficient[j] = weight[j] if kept[j] != 0 else zero


@exact
def find_gradient(share, coefficient, advantage, gradient):
    for j in range(len(gradient)):
        gradient[j] = -(share * coefficient[j] * advantage[j])


@exact
def add_sums(z, used, seen, near, work, at, share, sums):
    """Add a chunk to the sums; the exponential of z stands from work[at] on, only its tail if ``near``."""
    sums[SURROGATE] += np.float64(share) * np.float64(add(work[2, : len(z)]))
    total, squares = moments(work[0], seen, 0.0)
    sums[WEIGHT] += total
    sums[SQUARES] += squares
    if near:
        sums[KL] += add(work[at + 2, : len(z)])
    else:
        sums[KL] += divergence(z, work[at], work[at + 1], work[at + 2])
    total, squares = moments(z, seen, sums[RAW_AROUND])
    sums[RAW] += total
    sums[RAW_SQUARES] += squares
    if at == 6:
        total, squares = moments(used, seen, sums[USED_AROUND])
    sums[USED] += total
    sums[USED_SQUARES] += squares


@loose
def moments(values, seen, around):
    """Sums of the differences from ``around`` and of their squares, where tokens are trained."""
    zero, centre = values.dtype.type(0), values.dtype.type(around)
    total, squares = zero, zero
    for j in range(len(seen)):
        d = values[j] - centre if seen[j] != 0 else zero
        total += d
        squares += d * d
    return total, squares


@loose
def divergence(z, power, rest, tail):
    """Sum of ``exp(l) - 1 - l``; the parts of l cancel before what is small is added."""
    total, one = z.dtype.type(0), z.dtype.type(1)
    for j in range(len(z)):
        total += move(z[j], power[j], rest[j], tail[j], one)
    return total


@exact
def move(z, power, rest, tail, one):
    return (power * rest - z) + (power - one) + power * tail


@exact
def largest_size(values, sizes, bits):
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
def add_counts(used, kept, kind, largest, counts):
    """Only CLIP drops tokens, and no log-weight exceeds the largest log-ratio."""
    low, capped = np.int32(0), np.int32(0)
    if kind == CLIP:
        for j in range(len(used)):
            low += np.int32((used[j] < 0) & (kept[j] == 0))
    if largest > LIMIT:
        for j in range(len(used)):
            capped += np.int32(used[j] > LIMIT)
    counts[KEPT] += ones(kept)
    counts[LOW] += low
    counts[CAPPED] += capped


@exact
def count_pairs(seen):
    pairs = np.int32(0)
    for j in range(len(seen) - 1):
        pairs += np.int32(seen[j + 1] & seen[j])
    return pairs


@exact
def count_switches(values):
    """Neighbours whose signs differ; masked tokens are 0 and have none."""
    switches = np.int32(0)
    for j in range(len(values) - 1):
        a, b = values[j], values[j + 1]
        switches += np.int32(((a > 0) & (b < 0)) | ((a < 0) & (b > 0)))
    return switches
