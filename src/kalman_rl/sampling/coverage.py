"""The coverage floor: every prompt comes up again, however little is expected of it.

A rule that never samples what it believes to be hopeless never finds out that it was wrong, or that the
policy has learned meanwhile.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from kalman_rl.beliefs.groups import check_id, expect_names
from kalman_rl.checks import LARGEST_WHOLE, expect, is_real, is_whole, reading, saved
from kalman_rl.errors import ConfigError, quote


class Coverage:
    """When each prompt was last sampled, and which ones are due.

    Args:
        every: a prompt is due ``every`` steps after its last visit, >= 1; never visited = due.
        share: most of a total that goes to prompts because they are due, in (0, 1]; those that wait longest come
            first, and one of them always does.

    Raises: ConfigError for an argument out of range.

    >>> floor = Coverage(every=2)
    >>> floor.visit(["a"], step=4)
    >>> floor.due(["a", "new"], step=5), floor.due(["a", "new"], step=6)
    (tensor([False,  True]), tensor([True, True]))
    """

    def __init__(self, every: int, share: float = 1.0) -> None:
        if not is_whole(every, 1):
            raise ConfigError(f"every: got {quote(every)}, expected a number of steps >= 1 between visits")
        if not (is_real(share) and 0 < share <= 1):
            raise ConfigError(f"share: got {quote(share)}, expected a share of the completions in (0, 1]")
        self.every, self.share = every, share
        self._last: dict[Hashable, int] = {}

    def waiting(self, ids: Sequence[Hashable], *, step: int) -> Tensor:
        """(n,) int64: steps since the last visit; 2^62 for a prompt never visited."""
        _check(ids, step)
        last = self._last
        return torch.tensor([step - last[name] if name in last else 2**62 for name in ids], dtype=torch.long)

    def due(self, ids: Sequence[Hashable], *, step: int, limit: int | None = None) -> Tensor:
        """(n,) bool: prompts that must be sampled at ``step``; with a limit, those that wait longest."""
        waiting = self.waiting(ids, step=step)
        due = waiting >= self.every
        if limit is not None and not is_whole(limit, -LARGEST_WHOLE):
            raise ConfigError(f"limit: got {quote(limit, 80)}, expected a number of prompts")
        if limit is not None and int(due.sum()) > limit:
            longest = torch.where(due, waiting, -1).argsort(descending=True, stable=True)[: max(limit, 0)]
            due = torch.zeros_like(due).index_fill_(0, longest, True)
        return due

    def visited(self, most: int) -> list[Hashable]:
        """Prompts that were sampled, in the order of their first visits; of more than ``most``, every n-th."""
        return list(self._last)[:: max(1, -(-len(self._last) // most))]

    def visit(self, ids: Sequence[Hashable], *, step: int) -> None:
        """Note that these prompts are sampled at ``step``."""
        _check(ids, step)
        self._last.update(dict.fromkeys(ids, step))

    def state_dict(self) -> dict[str, Any]:
        """Ids and the step of the last visit of each, for :meth:`load_state_dict`."""
        steps = torch.tensor(list(self._last.values()), dtype=torch.long)
        return {"format": 1, "ids": list(self._last), "step": steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the saved visits; ``every`` stays this object's. Raises: ConfigError."""
        with reading("coverage state", state):
            self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        form, ids, steps = saved("coverage state", state, "format", "ids", "step")
        if form != 1 or len(ids) != len(steps):
            raise ConfigError(
                f"coverage state: got format {quote(form)}, {len(ids)} ids and {len(steps)} steps, expected 1 "
                "and a step for each id"
            )
        for name in ids:
            check_id("coverage state", name)
        legal = isinstance(steps, Tensor) and steps.dtype == torch.long and steps.dim() == 1
        expect(
            "coverage state",
            "step",
            legal and isinstance(ids, list),
            steps,
            "a whole number for each id",
        )
        self._last = dict(zip(ids, steps.tolist()))


def _check(ids: Sequence[Hashable], step: int) -> None:
    expect_names(ids)
    if not is_whole(step, -LARGEST_WHOLE):
        raise ConfigError(f"step: got {quote(step, 80)}, expected a whole number")
