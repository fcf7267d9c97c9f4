"""Eight numbers as one value: every operation against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from kalman_rl.kernels import jit

pytestmark = pytest.mark.skipif(not jit.usable(), reason="numba is not installed or switched off")
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def vectors():
    from kalman_rl.kernels.filter import vectors

    return vectors


def compiled(function):
    import numba

    return numba.njit(error_model="numpy")(function)


def test_arithmetic_with_vectors_and_numbers(vectors) -> None:
    load, store, same = vectors.load, vectors.store, vectors.broadcast

    @compiled
    def run(a, b, x, out):
        u, v = load(a, 0), load(b, 0)
        store(out, 0, u + v)
        store(out, 1, u - v)
        store(out, 2, u * v)
        store(out, 3, u / v)
        store(out, 4, x - u)
        store(out, 5, u / x)
        store(out, 6, x / u)
        store(out, 7, same(x) + x)

    a, b, x = RNG.normal(size=8), RNG.normal(size=8), 0.3
    out = np.empty((8, 8))
    run(a, b, x, out.reshape(-1))
    expected = [a + b, a - b, a * b, a / b, x - a, a / x, x / a, np.full(8, 2 * x)]
    np.testing.assert_allclose(out, np.stack(expected), rtol=3e-16)  # a reciprocal may stand for a division


def test_masks(vectors) -> None:
    load, store, choose, is_number = vectors.load, vectors.store, vectors.choose, vectors.is_number

    @compiled
    def run(a, b, out):
        u, v = load(a, 0), load(b, 0)
        store(out, 0, choose(is_number(u), u, v))

    a, b = np.array([1.0, np.nan, -np.inf, np.inf, 0.0, np.nan, -0.0, 1e-320]), RNG.normal(size=8)
    out = np.empty(8)
    run(a, b, out)
    assert np.array_equal(out, np.where(np.isnan(a), b, a))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tiles_go_in_and_out(vectors, dtype) -> None:
    transpose_in, transpose_out = vectors.transpose_in, vectors.transpose_out

    @compiled
    def run(source, first, t, tile, target):
        transpose_in(source, first, t, tile)
        transpose_out(tile, target, first, t)

    source = RNG.normal(size=1000).astype(dtype)
    first = np.array([0, 3, 100, 40, 700, 977, 500, 61])  # the last tile ends with the array
    target, tile = np.zeros_like(source), np.empty(128)
    run(source, first, 7, tile, target)
    places = first[:, None] + 7 + np.arange(16)
    assert np.array_equal(tile.reshape(16, 8), source[places].T)
    expected = np.zeros_like(source)
    expected[places] = source[places]
    assert np.array_equal(target, expected)


def test_a_result_is_rounded_to_the_type_it_goes_to(vectors) -> None:
    transpose_out = vectors.transpose_out

    @compiled
    def run(tile, target, first):
        transpose_out(tile, target, first, 0)

    tile, target = RNG.normal(size=128), np.empty(128, np.float32)
    run(tile, target, np.arange(0, 128, 16))
    assert np.array_equal(target.reshape(8, 16), tile.reshape(16, 8).T.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, None])
def test_what_is_not_seen_is_nan_and_never_judged(vectors, dtype, bad) -> None:
    transpose_in_seen, transpose_in_mask = vectors.transpose_in_seen, vectors.transpose_in_mask

    @compiled
    def run(source, mask, first, tile, marks):
        transpose_in_mask(mask, first, 0, marks)
        return transpose_in_seen(source, mask, first, 0, tile)

    source, mask = RNG.normal(size=(8, 16)).astype(dtype), (RNG.random((8, 16)) < 0.6).astype(np.uint8)
    source[mask == 0] = np.nan
    row, token = np.argwhere(mask == 1)[17]
    if bad is not None:
        source[row, token] = bad
    tile, marks, first = np.empty(128), np.empty(128), np.arange(0, 128, 16)
    fine = run(source.reshape(-1), mask.reshape(-1), first, tile, marks)
    assert fine == (bad is None or not np.isnan(bad))  # infinity is left to the state, which it never leaves
    assert np.array_equal(tile.reshape(16, 8), np.where(mask, source, np.nan).T, equal_nan=True)
    assert np.array_equal(marks.reshape(16, 8), mask.T)


def test_machine_code_is_named_after_all_kernel_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba compares one file; a kernel has parts in several."""

    def one(x):
        return x + 1

    def two(x):
        return x + 1

    before = jit.compiled(one).py_func.__qualname__
    monkeypatch.setattr(jit, "_sources", lambda: "other")
    assert before.startswith("one_") and jit.compiled(two).py_func.__qualname__ == "two_other"
