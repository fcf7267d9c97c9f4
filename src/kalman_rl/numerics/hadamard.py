"""Fast Walsh-Hadamard transform, and random projections built on it (SRHT).

The Hadamard matrix of size D = 2^k is ``H_1 = 1``, ``H_2n = [[H_n, H_n], [H_n, -H_n]]`` (Sylvester's order):
entries are +1 and -1, ``H H = D I``. Multiplying by it takes ``D log2 D`` additions. Feature vectors of
language models (hundreds to thousands of numbers) are shortened with it before a tracker learns from them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kalman_rl.checks import expect_tensor, is_whole, reading, saved
from kalman_rl.errors import ConfigError, NumericError, ShapeError, quote
from kalman_rl.kernels import hadamard as compiled_hadamard
from kalman_rl.kernels import jit

FORMAT = 1
_BLOCK = 16  # up to this size a small matrix product is faster than passes over the memory
# Up to so many coordinates, for at least so many vectors, a product with the whole matrix is faster than the
# compiled transform, or than the one in torch.
_DENSE_FAST, _DENSE, _DENSE_COUNT = 32, 256, 16


def hadamard_transform(x: Tensor, *, orthonormal: bool = True) -> Tensor:
    """``H x`` along the last dimension, divided by ``sqrt(D)`` by default.

    Args:
        x: (..., D) floating, D a power of two.
        orthonormal: True = an isometry and its own inverse; False = the plain sums and differences.

    Returns:
        (..., D) in the type of x. Gradient flows (the transform is linear and symmetric).

    Raises: ShapeError if x is not floating or D is not a power of two.

    Half-precision input is summed in float32. Source: Sylvester (1867); the factorisation is Yates's.

    >>> hadamard_transform(torch.tensor([1.0, 0.0, 0.0, 1.0]), orthonormal=False)
    tensor([2., 0., 0., 2.])
    """
    expect_tensor("x", x)
    size = x.shape[-1] if x.dim() else 0
    if not x.is_floating_point() or size < 1 or size & (size - 1):
        raise ShapeError(
            f"x: got {x.dtype} {tuple(x.shape)}, expected floating (..., D) with D a power of two; "
            "pad the last dimension with zeros, or use SRHT, which does"
        )
    shape, dtype = x.shape, x.dtype
    out = x.float() if dtype in (torch.float16, torch.bfloat16) else x
    out = out.reshape(-1, size)
    done = 1
    while done < size:
        block = min(_BLOCK, size // done)
        # One Kronecker factor at a time: positions that differ in log2(block) bits are mixed.
        out = out.reshape(-1, size // (block * done), block, done)
        out = torch.einsum("ij,nkjl->nkil", _small_hadamard(block, out), out)
        done *= block
    out = out.reshape(shape)
    return (out / math.sqrt(size) if orthonormal else out).to(dtype)


class SRHT:
    """Subsampled randomised Hadamard transform: ``S x = sqrt(D/d) * P H diag(s) x / sqrt(D)``.

    ``x`` (dimension_in) is padded with zeros to the next power of two D, its signs are flipped at random (s),
    it is rotated by the orthonormal Hadamard matrix and d = dimension_out of its D coordinates are kept
    (P, drawn without replacement). ``E |S x|^2 = |x|^2``; with d = D lengths and angles are kept exactly.

    Args:
        dimension_in: width of the features, >= 1.
        dimension_out: d, from 1 to D.
        seed: of a separate generator; the global random state is neither read nor changed.

    Raises: ConfigError for sizes outside their range.
    Source: Ailon and Chazelle (2009); Tropp (2011, arXiv 1011.1595).

    >>> project = SRHT(3, 4, seed=0)
    >>> x = torch.tensor([3.0, 4.0, 12.0])
    >>> round(project(x).norm().item(), 5)  # d = D = 4: an isometry
    13.0
    """

    def __init__(self, dimension_in: int, dimension_out: int, seed: int = 0) -> None:
        padded = 1 << max(int(dimension_in) - 1, 0).bit_length() if is_whole(dimension_in, 1) else 0
        if not padded or not is_whole(dimension_out, 1, padded):
            raise ConfigError(
                f"dimension_in, dimension_out: got {quote(dimension_in)}, {quote(dimension_out)}, expected "
                f"dimension_in >= 1 and dimension_out from 1 to {padded}, the next power of two"
            )
        if not is_whole(seed):
            raise ConfigError(f"seed: got {quote(seed)}, expected an integer >= 0")
        generator = torch.Generator().manual_seed(seed)
        self.dimension_in, self.dimension_out = dimension_in, dimension_out
        self.signs = (
            torch.randint(2, (self.dimension_in,), generator=generator).mul_(2).sub_(1).to(torch.int8)
        )
        kept = torch.randperm(padded, generator=generator)[: self.dimension_out]
        self.rows = kept.sort().values
        self.padded = padded
        self._dense: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Project (..., dimension_in) to (..., dimension_out), in the type of x.

        Raises: ShapeError for another width. Gradient flows through x.
        """
        expect_tensor("x", x, f"a floating tensor (..., {self.dimension_in})")
        if x.dim() < 1 or x.shape[-1] != self.dimension_in or not x.is_floating_point():
            raise ShapeError(
                f"x: got {x.dtype} {tuple(x.shape)}, expected floating (..., {self.dimension_in}): the width "
                "of the features must not change"
            )
        count = x.numel() // self.dimension_in
        if x.is_cpu and x.dtype in (torch.float32, torch.float64):
            wanted = torch.is_grad_enabled() and x.requires_grad
            fast = not wanted and jit.usable(x, self.signs, self.rows)
            if count >= _DENSE_COUNT and self.dimension_out <= (_DENSE_FAST if fast else _DENSE):
                return x @ self._matrix(x)
            if fast:
                flat = x.detach().reshape(-1, self.dimension_in).contiguous()
                scale = 1 / math.sqrt(self.dimension_out)
                kept = compiled_hadamard.project(flat, self.signs, self.rows, self.padded, scale)
                return kept.reshape(*x.shape[:-1], self.dimension_out)
        signed = x * self.signs.to(device=x.device, dtype=x.dtype)
        signed = torch.nn.functional.pad(signed, (0, self.padded - self.dimension_in))
        kept = hadamard_transform(signed).index_select(-1, self.rows.to(x.device))
        return kept * math.sqrt(self.padded / self.dimension_out)

    def _matrix(self, like: Tensor) -> Tensor:
        """The whole map as a matrix (dimension_in, dimension_out), remembered."""
        if self._dense is None or self._dense.dtype != like.dtype:
            chosen = torch.zeros(self.dimension_out, self.padded, dtype=like.dtype)
            chosen[torch.arange(self.dimension_out), self.rows] = 1.0
            h = hadamard_transform(chosen, orthonormal=False)[:, : self.dimension_in]
            self._dense = ((h * self.signs) / math.sqrt(self.dimension_out)).T.contiguous()
        return self._dense

    def state_dict(self) -> dict[str, Any]:
        """Signs, rows and sizes: a restored projection is the same map, not one drawn again."""
        return {
            "format": FORMAT,
            "dimension_in": self.dimension_in,
            "dimension_out": self.dimension_out,
            "signs": self.signs.clone(),
            "rows": self.rows.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the saved projection.

        Raises: ConfigError for a state of another format or of other sizes; NumericError for values that
        are not signs or rows. Nothing is changed then.
        """
        with reading("SRHT state", state):
            self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        sizes = (self.dimension_in, self.dimension_out)
        names = ("format", "dimension_in", "dimension_out", "signs", "rows")
        form, *got, signs, rows = saved("SRHT state", state, *names)
        if form != FORMAT or tuple(got) != sizes:
            raise ConfigError(
                f"SRHT state: got format {form} with sizes {tuple(got)}, expected format {FORMAT} "
                f"with sizes {sizes}; build SRHT with the saved sizes and a version that reads this format"
            )
        unique = rows.unique()
        if (
            signs.dtype != torch.int8
            or rows.dtype != torch.long
            or rows.shape != self.rows.shape
            or signs.shape != self.signs.shape
            or bool((signs.abs() != 1).any())
            or len(unique) != self.dimension_out
            or int(unique[0]) < 0
            or int(unique[-1]) >= self.padded
        ):
            raise NumericError(
                f"SRHT state: got signs {tuple(signs.shape)} and rows {tuple(rows.shape)}, expected "
                f"{self.dimension_in} signs of +-1 and {self.dimension_out} different rows below "
                f"{self.padded}"
            )
        self.signs, self.rows = signs.to(torch.int8).clone(), rows.long().clone()
        self._dense = None


def _small_hadamard(size: int, like: Tensor) -> Tensor:
    h = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while h.shape[0] < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h
