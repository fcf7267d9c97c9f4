"""The filter's loops transposed: gradients of the observations from those of the means; see ``filter_loops``."""

from __future__ import annotations

from typing import Any

Array = Any


def gradients_by_table(
    gradient: Array, table: Array, runs: Array, order: Array, start: int, stop: int, out: Array
) -> None:
    """The transpose of :func:`means_by_table`: from the gradient of the means to that of the observations.

    ``s_t = g_t + (1 - K_{t+1}) s_{t+1}``, ``dz_t = K_t s_t``; what is asked of the means behind the last
    observed token counts there.
    """
    gain, keep = table[: len(table) // 2], table[len(table) // 2 :]
    for g in range(start, stop, 4):
        i0, i1 = 5 * order[g], 5 * order[min(g + 1, stop - 1)]
        i2, i3 = 5 * order[min(g + 2, stop - 1)], 5 * order[min(g + 3, stop - 1)]
        g0, o0 = gradient[runs[i0 + 2] : runs[i0 + 3]], out[runs[i0 + 2] : runs[i0 + 3]]
        g1, o1 = gradient[runs[i1 + 2] : runs[i1 + 3]], out[runs[i1 + 2] : runs[i1 + 3]]
        g2, o2 = gradient[runs[i2 + 2] : runs[i2 + 3]], out[runs[i2 + 2] : runs[i2 + 3]]
        g3, o3 = gradient[runs[i3 + 2] : runs[i3 + 3]], out[runs[i3 + 2] : runs[i3 + 3]]
        steps = min(len(g0), len(g1), len(g2), len(g3))
        c0 = c1 = c2 = c3 = 0.0
        for lane in range(min(4, stop - g)):
            i = i0 if lane == 0 else i1 if lane == 1 else i2 if lane == 2 else i3
            behind = gradient[runs[i + 3] : runs[i + 1]]
            b0 = b1 = b2 = b3 = 0.0
            for t in range(len(behind) // 4):
                b0 += behind[4 * t]
                b1 += behind[4 * t + 1]
                b2 += behind[4 * t + 2]
                b3 += behind[4 * t + 3]
            for t in range(len(behind) // 4 * 4, len(behind)):
                b0 += behind[t]
            c = (b0 + b1) + (b2 + b3)
            rest = runs[i + 2] + steps
            gl, ol = gradient[rest : runs[i + 3]], out[rest : runs[i + 3]]
            kl, al = gain[steps : steps + len(gl)], keep[steps : steps + len(gl)]
            t = len(gl)
            while t > 0:
                t -= 1
                c += gl[t]
                ol[t] = kl[t] * c
                c *= al[t]
            out[runs[i] : runs[i + 2]] = 0.0
            out[runs[i + 3] : runs[i + 1]] = 0.0
            c0, c1 = c if lane == 0 else c0, c if lane == 1 else c1
            c2, c3 = c if lane == 2 else c2, c if lane == 3 else c3
        # A group that is not full repeats its last run: the same numbers are written again.
        full = stop - g
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


def gradients_in_general(
    gradient: Array,
    mask: Array,
    q: Array,
    r: Array,
    strides: tuple[int, int, int, int],
    length: int,
    p0: float,
    runs: Array,
    order: Array,
    start: int,
    stop: int,
    scratch: Array,
    out: Array,
) -> None:
    """As :func:`gradients_by_table` for any run; ``scratch`` holds the weights of one run (2 length)."""
    inf = float("inf")
    q_row, q_token, r_row, r_token = strides
    for g in range(start, stop):
        i = 5 * order[g]
        b = runs[i + 2]
        row, token = b // length, b % length
        gl, ol, ml = gradient[b : runs[i + 3]], out[b : runs[i + 3]], mask[b : runs[i + 3]]
        ql, rl = q[row * q_row + token * q_token :], r[row * r_row + token * r_token :]
        gain, keep = scratch[: len(gl)], scratch[length : length + len(gl)]
        p = p0
        for t in range(len(gl)):
            noise = rl[t * r_token]
            p += ql[t * q_token]
            k = 1.0 if p == inf else p / (p + noise)
            seen = (ml[t] != 0) & (noise != inf)
            gain[t], keep[t] = (k, noise / (p + noise)) if seen else (0.0, 1.0)
            p = k * noise if seen else p
        behind, c = gradient[runs[i + 3] : runs[i + 1]], 0.0
        for t in range(len(behind)):
            c += behind[t]
        t = len(gl)
        while t > 0:
            t -= 1
            c += gl[t]
            ol[t] = gain[t] * c
            c *= keep[t]
        out[runs[i] : runs[i + 2]] = 0.0
        out[runs[i + 3] : runs[i + 1]] = 0.0
