"""The scalar filter of :mod:`kalman_rl.kalman` for CPU tensors, compiled.

Each function returns None for input that it does not take, wrong input included: the caller then computes in
torch, which says what is wrong. States are float64 whatever the type of the observations.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.fast import filter_fields as field_loops
from kalman_rl.fast import filter_gradients as gradient_loops
from kalman_rl.fast import filter_loops as loops
from kalman_rl.fast.jit import compiled, usable
from kalman_rl.fast.memory import empty_like

Noise = Tensor | float
RATIO_LIMIT = 100.0  # of Q / R in means_with_holes
TYPES = (torch.float32, torch.float64)
ZERO_STRIDES = (0, 0, 0, 0)


class Model(NamedTuple):
    """Noises and prior. ``process_noise`` and ``observation_noise`` as given by the caller, detached."""

    process_noise: Noise
    observation_noise: Noise
    initial_mean: float
    initial_variance: float


class Runs(NamedTuple):
    """Where what is observed: flat arrays for the loops."""

    mask: Any  # uint8
    place: Any  # five numbers a run
    order: Any
    clean: int  # runs without holes, first in order
    total: int
    length: int


def means(z: Tensor, mask: Tensor, segment: Tensor | None, *given: Any) -> Tensor | None:
    """Posterior means (B, T) in the type of z, or None. ``given``: the parts of a :class:`Model`."""
    return _means(z, mask, segment, Model(*given))[0]


def _means(
    z: Tensor, mask: Tensor, segment: Tensor | None, model: Model, out: Tensor | None = None
) -> tuple[Tensor | None, Runs | None]:
    if not _fits(z, mask, segment, model):
        return None, None
    z = z.detach().contiguous()
    runs = find_runs(mask, segment)
    out = empty_like(z) if out is None else out
    flat, result = z.numpy().reshape(-1), out.numpy().reshape(-1)
    noises = _numbers(model)
    m0, p0 = model.initial_mean, model.initial_variance
    good = True
    start = 0
    if noises is not None:
        q, r = noises
        if runs.clean:
            table = gains(q, r, p0, runs.length)
            args = (runs.place, runs.order, 0, runs.clean, result)
            good = compiled(loops.means_by_table)(flat, table, m0, *args)
        start = runs.clean
        if start < runs.total and q / r <= RATIO_LIMIT:
            kernel = compiled(loops.means_with_holes)
            args = (runs.place, runs.order, start, runs.total, result)
            good &= kernel(flat, runs.mask, q / r, p0 / r, m0, *args)
            start = runs.total
    if start < runs.total:
        arrays = _arrays(model, z)
        if arrays is None:
            return None, None
        kernel = compiled(loops.means_in_general)
        place = (runs.place, runs.order, start, runs.total, result)
        good &= kernel(flat, runs.mask, *arrays, runs.length, m0, p0, *place)
    return (out, runs) if good else (None, None)


def gradients(
    gradient: Tensor, mask: Tensor, segment: Tensor | None, *given: Any, runs: Runs | None = None
) -> Tensor:
    """The transpose of :func:`means` for input that it takes: gradient of the observations (B, T)."""
    model = Model(*given)
    gradient = gradient.detach().contiguous()
    runs = runs or find_runs(mask, segment)
    out = empty_like(gradient)
    flat, result = gradient.numpy().reshape(-1), out.numpy().reshape(-1)
    noises = _numbers(model)
    start = 0
    if noises is not None and runs.clean:
        table = gains(*noises, model.initial_variance, runs.length)
        start = runs.clean
        compiled(gradient_loops.gradients_by_table)(flat, table, runs.place, runs.order, 0, start, result)
    arrays = _arrays(model, gradient) if start < runs.total else None
    if arrays is not None:
        scratch = torch.empty(2 * runs.length, dtype=torch.float64).numpy()
        args = (runs.length, model.initial_variance, runs.place, runs.order, start, runs.total, scratch)
        compiled(gradient_loops.gradients_in_general)(flat, runs.mask, *arrays, *args, result)
    return out


def fields(z: Tensor, mask: Tensor, segment: Tensor | None, *given: Any) -> tuple[Tensor, ...] | None:
    """Mean, variance, gain, innovation, innovation variance and log-likelihood (B, T), or None."""
    model = Model(*given)
    if not _fits(z, mask, segment, model):
        return None
    z = z.detach().contiguous()
    runs = find_runs(mask, segment)
    out = tuple(empty_like(z) for _ in range(6))
    flat, results = z.numpy().reshape(-1), tuple(field.numpy().reshape(-1) for field in out)
    noises = _numbers(model)
    m0, p0 = model.initial_mean, model.initial_variance
    good, start = True, 0
    if noises is not None and runs.clean:
        table = _table_of_fields(*noises, p0, 1 << (runs.length - 1).bit_length())
        start = runs.clean
        kernel = compiled(field_loops.fields_by_table)
        good = kernel(flat, table, noises[1], m0, p0, runs.place, runs.order, 0, start, *results)
    if start < runs.total:
        arrays = _arrays(model, z)
        if arrays is None:
            return None
        args = (runs.length, m0, p0, runs.place, runs.order, start, runs.total, *results)
        good &= compiled(field_loops.fields_in_general)(flat, runs.mask, *arrays, *args)
    return out if good else None


def differentiable_means(*arguments: Any) -> Tensor | None:
    """:func:`means`, with a gradient for the observations."""
    if not usable(*arguments[:2]):
        return None
    out: Tensor | None = Means.apply(*arguments)
    return out


class Means(torch.autograd.Function):
    """:func:`means` with a gradient for the observations; ``apply`` returns None where means does."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, mask: Tensor, segment: Tensor | None, *model: Any) -> Any:
        _remember(ctx, mask, segment, *model)
        out, ctx.runs = _means(z, mask, segment, Model(*model))
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        if torch.is_grad_enabled():  # a gradient of this gradient may be asked for
            return Gradients.apply(gradient[0], *_recall(ctx)), *(None,) * 6
        return gradients(gradient[0], *_recall(ctx), runs=ctx.runs), *(None,) * 6


class Gradients(torch.autograd.Function):
    """:func:`gradients`. Both are linear maps, so the gradient of this one is the filter from a mean of 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, mask: Tensor, segment: Tensor | None, *model: Any) -> Tensor:
        _remember(ctx, mask, segment, *model)
        return gradients(gradient, mask, segment, *model)

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        mask, segment, q, r, _, p0 = _recall(ctx)
        return Means.apply(gradient[0], mask, segment, q, r, 0.0, p0), *(None,) * 6


def _remember(ctx: Any, mask: Tensor, segment: Tensor | None, *model: Any) -> None:
    ctx.save_for_backward(mask, segment, *(part if isinstance(part, Tensor) else None for part in model))
    ctx.numbers = [None if isinstance(part, Tensor) else part for part in model]


def _recall(ctx: Any) -> tuple[Any, ...]:
    mask, segment, *model = ctx.saved_tensors
    return mask, segment, *(n if t is None else t for t, n in zip(model, ctx.numbers))


def find_runs(mask: Tensor, segment: Tensor | None) -> Runs:
    """Segments, padding and holes of a mask (B, T)."""
    rows, length = mask.shape
    marks, most = _no_marks(), rows
    if segment is not None:
        marks = segment.detach().to(torch.int64).contiguous().numpy().reshape(-1)
        most += int((segment[:, 1:] != segment[:, :-1]).sum())
    work = torch.empty(6 * most + 2 * loops.BUCKETS + 2, dtype=torch.int64).numpy()
    place, order = work[: 5 * most], work[5 * most :]
    flat = mask.contiguous().numpy().reshape(-1).view("uint8")
    clean = compiled(loops.find_runs)(flat, marks, rows, length, place, order)
    return Runs(flat, place, order, clean, int(order[-1]), length)


@functools.cache
def _no_marks() -> Any:
    return torch.empty(0, dtype=torch.int64).numpy()


def gains(q: float, r: float, p0: float, length: int) -> Any:
    """K_t, then 1 - K_t, of a run without holes; remembered for the next call."""
    return _gains(q, r, p0, 1 << (length - 1).bit_length())


@functools.lru_cache(maxsize=8)
def _table_of_fields(q: float, r: float, p0: float, length: int) -> Any:
    table = torch.empty(6 * length, dtype=torch.float64).numpy()
    compiled(field_loops.table_of_fields)(q, r, p0, table, length)
    return table


@functools.lru_cache(maxsize=8)
def _gains(q: float, r: float, p0: float, length: int) -> Any:
    table = torch.empty(2 * length, dtype=torch.float64).numpy()
    compiled(loops.table_of_gains)(q, r, p0, table, length)
    return table


def _fits(z: Tensor, mask: Tensor, segment: Tensor | None, model: Model) -> bool:
    if not usable(z, mask, segment, model.process_noise, model.observation_noise):
        return False
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
        if tensor.dim() > 2 or any(n not in (1, m) for n, m in zip(tensor.shape[::-1], z.shape[::-1])):
            return None
        tensor = tensor.reshape((1,) * (2 - tensor.dim()) + tensor.shape).contiguous()
        rows, tokens = tensor.shape
        strides += [tokens if rows > 1 else 0, 1 if tokens > 1 else 0]
        flat.append(tensor.view(-1))
    q, r = flat
    if not bool((q >= 0).all() & (r > 0).all()):
        return None
    return q.numpy(), r.numpy(), (strides[0], strides[1], strides[2], strides[3])
