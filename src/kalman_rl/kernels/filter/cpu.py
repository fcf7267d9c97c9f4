"""The scalar filter of :mod:`kalman_rl.numerics.kalman` for CPU tensors, compiled.

This module is the one way to the vector kernels of the folder. They exist because one row waits for its last addition
at every token, eight rows side by side fill that time, and numba packs neighbouring scalars only by luck.

Each function returns None for input that it does not take, wrong input included: the caller then computes in
torch, which reports what is wrong. States are float64 whatever the type of the observations.
"""

from __future__ import annotations

import functools
import math
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.checks import broadcasts
from kalman_rl.kernels.filter import cpu_fields as field_loops
from kalman_rl.kernels.jit import compiled, module, usable
from kalman_rl.kernels.memory import empty_like

Noise = Tensor | float
RATIO_LIMIT = 100.0  # of Q / R in means_with_holes
TYPES = (torch.float32, torch.float64)


class Model(NamedTuple):
    """Noises and prior. ``process_noise`` and ``observation_noise`` as given by the caller, detached."""

    process_noise: Noise
    observation_noise: Noise
    initial_mean: float
    initial_variance: float


class Segments(NamedTuple):
    """Where what is observed: flat arrays for the loops."""

    mask: Any  # uint8
    place: Any  # five numbers a segment
    order: Any
    clean: int  # segments without holes, first in order
    total: int
    length: int


def means(z: Tensor, mask: Tensor, segment: Tensor | None, *given: Any) -> Tensor | None:
    """Posterior means (B, T) in the type of z, or None. ``given``: the parts of a :class:`Model`."""
    if not usable(z, mask, segment, *given[:2]):
        return None
    return _means(z, mask, segment, Model(*given))[0]


def _means(
    z: Tensor, mask: Tensor, segment: Tensor | None, model: Model
) -> tuple[Tensor | None, Segments | None]:
    if not _fits(z, mask, segment, model):
        return None, None
    z = z.detach().contiguous()
    out = empty_like(z)  # before small blocks could take a piece of its place
    segments = find_segments(mask, segment)
    flat, result = z.numpy().reshape(-1), out.numpy().reshape(-1)
    noises = _numbers(model)
    m0, p0 = model.initial_mean, model.initial_variance
    good, start, loops = True, 0, module("filter.cpu_loops")
    place, order, total = segments.place, segments.order, segments.total
    if noises is not None:
        q, r = noises
        if segments.clean:
            kernel = compiled(loops.means_by_table)
            table = gains(q, r, p0, segments.length)
            good = kernel(flat, table, m0, place, order, 0, segments.clean, *scratch(), result)
        start = segments.clean
        if start < total and q / r <= RATIO_LIMIT:
            kernel = compiled(loops.means_with_holes)
            variances, no_gains = (q / r, p0 / r), result[:0]
            good &= kernel(
                flat, segments.mask, *variances, m0, place, order, start, total, *scratch(), result, no_gains
            )
            start = total
    if start < total:
        arrays = _arrays(model, z)
        if arrays is None:
            return None, None
        kernel = compiled(loops.means_in_general)
        prior = segments.length, m0, p0
        good &= kernel(flat, segments.mask, *arrays, *prior, place, order, start, total, *scratch(), result)
    return (out, segments) if good else (None, None)


def gradients(
    gradient: Tensor, mask: Tensor, segment: Tensor | None, *given: Any, segments: Segments | None = None
) -> Tensor:
    """The transpose of :func:`means` for input that it takes: gradient of the observations (B, T)."""
    model = Model(*given)
    gradient = gradient.detach().contiguous()
    out = empty_like(gradient)
    segments = segments or find_segments(mask, segment)
    flat, result = gradient.numpy().reshape(-1), out.numpy().reshape(-1)
    noises = _numbers(model)
    start, loops, p0 = 0, module("filter.cpu_gradients"), model.initial_variance
    place, order, total = segments.place, segments.order, segments.total
    if noises is not None and segments.clean:
        start, table = segments.clean, gains(*noises, p0, segments.length)
        compiled(loops.gradients_by_table)(flat, table, place, order, 0, start, *scratch(), result)
    if start == total:
        return out
    rest = (
        place,
        order,
        start,
        total,
        *scratch(),
        torch.empty(8 * segments.length, dtype=torch.float64).numpy(),
    )
    if noises is not None and noises[0] / noises[1] <= RATIO_LIMIT:
        q, r = noises
        compiled(loops.gradients_with_holes)(flat, segments.mask, q / r, p0 / r, *rest, result)
    elif (arrays := _arrays(model, gradient)) is not None:
        compiled(loops.gradients_in_general)(flat, segments.mask, *arrays, segments.length, p0, *rest, result)
    return out


def fields(z: Tensor, mask: Tensor, segment: Tensor | None, *given: Any) -> tuple[Tensor, ...] | None:
    """Mean, variance, gain, innovation, innovation variance and log-likelihood (B, T), or None."""
    model = Model(*given)
    if not usable(z, mask, segment, *given[:2]) or not _fits(z, mask, segment, model):
        return None
    z = z.detach().contiguous()
    out = tuple(empty_like(z) for _ in range(6))
    segments = find_segments(mask, segment)
    flat, results = z.numpy().reshape(-1), tuple(field.numpy().reshape(-1) for field in out)
    noises = _numbers(model)
    m0, p0 = model.initial_mean, model.initial_variance
    good, start = True, 0
    if noises is not None and segments.clean:
        table = _table_of_fields(*noises, p0, 1 << (segments.length - 1).bit_length())
        start = segments.clean
        kernel = compiled(field_loops.fields_by_table)
        good = kernel(flat, table, noises[1], m0, p0, segments.place, segments.order, 0, start, *results)
    if start < segments.total:
        arrays = _arrays(model, z)
        if arrays is None:
            return None
        args = (segments.length, m0, p0, segments.place, segments.order, start, segments.total, *results)
        good &= compiled(field_loops.fields_in_general)(flat, segments.mask, *arrays, *args)
    return out if good else None


def differentiable_means(z: Tensor, mask: Tensor, segment: Tensor | None, *given: Any) -> Tensor | None:
    """:func:`means`, with a gradient for the observations."""
    if not usable(z, mask, segment, *given[:2]):
        return None
    out: Tensor | None = CpuMeans.apply(z, mask, segment, Model(*given))
    return out


class CpuMeans(torch.autograd.Function):
    """:func:`means` with a gradient for the observations; ``apply`` returns None where means does."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, mask: Tensor, segment: Tensor | None, model: Model) -> Any:
        _remember(ctx, mask, segment, model)
        out, ctx.segments = _means(z, mask, segment, model)
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        (mask, *_), (segment, model) = ctx.saved_tensors, ctx.rest
        if torch.is_grad_enabled():  # a gradient of this gradient may be asked for
            return Gradients.apply(gradient[0], mask, segment, model), None, None, None
        return gradients(gradient[0], mask, segment, *model, segments=ctx.segments), None, None, None


class Gradients(torch.autograd.Function):
    """:func:`gradients`. Both are linear maps, so the gradient of this one is the filter from a mean of 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, mask: Tensor, segment: Tensor | None, model: Model) -> Tensor:
        _remember(ctx, mask, segment, model)
        return gradients(gradient, mask, segment, *model)

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        (mask, *_), (segment, model) = ctx.saved_tensors, ctx.rest
        return CpuMeans.apply(gradient[0], mask, segment, model._replace(initial_mean=0.0)), None, None, None


def _remember(ctx: Any, mask: Tensor, segment: Tensor | None, model: Model) -> None:
    """All tensors are saved the way that notices a change in place."""
    others = (segment, model.process_noise, model.observation_noise)
    ctx.save_for_backward(mask, *(part for part in others if isinstance(part, Tensor)))
    ctx.rest = segment, model


def find_segments(mask: Tensor, segment: Tensor | None) -> Segments:
    """Segments, padding and holes of a mask (B, T)."""
    rows, length = mask.shape
    marks, place, order = room_for_segments(rows, segment)
    flat = mask.contiguous().numpy().reshape(-1).view("uint8")
    clean = compiled(module("filter.segments").find_segments)(flat, marks, rows, length, place, order)
    return Segments(flat, place, order, clean, int(order[-1]), length)


def room_for_segments(rows: int, segment: Tensor | None) -> tuple[Any, Any, Any]:
    """``segment, segments, order`` of the kernel ``find_segments``, the last two empty."""
    np, marks, most = module("filter.segments").np, _no_marks(), rows
    if segment is not None:
        marks = segment.detach().to(torch.int64).contiguous().numpy().reshape(-1)
        most += int((segment[:, 1:] != segment[:, :-1]).sum())
    work = np.empty(6 * most + 2 * module("filter.segments").BUCKETS + 2, "int64")
    return marks, work[: 5 * most], work[5 * most :]


_kept = threading.local()


def scratch() -> tuple[Any, Any]:
    """Places (24) and three tiles for eight segments, of this thread. torch's memory begins with a line of the cache;
    a vector across two lines costs half as much again."""
    if not hasattr(_kept, "scratch"):
        work = torch.empty(24 + 3 * 128, dtype=torch.float64).numpy()
        _kept.scratch = work[:24].view("int64"), work[24:]
    found: tuple[Any, Any] = _kept.scratch
    return found


@functools.cache
def _no_marks() -> Any:
    return module("filter.segments").np.empty(0, "int64")


def gains(q: float, r: float, p0: float, length: int) -> Any:
    """K_t, then 1 - K_t, of a segment without holes; remembered for the next call."""
    return _gains(q, r, p0, 1 << (length - 1).bit_length())


@functools.lru_cache(maxsize=8)
def _table_of_fields(q: float, r: float, p0: float, length: int) -> Any:
    table = module("filter.segments").np.empty(6 * length)
    compiled(field_loops.table_of_fields)(q, r, p0, table, length)
    return table


@functools.lru_cache(maxsize=8)
def _gains(q: float, r: float, p0: float, length: int) -> Any:
    table = module("filter.segments").np.empty(2 * length)
    compiled(module("filter.cpu_loops").table_of_gains)(q, r, p0, table, length)
    return table


def _fits(z: Tensor, mask: Tensor, segment: Tensor | None, model: Model) -> bool:
    return (
        z.dtype in TYPES
        and z.dim() == 2
        and z.shape[1] > 0
        and mask.dtype == torch.bool
        and mask.shape == z.shape
        and (segment is None or (segment.shape == z.shape and _integer(segment)))
        and math.isfinite(model.initial_mean)
        and model.initial_variance >= 0
    )


def _integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _numbers(model: Model) -> tuple[float, float] | None:
    """Q and R where each is one number in its range and R is finite."""
    noises = []
    for noise in (model.process_noise, model.observation_noise):
        if isinstance(noise, Tensor):
            if noise.numel() != 1:
                return None
            noise = noise.item()
        noises.append(float(noise))
    q, r = noises
    return (q, r) if q >= 0 and 0 < r < math.inf else None


def _arrays(model: Model, z: Tensor) -> tuple[Any, Any, tuple[int, int, int, int]] | None:
    """Q and R flat, float64, with their strides along rows and tokens; None if one is out of range."""
    flat, strides = [], []
    for noise in (model.process_noise, model.observation_noise):
        if not isinstance(noise, Tensor):
            noise = torch.full((1, 1), noise, dtype=torch.float64)
        tensor = noise.detach().to(torch.float64)
        if not broadcasts(tensor.shape, z.shape):
            return None
        tensor = tensor.reshape((1,) * (2 - tensor.dim()) + tensor.shape).contiguous()
        rows, tokens = tensor.shape
        strides += [tokens if rows > 1 else 0, 1 if tokens > 1 else 0]
        flat.append(tensor.view(-1))
    q, r = flat
    if not bool((q >= 0).all() & (r > 0).all()):
        return None
    return q.numpy(), r.numpy(), (strides[0], strides[1], strides[2], strides[3])
