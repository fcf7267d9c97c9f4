"""Means of the scalar filter of :mod:`kalman_rl.numerics.kalman` for CUDA tensors, and their gradient, in Triton.

The kernels are in ``kernels/filter/cuda_kernels``. Importing this module imports Triton.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kalman_rl.kernels import triton_support
from kalman_rl.kernels.filter.cuda_kernels import (
    adjoint_kernel,
    carry_affine,
    carry_variance,
    means_kernel,
    spans_kernel,
    variance_of_chunks,
)

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BLOCK = 1024
WARPS = 4
LARGEST = 1e18  # of q and P0 in units of R; beyond, the gain is 1 to the last digit, as it is here
LONG = 4096  # tokens
ROWS = 264  # two rows for every multiprocessor of a large GPU; fewer are split along T
START, FIRST = 1, 2  # flags of a token: first of its segment, first observed one of its segment


def means(z: Tensor, mask: Tensor, segment: Tensor | None, *model: Any) -> Tensor | None:
    """Posterior means (B, T) in the type of z. None, for the caller to compute in torch or to report what is
    wrong: noises that differ from token to token, values out of range, observed numbers that are not finite.

    ``model``: process noise, observation noise, mean and variance of the prior. Numbers are computed in the
    type of z, at least float32.
    """
    plan = _plan(z, mask, segment, *model)
    if plan is None:
        return None
    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    fine = _forward(plan, z.detach().contiguous(), out, plan.constants)  # the last argument is not written
    return out if fine else None


class CudaMeans(torch.autograd.Function):
    """:func:`means` with a gradient for the observations; None where means is."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, mask: Tensor, segment: Tensor | None, *model: Any) -> Any:
        plan = _plan(z, mask, segment, *model)
        if plan is None:
            return None
        out = torch.empty_like(z, memory_format=torch.contiguous_format)
        gains = torch.empty_like(out, dtype=plan.constants.dtype) if plan.holes else plan.constants
        if not _forward(plan, z.detach().contiguous(), out, gains, store=plan.holes):
            return None
        ctx.plan = plan
        ctx.save_for_backward(gains)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (gains,) = ctx.saved_tensors
        return _adjoint(ctx.plan, gradient.contiguous(), gains), *(None,) * 6


class LaunchPlan(NamedTuple):
    """What the kernels need besides the numbers of a batch."""

    mask: Tensor  # uint8, contiguous
    starts: Tensor  # (B,) place of the first observed token, or (B, T) flags
    constants: Tensor  # q, k0, m0
    table: Tensor  # (2, T): K and 1 - K
    holes: bool
    flags: bool
    chunks: int
    chunk: int  # tokens, a multiple of BLOCK


def _plan(
    z: Tensor, mask: Tensor, segment: Tensor | None, q: Any, r: Any, m0: float, p0: float
) -> LaunchPlan | None:
    numbers = [x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for x in (q, r)]
    if any(isinstance(x, Tensor) for x in numbers) or not triton_support.usable(z, mask, segment):
        return None
    q, r = map(float, numbers)
    if not (q >= 0 and 0 < r < math.inf and p0 >= 0 and math.isfinite(m0)):
        return None
    if (
        z.dim() != 2
        or z.dtype not in TYPES
        or mask.dtype != torch.bool
        or z.shape != mask.shape
        or not z.numel()
    ):
        return None
    if segment is not None and (segment.shape != z.shape or segment.is_floating_point()):
        return None
    rows, length = z.shape
    bytes_ = mask.contiguous().view(torch.uint8)
    if segment is None:
        first, last, count = spans(bytes_)
        starts, holes = first, bool((last - first > count).any())
    else:
        starts, holes = flags_of(mask, segment), True
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    constants, table = numbers_of(q, r, float(m0), float(p0), table_size(length), dtype, z.device)
    chunks = 1
    if rows < ROWS and length > LONG:
        chunks = min(triton.cdiv(ROWS, rows), triton.cdiv(length, 2 * BLOCK))
    chunk = triton.cdiv(triton.cdiv(length, chunks), BLOCK) * BLOCK
    return LaunchPlan(
        bytes_, starts, constants, table, holes, segment is not None, triton.cdiv(length, chunk), chunk
    )


def spans(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of a uint8 mask (B, T): place of the first observed token (T if none), place after the last,
    count; int32."""
    found = torch.empty((3, len(mask)), dtype=torch.int32, device=mask.device)
    with on(mask):
        spans_kernel[(len(mask),)](mask, *found, mask.shape[1], BLOCK=BLOCK, num_warps=WARPS)
    return found[0], found[1], found[2]


def flags_of(mask: Tensor, segment: Tensor) -> Tensor:
    """START and FIRST of every token, uint8 (B, T)."""
    start = torch.ones_like(mask)
    start[:, 1:] = segment[:, 1:] != segment[:, :-1]
    seen = mask.cumsum(1) - mask.long()
    first = mask & (seen == torch.where(start, seen, 0).cummax(1).values)
    return (START * start + FIRST * first).to(torch.uint8).contiguous()


def table_size(length: int) -> int:
    """A table for rows of this length and somewhat longer ones, so that few are made."""
    return 1 << (length - 1).bit_length()


@functools.lru_cache(maxsize=16)
def numbers_of(
    q: float, r: float, m0: float, p0: float, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``q, k0, m0`` and the table of gains, on the device; remembered."""
    q, start = min(q / r, LARGEST), min(p0 / r, LARGEST)
    gains, p = [], start
    for _ in range(length):
        p = (p + q) / (p + q + 1)
        gains.append(p)
    keeps = [1 / (k + q + 1) for k in (start, *gains[:-1])]
    constants = torch.tensor([q, gains[0], m0], dtype=torch.float64).to(device, dtype)
    return constants, torch.tensor([gains, keeps], dtype=torch.float64).to(device, dtype)


def on(tensor: Tensor) -> Any:
    """The tensor's device as the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _forward(plan: LaunchPlan, z: Tensor, out: Tensor, gains: Tensor, store: bool = False) -> bool:
    """Fill ``out``; False if an observed number is not finite."""
    rows, length = z.shape
    grid, kinds = (
        (rows, plan.chunks),
        {"HOLES": plan.holes, "FLAGS": plan.flags, "BLOCK": BLOCK, "num_warps": WARPS},
    )
    new = functools.partial(torch.empty, dtype=plan.constants.dtype, device=z.device)
    variance = mean = maps = plan.constants
    bad = torch.empty(grid, dtype=torch.int32, device=z.device)
    sizes = (length, plan.chunk, plan.table.shape[1])

    def run(split: int) -> None:
        means_kernel[grid](
            z, plan.mask, plan.starts, plan.constants, plan.table, variance, mean, maps, out, gains, bad, *sizes,
            SPLIT=split, STORE=store and split != 1, **kinds,
        )  # fmt: skip

    with on(z):
        if plan.chunks > 1:
            variance, mean, maps = new(grid), new(grid), new((*grid, 2))
            if plan.holes:
                products = new((*grid, 4))
                args = (plan.mask, plan.starts, plan.constants, products, length, plan.chunk)
                variance_of_chunks[grid](*args, FLAGS=plan.flags, BLOCK=BLOCK, num_warps=WARPS)
                carry_variance[(rows,)](products, plan.constants, variance, plan.chunks, num_warps=1)
            run(1)
            carry_affine[(rows,)](maps, plan.constants[2:], mean, plan.chunks, REVERSE=False, num_warps=1)
        run(2 if plan.chunks > 1 else 0)
    return not bool(bad.any())


def _adjoint(plan: LaunchPlan, gradient: Tensor, gains: Tensor) -> Tensor:
    rows, length = gradient.shape
    out, grid = torch.empty_like(gradient), (rows, plan.chunks)
    new = functools.partial(torch.empty, dtype=plan.constants.dtype, device=gradient.device)
    carried = maps = plan.constants
    kinds = {"HOLES": plan.holes, "FLAGS": plan.flags, "BLOCK": BLOCK, "num_warps": WARPS}

    def run(split: int) -> None:
        adjoint_kernel[grid](
            gradient, plan.mask, plan.starts, gains, plan.table, carried, maps, out, length, plan.chunk,
            plan.table.shape[1], SPLIT=split, **kinds,
        )  # fmt: skip

    with on(gradient):
        if plan.chunks > 1:
            carried, maps = new(grid), new((*grid, 2))
            run(1)
            zero = torch.zeros_like(plan.constants)
            carry_affine[(rows,)](maps, zero, carried, plan.chunks, REVERSE=True, num_warps=1)
        run(2 if plan.chunks > 1 else 0)
    return out
