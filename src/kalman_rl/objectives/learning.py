"""What a method learns while it trains: clip bounds of one optimizer step, noises of a filter over many.

Both are functions of sums: every micro-batch adds its statistics, ranks add theirs, and the result is the
same however an optimizer step is cut into pieces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kalman_rl.errors import RunError
from kalman_rl.objectives.loss import Method, settled

Reduce = Callable[[Tensor], Tensor]


class Learning:
    """The method as it stands now, given what past optimizer steps have shown.

    A ratio that learns has ``blank()``, ``statistics(logp, rollouts)``, ``settle(state)`` and ``memory``;
    after every optimizer step ``state <- memory * state + statistics``.

    Args:
        method: as composed.
        reduce: sum of a tensor over ranks (identity on one process).
    """

    def __init__(self, method: Method, reduce: Reduce) -> None:
        self.method, self.reduce = method, reduce
        part: Any = method.ratio
        self.ratio = part if hasattr(part, "settle") else None
        self.state: Tensor | None = None if self.ratio is None else self.ratio.blank()
        self._fresh: Tensor | None = None
        self.now = method
        self.refresh()

    def refresh(self) -> None:
        """Rebuild the method from the state."""
        if self.ratio is not None and self.state is not None:
            self.now = dataclasses.replace(self.method, ratio=self.ratio.settle(self.state))

    def observe(self, logp: Tensor, rollouts: Any) -> None:
        """Note one micro-batch of the optimizer step under way."""
        if self.ratio is not None:
            fresh = self.ratio.statistics(logp.detach(), rollouts).cpu()
            self._fresh = fresh if self._fresh is None else self._fresh + fresh

    def end_step(self) -> None:
        """Absorb what the micro-batches of all ranks have shown."""
        if self.ratio is not None and self.state is not None and self._fresh is not None:
            self.state = self.ratio.memory * self.state + self.reduce(self._fresh)
            self._fresh = None
            self.refresh()

    def settle(self, statistics: Tensor | None) -> Method:
        """The method with clip bounds for an optimizer step whose parts here sum to ``statistics``."""
        return self.now if statistics is None else settled(self.now, self.reduce(statistics))

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold; empty if nothing is learned."""
        return {} if self.state is None else {"ratio": self.state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint. Raises: RunError if it belongs to another method."""
        own = self.state_dict()
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        expected = {name: tuple(value.shape) for name, value in own.items()}
        if shapes != expected:
            raise RunError(
                f"checkpoint: got learned state {shapes}, expected {expected} for {self.method.name}; "
                "continue with the method and options that the run started with"
            )
        if own:
            self.state = state["ratio"]
            self.refresh()
