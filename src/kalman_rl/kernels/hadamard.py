"""Random projection by the Walsh-Hadamard transform, compiled: signs, butterflies of four, and only the
coordinates that are kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kalman_rl.kernels.jit import compiled

Array = Any


def project(x: Tensor, signs: Tensor, rows: Tensor, padded: int, scale: float) -> Tensor:
    """``scale (H diag(signs) x)[rows]`` for x (n, D) padded with zeros to a power of two; (n, len(rows)).

    x: float32 or float64, contiguous. signs: (D,) int8. rows: (d,) int64 below ``padded``. Not a function
    autograd knows.
    """
    out = x.new_empty(len(x), len(rows))
    scratch = x.new_empty(padded).numpy()
    given = x.numpy(), signs.numpy(), rows.numpy(), scale, scratch
    compiled(_project)(*given, out.numpy())
    return out


def _project(x: Array, signs: Array, rows: Array, scale: float, scratch: Array, out: Array) -> None:
    size = len(scratch)
    for i in range(len(x)):
        vector, width = x[i], len(signs)
        for j in range(width):
            scratch[j] = vector[j] * signs[j]
        scratch[width:] = 0.0
        step = 1
        if size > 4:  # neighbours: no slices of one element
            for q in range(size // 4):
                a, b, c, d = scratch[4 * q], scratch[4 * q + 1], scratch[4 * q + 2], scratch[4 * q + 3]
                scratch[4 * q], scratch[4 * q + 1] = (a + b) + (c + d), (a - b) + (c - d)
                scratch[4 * q + 2], scratch[4 * q + 3] = (a + b) - (c + d), (a - b) - (c - d)
            step = 4
        while 4 * step < size:  # positions that differ in two bits are mixed at once
            for base in range(0, size, 4 * step):
                p0, p1 = scratch[base : base + step], scratch[base + step : base + 2 * step]
                p2 = scratch[base + 2 * step : base + 3 * step]
                p3 = scratch[base + 3 * step : base + 4 * step]
                for j in range(step):
                    a, b, c, d = p0[j], p1[j], p2[j], p3[j]
                    p0[j], p1[j] = (a + b) + (c + d), (a - b) + (c - d)
                    p2[j], p3[j] = (a + b) - (c + d), (a - b) - (c - d)
            step *= 4
        kept = out[i]
        if 4 * step == size:  # the last stage for the kept coordinates only
            for k in range(len(rows)):
                row = rows[k]
                j, quarter = row % step, row // step
                a, b = scratch[j], scratch[step + j]
                c, d = scratch[2 * step + j], scratch[3 * step + j]
                b, d = (-b, -d) if quarter % 2 else (b, d)
                c, d = (-c, -d) if quarter >= 2 else (c, d)
                kept[k] = ((a + b) + (c + d)) * scale
        elif 2 * step == size:
            for k in range(len(rows)):
                row = rows[k]
                a, b = scratch[row % step], scratch[step + row % step]
                kept[k] = (a - b if row >= step else a + b) * scale
        else:
            for k in range(len(rows)):
                kept[k] = scratch[rows[k]] * scale
