"""The scalar filter as loops over flat arrays, for :mod:`kalman_rl.kernels.jit`.

Segments are those of the module ``segments``. Eight of similar length are taken side by side, because one alone would
wait for its own last addition.

Importing this module imports numba.
"""

from __future__ import annotations

from typing import Any

from kalman_rl.kernels.filter.vectors import (
    broadcast,
    choose,
    is_number,
    is_positive,
    load,
    store,
    transpose_in,
    transpose_in_seen,
    transpose_out,
)
from kalman_rl.kernels.jit import inner

Array = Any  # one-dimensional, contiguous


def table_of_gains(q: float, r: float, p0: float, table: Array, length: int) -> None:
    """K_t and 1 - K_t of a segment without holes, one after the other in ``table`` (2 length)."""
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
def place(segments: Array, order: Array, start: int, stop: int, first: Array) -> tuple[int, int]:
    """Where the eight segments from ``order[start]`` on begin, to ``first``; the last one again where there are
    fewer. Returns how many tokens are taken by whole tiles: of the shortest, and as many as the longest needs
    and all have room for. A segment that has ended goes on as a hole."""
    shortest, longest, room = 1 << 62, 0, 1 << 62
    for lane in range(8):
        i = 5 * order[min(start + lane, stop - 1)]
        first[lane] = segments[i + 2]
        shortest = min(shortest, segments[i + 3] - segments[i + 2])
        longest = max(longest, segments[i + 3] - segments[i + 2])
        room = min(room, segments[i + 1] - segments[i + 2])
    return shortest // 16 * 16, min(room // 16 * 16, (longest + 15) // 16 * 16)


@inner
def write_lengths(segments: Array, order: Array, start: int, stop: int, out: Array) -> None:
    """Tokens of each of eight segments."""
    for lane in range(8):
        i = 5 * order[min(start + lane, stop - 1)]
        out[lane] = segments[i + 3] - segments[i + 2]


@inner
def means_of_four(
    z: Array, table: Array, m0: float, segments: Array, order: Array, start: int, stop: int, out: Array
) -> bool:
    """:func:`means_by_table` of at most four segments, for which vectors of eight cost more than they save. Written
    out
    four times: that is what keeps the states in registers."""
    gain, keep = table[: len(table) // 2], table[len(table) // 2 :]
    fine = True
    i0, i1 = 5 * order[start], 5 * order[min(start + 1, stop - 1)]
    i2, i3 = 5 * order[min(start + 2, stop - 1)], 5 * order[min(start + 3, stop - 1)]
    z0, o0 = z[segments[i0 + 2] : segments[i0 + 3]], out[segments[i0 + 2] : segments[i0 + 3]]
    z1, o1 = z[segments[i1 + 2] : segments[i1 + 3]], out[segments[i1 + 2] : segments[i1 + 3]]
    z2, o2 = z[segments[i2 + 2] : segments[i2 + 3]], out[segments[i2 + 2] : segments[i2 + 3]]
    z3, o3 = z[segments[i3 + 2] : segments[i3 + 3]], out[segments[i3 + 2] : segments[i3 + 3]]
    x0 = x1 = x2 = x3 = m0
    steps = min(len(z0), len(z1), len(z2), len(z3))
    for t in range(steps):
        k, a = gain[t], keep[t]
        x0 = a * x0 + k * z0[t]
        x1 = a * x1 + k * z1[t]
        x2 = a * x2 + k * z2[t]
        x3 = a * x3 + k * z3[t]
        o0[t] = x0
        o1[t] = x1
        o2[t] = x2
        o3[t] = x3
    for lane in range(min(4, stop - start)):
        i = i0 if lane == 0 else i1 if lane == 1 else i2 if lane == 2 else i3
        x = x0 if lane == 0 else x1 if lane == 1 else x2 if lane == 2 else x3
        zl, ol = z[segments[i + 2] : segments[i + 3]], out[segments[i + 2] : segments[i + 3]]
        for t in range(steps, len(zl)):
            x = keep[t] * x + gain[t] * zl[t]
            ol[t] = x
        fine &= x - x == 0.0
        out[segments[i] : segments[i + 2]] = m0
        out[segments[i + 3] : segments[i + 1]] = x
    return fine


def means_by_table(
    z: Array,
    table: Array,
    m0: float,
    segments: Array,
    order: Array,
    start: int,
    stop: int,
    first: Array,
    tile: Array,
    out: Array,
) -> bool:
    """Means of the segments ``order[start:stop]``, which have no hole; False if an observation is not finite.

    ``first`` (8 int64) and ``tile`` (128 float64) are scratch.
    """
    gain, keep = table[: len(table) // 2], table[len(table) // 2 :]
    fine = True
    for g in range(start, stop, 8):
        if stop - g <= 4:
            fine &= means_of_four(z, table, m0, segments, order, g, stop, out)
            break
        common, steps = place(segments, order, g, stop, first)
        write_lengths(segments, order, g, stop, tile)
        x, lengths = broadcast(m0), load(tile, 0)
        for t in range(0, common, 16):
            transpose_in(z, first, t, tile)
            k, a = gain[t : t + 16], keep[t : t + 16]
            for i in range(16):
                x = a[i] * x + k[i] * load(tile, i)
                store(tile, i, x)
            transpose_out(tile, out, first, t)
        for t in range(common, steps, 16):
            transpose_in(z, first, t, tile)
            k, a = gain[t : t + 16], keep[t : t + 16]
            for i in range(16):
                x = choose(is_positive(lengths - 1.0 * (t + i)), a[i] * x + k[i] * load(tile, i), x)
                store(tile, i, x)
            transpose_out(tile, out, first, t)
        store(tile, 0, x)
        for lane in range(min(8, stop - g)):
            i, mean = 5 * order[g + lane], tile[lane]
            rest, last = segments[i + 2] + steps, segments[i + 3]
            for t in range(rest, last):
                mean = keep[t - segments[i + 2]] * mean + gain[t - segments[i + 2]] * z[t]
                out[t] = mean
            fine &= mean - mean == 0.0
            out[segments[i] : segments[i + 2]] = m0
            out[max(rest, last) : segments[i + 1]] = mean
    return fine


def means_with_holes(
    z: Array,
    mask: Array,
    q: float,
    start_p: float,
    m0: float,
    segments: Array,
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
    tokens ``v = 1`` again: it can grow to 1e32 in between.

    ``tile`` is two tiles here. ``gain`` is empty or like ``out``: the gains from the first token to
    the last, 0 where nothing is observed.
    """
    unknown, fine = start_p == float("inf"), True
    means, gains = tile[:128], tile[128:]
    for g in range(start, stop, 8):
        _, steps = place(segments, order, g, stop, first)
        x = broadcast(m0)
        u, v = broadcast(1.0 if unknown else start_p), broadcast(0.0 if unknown else 1.0)
        for t in range(0, steps, 16):
            fine &= transpose_in_seen(z, mask, first, t, means)
            for i in range(0, 16, 2):
                z0, z1 = load(means, i), load(means, i + 1)
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
                store(means, i, x)
                x = choose(seen1, x + k1 * (z1 - x), x)
                store(means, i + 1, x)
                if len(gain) > 0:
                    store(gains, i, choose(seen0, k0, broadcast(0.0)))
                    store(gains, i + 1, choose(seen1, k1, broadcast(0.0)))
            u, v = u / v, broadcast(1.0)
            transpose_out(means, out, first, t)
            if len(gain) > 0:
                transpose_out(gains, gain, first, t)
        store(means, 0, x)
        store(gains, 0, u)
        for lane in range(min(8, stop - g)):
            i, mean, p = 5 * order[g + lane], means[lane], gains[lane]
            p = start_p if steps == 0 else p
            rest, last = segments[i + 2] + steps, segments[i + 3]
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
            out[segments[i] : segments[i + 2]] = m0
            out[max(rest, last) : segments[i + 1]] = mean
    return fine


@inner
def find_noises(
    q: Array, r: Array, strides: tuple[int, int, int, int], length: int, places: Array, tiles: Array
) -> None:
    """Where Q and R of eight segments begin, to ``places[8:24]``, from where the segments begin, ``places[:8]``. What
    has one number a row fills its tile, ``tiles[128:256]`` or ``tiles[256:384]``, once for all."""
    q_row, q_token, r_row, r_token = strides
    for lane in range(8):
        row, token = places[lane] // length, places[lane] % length
        places[8 + lane] = row * q_row + token * q_token
        places[16 + lane] = row * r_row + token * r_token
        for i in range(16):
            tiles[128 + 8 * i + lane] = q[places[8 + lane]]
            tiles[256 + 8 * i + lane] = r[places[16 + lane]]


def means_in_general(
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
    places: Array,
    tiles: Array,
    out: Array,
) -> bool:
    """As :func:`means_by_table`, with a separate variance for every segment.

    Q of (row, token) is ``q[row strides[0] + token strides[1]]``, R likewise with the other two strides.
    ``places`` (24 int64) and ``tiles`` (three) are scratch.
    """
    inf, fine = float("inf"), True
    q_token, r_token = strides[1], strides[3]
    first, zs, qs, rs = places[:8], tiles[:128], tiles[128:256], tiles[256:384]
    for g in range(start, stop, 8):
        _, steps = place(segments, order, g, stop, first)
        find_noises(q, r, strides, length, places, tiles)
        x, p = broadcast(m0), broadcast(p0)
        for t in range(0, steps, 16):
            fine &= transpose_in_seen(z, mask, first, t, zs)
            if q_token > 0:
                transpose_in(q, places[8:16], t, qs)
            if r_token > 0:
                transpose_in(r, places[16:24], t, rs)
            for i in range(16):
                observed, noise = load(zs, i), load(rs, i)
                seen = is_number(observed + (noise - noise))  # R = inf is a hole too
                p = p + load(qs, i)
                w = 1.0 / (p + noise)
                k = choose(is_number(p - p), p * w, broadcast(1.0))
                x = choose(seen, noise * w * x + k * observed, x)
                p = choose(seen, k * noise, p)
                store(zs, i, x)
            transpose_out(zs, out, first, t)
        store(zs, 0, x)
        store(qs, 0, p)
        for lane in range(min(8, stop - g)):
            i, mean, variance = 5 * order[g + lane], zs[lane], qs[lane]
            rest, last = segments[i + 2] + steps, segments[i + 3]
            u, v = places[8 + lane] + steps * q_token, places[16 + lane] + steps * r_token
            for t in range(rest, last):
                variance += q[u]
                noise1 = r[v]
                if mask[t] != 0 and noise1 != inf:
                    k1 = 1.0 if variance == inf else variance / (variance + noise1)
                    mean = noise1 / (variance + noise1) * mean + k1 * z[t]
                    variance = k1 * noise1
                out[t] = mean
                u += q_token
                v += r_token
            fine &= mean - mean == 0.0
            out[segments[i] : segments[i + 2]] = m0
            out[max(rest, last) : segments[i + 1]] = mean
    return fine
