"""A trust region whose clip bounds are found on the batch: positive tokens get a share of the objective.

Negative-advantage tokens dominate off-policy updates. The bounds [low, high] of a PPO clip are widened in
steps until the positive tokens supply enough:

    S+(high) = sum_{A > 0} A min(w, high)          S-(low) = sum_{A < 0} |A| max(w, low)
    measure: share S+ / (S+ + S-)  or  quotient S+ / S-

S+ depends on ``high`` only and S- on ``low`` only, so both are tabulated on the grid of steps. The tables add
up over micro-batches and ranks (:meth:`Balance.statistics`), and one look at the sums gives the bounds of the
whole optimizer step (:meth:`Balance.fitted`), however it was split.

Source: BAPO (arXiv 2510.18927). Published code searches per micro-batch; see the methods for the rest.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from kalman_rl.errors import ConfigError, NumericError, ShapeError, quote
from kalman_rl.objectives.ratio.transforms import Ratio
from kalman_rl.objectives.rollouts import Current, Rollouts
from kalman_rl.objectives.trust.clip import Clip, Trust, weight_of

Measure = Literal["share", "quotient"]
First = Literal["high", "low"]

MAX_POINTS = 10_000
"""Points of a grid; every one is a pass over the batch."""


@dataclass(frozen=True)
class Balance:
    """PPO clip with bounds chosen so that positive tokens reach ``target`` of the objective.

    Raising ``low`` zeroes gradients of negative tokens but *raises* their loss ``|A| max(w, low)``, so the
    measured value share falls. With ``gradient=True`` only unclipped tokens count, and raising either bound
    raises the share.

    Args:
        target: >= 0; at ``low`` and ``high`` starts the search ends at once if it is met.
        measure: ``share`` in [0, 1] or ``quotient`` in [0, inf).
        first: which bound moves first. ``high``: one step of ``high`` at a time, then ``low``. ``low``: first
            ``low`` to its end, then ``high``.
        gradient: measure what the gradient sees instead of the loss value.
        low, low_end, low_step; high, high_end, high_step: the ratio bounds themselves and their steps.
        dual: as in :class:`kalman_rl.objectives.trust.Clip`.

    Raises: NumericError, ConfigError for a value outside its range.
    """

    memory: ClassVar[float] = 0.0
    learned: ClassVar[tuple[str, ...]] = ("low", "high")

    target: float = 0.4
    measure: Measure = "share"
    first: First = "high"
    gradient: bool = False
    low: float = 0.6
    low_end: float = 0.9
    low_step: float = 0.02
    high: float = 1.2
    high_end: float = 3.0
    high_step: float = 0.05
    dual: float | None = None

    def __post_init__(self) -> None:
        if not self.target >= 0:
            raise NumericError(f"target: got {quote(self.target)}, expected a share or quotient >= 0")
        for name, kinds in (("measure", Measure), ("first", First)):
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(
                    f"{name}: got {quote(getattr(self, name))}, expected one of {get_args(kinds)}"
                )
        for name, ends in (("low", (0, self.low, self.low_end, 1)), ("high", (1, self.high, self.high_end))):
            step = getattr(self, f"{name}_step")
            ordered = all(a <= b for a, b in itertools.pairwise(ends))
            if not (ordered and 0 < step < math.inf and ends[2] - ends[1] < MAX_POINTS * step):
                limits = "0 <= low <= low_end <= 1" if name == "low" else "1 <= high <= high_end < inf"
                got = f"{ends[1]}, {ends[2]}, step {step}"
                raise NumericError(
                    f"{name}, {name}_end: got {got}, expected {limits} and a finite step > 0 with fewer than "
                    f"{MAX_POINTS} steps in between"
                )
        Clip(1 - self.low, self.high - 1, self.dual)

    def grid(self, name: Literal["low", "high"]) -> list[float]:
        """The bounds that the search may take: start, start + step, ... up to the end."""
        start, end, step = (getattr(self, f"{name}{suffix}") for suffix in ("", "_end", "_step"))
        points = [start + i * step for i in range(int((end - start) / step + 1e-9) + 1)]
        if abs(points[-1] - end) < 1e-6 * step:
            points[-1] = end  # whatever rounding made of it: 0.09 + 13 * 0.07 is above 1
        return points

    def initial(self) -> Tensor:
        """The state before anything was seen: zeros, one for every point of both grids, float64."""
        return torch.zeros(len(self.grid("high")) + len(self.grid("low")), dtype=torch.float64)

    def statistics(self, ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Tensor:
        """S+ at every ``high`` of the grid, then S- at every ``low`` (float64): additive over the parts of
        an optimizer step."""
        mask = rollouts.mask
        weight = weight_of(ratio.log_weight).double()
        sums = []
        for name, side in (("high", advantage > 0), ("low", advantage < 0)):
            size, w = advantage.double().abs()[mask & side], weight[mask & side]
            for bound in self.grid(name):  # type: ignore[arg-type]
                inside = w <= bound if name == "high" else w >= bound
                outside = torch.zeros_like(w) if self.gradient else torch.full_like(w, bound)
                sums.append((size * torch.where(inside, w, outside)).sum())
        return torch.stack(sums)

    def fitted(self, state: Tensor) -> Clip:
        """The clip whose bounds the search ends with, given the statistics of a whole optimizer step.

        Raises: ShapeError for statistics of other settings."""
        highs, lows = self.grid("high"), self.grid("low")
        if state.shape != (len(highs) + len(lows),):
            raise ShapeError(
                f"statistics: got shape {tuple(state.shape)}, expected ({len(highs) + len(lows)},): the "
                "sum of what `statistics` of these settings returned for each part"
            )
        positive, negative = state[: len(highs)].tolist(), state[len(highs) :].tolist()
        i = j = 0  # positions of high and low

        def met() -> bool:
            if negative[j] == 0:
                return True
            total = positive[i] + negative[j] if self.measure == "share" else negative[j]
            return bool(positive[i] / total >= self.target)

        while not met() and (i < len(highs) - 1 or j < len(lows) - 1):
            raise_high = i < len(highs) - 1 and (self.first == "high" or j == len(lows) - 1)
            i, j = (i + 1, j) if raise_high else (i, j + 1)
        return Clip(1 - lows[j], highs[i] - 1, self.dual)

    def __call__(self, ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Trust:
        """The current batch taken for the whole optimizer step."""
        found = self.fitted(self.statistics(ratio, advantage, current, rollouts))
        return found(ratio, advantage, current, rollouts)
