"""The scalar filter as loops over flat arrays, for :mod:`kalman_rl.fast.jit`.

A row is cut into runs: one for each segment, ``(begin, end, first, last, hole)``, positions in the flat array.
Tokens outside ``[first, last)`` are padding; ``hole`` says whether a token inside is masked. Eight runs of
similar length are taken side by side, because one alone would wait for its own last addition.

Importing this module imports numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kalman_rl.fast.jit import inner
from kalman_rl.fast.lanes import choose, is_number, lanes, put, take, turn_in, turn_in_seen, turn_out

Array = Any  # one-dimensional, contiguous
BUCKETS = 256  # as in filter_numba
BLOCK = 128  # so many ones fit into a byte


@inner
def ones(mask: Array) -> Any:
    """How many: by blocks in bytes, of which a vector holds eight times as many as of integers."""
    blocks: Any = len(mask) // BLOCK
    total: Any = 0
    for b in range(blocks):
        part, count = mask[b * BLOCK : b * BLOCK + BLOCK], np.uint8(0)
        for t in range(BLOCK):
            count = np.uint8(count + part[t])
        total += count
    for t in range(blocks * BLOCK, len(mask)):
        total += mask[t]
    return total


@inner
def every(mask: Array) -> Any:
    """1 if all are 1."""
    whole = np.uint8(1)
    for t in range(len(mask)):
        whole = np.uint8(whole & mask[t])
    return whole


def find_runs(mask: Array, segment: Array, rows: int, length: int, runs: Array, order: Array) -> int:
    """Fill ``runs`` (5 n) and ``order`` (n): runs without holes first, each kind from long to short.

    Args: mask: uint8. segment: int64, empty = one segment a row.

    Returns: how many runs have no hole; the number of runs is in ``order[-1]``.
    """
    n = clean = 0
    for row in range(rows):
        begin, stop = row * length, (row + 1) * length
        while begin < stop:
            end = stop
            if len(segment):
                end = begin + 1
                while end < stop and segment[end] == segment[begin]:
                    end += 1
            first = begin
            while first < end and mask[first] == 0:
                first += 1
            count = ones(mask[first:end])
            last, whole = first + count, every(mask[first : first + count])
            if whole == 0:
                last, some = end, 0
                while some == 0:  # a block of padding at a time
                    block = mask[max(last - 64, first) : last]
                    for t in range(len(block)):
                        some |= block[t]
                    last -= 0 if some else len(block)
                while mask[last - 1] == 0:
                    last -= 1
            runs[5 * n], runs[5 * n + 1] = begin, end
            runs[5 * n + 2], runs[5 * n + 3], runs[5 * n + 4] = first, last, 1 - whole
            clean += whole
            n += 1
            begin = end
    # Sorted by counting, in at most 2 x 256 buckets, which lie behind the runs' own places.
    shift = 0
    while length >> shift >= BUCKETS:
        shift += 1
    width = (length >> shift) + 1
    count = order[n : n + 2 * width]
    for i in range(2 * width):
        count[i] = 0
    for i in range(n):
        observed = runs[5 * i + 3] - runs[5 * i + 2]
        count[runs[5 * i + 4] * width + ((length - observed) >> shift)] += 1
    total = 0
    for i in range(2 * width):
        here = count[i]
        count[i] = total
        total += here
    for i in range(n):
        observed = runs[5 * i + 3] - runs[5 * i + 2]
        bucket = runs[5 * i + 4] * width + ((length - observed) >> shift)
        order[count[bucket]] = i
        count[bucket] += 1
    order[-1] = n
    return clean


def table_of_gains(q: float, r: float, p0: float, table: Array, length: int) -> None:
    """K_t and 1 - K_t of a run without holes, one after the other in ``table`` (2 length)."""
    gain, keep = table[:length], table[length:]
    p = p0
    for t in range(length):
        p += q
        if p == float("inf"):
            gain[t], keep[t] = 1.0, 0.0
        else:
            gain[t], keep[t] = p / (p + r), r / (p + r)
        p = gain[t] * r


@inner
def place(runs: Array, order: Array, start: int, stop: int, first: Array) -> tuple[int, int, int]:
    """Where the eight runs from ``order[start]`` on begin, to ``first``; the last one again where there are
    fewer. Returns the length of the shortest and of the longest, and the room that all have."""
    shortest, longest, room = 1 << 62, 0, 1 << 62
    for lane in range(8):
        i = 5 * order[min(start + lane, stop - 1)]
        first[lane] = runs[i + 2]
        shortest = min(shortest, runs[i + 3] - runs[i + 2])
        longest = max(longest, runs[i + 3] - runs[i + 2])
        room = min(room, runs[i + 1] - runs[i + 2])
    return shortest, longest, room


def means_by_table(
    z: Array,
    table: Array,
    m0: float,
    runs: Array,
    order: Array,
    start: int,
    stop: int,
    first: Array,
    tile: Array,
    out: Array,
) -> bool:
    """Means of the runs ``order[start:stop]``, which have no hole; False if an observation is not finite.

    ``first`` (8 int64) and ``tile`` (128 float64) are scratch.
    """
    gain, keep = table[: len(table) // 2], table[len(table) // 2 :]
    fine = True
    for g in range(start, stop, 8):
        shortest, _, _ = place(runs, order, g, stop, first)
        x, steps = lanes(m0), shortest // 16 * 16
        for t in range(0, steps, 16):
            turn_in(z, first, t, tile)
            k, a = gain[t : t + 16], keep[t : t + 16]
            for i in range(16):
                x = a[i] * x + k[i] * take(tile, i)
                put(tile, i, x)
            turn_out(tile, out, first, t)
        put(tile, 0, x)
        for lane in range(min(8, stop - g)):
            i, mean = 5 * order[g + lane], tile[lane]
            rest = runs[i + 2] + steps
            zl, ol = z[rest : runs[i + 3]], out[rest : runs[i + 3]]
            kl, al = gain[steps : steps + len(zl)], keep[steps : steps + len(zl)]
            for t in range(len(zl)):
                mean = al[t] * mean + kl[t] * zl[t]
                ol[t] = mean
            fine &= mean - mean == 0.0
            out[runs[i] : runs[i + 2]] = m0
            out[runs[i + 3] : runs[i + 1]] = mean
    return fine


def means_with_holes(
    z: Array,
    mask: Array,
    q: float,
    start_p: float,
    m0: float,
    runs: Array,
    order: Array,
    start: int,
    stop: int,
    first: Array,
    tile: Array,
    out: Array,
    gain: Array,
) -> bool:
    """As :func:`means_by_table` where tokens are missing, for R = 1, Q = q in [0, 100], P_0 = ``start_p``.

    The variance is a fraction u / v: a prediction is ``u += q v``, an observation ``v += u``. So the division
    that makes the gain is outside of the chain from token to token, and two tokens share one. After sixteen
    tokens ``v = 1`` again: it can grow to 1e32 in between. A run that has ended goes on as a hole.

    ``tile`` is two tiles here. ``gain`` is empty or like ``out``: the gains, 0 where nothing is observed.
    """
    unknown, fine = start_p == float("inf"), True
    means, gains = tile[:128], tile[128:]
    for g in range(start, stop, 8):
        _, longest, room = place(runs, order, g, stop, first)
        steps = min(room // 16 * 16, (longest + 15) // 16 * 16)
        x = lanes(m0)
        u, v = lanes(1.0 if unknown else start_p), lanes(0.0 if unknown else 1.0)
        for t in range(0, steps, 16):
            fine &= turn_in_seen(z, mask, first, t, means)
            for i in range(0, 16, 2):
                z0, z1 = take(means, i), take(means, i + 1)
                seen0, seen1 = is_number(z0), is_number(z1)
                u0 = u + q * v
                n0 = u0 + v
                v = choose(seen0, n0, v)
                u = u0 + q * v
                n1 = u + v
                v = choose(seen1, n1, v)
                both = 1.0 / (n0 * n1)
                k0, k1 = u0 * (n1 * both), u * (n0 * both)
                x = choose(seen0, x + k0 * (z0 - x), x)
                put(means, i, x)
                x = choose(seen1, x + k1 * (z1 - x), x)
                put(means, i + 1, x)
                if len(gain) > 0:
                    put(gains, i, choose(seen0, k0, lanes(0.0)))
                    put(gains, i + 1, choose(seen1, k1, lanes(0.0)))
            u, v = u / v, lanes(1.0)
            turn_out(means, out, first, t)
            if len(gain) > 0:
                turn_out(gains, gain, first, t)
        put(means, 0, x)
        put(gains, 0, u)
        for lane in range(min(8, stop - g)):
            i, mean, p = 5 * order[g + lane], means[lane], gains[lane]
            p = start_p if steps == 0 else p
            rest, last, end = runs[i + 2] + steps, runs[i + 3], runs[i + 1]
            for t in range(rest, last):
                p += q
                k = 0.0
                if mask[t] != 0:
                    k = 1.0 if p == float("inf") else p / (p + 1.0)
                    p = k
                    mean += k * (z[t] - mean)
                out[t] = mean
                if len(gain) > 0:
                    gain[t] = k
            fine &= mean - mean == 0.0
            out[runs[i] : runs[i + 2]] = m0
            out[max(rest, last) : end] = mean
            if len(gain) > 0:
                gain[runs[i] : runs[i + 2]] = 0.0
                gain[max(rest, last) : end] = 0.0
    return fine


def means_in_general(
    z: Array,
    mask: Array,
    q: Array,
    r: Array,
    strides: tuple[int, int, int, int],
    length: int,
    m0: float,
    p0: float,
    runs: Array,
    order: Array,
    start: int,
    stop: int,
    out: Array,
) -> bool:
    """As :func:`means_by_table`, with a variance of its own for every run.

    Q of (row, token) is ``q[row strides[0] + token strides[1]]``, R likewise with the other two strides.
    """
    inf = float("inf")
    q_row, q_token, r_row, r_token = strides
    fine = True
    for g in range(start, stop, 4):
        i0, i1 = 5 * order[g], 5 * order[min(g + 1, stop - 1)]
        i2, i3 = 5 * order[min(g + 2, stop - 1)], 5 * order[min(g + 3, stop - 1)]
        z0, o0 = z[runs[i0 + 2] : runs[i0 + 3]], out[runs[i0 + 2] : runs[i0 + 3]]
        z1, o1 = z[runs[i1 + 2] : runs[i1 + 3]], out[runs[i1 + 2] : runs[i1 + 3]]
        z2, o2 = z[runs[i2 + 2] : runs[i2 + 3]], out[runs[i2 + 2] : runs[i2 + 3]]
        z3, o3 = z[runs[i3 + 2] : runs[i3 + 3]], out[runs[i3 + 2] : runs[i3 + 3]]
        m0_, m1_ = mask[runs[i0 + 2] : runs[i0 + 3]], mask[runs[i1 + 2] : runs[i1 + 3]]
        m2_, m3_ = mask[runs[i2 + 2] : runs[i2 + 3]], mask[runs[i3 + 2] : runs[i3 + 3]]
        b0, b1, b2, b3 = runs[i0 + 2], runs[i1 + 2], runs[i2 + 2], runs[i3 + 2]
        q0 = q[b0 // length * q_row + b0 % length * q_token :]
        q1 = q[b1 // length * q_row + b1 % length * q_token :]
        q2 = q[b2 // length * q_row + b2 % length * q_token :]
        q3 = q[b3 // length * q_row + b3 % length * q_token :]
        r0 = r[b0 // length * r_row + b0 % length * r_token :]
        r1 = r[b1 // length * r_row + b1 % length * r_token :]
        r2 = r[b2 // length * r_row + b2 % length * r_token :]
        r3 = r[b3 // length * r_row + b3 % length * r_token :]
        x0 = x1 = x2 = x3 = m0
        p0_ = p1 = p2 = p3 = p0
        steps = min(len(z0), len(z1), len(z2), len(z3))
        for t in range(steps):
            # observed: R is finite and the mask is set; then z is used, else the state stays
            u, v = t * q_token, t * r_token
            n0, n1, n2, n3 = r0[v], r1[v], r2[v], r3[v]
            p0_ += q0[u]
            p1 += q1[u]
            p2 += q2[u]
            p3 += q3[u]
            w0, w1, w2, w3 = 1.0 / (p0_ + n0), 1.0 / (p1 + n1), 1.0 / (p2 + n2), 1.0 / (p3 + n3)
            k0, k1, k2, k3 = p0_ * w0, p1 * w1, p2 * w2, p3 * w3
            k0 = 1.0 if p0_ == inf else k0
            k1 = 1.0 if p1 == inf else k1
            k2 = 1.0 if p2 == inf else k2
            k3 = 1.0 if p3 == inf else k3
            y0, c0 = n0 * w0 * x0 + k0 * z0[t], k0 * n0
            y1, c1 = n1 * w1 * x1 + k1 * z1[t], k1 * n1
            y2, c2 = n2 * w2 * x2 + k2 * z2[t], k2 * n2
            y3, c3 = n3 * w3 * x3 + k3 * z3[t], k3 * n3
            s0, s1 = (m0_[t] != 0) & (n0 != inf), (m1_[t] != 0) & (n1 != inf)
            s2, s3 = (m2_[t] != 0) & (n2 != inf), (m3_[t] != 0) & (n3 != inf)
            x0, p0_ = (y0, c0) if s0 else (x0, p0_)
            x1, p1 = (y1, c1) if s1 else (x1, p1)
            x2, p2 = (y2, c2) if s2 else (x2, p2)
            x3, p3 = (y3, c3) if s3 else (x3, p3)
            o0[t] = x0
            o1[t] = x1
            o2[t] = x2
            o3[t] = x3
        for lane in range(min(4, stop - g)):
            i = i0 if lane == 0 else i1 if lane == 1 else i2 if lane == 2 else i3
            x = x0 if lane == 0 else x1 if lane == 1 else x2 if lane == 2 else x3
            p = p0_ if lane == 0 else p1 if lane == 1 else p2 if lane == 2 else p3
            b = runs[i + 2] + steps
            row, token = b // length, b % length
            zl, ol, ml = z[b : runs[i + 3]], out[b : runs[i + 3]], mask[b : runs[i + 3]]
            ql, rl = q[row * q_row + token * q_token :], r[row * r_row + token * r_token :]
            for t in range(len(zl)):
                noise = rl[t * r_token]
                p += ql[t * q_token]
                if ml[t] != 0 and noise != inf:
                    k = 1.0 if p == inf else p / (p + noise)
                    x = noise / (p + noise) * x + k * zl[t]
                    p = k * noise
                ol[t] = x
            fine &= x - x == 0.0
            out[runs[i] : runs[i + 2]] = m0
            out[runs[i + 3] : runs[i + 1]] = x
    return fine
