"""SPO's published tracker: success counts that fade per visit, a baseline from the past only."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from kalman_rl.beliefs.base import Prior, TableBelief
from kalman_rl.beliefs.beta import refuse_outside_unit_interval
from kalman_rl.beliefs.groups import Groups, unique_ids
from kalman_rl.beliefs.protocol import Observed
from kalman_rl.beliefs.table import PromptTable
from kalman_rl.checks import is_real
from kalman_rl.errors import ConfigError, NumericError, ShapeError, quote
from kalman_rl.numerics.kalman import Gaussian


class SPOBelief(TableBelief):
    """The tracker published with SPO: counts that fade per *visit*, a baseline from the past only.

    ``v = a / (a + b)`` before the rewards are seen, ``A = r - v``; then ``a <- rho a + S``, ``b <- rho b +
    F``. A prompt never visited has a = b = 0.5 and rho = ``high``.

    Args:
        rho: a constant in (0, 1], or None: ``rho = clip(2^(-D / half), low, high)`` from the signal ``D``
            given to :meth:`update`; without a signal rho = high.
        half: D that halves the memory. low, high: bounds of rho.
        scale: divide advantages by the lagged pooled standard deviation.

    Raises: ConfigError for a setting outside its range.
    Source: SPO (arXiv 2509.13232) and its published code. Deviations: several rewards of a prompt in one
    batch are merged (there the last one wins); the published centring by the batch, which contains the own
    reward, is replaced by the lagged scale.

    >>> belief = SPOBelief(rho=0.875, scale=False)
    >>> _ = belief.update(["a"], torch.tensor([1.0]), step=0)
    >>> round(belief.predict(["a"], step=1).mean.item(), 4)  # (0.5 rho + 1) / (rho + 1)
    0.7667
    """

    def __init__(
        self,
        *,
        rho: float | None = None,
        half: float = 0.06,
        low: float = 0.875,
        high: float = 0.96,
        scale: bool = True,
    ) -> None:
        numbers = is_real(half, low, high) and (rho is None or is_real(rho))
        if not numbers or not (0 < low <= high <= 1 and half > 0) or (rho is not None and not 0 < rho <= 1):
            raise ConfigError(
                f"rho, half, low, high: got {quote(rho)}, {quote(half)}, {quote(low)}, {quote(high)}, expected "
                "0 < low <= high <= 1, half > 0 and rho in (0, 1] or None"
            )
        columns = {name: ((), torch.float64) for name in ("success", "failure")}
        super().__init__(PromptTable(columns), scale=scale)
        self.rho, self.half, self.low, self.high = rho, half, low, high
        self._signal: dict[Hashable, float] = {}

    @property
    def _options(self) -> dict[str, Any]:
        return {"rho": self.rho, "half": self.half, "low": self.low, "high": self.high}

    def _check(self, groups: Groups, step: int, part: int) -> None:
        super()._check(groups, step, part)
        refuse_outside_unit_interval(groups)

    def start(self, ids: Sequence[Hashable], successes: Sequence[float], trials: Sequence[float]) -> None:
        """Set unvisited prompts from offline samples: ``N = 1 / (1 - low)``, ``a = N (S + 0.5) / (n0 + 1)``.

        Args:
            ids: prompts never visited, each once.
            successes: S of each, the sum of its offline rewards.
            trials: n0 of each, how many offline rewards there were.

        Raises: ShapeError for no ids, or sequences of other lengths. ConfigError for a prompt that was visited or
            named twice, or a count outside 0 <= S <= n0.
        """
        unique_ids(ids)
        for name, counts in (("successes", successes), ("trials", trials)):
            listed = counts.tolist() if hasattr(counts, "tolist") else counts
            if not isinstance(listed, Sequence) or not is_real(*listed):
                raise ShapeError(f"{name}: got {quote(counts, 80)}, expected a list of numbers, one per id")
        if not len(ids) == len(successes) == len(trials):
            raise ShapeError(
                f"successes, trials: got {len(successes)} and {len(trials)} numbers, expected {len(ids)}, one per id"
            )
        triples = [(name, float(s), float(n)) for name, s, n in zip(ids, successes, trials)]
        if len({name for name, _, _ in triples}) != len(triples) or any(
            name in self._table for name, _, _ in triples
        ):
            raise ConfigError(
                "ids: got a prompt twice or one that was visited, expected new prompts once each"
            )
        if not all(0 <= s <= n < math.inf for _, s, n in triples) or self.low == 1:
            raise ConfigError("successes, trials: expected 0 <= successes <= trials, and low < 1")
        rows = self._table.add([name for name, _, _ in triples], torch.full((len(triples),), -1))
        strength = 1 / (1 - self.low)
        s, n = (torch.tensor(list(c), dtype=torch.float64) for c in list(zip(*triples))[1:])
        self._table.columns["success"][rows] = strength * (s + 0.5) / (n + 1)
        self._table.columns["failure"][rows] = strength * (n - s + 0.5) / (n + 1)
        self._table.clock[rows] = -1

    def update(
        self,
        ids: Sequence[Hashable],
        reward: Tensor,
        *,
        step: int,
        features: Tensor | None = None,
        part: int = 0,
        signal: Tensor | None = None,
    ) -> Observed:
        """:class:`Belief`'s update, with an optional ``signal`` (n,) >= 0, equal for all rows of an id.

        The signal D of SPO is the mean absolute change of log-probability, in nats, on the prompt's stored
        response since its last visit. Raises: ShapeError for another shape, NumericError for NaN, infinity, a
        negative D or rows of one id that differ.
        """
        self._signal = {} if signal is None else _signals(ids, signal)
        try:
            return super().update(ids, reward, step=step, features=features, part=part)
        finally:
            self._signal = {}

    def _stored(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if not len(self._table):
            return torch.full(rows.shape, 0.5, dtype=torch.float64), torch.full(
                rows.shape, 0.5, dtype=torch.float64
            )
        place = rows.clamp(min=0)
        a, b = (self._table.columns[name][place] for name in ("success", "failure"))
        return torch.where(rows < 0, 0.5, a), torch.where(rows < 0, 0.5, b)

    def _prior(self, rows: Tensor, gap: Tensor, step: int, inputs: Tensor | None) -> Prior:
        a, b = self._stored(rows)
        rate, size = a / (a + b), a + b
        variance = rate * (1 - rate) / (size + 1)
        return Prior(Gaussian(rate, variance), (rate * (1 - rate) - variance).clamp(min=1e-12))

    def _unscaled(self, groups: Groups, prior: Prior) -> tuple[Tensor, Tensor]:
        baseline = prior.value.mean[groups.place]  # the own group takes no part in it, as published
        return self._difference(groups, baseline), baseline

    def _absorb(self, groups: Groups, rows: Tensor, gap: Tensor, step: int, inputs: Tensor | None) -> None:
        prior = self._prior(rows, gap, step, inputs)
        a, b = self._stored(rows)
        if self.rho is not None:
            rho = torch.full_like(a, self.rho)
        else:
            signal = torch.tensor([self._signal.get(name, 0.0) for name in groups.ids], dtype=torch.float64)
            rho = torch.exp2(-signal / self.half).clamp(self.low, self.high)
            rho = torch.where(rows < 0, self.high, rho)
        rows = self._table.add(groups.ids, rows)
        self._table.columns["success"][rows] = rho * a + groups.total
        self._table.columns["failure"][rows] = rho * b + groups.size - groups.total
        self._noise.learn(groups, *prior.value)


def _signals(ids: Sequence[Hashable], signal: Tensor) -> dict[Hashable, float]:
    if not isinstance(signal, Tensor) or signal.shape != unique_ids(ids)[1].shape:
        got = tuple(signal.shape) if isinstance(signal, Tensor) else type(signal).__name__
        raise ShapeError(f"signal: got {got}, expected a tensor ({len(ids)},): one number per id")
    values = signal.detach().double().cpu()
    bad = ~(torch.isfinite(values) & (values >= 0))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise NumericError(
            f"signal: got {values[row].item()} at row {row}, expected a finite number of nats >= 0"
        )
    by_id = dict(zip(ids, values.tolist()))
    for row, (name, value) in enumerate(zip(ids, values.tolist())):
        if by_id[name] != value:
            raise NumericError(
                f"signal: got {quote(value)} at row {row} and {by_id[name]} in another row of prompt {quote(name)}, "
                "expected one number per prompt"
            )
    return by_id
