"""A table with one row per prompt id: numbers in growing tensors, names in a dictionary."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from kalman_rl.beliefs.groups import check_id
from kalman_rl.checks import expect, is_whole, saved
from kalman_rl.errors import ConfigError, quote

PARTS = 4096
"""Rounds per step that a clock can tell apart; ``clock = step * PARTS + part``."""
_LARGEST_STEP = 2**63 // PARTS - 1


class PromptTable:
    """Columns of numbers, a row per prompt that was visited.

    The tensors cost what the columns say plus 8 bytes for the clock (and up to an eighth more while growing).
    The dictionary from id to row is Python's: about 60 bytes per prompt for the table and its row number,
    on top of the id objects themselves (a short str is about 60 bytes), which may be shared with the data
    set.

    Args:
        columns: name -> (shape of one row, dtype).
    """

    def __init__(self, columns: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._row: dict[Hashable, int] = {}
        self.columns = {name: torch.zeros(0, *shape, dtype=dtype) for name, (shape, dtype) in columns.items()}
        self.clock = torch.zeros(0, dtype=torch.long)

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, name: Hashable) -> bool:
        return name in self._row

    @property
    def bytes_per_prompt(self) -> int:
        """Bytes of tensor data in a row."""
        tensors = (self.clock, *self.columns.values())
        return sum(t[:0].element_size() * max(t[:1].numel(), t.shape[1:].numel()) for t in tensors)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors, with the room for growth."""
        return sum(t.element_size() * t.numel() for t in (self.clock, *self.columns.values()))

    def rows(self, names: list[Hashable]) -> Tensor:
        """(u,) row of each name, -1 where it was never visited."""
        get = self._row.get
        return torch.tensor([get(name, -1) for name in names], dtype=torch.long)

    def add(self, names: list[Hashable], rows: Tensor) -> Tensor:
        """Rows of all names, new ones (where ``rows`` is -1) created with zeros."""
        rows = rows.clone()
        for place in (rows < 0).nonzero().flatten().tolist():
            rows[place] = self._row[names[place]] = len(self._row)
        if len(self._row) > len(self.clock):
            size = max(len(self._row), len(self.clock) * 9 // 8)
            self.clock = _grown(self.clock, size)
            self.columns = {name: _grown(column, size) for name, column in self.columns.items()}
        return rows

    def gap(self, rows: Tensor, step: int) -> Tensor:
        """(u,) steps since the last visit, float64; negative = late; 0 for a prompt never visited."""
        last = self.clock[rows.clamp(min=0)] if len(self.clock) else torch.zeros_like(rows)
        return torch.where(rows < 0, 0, step - last.div(PARTS, rounding_mode="floor")).double()

    def check_new(self, names: list[Hashable], rows: Tensor, step: int, part: int) -> None:
        """Refuse a batch that was absorbed before. Raises: ConfigError."""
        if not len(self.clock):
            return
        repeated = (rows >= 0) & (self.clock[rows.clamp(min=0)] == clock_of(step, part))
        if repeated.any():
            name = names[int(repeated.nonzero()[0])]
            raise ConfigError(
                f"step, part: got step {step}, part {part} for prompt {quote(name)} a second time "
                f"({int(repeated.sum())} such prompts), expected each batch once; skip it after a resume, "
                "merge micro-batches of one step, or number the rounds of one step with part"
            )

    def state_dict(self) -> dict[str, Any]:
        """Ids, clock and columns of the visited prompts; :meth:`checked` reads them back."""
        size = len(self)
        columns = {name: column[:size].clone() for name, column in self.columns.items()}
        return {"ids": list(self._row), "clock": self.clock[:size].clone(), "columns": columns}

    def checked(self, state: dict[str, Any]) -> PromptTable:
        """A new table from a saved state. Raises: ConfigError if it does not fit this one's columns."""
        new = PromptTable({})
        names, clock, columns = saved("belief state", state, "ids", "clock", "columns")
        if not isinstance(names, list) or not isinstance(clock, Tensor) or not isinstance(columns, dict):
            raise ConfigError("belief state: got no table of prompts, expected ids, clock and columns")
        expected = {name: (len(names), *c.shape[1:]) for name, c in self.columns.items()}
        got = {name: tuple(c.shape) for name, c in columns.items()}
        if got != expected or clock.shape != (len(names),) or len(set(names)) != len(names):
            raise ConfigError(
                f"belief state: got columns {got}, expected {expected}; was it saved with other options?"
            )
        for name in names:
            check_id("belief state", name)
        for name, column in columns.items():
            legal = column.dtype == self.columns[name].dtype and bool((column > -torch.inf).all())
            # An uncertain prior has variance inf.
            legal = legal and (name == "variance" or bool(column.isfinite().all()))
            expect(
                "belief state",
                f"column {quote(name)}",
                legal,
                column,
                "finite numbers of the type they are kept in",
            )
        legal = clock.dtype == torch.long and bool((clock >= -1).all())
        expect("belief state", "clock", legal, clock, "steps >= 0")
        new._row = {name: row for row, name in enumerate(names)}
        new.clock = clock.to("cpu", torch.long).clone()
        new.columns = {name: columns[name].to("cpu", c.dtype).clone() for name, c in self.columns.items()}
        return new


def clock_of(step: int, part: int = 0) -> int:
    """One number for (step, part), growing with time.

    Raises: ConfigError unless both are integers, step >= 0 and 0 <= part < PARTS.
    """
    for name, value, limit in (("step", step, _LARGEST_STEP), ("part", part, PARTS - 1)):
        if not is_whole(value, 0, limit):
            raise ConfigError(f"{name}: got {quote(value)}, expected an integer from 0 to {limit}")
    return step * PARTS + part


def _grown(column: Tensor, size: int) -> Tensor:
    out = column.new_zeros(size, *column.shape[1:])
    out[: len(column)] = column
    return out
