"""All that :func:`kalman_rl.numerics.kalman.causal_filter` returns, as loops; segments as in ``segments``.

Fields, each flat like z: mean, variance, gain, innovation, innovation variance, log-likelihood.
"""

from __future__ import annotations

import math
from typing import Any

Array = Any
TWO_PI = 2 * math.pi


def table_of_fields(q: float, r: float, p0: float, table: Array, length: int) -> None:
    """What is the same for every segment without holes, one column after the other: K, 1 - K, variance after,
    innovation variance S, log(2 pi S) / 2 and 1 / (2 S); the last two are 0 where the start is unknown."""
    p = p0
    for t in range(length):
        p += q
        total = p + r
        if p == float("inf"):
            k, a, constant, factor = 1.0, 0.0, 0.0, 0.0
        else:
            k, a, constant, factor = p / total, r / total, 0.5 * math.log(TWO_PI * total), 0.5 / total
        p = k * r
        table[t], table[length + t], table[2 * length + t] = k, a, p
        table[3 * length + t], table[4 * length + t], table[5 * length + t] = total, constant, factor


def fields_by_table(
    z: Array,
    table: Array,
    r: float,
    m0: float,
    p0: float,
    segments: Array,
    order: Array,
    start: int,
    stop: int,
    mean: Array,
    variance: Array,
    gain: Array,
    innovation: Array,
    spread: Array,
    likelihood: Array,
) -> bool:
    """Fields of the segments ``order[start:stop]``, which have no hole; False if a value is not finite."""
    n = len(table) // 6
    fine = True
    for g in range(start, stop):
        i = 5 * order[g]
        begin, end, first, last = segments[i], segments[i + 1], segments[i + 2], segments[i + 3]
        x, p = m0, p0
        zl, xl, pl, kl = z[first:last], mean[first:last], variance[first:last], gain[first:last]
        dl, sl, ll = innovation[first:last], spread[first:last], likelihood[first:last]
        for t in range(len(zl)):
            d = zl[t] - x
            x = table[n + t] * x + table[t] * zl[t]
            p = table[2 * n + t]
            xl[t], pl[t], kl[t], dl[t] = x, p, table[t], d
            sl[t] = table[3 * n + t]
            ll[t] = -(table[4 * n + t] + d * d * table[5 * n + t])
        fine &= x - x == 0.0
        mean[begin:first], variance[begin:first], spread[begin:first] = m0, p0, p0 + r
        mean[last:end], variance[last:end], spread[last:end] = x, p, p + r
        gain[begin:first], innovation[begin:first], likelihood[begin:first] = 0.0, 0.0, 0.0
        gain[last:end], innovation[last:end], likelihood[last:end] = 0.0, 0.0, 0.0
    return fine


def fields_in_general(
    z: Array,
    mask: Array,
    q: Array,
    r: Array,
    strides: tuple[int, int, int, int],
    length: int,
    m0: float,
    p0: float,
    segments: Array,
    order: Array,
    start: int,
    stop: int,
    mean: Array,
    variance: Array,
    gain: Array,
    innovation: Array,
    spread: Array,
    likelihood: Array,
) -> bool:
    """As :func:`fields_by_table` for any segment; Q of (row, token) is ``q[row strides[0] + token strides[1]]``."""
    inf = float("inf")
    q_row, q_token, r_row, r_token = strides
    fine = True
    for g in range(start, stop):
        i = 5 * order[g]
        begin, end, first, last = segments[i], segments[i + 1], segments[i + 2], segments[i + 3]
        row = begin // length * length
        base, noises = begin // length * q_row - row * q_token, begin // length * r_row - row * r_token
        x, p = m0, p0
        for t in range(begin, end):
            noise = r[noises + t * r_token]
            k = d = log_likelihood = 0.0
            inside = first <= t < last
            p += q[base + t * q_token] if inside else 0.0
            total = p + noise
            if inside and mask[t] != 0 and noise != inf:
                d = z[t] - x
                if p == inf:
                    k, x = 1.0, 0.0 * x + z[t]
                else:
                    k = p / total
                    x = noise / total * x + k * z[t]
                    log_likelihood = -0.5 * (math.log(TWO_PI * total) + d * d / total)
                p = k * noise
            mean[t], variance[t], gain[t] = x, p, k
            innovation[t], spread[t], likelihood[t] = d, total, log_likelihood
        fine &= x - x == 0.0
    return fine
