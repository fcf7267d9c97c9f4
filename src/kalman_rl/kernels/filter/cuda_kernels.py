"""Triton kernels of the scalar filter, and pieces of them that the fused objective uses.

One program takes one row, or one chunk of a long row, block by block, and carries the state from block to
block. Variances are in units of R. Without holes the gain depends on the count of observed tokens only and
comes from a table. With holes the variance is a running product of non-negative Moebius maps

    observed   p -> (p + q) / (p + q + 1)      (1 q; 1 1+q)
    missing    p -> p + q                      (1 q; 0 1)
    start      p -> k0 = (P0 + q) / (P0 + q + 1)

kept in proportion by its bottom row, and the gain of an observed token is the variance after it. The mean is
a running product of ``x -> (1 - K) x + K z``. The gradient runs the same recursion backwards:
``s_t = g_t + (1 - K_{t+1}) s_{t+1}``, ``dz_t = K_t s_t``. Importing this module imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def affine(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
def moebius(a1, b1, c1, d1, a2, b2, c2, d2):
    a, b = a2 * a1 + b2 * c1, a2 * b1 + b2 * d1
    c, d = c2 * a1 + d2 * c1, c2 * b1 + d2 * d1
    unit = 1 / (c + d)
    return a * unit, b * unit, c * unit, d * unit


@triton.jit
def last_of(values, BLOCK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, values, 0.0))


@triton.jit
def variance_maps(observed, begins, q, k0):
    one = tl.where(observed, 1.0, 1.0).to(q.dtype)
    a, b = tl.where(begins, 0.0, one), tl.where(begins, k0, q + 0.0 * one)
    c, d = tl.where(observed & ~begins, 1.0, 0.0 * one), tl.where(observed & ~begins, 1.0 + q, one)
    return a, b, c, d


@triton.jit
def spans_kernel(mask, first, last, count, T, BLOCK: tl.constexpr):
    """Of each row: place of the first observed token, place after the last one, how many."""
    row = tl.program_id(0).to(tl.int64)
    low, high, n = T, 0, 0
    for t0 in range(0, T, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        observed = tl.load(mask + row * T + t, mask=t < T, other=0) != 0
        low = tl.minimum(low, tl.min(tl.where(observed, t, T)))
        high = tl.maximum(high, tl.max(tl.where(observed, t + 1, 0)))
        n += tl.sum(observed.to(tl.int32))
    tl.store(first + row, low)
    tl.store(last + row, high)
    tl.store(count + row, n)


@triton.jit
def block_gains(
    mask, starts, table, t, inside, row, T, TABLE, p, q, k0, HOLES: tl.constexpr, FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Observed, starting, segment-starting, gain, 1 - gain of a block, and the variance after it."""
    observed = tl.load(mask + row * T + t, mask=inside, other=0) != 0
    opens = t < 0
    if FLAGS:
        flags = tl.load(starts + row * T + t, mask=inside, other=0)
        begins, opens = (flags & 2) != 0, (flags & 1) != 0
    else:
        first = tl.load(starts + row)
        begins = t == first
    if HOLES:
        a, b, c, d = variance_maps(observed, begins, q, k0)
        a, b, c, d = tl.associative_scan((a, b, c, d), 0, moebius)
        after = (a * p + b) / (c * p + d)
        gain = tl.where(observed, after, 0.0)
        keep = 1.0 - gain
        p = last_of(after, BLOCK)
    else:
        place = t - tl.load(starts + row)
        gain = tl.load(table + place, mask=observed, other=0.0)
        keep = tl.load(table + TABLE + place, mask=observed, other=1.0)
    return observed, begins, opens, gain, keep, p


@triton.jit
def mean_maps(z, observed, begins, opens, gain, keep, k0, m0):
    """Running products ``x -> a x + b`` over a block, from before it to after every token."""
    prior = begins | opens
    a = tl.where(prior, 0.0, keep)
    b = gain * z + tl.where(prior, tl.where(observed, 1.0 - k0, 1.0) * m0, 0.0)
    return tl.associative_scan((a, b), 0, affine)


@triton.jit
def variance_of_chunks(mask, starts, constants, products, T, CHUNK, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    """The Moebius product over each chunk, four numbers."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q, k0 = tl.load(constants), tl.load(constants + 1)
    zero = 0.0 * q
    ra, rb, rc, rd = zero + 1.0, zero, zero, zero + 1.0
    end = tl.minimum(T, (chunk + 1) * CHUNK)
    for t0 in range(chunk * CHUNK, end, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        observed = tl.load(mask + row * T + t, mask=t < end, other=0) != 0
        if FLAGS:
            begins = (tl.load(starts + row * T + t, mask=t < end, other=0) & 2) != 0
        else:
            begins = t == tl.load(starts + row)
        a, b, c, d = variance_maps(observed, begins, q, k0)
        a, b, c, d = tl.associative_scan((a, b, c, d), 0, moebius)
        a, b, c, d = last_of(a, BLOCK), last_of(b, BLOCK), last_of(c, BLOCK), last_of(d, BLOCK)
        ra, rb, rc, rd = moebius(ra, rb, rc, rd, a, b, c, d)
    at = products + (row * tl.num_programs(1) + chunk) * 4
    tl.store(at, ra)
    tl.store(at + 1, rb)
    tl.store(at + 2, rc)
    tl.store(at + 3, rd)


@triton.jit
def carry_variance(products, constants, variance, CHUNKS):
    """Variance before every chunk, one program a row."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.load(constants + 1)
    for chunk in range(CHUNKS):
        at = row * CHUNKS + chunk
        tl.store(variance + at, p)
        a, b = tl.load(products + at * 4), tl.load(products + at * 4 + 1)
        c, d = tl.load(products + at * 4 + 2), tl.load(products + at * 4 + 3)
        p = (a * p + b) / (c * p + d)


@triton.jit
def means_kernel(
    z, mask, starts, constants, table, variance, mean, maps, out, gains, bad, T, CHUNK, TABLE,
    HOLES: tl.constexpr, FLAGS: tl.constexpr, SPLIT: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means of a row or chunk. SPLIT 0: the whole row. 1: only the affine map of the chunk, to ``maps``.
    2: from the chunk's ``mean``. STORE: the gains too."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = row * tl.num_programs(1) + chunk
    q, k0, m0 = tl.load(constants), tl.load(constants + 1), tl.load(constants + 2)
    p, x, share, wrong = k0, m0, 0.0 * m0 + 1.0, 0
    if HOLES and SPLIT > 0:
        p = tl.load(variance + at)
    if SPLIT == 1:
        x = 0.0 * m0
    if SPLIT == 2:
        x = tl.load(mean + at)
    end = tl.minimum(T, (chunk + 1) * CHUNK)
    for t0 in range(chunk * CHUNK, end, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        observed, begins, opens, gain, keep, p = block_gains(
            mask, starts, table, t, t < end, row, T, TABLE, p, q, k0, HOLES, FLAGS, BLOCK
        )
        value = tl.load(z + row * T + t, mask=observed, other=0.0).to(k0.dtype)
        wrong += tl.sum((observed & ~(tl.abs(value) < float("inf"))).to(tl.int32))
        a, b = mean_maps(value, observed, begins, opens, gain, keep, k0, m0)
        means = a * x + b
        x = last_of(means, BLOCK)
        if SPLIT == 1:
            share = share * last_of(a, BLOCK)
        if SPLIT != 1:
            tl.store(out + row * T + t, means.to(out.dtype.element_ty), mask=t < end)
            if STORE:
                tl.store(gains + row * T + t, gain, mask=t < end)
    if SPLIT == 1:
        tl.store(maps + at * 2, share)
        tl.store(maps + at * 2 + 1, x)
    else:
        tl.store(bad + at, wrong)


@triton.jit
def carry_affine(maps, start, carried, CHUNKS, REVERSE: tl.constexpr):
    """The state before every chunk (after it, if REVERSE), one program a row."""
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(start)
    for i in range(CHUNKS):
        chunk = CHUNKS - 1 - i if REVERSE else i
        at = row * CHUNKS + chunk
        tl.store(carried + at, x)
        x = tl.load(maps + at * 2) * x + tl.load(maps + at * 2 + 1)


@triton.jit
def adjoint_kernel(
    g, mask, starts, gains, table, carried, maps, out, T, CHUNK, TABLE,
    HOLES: tl.constexpr, FLAGS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the observations from that of the means, from right to left. SPLIT as in means_kernel."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = row * tl.num_programs(1) + chunk
    zero = 0.0 * tl.load(table)
    s, share = zero, zero + 1.0
    if SPLIT == 2:
        s = tl.load(carried + at)
    begin, end = chunk * CHUNK, tl.minimum(T, (chunk + 1) * CHUNK)
    blocks = tl.cdiv(end - begin, BLOCK)
    for i in range(blocks):
        t = begin + (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        inside, follows = t < end, (t + 1 < T) & (t < end)
        seen = tl.load(mask + row * T + t, mask=inside, other=0) != 0
        next_seen = tl.load(mask + row * T + t + 1, mask=follows, other=0) != 0
        if FLAGS:
            cut = tl.load(starts + row * T + t + 1, mask=follows, other=0) != 0
        else:
            cut = t + 1 == tl.load(starts + row)
        if HOLES:
            gain = tl.load(gains + row * T + t, mask=seen, other=0.0)
            keep = 1.0 - tl.load(gains + row * T + t + 1, mask=next_seen, other=0.0)
        else:
            place = t - tl.load(starts + row)
            gain = tl.load(table + place, mask=seen, other=0.0)
            keep = tl.load(table + TABLE + place + 1, mask=next_seen, other=1.0)
        a = tl.where(cut | (t + 1 >= T), 0.0, keep)
        a = tl.where(inside, a, 1.0)
        value = tl.load(g + row * T + t, mask=inside, other=0.0).to(zero.dtype)
        a, b = tl.associative_scan((a, value), 0, affine, reverse=True)
        states = a * s + b
        if SPLIT == 1:
            share = share * tl.sum(tl.where(tl.arange(0, BLOCK) == 0, a, 0.0))
        else:
            tl.store(out + row * T + t, (gain * states).to(out.dtype.element_ty), mask=inside)
        s = tl.sum(tl.where(tl.arange(0, BLOCK) == 0, states, 0.0))
    if SPLIT == 1:
        tl.store(maps + at * 2, share)
        tl.store(maps + at * 2 + 1, s)
