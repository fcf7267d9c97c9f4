"""The filter's loops transposed: gradients of the observations from those of the means; see ``cpu_loops``.

``s_t = g_t + (1 - K_{t+1}) s_{t+1}``, ``dz_t = K_t s_t``; what is asked of the means behind the last observed
token counts there. Importing this module imports numba.
"""

from __future__ import annotations

from typing import Any

from kalman_rl.kernels.filter.cpu_loops import find_noises, place, write_lengths
from kalman_rl.kernels.filter.segments import total
from kalman_rl.kernels.filter.vectors import (
    broadcast,
    choose,
    is_number,
    is_positive,
    load,
    store,
    transpose_in,
    transpose_in_mask,
    transpose_out,
)
from kalman_rl.kernels.jit import inner

Array = Any


@inner
def gradients_of_four(
    gradient: Array, table: Array, segments: Array, order: Array, start: int, stop: int, out: Array
) -> None:
    """:func:`gradients_by_table` of at most four segments, as :func:`means_of_four`."""
    gain, keep = table[: len(table) // 2], table[len(table) // 2 :]
    i0, i1 = 5 * order[start], 5 * order[min(start + 1, stop - 1)]
    i2, i3 = 5 * order[min(start + 2, stop - 1)], 5 * order[min(start + 3, stop - 1)]
    g0, o0 = gradient[segments[i0 + 2] : segments[i0 + 3]], out[segments[i0 + 2] : segments[i0 + 3]]
    g1, o1 = gradient[segments[i1 + 2] : segments[i1 + 3]], out[segments[i1 + 2] : segments[i1 + 3]]
    g2, o2 = gradient[segments[i2 + 2] : segments[i2 + 3]], out[segments[i2 + 2] : segments[i2 + 3]]
    g3, o3 = gradient[segments[i3 + 2] : segments[i3 + 3]], out[segments[i3 + 2] : segments[i3 + 3]]
    steps = min(len(g0), len(g1), len(g2), len(g3))
    c0 = c1 = c2 = c3 = 0.0
    for lane in range(min(4, stop - start)):
        i = i0 if lane == 0 else i1 if lane == 1 else i2 if lane == 2 else i3
        c = total(gradient[segments[i + 3] : segments[i + 1]])
        rest = segments[i + 2] + steps
        gl, ol = gradient[rest : segments[i + 3]], out[rest : segments[i + 3]]
        kl, al = gain[steps : steps + len(gl)], keep[steps : steps + len(gl)]
        t = len(gl)
        while t > 0:
            t -= 1
            c += gl[t]
            ol[t] = kl[t] * c
            c *= al[t]
        out[segments[i] : segments[i + 2]] = 0.0
        out[segments[i + 3] : segments[i + 1]] = 0.0
        c0, c1 = c if lane == 0 else c0, c if lane == 1 else c1
        c2, c3 = c if lane == 2 else c2, c if lane == 3 else c3
    # A group that is not full repeats its last segment: the same numbers are written again.
    full = stop - start
    c1 = c1 if full > 1 else c0
    c2 = c2 if full > 2 else c1
    c3 = c3 if full > 3 else c2
    t, a = steps, 1.0
    while t > 0:
        t -= 1
        k = gain[t]
        c0 = a * c0 + g0[t]
        c1 = a * c1 + g1[t]
        c2 = a * c2 + g2[t]
        c3 = a * c3 + g3[t]
        a = keep[t]
        o0[t] = k * c0
        o1[t] = k * c1
        o2[t] = k * c2
        o3[t] = k * c3


def gradients_by_table(
    gradient: Array,
    table: Array,
    segments: Array,
    order: Array,
    start: int,
    stop: int,
    first: Array,
    tile: Array,
    out: Array,
) -> None:
    """The transpose of :func:`means_by_table`: from the gradient of the means to that of the observations."""
    gain, keep = table[: len(table) // 2], table[len(table) // 2 :]
    for g in range(start, stop, 8):
        if stop - g <= 4:
            gradients_of_four(gradient, table, segments, order, g, stop, out)
            break
        common, steps = place(segments, order, g, stop, first)
        for lane in range(min(8, stop - g)):
            i = 5 * order[g + lane]
            rest, last = segments[i + 2] + steps, segments[i + 3]
            c = total(gradient[max(rest, last) : segments[i + 1]])
            for back in range(last - rest):
                t = last - 1 - back
                c += gradient[t]
                out[t] = gain[t - segments[i + 2]] * c
                c *= keep[t - segments[i + 2]]
            out[segments[i] : segments[i + 2]] = 0.0
            out[max(rest, last) : segments[i + 1]] = 0.0
            tile[lane] = c
        for lane in range(stop - g, 8):
            tile[lane] = tile[stop - 1 - g]
        s, later, none, all_ = load(tile, 0), broadcast(1.0), broadcast(0.0), broadcast(1.0)
        write_lengths(segments, order, g, stop, tile)
        lengths = load(tile, 0)
        for back in range(16, steps - common + 16, 16):
            t = steps - back
            transpose_in(gradient, first, t, tile)
            k, a = gain[t : t + 16], keep[t : t + 16]
            for j in range(16):
                i = 15 - j
                seen = is_positive(lengths - 1.0 * (t + i))
                s = later * s + load(tile, i)
                store(tile, i, choose(seen, k[i] * s, none))
                later = choose(seen, broadcast(a[i]), all_)
            transpose_out(tile, out, first, t)
        for back in range(16, common + 16, 16):
            t = common - back
            transpose_in(gradient, first, t, tile)
            k, a = gain[t : t + 16], keep[t : t + 16]
            for j in range(16):
                i = 15 - j
                s = later * s + load(tile, i)
                store(tile, i, k[i] * s)
                later = broadcast(a[i])
            transpose_out(tile, out, first, t)


@inner
def way_back(
    gradient: Array,
    segments: Array,
    order: Array,
    start: int,
    stop: int,
    steps: int,
    first: Array,
    tile: Array,
    gains: Array,
    out: Array,
) -> None:
    """From the gains of eight segments, token by token, to the gradient of their observations."""
    for lane in range(8):
        i = 5 * order[min(start + lane, stop - 1)]
        rest, last = segments[i + 2] + steps, segments[i + 3]
        c = total(gradient[max(rest, last) : segments[i + 1]])
        for back in range(last - rest):
            t = last - 1 - back
            k = gains[8 * (t - segments[i + 2]) + lane]
            c += gradient[t]
            out[t] = k * c
            c -= k * c
        out[segments[i] : segments[i + 2]] = 0.0
        out[max(rest, last) : segments[i + 1]] = 0.0
        tile[lane] = c
    s, later = load(tile, 0), broadcast(1.0)
    for back in range(16, steps + 16, 16):
        t = steps - back
        transpose_in(gradient, first, t, tile)
        for j in range(16):
            i = 15 - j
            gain = load(gains, t + i)
            s = later * s + load(tile, i)
            store(tile, i, gain * s)
            later = 1.0 - gain
        transpose_out(tile, out, first, t)


def gradients_with_holes(
    gradient: Array,
    mask: Array,
    q: float,
    start_p: float,
    segments: Array,
    order: Array,
    start: int,
    stop: int,
    first: Array,
    tile: Array,
    gains: Array,
    out: Array,
) -> None:
    """The transpose of :func:`means_with_holes`. ``gains`` (8 T) is scratch: the gains of eight segments, token by
    token, come first, and the way back after them."""
    unknown = start_p == float("inf")
    for g in range(start, stop, 8):
        _, steps = place(segments, order, g, stop, first)
        u, v = broadcast(1.0 if unknown else start_p), broadcast(0.0 if unknown else 1.0)
        for t in range(0, steps, 16):
            transpose_in_mask(mask, first, t, tile)
            for i in range(0, 16, 2):
                seen0, seen1 = load(tile, i), load(tile, i + 1)
                u0 = u + q * v
                n0 = u0 + v
                v = v + seen0 * u0
                u = u0 + q * v
                n1 = u + v
                v = v + seen1 * u
                both = 1.0 / (n0 * n1)
                store(gains, t + i, seen0 * (u0 * (n1 * both)))
                store(gains, t + i + 1, seen1 * (u * (n0 * both)))
            u, v = u / v, broadcast(1.0)
        store(tile, 0, u)
        for lane in range(8):
            i, p = 5 * order[min(g + lane, stop - 1)], tile[lane]
            p = start_p if steps == 0 else p
            for t in range(segments[i + 2] + steps, segments[i + 3]):
                p += q
                k = 0.0
                if mask[t] != 0:
                    k = 1.0 if p == float("inf") else p / (p + 1.0)
                    p = k
                gains[8 * (t - segments[i + 2]) + lane] = k
        way_back(gradient, segments, order, g, stop, steps, first, tile, gains, out)


def gradients_in_general(
    gradient: Array,
    mask: Array,
    q: Array,
    r: Array,
    strides: tuple[int, int, int, int],
    length: int,
    p0: float,
    segments: Array,
    order: Array,
    start: int,
    stop: int,
    places: Array,
    tiles: Array,
    gains: Array,
    out: Array,
) -> None:
    """The transpose of :func:`means_in_general`, as :func:`gradients_with_holes`."""
    inf, nothing = float("inf"), broadcast(0.0)
    q_token, r_token = strides[1], strides[3]
    first, marks, qs, rs = places[:8], tiles[:128], tiles[128:256], tiles[256:384]
    for g in range(start, stop, 8):
        _, steps = place(segments, order, g, stop, first)
        find_noises(q, r, strides, length, places, tiles)
        p = broadcast(p0)
        for t in range(0, steps, 16):
            transpose_in_mask(mask, first, t, marks)
            if q_token > 0:
                transpose_in(q, places[8:16], t, qs)
            if r_token > 0:
                transpose_in(r, places[16:24], t, rs)
            for i in range(16):
                noise = load(rs, i)
                seen = is_number(nothing / load(marks, i) + (noise - noise))  # 0 / 0 where masked
                p = p + load(qs, i)
                k = choose(is_number(p - p), p / (p + noise), broadcast(1.0))
                store(gains, t + i, choose(seen, k, nothing))
                p = choose(seen, k * noise, p)
        store(qs, 0, p)
        for lane in range(8):
            i, variance = 5 * order[min(g + lane, stop - 1)], qs[lane]
            rest, last = segments[i + 2] + steps, segments[i + 3]
            u, v = places[8 + lane] + steps * q_token, places[16 + lane] + steps * r_token
            for t in range(rest, last):
                variance += q[u]
                gain, noise1 = 0.0, r[v]
                if mask[t] != 0 and noise1 != inf:
                    gain = 1.0 if variance == inf else variance / (variance + noise1)
                    variance = gain * noise1
                gains[8 * (t - segments[i + 2]) + lane] = gain
                u += q_token
                v += r_token
        way_back(gradient, segments, order, g, stop, steps, first, marks, gains, out)
