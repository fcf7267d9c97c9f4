"""A hint where a clip drops most tokens: its band is narrower than the ratios that it judges."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

FEW = 0.5
"""Share of kept tokens below which a clip is called narrow."""
STEPS = 8
"""Optimizer steps with ratios other than 1 that it takes to say so."""


def few_kept(name: str, trust: Any, kept: Sequence[float]) -> str | None:
    """One sentence that names ``low`` and ``high``; None where enough is kept, or nothing can be said yet.

    Args: name: of the method. trust: its trust region. kept: shares of tokens by step, of steps that had moved.

    >>> from kalman_rl.objectives.trust import Clip
    >>> few_kept("kpo", Clip(3e-4, 4e-4), [0.38] * 8)
    'kpo: got 38 % of tokens kept, expected 50 % or more; widen its clip (low 0.0003, high 0.0004 now)'
    >>> few_kept("kpo", Clip(3e-4, 4e-4), [0.62] * 8)
    """
    band = getattr(trust, "low", None), getattr(trust, "high", None)
    if None in band or len(kept) < STEPS or fmean(kept) >= FEW:
        return None
    return (
        f"{name}: got {100 * fmean(kept):.0f} % of tokens kept, expected {100 * FEW:.0f} % or more; widen its clip "
        f"(low {band[0]:g}, high {band[1]:g} now)"
    )


class FewKept:
    """The last ``STEPS`` steps of a training whose ratios had moved, and what :func:`few_kept` says of them.

    Args: name: of the method. trust: its trust region.
    """

    def __init__(self, name: str, trust: Any) -> None:
        self.name, self.trust, self._said = name, trust, False
        self._kept: deque[float] = deque(maxlen=STEPS)

    def see(self, metrics: Mapping[str, float]) -> str | None:
        """Take in the metrics of one optimizer step; the hint, the first time there is one."""
        if "trust/kept" in metrics and metrics.get("ratio/noop", 0.0) < 1:
            self._kept.append(metrics["trust/kept"])
        hint = None if self._said else self.hint()
        self._said = self._said or hint is not None
        return hint

    def hint(self) -> str | None:
        """What is to be said of the last steps, each time it is asked."""
        return few_kept(self.name, self.trust, self._kept)
