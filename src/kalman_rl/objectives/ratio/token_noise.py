"""Observation noise that depends on the token: how rounding in the logits reaches a log-probability.

If the logits carry independent errors ``e_j`` of variance sigma^2, then to first order

    d logp_y = e_y - sum_j p_j e_j = (1 - p_y) e_y - sum_{j != y} p_j e_j
    Var d logp_y = sigma^2 [(1 - p_y)^2 + sum_{j != y} p_j^2]

which is sigma^2 times ``Rollouts.score_norm_squared``. The other probabilities sum to ``1 - p_y``, so the bracket
lies between ``(1 - p_y)^2`` (spread over many tokens) and ``2 (1 - p_y)^2`` (all on one). The model used here
keeps what the sampled token alone knows::

    R_t = floor + scale (1 - p_t)^2

Approximations: small errors; independent errors (a shared shift cancels, but an error in the hidden state
that moves logits together does not follow this shape); the concentration of the other tokens is unknown, a
factor of at most 2; the same variance for every logit. The last one holds while the logits share an exponent,
such as 16 to 32 in bfloat16. It fails for logits around 0, where an unlikely token may round less than a
likely one and a constant can fit as well: calibrate, and compare, before believing the shape.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, quote
from kalman_rl.numerics.kalman import causal_filter
from kalman_rl.numerics.likelihood import pack, peak
from kalman_rl.objectives.ratio.learned import check_memory, moved_tokens
from kalman_rl.objectives.ratio.transforms import Ratio, behaviour
from kalman_rl.objectives.rollouts import Rollouts, masked_finite, masked_logp

LOG_GRID: tuple[float, ...] = (*(math.log(10) * (-8 + 12 * i / 36) for i in range(37)), math.inf)
"""Natural logs of floor / scale: 37 values from 1e-8 to 1e4, then inf, a constant noise."""


@dataclass(frozen=True)
class NoiseModel:
    """``R_t = floor + scale (1 - p_t)^2`` in nats^2.

    Args:
        floor: > 0, finite; the noise of a token of probability 1. It must not vanish: a token that is
            certain has log-ratio 0 whatever the policy did elsewhere, and without a floor it would say so
            with certainty.
        scale: >= 0, finite; between sigma^2 and 2 sigma^2 for logit errors of variance sigma^2.

    Raises: NumericError for a value outside its range.

    >>> NoiseModel(0.1, 1.0).variance(torch.tensor([0.0, -math.inf]))
    tensor([0.1000, 1.1000], dtype=torch.float64)
    """

    floor: float = 0.1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.floor < math.inf:
            raise NumericError(
                f"floor: got {quote(self.floor)}, expected 0 < floor < inf (a variance, in nats^2)"
            )
        if not 0 <= self.scale < math.inf:
            raise NumericError(
                f"scale: got {quote(self.scale)}, expected 0 <= scale < inf (a variance, in nats^2)"
            )

    def variance(self, logp: Tensor) -> Tensor:
        """R, float64 and detached, of tokens whose log-probability under the old policy is ``logp``."""
        return self.floor + self.scale * one_minus_p_squared(logp)


def one_minus_p_squared(logp: Tensor) -> Tensor:
    """``(1 - p)^2`` in float64, exact to the last digits near p = 1."""
    return torch.expm1(logp.detach().double()).square()


def calibrate(log_ratio: Tensor, logp_old: Tensor, mask: Tensor) -> NoiseModel:
    """The most likely noise model where the true log-ratio is 0: ``l_t ~ N(0, floor + scale (1 - p_t)^2)``.

    Fit it on tokens that two computations of the *same* policy disagree on: behaviour policy against trainer, or one
    precision against another.

    Args:
        log_ratio: l (B, T), nats; a ratio of a policy to itself that is exactly 0 everywhere teaches nothing.
        logp_old: (B, T) log-probabilities of the tokens, for p.
        mask: (B, T) bool, tokens to use.

    Returns:
        :class:`NoiseModel` with ``floor / scale`` in [1e-8, 1e4], or ``scale = 0``. Both are >= 0 by
        construction, since the grid runs over their ratio.

    Raises: ShapeError, NumericError for bad input, and where every log-ratio is 0 or no token is used.

    >>> p = torch.linspace(0.1, 0.9, 1000, dtype=torch.float64)[None]
    >>> noise = 0.05 * (1 - p) * torch.tensor([1.0, -1.0]).repeat(500)  # exactly of the model's size
    >>> round(calibrate(noise, p.log(), p > 0).scale, 6)
    0.0025
    """
    log_ratio = masked_finite(
        "log_ratio", log_ratio.detach(), mask, "finite log-ratios where the mask is True"
    )
    logp_old = masked_logp("logp_old", logp_old.detach(), mask)
    model = _model(noise_sums(log_ratio, logp_old, mask), least=1.0)
    if model is None:
        raise NumericError(
            f"log_ratio: got {int(mask.sum())} tokens with log-ratios that are all 0, expected noise to "
            "measure; compare two computations of the same policy that differ in precision or engine"
        )
    return model


def noise_sums(log_ratio: Tensor, logp_old: Tensor, mask: Tensor) -> Tensor:
    """The sums of :mod:`kalman_rl.numerics.likelihood` for ``g = (rho + f) / (rho + 1)``, f = (1 - p)^2, over the
    grid of rho = floor / scale: float64 (77,), additive, detached.

    Args: log_ratio: (B, T) noise, nats. logp_old: (B, T) nats, for p. mask: (B, T) bool, the tokens that count.
    """
    square, f = log_ratio.detach().double()[mask].square(), one_minus_p_squared(logp_old)[mask]
    quadratic, log_determinant = [square.sum()], [square.new_zeros(())]  # rho = inf: g = 1
    for log_rho in LOG_GRID[-2::-1]:  # one at a time: the batch may be large
        rho = math.exp(log_rho)
        g = (rho + f) / (rho + 1)
        quadratic.append((square / g).sum())
        log_determinant.append(g.log().sum())
    return pack(len(f), torch.stack(quadratic[::-1]), torch.stack(log_determinant[::-1]))


def _model(state: Tensor, least: float) -> NoiseModel | None:
    found = peak(state, LOG_GRID, least)
    if found is None:
        return None
    certain = 1 / (1 + math.exp(-found.log_shape))
    return NoiseModel(found.scale * certain, found.scale * (1 - certain))


@dataclass(frozen=True)
class NoiseFiltered:
    """Kalman-filtered ratio with the observation noise ``R_t = floor + scale (1 - p_t)^2`` of each token.

        x_t = x_{t-1} + w_t,  Var w = Q;    l_t = x_t + v_t,  Var v_t = R_t

    With ``scale = 0`` it is :class:`kalman_rl.objectives.ratio.KalmanFiltered` with R = floor, to the last bit (so
    KPO with ``initial_variance = 0``). ``Q = inf`` is GRPO's token ratio. Q = 0 from a diffuse start ends in a
    weighted sequence mean, weights ``1 / R_t``, which is GSPO's where ``scale = 0``.

    A caution: a token of probability near 1 has a small noise *and* a small log-ratio, because a shift of
    its logit moves its log-probability by ``1 - p`` of that. Trusting it pulls the ratio of its neighbours
    towards 1; the floor limits how much. At the defaults one token counts at most 11 times another.

    With ``behaviour`` the ratio is to the behaviour policy, ``l_t = logp_t - logp_behaviour_t`` and p the behaviour
    policy's, so the filter has engine noise to remove; and every batch shows that noise alone in
    ``logp_old - logp_behaviour``, two computations of one policy. From it ``statistics`` and ``fitted``
    learn floor and scale, and Q keeps its ratio to ``floor + scale``. Without ``behaviour`` there is nothing
    to learn from: an on-policy log-ratio to the old policy is 0 up to rounding, and any later one has moved.

    Args:
        floor, scale: as in :class:`NoiseModel`; with ``behaviour`` the start values.
        process_noise: Q in [0, inf], nats^2 per token.
        initial_variance: P0 in [0, inf]; inf believes the first token.
        behaviour: see above; then logp_behaviour is needed.
        memory, least: as in :class:`kalman_rl.objectives.ratio.AutoFiltered`.

    Raises: NumericError for a value outside its range; ConfigError without a needed logp_behaviour.
    Source: ours.
    """

    floor: float = 0.1
    scale: float = 1.0
    process_noise: float = 1e-6
    initial_variance: float = math.inf
    behaviour: bool = False
    memory: float = 0.9
    least: float = 100.0

    def __post_init__(self) -> None:
        check_memory(self.memory, self.least)
        _ = self.model
        for name in ("process_noise", "initial_variance"):
            if not getattr(self, name) >= 0:
                raise NumericError(f"{name}: got {getattr(self, name)}, expected 0 <= value <= inf")

    @property
    def model(self) -> NoiseModel:
        """The noise model in use."""
        return NoiseModel(self.floor, self.scale)

    @property
    def learned(self) -> tuple[str, ...]:
        """Settings that are learned: none without ``behaviour``."""
        return ("floor", "scale") if self.behaviour else ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Inputs beyond log-probabilities and mask."""
        return ("logp_behaviour",) if self.behaviour else ()

    def __call__(self, logp: Tensor, rollouts: Rollouts) -> Ratio:
        before = behaviour(rollouts) if self.behaviour else rollouts.logp_old
        log_ratio = torch.where(rollouts.mask, logp.detach() - before, 0.0)
        state, info = causal_filter(
            log_ratio,
            rollouts.mask,
            process_noise=self.process_noise,
            observation_noise=self.model.variance(before) if self.scale > 0 else self.floor,
            initial_variance=self.initial_variance,
            segment=rollouts.segment,
        )
        return Ratio(log_ratio, torch.where(rollouts.mask, state.mean, 0.0), info)

    def initial(self) -> Tensor:
        """The state before the first step: zeros (77,), float64, on the CPU."""
        return torch.zeros(1 + 2 * len(LOG_GRID), dtype=torch.float64, device="cpu")

    def statistics(self, logp: Tensor, rollouts: Rollouts) -> Tensor:
        """Sums over the behaviour policy's noise in this part of a step, float64 (77,), additive over parts; zeros
        without ``behaviour``, and where behaviour policy and old policy agree on a whole sequence up to rounding."""
        if not self.behaviour:
            return self.initial().to(rollouts.logp_old.device)
        before = behaviour(rollouts)
        noise = rollouts.logp_old - before
        row, column, _ = moved_tokens(noise, rollouts)
        differs = torch.zeros_like(rollouts.mask)
        differs[row, column] = True
        return noise_sums(noise, before, differs)

    def fitted(self, state: Tensor) -> NoiseFiltered:
        """The filter with the most likely noise model; itself where the state does not determine one."""
        model = _model(state, self.least) if self.behaviour else None
        if model is None:
            return self
        moved = (model.floor + model.scale) / (self.floor + self.scale)
        return dataclasses.replace(
            self, floor=model.floor, scale=model.scale, process_noise=self.process_noise * moved
        )
