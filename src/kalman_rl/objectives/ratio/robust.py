"""A Kalman-filtered ratio that does not follow single spikes: innovations are clipped before they count."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, quote
from kalman_rl.numerics.kalman import Filtered, Gaussian, causal_filter
from kalman_rl.numerics.log_bins import bin_of, counted, edge
from kalman_rl.objectives.ratio.learned import check_memory, observed_series
from kalman_rl.objectives.ratio.transforms import KalmanFiltered, Ratio, token_log_ratio
from kalman_rl.objectives.rollouts import Rollouts

BINS = 256
"""Bins of the size of a step between neighbouring log-ratios, in nats."""
NORMAL_MEDIAN = 0.6744897501960817
"""Median of |x| for a standard normal x."""


@dataclass(frozen=True)
class RobustFiltered:
    """Kalman filter whose innovations are clipped at ``threshold`` predicted standard deviations.

        nu_t = l_t - m_{t-1},   S_t = P_{t-1} + Q + R,   K_t = (P_{t-1} + Q) / S_t
        m_t = m_{t-1} + K_t clip(nu_t, -c sqrt(S_t), c sqrt(S_t)),   P_t = K_t R

    One token moves the ratio by at most ``c K_t sqrt(S_t)``, however far off it is. The variance ignores the
    clipping, so the gains are those of the linear filter. A row without a spike is
    :class:`kalman_rl.objectives.ratio.KalmanFiltered` to the last bit, and so is everything at ``c = inf`` (KPO with
    ``initial_variance = 0``); GRPO is ``Q = inf, c = inf``, and Q = 0 from a diffuse start with ``c = inf``
    ends in GSPO's ratio.

    The threshold is in standard deviations, so R must be the noise there is: with R = 1 nobody's token is a
    spike. ``statistics`` and ``fitted`` learn R from past batches by the median size of the step between
    neighbouring tokens, ``Var(l_t - l_{t-1}) = 2 R + Q``, which spikes hardly move; Q and P0 keep their
    ratio to R. The median is that of a normal; where most tokens are certain and a few are not it is
    smaller than the root mean square, and the gate closes on the few.

    Args:
        process_noise, observation_noise, initial_variance: as in KalmanFiltered, at the start. P0 = R, the
            default, halves the first token and clips it; inf takes it as it is, and a spike there is believed
            for the rest of the sequence (``benchmarks/learning/ratio_filters.py``), so a diffuse start is not robust.
        threshold: c > 0 or inf. At 2 a normal noise loses about 1 % of efficiency, by Huber's
            location estimate.
        memory: in [0, 1), the share of the past statistics a step keeps.
        least: steps between tokens (weighted by memory) to learn from.

    Raises: NumericError for a value outside its range.

    >>> rollouts = Rollouts(torch.zeros(1, 4), torch.ones(1, 4))
    >>> still = {"process_noise": 0.0, "initial_variance": 1.0}  # with c = inf: 0, 0, 2, 1.6
    >>> RobustFiltered(**still, threshold=1.0)(torch.tensor([[0.0, 0.0, 8.0, 0.0]]), rollouts).log_weight
    tensor([[0.0000, 0.0000, 0.2887, 0.2309]])

    Source: Huber's psi in the update, as in Masreliez and Martin 1977; the composition is ours.
    """

    learned: ClassVar[tuple[str, ...]] = ("observation_noise",)

    process_noise: float = 1e-6
    observation_noise: float = 1.0
    initial_variance: float = 1.0
    threshold: float = 2.0
    memory: float = 0.9
    least: float = 100.0

    def __post_init__(self) -> None:
        KalmanFiltered(self.process_noise, self.observation_noise, self.initial_variance)
        check_memory(self.memory, self.least)
        if not self.threshold > 0:
            raise NumericError(
                f"threshold: got {quote(self.threshold)}, expected > 0 standard deviations, or inf"
            )

    def __call__(self, logp: Tensor, rollouts: Rollouts) -> Ratio:
        log_ratio = token_log_ratio(logp, rollouts)
        linear = causal_filter(
            log_ratio.double(),
            rollouts.mask,
            process_noise=self.process_noise,
            observation_noise=self.observation_noise,
            initial_variance=self.initial_variance,
            segment=rollouts.segment,
        )
        (mean, _), info = clipped(linear, log_ratio.double(), rollouts, self.threshold)
        info = info._replace(**{name: value.to(log_ratio.dtype) for name, value in info._asdict().items()})
        return Ratio(log_ratio, torch.where(rollouts.mask, mean, 0.0).to(log_ratio.dtype), info)

    def initial(self) -> Tensor:
        """The state before the first step: zeros (256,), float64, on the CPU."""
        return torch.zeros(BINS, dtype=torch.float64, device="cpu")

    def statistics(self, logp: Tensor, rollouts: Rollouts) -> Tensor:
        """Histogram (256,), float64, of log |l_t - l_{t-1}| over neighbouring tokens, additive over parts.
        Sequences of an unchanged policy and steps across a hole are left out; a step of 0 counts as the smallest."""
        value, gap, alive = observed_series(token_log_ratio(logp, rollouts), rollouts)
        if len(alive) < 2:
            return self.initial().to(value.device)
        alive_at = value.new_tensor(alive)[1:, None] > torch.arange(value.shape[1], device=value.device)
        size = value.diff(dim=0).abs()[alive_at & (gap[1:] == 1)]
        return counted(bin_of(size, BINS), torch.ones_like(size), BINS)

    def fitted(self, state: Tensor) -> RobustFiltered:
        """The filter with all variances moved to the learned R; itself where the state does not determine R."""
        counts = state.detach().double().cpu()
        total = counts.sum().item()
        if not self.least <= total < math.inf or self.process_noise == math.inf:  # NaN fails as well
            return self
        below = counts.cumsum(0)
        bin_ = int((below >= total / 2).nonzero()[0])
        if bin_ in (0, BINS - 1):  # most steps are 0, or beyond reason
            return self
        inside = 1 - (below[bin_].item() - total / 2) / counts[bin_].item()
        deviation = edge(bin_ + inside, BINS) / NORMAL_MEDIAN
        factor = deviation**2 / (2 * self.observation_noise + self.process_noise)
        return dataclasses.replace(
            self,
            process_noise=self.process_noise * factor,
            observation_noise=self.observation_noise * factor,
            initial_variance=self.initial_variance * factor,
        )


def clipped(linear: Filtered, observation: Tensor, rollouts: Rollouts, threshold: float) -> Filtered:
    """The linear filter's result with its means replaced by those of clipped innovations.

    Only rows where the linear filter itself meets a spike are filtered again, by a loop over time on
    one number per row: up to the first spike both are the same. ``gain`` becomes the share of the innovation
    that was used, ``K psi(nu) / nu``; ``log_likelihood`` stays the normal density, of the new innovations.

    Args: linear: float64, of ``observation`` (B, T), finite where masked too. threshold: c > 0 or inf.
    """
    (mean, variance), info = linear
    limit = threshold * info.innovation_variance.sqrt()
    rows = ((info.innovation.abs() > limit) & rollouts.mask).any(1).nonzero().flatten()
    if len(rows) == 0:
        return linear
    restart = torch.zeros_like(rollouts.mask[rows])
    if rollouts.segment is not None:
        restart[:, 1:] = rollouts.segment[rows, 1:] != rollouts.segment[rows, :-1]
    keep = (~restart).double()
    columns = (part[rows].T.contiguous() for part in (observation, info.gain, limit))
    now, means, innovations = observation.new_zeros(len(rows)), [], []
    for kept, z, gain, most in zip(keep.T.contiguous(), *columns):
        now = kept * now
        innovations.append(z - now)
        now = now + gain * innovations[-1].clamp(-most, most)
        means.append(now)
    innovation = torch.where(rollouts.mask[rows], torch.stack(innovations, 1), 0.0)
    total = info.innovation_variance[rows]
    used = torch.where(innovation.abs() > limit[rows], limit[rows] / innovation.abs(), 1.0)
    seen = rollouts.mask[rows] & total.isfinite()
    likelihood = -0.5 * (torch.log(2 * math.pi * total) + innovation**2 / total)
    changes = {
        "gain": info.gain[rows] * used,
        "innovation": innovation,
        "log_likelihood": torch.where(seen, likelihood, 0.0),
    }
    info = info._replace(**{k: getattr(info, k).index_copy(0, rows, v) for k, v in changes.items()})
    return Filtered(Gaussian(mean.index_copy(0, rows, torch.stack(means, 1)), variance), info)
