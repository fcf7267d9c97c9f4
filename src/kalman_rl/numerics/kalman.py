"""The scalar Kalman filter of a random walk, over a batch of token sequences.

A latent value moves by small random steps, and every token shows it through noise::

    x_t = x_{t-1} + w_t,   Var w_t = Q_t        (process noise)
    z_t = x_t + v_t,       Var v_t = R_t        (observation noise)
    x_0 ~ N(initial_mean, P_0)

:func:`predict` and :func:`update` are one step. :func:`causal_filter_loop` takes the steps one after
another and is the definition. :func:`causal_filter` gives the same numbers without a loop over time: two
scans (:mod:`kalman_rl.numerics.scan`) find the state before every token, then the step is taken for all tokens at once.

Source: Kalman 1960, the local-level model. KPO (arXiv:2602.10609) filters token log-ratios with Q/R = 1e-6
and P_0 = 0. Our deviations: a masked token inside a sequence is a missing observation, not a zero; padding
does not age the filter; P_0 = inf starts it from the first observation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl.checks import broadcasts, expect_tensor, is_real
from kalman_rl.errors import NumericError, quote
from kalman_rl.kernels import triton_support
from kalman_rl.kernels.filter import cpu as filter_cpu
from kalman_rl.numerics.arguments import expect_shape, expect_values
from kalman_rl.numerics.scan import mean_before, shifted, variance_before

Noise = Tensor | float  # a variance: one number, or one per token


class Gaussian(NamedTuple):
    """A belief about the latent value; variance 0 = certain, inf = unknown. Both of one shape."""

    mean: Tensor
    variance: Tensor


class Info(NamedTuple):
    """What an update did: gain in [0, 1], innovation z - m, its variance P + R, log-likelihood in nats."""

    gain: Tensor
    innovation: Tensor
    innovation_variance: Tensor
    log_likelihood: Tensor


class Filtered(NamedTuple):
    """The belief after every token and how it came about; every field (B, T)."""

    state: Gaussian
    info: Info


def predict(state: Gaussian, process_noise: Noise) -> Gaussian:
    """Let one token of time pass: the mean stays and the variance grows, ``P' = P + Q``.

    Args:
        state: belief before, any shape; variance in [0, inf].
        process_noise: Q in [0, inf], broadcastable to the state.

    Returns:
        The belief one token later. Gradient flows through every argument; values are not checked.

    >>> predict(Gaussian(torch.tensor(0.5), torch.tensor(1.0)), 0.25)
    Gaussian(mean=tensor(0.5000), variance=tensor(1.2500))
    """
    return Gaussian(state.mean, state.variance + process_noise)


def update(state: Gaussian, observation: Tensor, observation_noise: Noise) -> tuple[Gaussian, Info]:
    """Combine a belief N(m, P) with one observation z of variance R.

    ``K = P / (P + R)``, ``m' = (1 - K) m + K z``, ``P' = (1 - K) P = K R``,
    ``log p(z) = -(log 2 pi (P + R) + (z - m)^2 / (P + R)) / 2``.

    The limits are exact. P = inf: gain 1, variance R, log-likelihood 0 (a diffuse start is conditioned on
    its first observation). R = inf: nothing was observed, so gain, innovation and log-likelihood are 0 and
    z is not read, even if it is NaN; this wins where both are infinite.

    Args:
        state: belief before, any shape; variance in [0, inf].
        observation: z, broadcastable to the state.
        observation_noise: R in (0, inf], broadcastable to the state.

    Returns:
        The belief after, and :class:`Info`. Gradient flows through every argument; values are not checked.

    >>> after, info = update(Gaussian(torch.tensor(0.0), torch.tensor(1.0)), torch.tensor(3.0), 2.0)
    >>> round(after.mean.item(), 4), round(after.variance.item(), 4), round(info.gain.item(), 4)
    (1.0, 0.6667, 0.3333)
    """
    mean, variance = state
    noise = torch.as_tensor(observation_noise, dtype=variance.dtype, device=variance.device)
    missing, diffuse = noise.isinf(), variance.isinf()
    gain, keep, total = _weights(variance, noise)
    z = torch.where(missing, mean, observation)
    log_likelihood = -0.5 * (torch.log(2 * math.pi * total) + (z - mean) ** 2 / total)
    spread = torch.where(missing, variance, torch.where(diffuse, noise, gain * keep * total))
    return Gaussian(keep * mean + gain * z, spread), Info(
        gain=gain,
        innovation=z - mean,
        innovation_variance=variance + noise,
        log_likelihood=torch.where(missing | diffuse, 0.0, log_likelihood),
    )


def causal_filter(
    observation: Tensor,
    mask: Tensor | None = None,
    *,
    process_noise: Noise,
    observation_noise: Noise,
    initial_mean: float = 0.0,
    initial_variance: float = 0.0,
    segment: Tensor | None = None,
) -> Filtered:
    """Filter every row from left to right: token t sees only tokens up to t of its own segment.

    ``P^-_t = P_{t-1} + Q_t``, ``K_t = P^-_t / (P^-_t + R_t)``, ``x_t = (1 - K_t) x_{t-1} + K_t z_t``.

    A masked token between two observed ones of its segment is a missing observation: time passes
    (``P += Q``) and nothing is learned. Masked tokens at the ends of a segment are padding: the state is
    frozen (the prior before, the last state after). At every masked token gain, innovation and
    log-likelihood are 0. A new segment starts from the prior, so packed rows equal unpacked ones.

    Args:
        observation: z (B, T), any floating type; the values under the mask are never read.
        mask: (B, T) bool, True = observed; None = all of them.
        process_noise: Q in [0, inf], a number or broadcastable to (B, T); inf = follow the observations.
        observation_noise: R in (0, inf], likewise, in units of z squared; inf = missing.
        initial_mean: mean of the prior.
        initial_variance: P_0 in [0, inf]; inf = diffuse, the first observation is taken as it is.
        segment: (B, T) integers or None; the filter restarts wherever the value changes along a row.

    Returns:
        :class:`Filtered`, computed in float64 and returned in the type of the observation, at least
        float32. Gradient flows through the observation and through tensor Q and R.

    Raises:
        ShapeError: a shape or type is wrong. NumericError: a value is outside its range.

    Source: as in the module docstring. The variance is a running product of non-negative 2x2 Moebius maps
    and the mean one of affine maps, so nothing cancels, overflows or drifts, whatever Q, R and T.

    >>> z = torch.tensor([[1.0, 3.0, float("nan"), 8.0]])
    >>> diffuse = {"process_noise": 0.0, "observation_noise": 1.0, "initial_variance": math.inf}
    >>> causal_filter(z, z.isfinite(), **diffuse).state.mean  # of a constant: the running mean
    tensor([[1., 2., 2., 4.]])
    """
    mask = _all_if_none(observation, mask)
    model = process_noise, observation_noise, initial_mean, initial_variance
    initial_mean, initial_variance = _check_types(observation, mask, segment, *model)
    model = process_noise, observation_noise, initial_mean, initial_variance
    moving = _wants_gradient(observation)
    fields = mean = None
    if not _wants_gradient(process_noise, observation_noise):
        values = observation.double() if moving else _at_least_single(observation)
        fields = filter_cpu.fields(values, mask, segment, *model)
        mean = filter_cpu.differentiable_means(values, mask, segment, *model) if moving else None
    if fields is not None and not moving:
        return Filtered(Gaussian(*fields[:2]), Info(*fields[2:]))
    tokens = _prepare(observation, mask, process_noise, observation_noise, segment)
    prior = _prior(observation, initial_mean, initial_variance)
    if fields is not None and mean is not None:  # the gradient flows through the means alone
        states = zip((mean, fields[1]), prior, strict=True)
        before = Gaussian(*(shifted(after, tokens.restart, start) for after, start in states))
        return _returned(*_step(before, tokens), observation.dtype)
    constant = all(torch.as_tensor(noise).numel() == 1 for noise in (process_noise, observation_noise))
    if constant and not tokens.hole.any():  # then the variance depends on the count of observed tokens only
        row = observation.new_zeros(1, observation.shape[1])
        full = _prepare(row, row == 0, process_noise, observation_noise, None)
        noises = full.process_noise, full.observation_noise
        variance = variance_before(*noises, full.restart, prior.variance)[0, tokens.earlier]
    else:
        noises = tokens.process_noise, tokens.observation_noise
        variance = variance_before(*noises, tokens.restart, prior.variance)
    gain, keep, _ = _weights(variance + tokens.process_noise, tokens.observation_noise)
    mean = mean_before(gain, keep, tokens.observation, tokens.restart, prior.mean)
    before = Gaussian(mean, variance)
    return _returned(*_step(before, tokens), observation.dtype)


def causal_mean(
    observation: Tensor,
    mask: Tensor | None = None,
    *,
    process_noise: Noise,
    observation_noise: Noise,
    initial_mean: float = 0.0,
    initial_variance: float = 0.0,
    segment: Tensor | None = None,
) -> Tensor:
    """``causal_filter(...).state.mean`` alone (B, T): same arguments, same numbers, a sixth of the memory.

    For CPU tensors with numba installed it is one pass, as fast as ``torch.cumsum`` or faster, and the
    gradient for the observation another; see ``docs/speed.md``. For CUDA tensors with Triton installed it is
    a kernel that computes in the type of the observation, at least float32, and whose gradient has none of
    its own; see ``docs/kernels.md``. Raises as :func:`causal_filter`.

    >>> z = torch.tensor([[4.0, 0.0, 8.0]])
    >>> causal_mean(z, z > 0, process_noise=1.0, observation_noise=1.0, initial_variance=1.0)
    tensor([[2.6667, 2.6667, 6.5455]])
    """
    mask = _all_if_none(observation, mask)
    noises = process_noise, observation_noise
    prior = _check_types(observation, mask, segment, *noises, initial_mean, initial_variance)
    initial_mean, initial_variance = prior
    if not _wants_gradient(*noises):
        moving = _wants_gradient(observation)
        run = filter_cpu.differentiable_means if moving else filter_cpu.means
        given = _at_least_single(observation), mask, segment, *noises, initial_mean, initial_variance
        mean = run(*given)
        if mean is None:
            mean = triton_support.means(*given, gradient=moving)
        if mean is not None:
            return mean
    return causal_filter(
        observation,
        mask,
        process_noise=process_noise,
        observation_noise=observation_noise,
        initial_mean=initial_mean,
        initial_variance=initial_variance,
        segment=segment,
    ).state.mean


def causal_filter_loop(
    observation: Tensor,
    mask: Tensor | None = None,
    *,
    process_noise: Noise,
    observation_noise: Noise,
    initial_mean: float = 0.0,
    initial_variance: float = 0.0,
    segment: Tensor | None = None,
) -> Filtered:
    """The definition of :func:`causal_filter`: same arguments, same result, one token after another."""
    mask = _all_if_none(observation, mask)
    noises = process_noise, observation_noise
    start = _check_types(observation, mask, segment, *noises, initial_mean, initial_variance)
    tokens = _prepare(observation, mask, process_noise, observation_noise, segment)
    prior = _prior(observation, *start)
    state, steps = prior, []
    for t in range(observation.shape[1]):
        token = _Tokens(*(field[:, t] for field in tokens))
        before = Gaussian(*(torch.where(token.restart, p, s) for p, s in zip(prior, state, strict=True)))
        state, info = _step(before, token)
        steps.append((*state, *info))
    mean, variance, *info_fields = (torch.stack(field, dim=1) for field in zip(*steps, strict=True))
    return _returned(Gaussian(mean, variance), Info(*info_fields), observation.dtype)


class _Tokens(NamedTuple):
    """Checked input; every field (B, T), or (B,) for one token of each row. Numbers are float64."""

    observation: Tensor  # 0 where masked
    process_noise: Tensor  # 0 in padding: no time passes
    observation_noise: Tensor  # inf where masked: nothing is learned
    given_noise: Tensor  # the observation noise before masking
    restart: Tensor  # first token of a segment
    hole: Tensor  # masked between observed tokens of its segment
    earlier: Tensor  # number of observed tokens before it in its segment


def _all_if_none(observation: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None and isinstance(observation, Tensor):
        return torch.ones(observation.shape, dtype=torch.bool, device=observation.device)
    return mask  # what is no tensor is refused where types are checked


def _wants_gradient(*values: Noise) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def _at_least_single(values: Tensor) -> Tensor:
    half = values.dtype in (torch.float16, torch.bfloat16)
    return values.float() if half else values


def _step(before: Gaussian, tokens: _Tokens) -> tuple[Gaussian, Info]:
    """Take one token, or all tokens at once where the state before each is known."""
    predicted = predict(before, tokens.process_noise)
    after, info = update(predicted, tokens.observation, tokens.observation_noise)
    return after, info._replace(innovation_variance=predicted.variance + tokens.given_noise)


def _weights(variance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K, 1 - K and P + R, all finite: K and 1 - K by division each, so neither loses digits to the other."""
    missing, diffuse = noise.isinf(), variance.isinf()
    p = torch.where(missing, 0.0, torch.where(diffuse, 1.0, variance))
    r = torch.where(missing, 1.0, torch.where(diffuse, 0.0, noise))
    return p / (p + r), r / (p + r), p + r


def _returned(state: Gaussian, info: Info, dtype: torch.dtype) -> Filtered:
    dtype = torch.promote_types(dtype, torch.float32)
    return Filtered(Gaussian(*(f.to(dtype) for f in state)), Info(*(f.to(dtype) for f in info)))


def _prior(like: Tensor, mean: float, variance: float) -> Gaussian:
    if not math.isfinite(mean):
        raise NumericError(
            f"initial_mean: got {quote(mean)}, expected a finite number; use 0.0 for no change"
        )
    if not variance >= 0:
        raise NumericError(f"initial_variance: got {quote(variance)}, expected [0, inf]; use inf for unknown")
    return Gaussian(*torch.tensor([mean, variance], dtype=torch.float64, device=like.device))


def _check_types(
    z: Tensor, mask: Tensor, segment: Tensor | None, q: Noise, r: Noise, mean: float, variance: float
) -> tuple[float, float]:
    """Refuse what is no tensor or number at all; shapes and values come later. Returns: the prior as floats."""
    expect_tensor("observation", z)
    expect_tensor("mask", mask)
    if segment is not None:
        expect_tensor("segment", segment)
    for name, noise in (("process_noise", q), ("observation_noise", r)):
        if not (
            is_real(noise)
            or isinstance(noise, float)
            or (isinstance(noise, Tensor) and not noise.is_complex())
        ):
            raise NumericError(f"{name}: got {quote(noise, 80)}, expected a number or a tensor of numbers")
    for name, number in (("initial_mean", mean), ("initial_variance", variance)):
        if not (is_real(number) or isinstance(number, float)):
            raise NumericError(f"{name}: got {quote(number, 80)}, expected a number")
    return float(mean), float(variance)


def _prepare(z: Tensor, mask: Tensor, q: Noise, r: Noise, segment: Tensor | None) -> _Tokens:
    """Check the input and find segments, holes and padding."""
    shape = z.shape
    matrix = z.is_floating_point() and len(shape) == 2 and shape[1] > 0
    expect_shape("observation", z, matrix, "floating point (B, T), T >= 1; one row per sequence")
    boolean = mask.dtype == torch.bool and mask.shape == shape
    expect_shape("mask", mask, boolean, f"torch.bool {tuple(shape)} as observation; True = observed token")
    restart = torch.zeros_like(mask)
    restart[:, 0] = True
    if segment is not None:
        integer = not segment.is_floating_point() and segment.shape == shape
        expect_shape(
            "segment", segment, integer, f"integers {tuple(shape)} as observation; number the segments"
        )
        restart[:, 1:] = segment[:, 1:] != segment[:, :-1]
    z = torch.where(mask, z, 0.0).double()
    q, r = (torch.as_tensor(noise, dtype=z.dtype, device=z.device) for noise in (q, r))
    for name, noise in (("process_noise", q), ("observation_noise", r)):
        fits = broadcasts(noise.shape, shape)
        expect_shape(name, noise, fits, f"a number or a tensor broadcastable to {tuple(shape)}; reshape it")
    expect_values("observation", z, z.isfinite(), "a finite number where observed", "mask the token out")
    expect_values("process_noise", q, q >= 0, "[0, inf]", "use 0.0 for a constant latent value")
    expect_values(
        "observation_noise", r, r > 0, "(0, inf]", "use process_noise=inf to follow the observations"
    )
    earlier = _count_before(mask, restart)
    later = _count_before(mask.flip(-1), restart.roll(-1, -1).flip(-1)).flip(-1)
    hole = ~mask & (earlier > 0) & (later > 0)
    moving, noisy = torch.where(mask | hole, q, 0.0), torch.where(mask, r, math.inf)
    return _Tokens(z, moving, noisy, r.expand(shape), restart, hole, earlier)


def _count_before(observed: Tensor, restart: Tensor) -> Tensor:
    """How many tokens of the same segment were observed before each token."""
    count = observed.cumsum(-1) - observed.long()
    return count - torch.where(restart, count, 0).cummax(-1).values
