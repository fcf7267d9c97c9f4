"""What a method learns while it trains: clip bounds of one optimizer step, noises of a filter over many.

A part that learns (``protocol.Learns``) keeps sums. Every micro-batch adds its statistics, ranks add theirs, and the
result is the same however an optimizer step is cut into pieces::

    state <- memory state + statistics(...)        part = fitted(state)

A ratio is fitted to the steps before, so the weights of a batch never depend on that batch. A trust region has
memory 0: it is fitted to the step under way, before its loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from kalman_rl.errors import RunError
from kalman_rl.objectives.loss import Method
from kalman_rl.objectives.rollouts import Current, Rollouts, prepared

Reduce = Callable[[Tensor], Tensor]


def step_statistics(
    method: Method, rollouts: Rollouts, logp: Tensor | Current, *, advantage: Tensor
) -> Tensor | None:
    """What a part of an optimizer step adds to the choice of the step's bounds; None if the method has none to
    choose. Sum over micro-batches and ranks, then call :func:`with_bounds`."""
    trust = method.learns.get("trust")
    if trust is None:
        return None
    _, current, advantage = prepared(rollouts, logp, advantage)
    return trust.statistics(method.ratio(current.logp, rollouts), advantage, current, rollouts)


def with_bounds(method: Method, statistics: Tensor | None) -> Method:
    """The method with the bounds that the statistics of a whole optimizer step lead to."""
    trust = method.learns.get("trust")
    if statistics is None or trust is None:
        return method
    return dataclasses.replace(method, trust=trust.fitted(statistics))


def bound_metrics(method: Method) -> dict[str, float]:
    """``trust/bound_*`` for logs: the ``bounds`` of the trust region, by name, if it has some."""
    bounds: dict[str, float] = getattr(method.trust, "bounds", {})
    return {f"trust/bound_{name}": value for name, value in bounds.items()}


class LearnedState:
    """The method as it stands now, given what past optimizer steps have shown.

    Args:
        method: as composed.
        reduce: sum of a tensor over ranks (identity on one process).
    """

    def __init__(self, method: Method, reduce: Reduce) -> None:
        self.method, self.reduce = method, reduce
        self.ratio = method.learns.get("ratio")
        self.state: Tensor | None = None if self.ratio is None else self.ratio.initial()
        self._fresh: Tensor | None = None
        self.now = method
        self.refresh()

    def refresh(self) -> None:
        """Rebuild the method from the state."""
        if self.ratio is not None and self.state is not None:
            self.now = dataclasses.replace(self.method, ratio=self.ratio.fitted(self.state))

    def observe(self, logp: Tensor, rollouts: Rollouts) -> None:
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

    def with_bounds(self, statistics: Tensor | None) -> Method:
        """The method with the bounds of an optimizer step whose parts here sum to ``statistics``."""
        return self.now if statistics is None else with_bounds(self.now, self.reduce(statistics))

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold; empty if nothing is learned over steps."""
        return {} if self.state is None else {"ratio": self.state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint. Raises: RunError if it belongs to another method."""
        own = self.state_dict()
        whole = isinstance(state, dict) and all(
            isinstance(value, Tensor) and bool(value.isfinite().all()) for value in state.values()
        )
        shapes = {name: tuple(value.shape) for name, value in state.items()} if whole else "no finite tensors"
        expected = {name: tuple(value.shape) for name, value in own.items()}
        if shapes != expected:
            raise RunError(
                f"checkpoint: got learned state {shapes}, expected {expected} for {self.method.name}; "
                "continue with the method and options that the run started with"
            )
        if own:
            self.state = state["ratio"]
            self.refresh()
