"""A Kalman-filtered ratio whose noises are learned from past batches by maximum likelihood.

For the local-level model from a diffuse start, ``l_t`` given the tokens before it is ``N(m_t, R S_t)`` where
m and S depend on ``q = Q / R`` alone. Filters for a fixed grid of q run side by side with R = 1 and keep the
three sums of :mod:`kalman_rl.numerics.likelihood`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, quote
from kalman_rl.numerics.likelihood import pack, peak
from kalman_rl.objectives.ratio.transforms import KalmanFiltered, Ratio, token_log_ratio
from kalman_rl.objectives.rollouts import Rollouts

LOG_GRID: tuple[float, ...] = (-math.inf, *(math.log(10) * (-8 + 10 * i / 31) for i in range(32)))
"""Natural logs of the grid of q: 0, then 32 values from 1e-8 to 1e2."""


def check_memory(memory: float, least: float) -> None:
    """Refuse a share of the past outside [0, 1) and an amount to learn from outside (0, inf). Raises: NumericError."""
    if not 0 <= memory < 1:
        raise NumericError(
            f"memory: got {quote(memory)}, expected [0, 1), the share of the past a step keeps"
        )
    if not 0 < least < math.inf:
        raise NumericError(
            f"least: got {quote(least)}, expected a finite number of tokens > 0 to learn from, weighted by memory"
        )


@dataclass(frozen=True)
class AutoFiltered:
    """:class:`kalman_rl.objectives.ratio.KalmanFiltered` from a diffuse start, with learned Q and R.

    Used as it is, it filters with its start values. A trainer learns::

        state = initial();   ratio = fitted(state);   after a step:  state = memory state + statistics(...)

    so the weights of a batch never depend on that batch, and a step forgets with weight ``memory``. Only
    ``Q/R`` matters for the weights; R is the scale of the predicted spread in ``Ratio.info``.

    Learned Q = 0 is the running mean, which ends in GSPO's ratio; learned ``Q/R >= 100`` is GRPO's token
    ratio within 1 %; with ``statistics`` never called it is ``kpo_diffuse``.

    Args:
        process_noise, observation_noise: the start values, as in KalmanFiltered; with R = 1 and Q = 1e-6
            they are those of ``kpo_diffuse``. Also used while there is too little to learn from.
        memory: in [0, 1); 0.9 averages over about ten steps.
        least: innovations (weighted by memory) to learn from; with 100, log q is known to about +-1.

    Raises: NumericError for a value outside its range.

    >>> auto, rollouts = AutoFiltered(), Rollouts(torch.zeros(1, 200), torch.ones(1, 200))
    >>> logp = torch.tensor([0.1, -0.1]).repeat(100)[None]  # nothing moves
    >>> learned = auto.fitted(auto.statistics(logp, rollouts))
    >>> learned.process_noise, round(learned.observation_noise, 3)
    (0.0, 0.01)

    A sequence whose log-ratios are all 0 up to :func:`rounding` comes from an unchanged policy. It shows no noise
    and is left out, or a step would depend on which of its zeros were exact.
    Source: KPO (arXiv 2602.10609) for the filter; the estimate is the textbook likelihood by prediction
    errors (Harvey 1989). Ours is where it is taken from.
    """

    learned: ClassVar[tuple[str, ...]] = ("process_noise", "observation_noise")

    process_noise: float = 1e-6
    observation_noise: float = 1.0
    memory: float = 0.9
    least: float = 100.0

    def __post_init__(self) -> None:
        check_memory(self.memory, self.least)
        _ = self.start

    @property
    def start(self) -> KalmanFiltered:
        """The filter with the start values."""
        return KalmanFiltered(self.process_noise, self.observation_noise, math.inf)

    def __call__(self, logp: Tensor, rollouts: Rollouts) -> Ratio:
        return self.start(logp, rollouts)

    def initial(self) -> Tensor:
        """The state before the first step: zeros (67,), float64, on the CPU."""
        return torch.zeros(1 + 2 * len(LOG_GRID), dtype=torch.float64, device="cpu")

    def statistics(self, logp: Tensor, rollouts: Rollouts) -> Tensor:
        """Sums over the innovations of this part of a step, float64 (67,), additive over parts.

        Cost: one pass over time on (grid, sequences) numbers; see ``benchmarks/learning/ratio_filters.py``.
        """
        return innovation_sums(observed_series(token_log_ratio(logp, rollouts), rollouts), LOG_GRID)

    def fitted(self, state: Tensor) -> KalmanFiltered:
        """The filter with the most likely Q and R, or with the start values where the state does not determine them."""
        found = peak(state, LOG_GRID, self.least)
        if found is None:
            return self.start
        return KalmanFiltered(math.exp(found.log_shape) * found.scale, found.scale, math.inf)


def rounding(values: Tensor) -> float:
    """The size up to which a log-ratio (B, T) is rounding: 512 units in the last place of 1, 6.1e-5 nats in float32.

    Two passes of one policy over the same tokens, in batches of another shape, agree only up to rounding, which reaches
    1e-5 nats in SmolLM2-135M. A policy that moved less than this has moved less than any clip, KPO's of 3e-4 included.
    """
    return 512 * torch.finfo(values.dtype).eps


class Series(NamedTuple):
    """Observed tokens only, time first, longest sequence first: ``value`` (L, N), 0 after a sequence's end;
    ``gap`` (L, N) tokens of time since the one before, or (L, 1) of ones where nothing has holes; ``alive``,
    for each of L places, how many sequences reach it."""

    value: Tensor
    gap: Tensor
    alive: list[int]


def observed_series(values: Tensor, rollouts: Rollouts) -> Series:
    """The observed values (B, T), in float64, of every sequence that has one beyond :func:`rounding`."""
    row, column, sequence = moved_tokens(values, rollouts)
    values = values.double()
    _, member, count = torch.unique_consecutive(sequence, return_inverse=True, return_counts=True)
    if len(count) == 0:
        return Series(values.new_zeros(0, 0), values.new_zeros(0, 1), [])
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[member]
    rank = torch.empty_like(count)
    rank[torch.argsort(count, descending=True, stable=True)] = torch.arange(len(count), device=row.device)
    length = int(count.max())
    value = values.new_zeros(length, len(count))
    value[place, rank[member]] = values[row, column]
    gap = torch.ones_like(value)
    gap[place, rank[member]] = torch.where(place > 0, column - column.roll(1), 1).to(values.dtype)
    alive = (count[None] > torch.arange(length, device=row.device)[:, None]).sum(1).tolist()
    return Series(value, gap if bool((gap != 1).any()) else gap[:, :1], alive)


def moved_tokens(values: Tensor, rollouts: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and sequence number of the observed tokens of every sequence that has a value (B, T) beyond
    :func:`rounding`, each (N,), in order."""
    row, column = rollouts.mask.nonzero(as_tuple=True)
    sequence = rollouts.sequence_index[row, column]
    beyond = values[row, column].abs() > rounding(values)
    moved = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    moved[sequence[beyond]] = True
    kept = moved[sequence]
    return row[kept], column[kept], sequence[kept]


def innovation_sums(series: Series, log_grid: tuple[float, ...]) -> Tensor:
    """``n``, ``sum nu^2 / S`` and ``sum log S`` of the filters q of the grid, R = 1, diffuse starts left out.

    ``S_t = P_{t-1} + q gap_t + 1``, ``P_t = 1 - 1 / S_t``, ``m_t = m_{t-1} + P_t nu_t``. Without holes all
    sequences share one P per q, so P and S are (G, 1).
    """
    value, gap, alive = series
    q = value.new_tensor([math.exp(log) for log in log_grid])[:, None]
    mean = value[:1].expand(len(q), -1).clone() if alive else value.new_zeros(len(q), 0)
    quadratic = torch.zeros_like(mean)
    log_determinant = value.new_zeros(len(q))
    variance = q.new_ones(len(q), gap.shape[1])
    for t in range(1, len(alive)):
        n = alive[t]
        predicted = variance[:, :n] + q * gap[t, :n]
        total = predicted + 1
        variance = predicted / total
        innovation = value[t, :n] - mean[:, :n]
        mean[:, :n].addcmul_(innovation, variance)
        quadratic[:, :n].addcdiv_(innovation.square_(), total)
        log_determinant += total.log().sum(1) * (n / total.shape[1])
    return pack(sum(alive[1:]), quadratic.sum(1), log_determinant)
