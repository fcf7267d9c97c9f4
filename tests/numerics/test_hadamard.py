"""The fast transform against SciPy's matrix, and what a random projection must keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.errors import ConfigError, NumericError, ShapeError
from kalman_rl.kernels import jit
from kalman_rl.numerics.hadamard import SRHT, hadamard_transform

SIZES = [2**k for k in range(13)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(size: int) -> Tensor:
    return torch.from_numpy(scipy.linalg.hadamard(size).astype(np.float64))


@pytest.mark.parametrize("size", SIZES)
def test_equals_scipys_matrix(size: int) -> None:
    x = normal(3, 2, size)
    torch.testing.assert_close(
        hadamard_transform(x, orthonormal=False), x @ matrix(size), rtol=1e-12, atol=1e-12 * size
    )
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 256, 1024])
def test_error_is_at_most_twice_the_matrix_products(size: int, dtype: torch.dtype) -> None:
    x = normal(64, size).to(dtype)
    exact = x.double() @ matrix(size) / math.sqrt(size)
    fast = hadamard_transform(x)
    plain = (x @ matrix(size).to(dtype)) / math.sqrt(size)
    assert fast.dtype == dtype
    error, allowed = (fast.double() - exact).norm(), (plain.double() - exact).norm()
    assert 0 < error <= 2 * allowed


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from(SIZES[:8]), batch=st.lists(st.integers(0, 3), max_size=3), seed=st.integers(0, 99)
)
def test_any_batch_shape_and_linearity(size: int, batch: list[int], seed: int) -> None:
    x, y = normal(*batch, size, seed=seed), normal(*batch, size, seed=seed + 100)
    out = hadamard_transform(x - 2 * y)
    assert out.shape == x.shape
    torch.testing.assert_close(out, hadamard_transform(x) - 2 * hadamard_transform(y), rtol=1e-10, atol=1e-10)


def test_gradient_and_non_contiguous_input() -> None:
    x = normal(8, 3).T.requires_grad_()
    assert torch.autograd.gradcheck(hadamard_transform, (x,))
    torch.testing.assert_close(hadamard_transform(x), hadamard_transform(x.contiguous()))


@pytest.mark.parametrize(
    "bad", [torch.zeros(3), torch.zeros(2, 12), torch.zeros(4).long(), torch.tensor(1.0)]
)
def test_bad_input(bad: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"^x: got .*power of two; pad"):
        hadamard_transform(bad)


# ---- projection


@pytest.mark.parametrize("width", [1, 3, 8, 100, 896])
def test_full_width_is_an_isometry(width: int) -> None:
    padded = 1 << max(width - 1, 0).bit_length()
    x = normal(5, width)
    projected = SRHT(width, padded, seed=7)(x)
    torch.testing.assert_close(projected @ projected.T, x @ x.T, rtol=1e-12, atol=1e-12)


def test_equals_its_definition() -> None:
    project = SRHT(12, 5, seed=3)
    x = normal(4, 12)
    padded = torch.nn.functional.pad(x * project.signs, (0, 4))
    expected = math.sqrt(16 / 5) * (padded @ matrix(16) / 4)[:, project.rows]
    torch.testing.assert_close(project(x), expected)
    assert len(project.rows.unique()) == 5


@pytest.mark.parametrize("numba", ["", "1"])
@pytest.mark.parametrize("kept", [1, 3, 30, 64, 300])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 15, 16, 32, 100, 600])
def test_every_way_of_computing_it_agrees(monkeypatch, width: int, kept: int, numba: str) -> None:
    """Compiled, as one matrix, by torch's passes (with gradient); few and many vectors; float32."""
    kept = min(kept, 1 << max(width - 1, 0).bit_length())
    monkeypatch.setenv(jit.SWITCH, numba)
    project = SRHT(width, kept, seed=5)
    x = normal(20, 3, width)
    padded = torch.nn.functional.pad(x * project.signs, (0, project.padded - width))
    exact = (padded @ matrix(project.padded))[..., project.rows] / math.sqrt(kept)
    for rows in (slice(0, 20), slice(0, 1)):
        got = project(x[rows])
        assert got.dtype == x.dtype and got.shape == (*x[rows].shape[:-1], kept) == (len(got), 3, kept)
        torch.testing.assert_close(got, exact[rows], rtol=1e-11, atol=1e-11)
        single = project(x[rows].float())
        torch.testing.assert_close(single, exact[rows].float(), rtol=1e-5, atol=2e-5)
        leaf = x[rows].clone().requires_grad_()
        torch.testing.assert_close(project(leaf), got, rtol=1e-11, atol=1e-11)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(project(strided), project(x), rtol=0, atol=1e-12)
    assert project(x[:0]).shape == (0, 3, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_projected_too(dtype: torch.dtype) -> None:
    project, x = SRHT(12, 5), normal(20, 12).to(dtype)
    got = project(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), project(x.double()), rtol=0.02, atol=0.02)


def test_the_matrix_follows_a_loaded_state() -> None:
    one, other, x = SRHT(100, 8, seed=1), SRHT(100, 8, seed=2), normal(32, 100)
    other(x)  # remembers its matrix
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), one(x)) and set(one.state_dict()) == {
        "format",
        "dimension_in",
        "dimension_out",
        "signs",
        "rows",
    }


def test_squared_length_is_kept_on_average() -> None:
    """Over draws: the mean of |Sx|^2 / |x|^2 is 1 within three standard errors."""
    x = normal(30)
    ratio = torch.stack([SRHT(30, 4, seed=s)(x).square().sum() for s in range(3000)]) / x.square().sum()
    error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - 1) < 3 * error and error < 0.02


def test_own_generator_and_seed() -> None:
    before = torch.get_rng_state()
    one, same, other = SRHT(100, 16, seed=1), SRHT(100, 16, seed=1), SRHT(100, 16, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    x = normal(100)
    assert torch.equal(one(x), same(x)) and not torch.equal(one(x), other(x))
    assert torch.equal(SRHT(100, 16)(x), SRHT(100, 16, seed=0)(x))


def test_state_restores_the_same_map() -> None:
    one, other = SRHT(100, 16, seed=1), SRHT(100, 16, seed=2)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(normal(100)), other(normal(100)))


def test_bad_state_changes_nothing() -> None:
    project = SRHT(10, 4, seed=1)
    good, x = project.state_dict(), normal(10)
    before = project(x)
    for change, error in (
        ({"format": 0}, ConfigError),
        ({"dimension_in": 11}, ConfigError),
        ({"signs": torch.zeros(10)}, NumericError),
        ({"rows": torch.tensor([0, 1, 2, 2])}, NumericError),
        ({"rows": torch.tensor([0, 1, 2, 16])}, NumericError),
    ):
        with pytest.raises(error, match="^SRHT state: got"):
            project.load_state_dict({**good, **change})
    assert torch.equal(project(x), before)


@pytest.mark.parametrize(("width", "kept"), [(0, 1), (4, 0), (4, 5), (5, 9)])
def test_bad_sizes(width: int, kept: int) -> None:
    with pytest.raises(ConfigError, match=r"^dimension_in, dimension_out: got"):
        SRHT(width, kept)


def test_wrong_width() -> None:
    with pytest.raises(ShapeError, match=r"expected floating \(\.\.\., 10\)"):
        SRHT(10, 4)(torch.zeros(2, 9))
