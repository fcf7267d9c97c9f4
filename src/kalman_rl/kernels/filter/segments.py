"""Where the sequences of a batch begin, end and have holes, for the kernels that take them one by one.

A row of a batch holds one segment, a packed row several. Each is five numbers, ``(begin, end, first, last, hole)``:
positions in the flat array. Tokens outside ``[first, last)`` are padding; ``hole`` is whether a token inside is
masked. Importing this module imports numba.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from kalman_rl.kernels.jit import REORDER, inner

Array = Any  # one-dimensional, contiguous
BUCKETS = 256  # of lengths, in find_segments
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


@functools.partial(inner, freedoms=REORDER)
def total(values: Array) -> float:
    """Sum in float64, in any order, which a vector can take."""
    added = 0.0
    for t in range(len(values)):
        added += values[t]
    return added


def find_segments(mask: Array, segment: Array, rows: int, length: int, segments: Array, order: Array) -> int:
    """Fill ``segments`` (5 n) and ``order`` (n): segments without holes first, each kind from long to short.

    Args: mask: uint8. segment: int64, empty = one segment a row.

    Returns: how many segments have no hole; the number of segments is in ``order[-1]``.
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
            segments[5 * n], segments[5 * n + 1] = begin, end
            segments[5 * n + 2], segments[5 * n + 3], segments[5 * n + 4] = first, last, 1 - whole
            clean += whole
            n += 1
            begin = end
    # Sorted by counting, in at most 2 x 256 buckets, which lie behind the segments' own places.
    shift = 0
    while length >> shift >= BUCKETS:
        shift += 1
    width = (length >> shift) + 1
    count = order[n : n + 2 * width]
    for i in range(2 * width):
        count[i] = 0
    for i in range(n):
        observed = segments[5 * i + 3] - segments[5 * i + 2]
        count[segments[5 * i + 4] * width + ((length - observed) >> shift)] += 1
    total = 0
    for i in range(2 * width):
        here = count[i]
        count[i] = total
        total += here
    for i in range(n):
        observed = segments[5 * i + 3] - segments[5 * i + 2]
        bucket = segments[5 * i + 4] * width + ((length - observed) >> shift)
        order[count[bucket]] = i
        count[bucket] += 1
    order[-1] = n
    return clean
