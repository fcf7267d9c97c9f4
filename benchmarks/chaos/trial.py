"""What every kind of fault is given and gives."""

from __future__ import annotations

import importlib
import logging
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Plan:
    """``folder`` to work in, ``seed`` of every choice, ``size`` in (0, 1]: the share of a whole campaign."""

    folder: Path
    seed: int
    size: float = 1.0

    def random(self, kind: str) -> random.Random:
        return random.Random(f"{kind} {self.seed}")

    def count(self, whole: int) -> int:
        """How many trials of a kind whose campaign has so many."""
        return max(1, round(whole * self.size))


@dataclass
class Outcome:
    """One line of the table: trials of a ``kind``, those that did not ``survive``, and remarks."""

    kind: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @contextmanager
    def trial(self, what: str) -> Iterator[None]:
        """Whatever leaves the block as an exception is a loss, named by ``what`` so that it can be done again."""
        self.tried += 1
        try:
            yield
        except Exception as error:
            self.lost.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")

    def line(self) -> str:
        """A row of Markdown: kind, tried, survived, lost, seconds, what was seen."""
        seen = ", ".join(f"{count} {what}" for what, count in sorted(self.seen.items()))
        numbers = f"{self.tried} | {self.tried - len(self.lost)} | {len(self.lost)} | {self.seconds:.0f}"
        return f"| {self.kind} | {numbers} | {seen} |"


def one(kind: str, seed: int, size: float) -> Outcome:
    """Run one kind in a folder of its own."""
    logging.getLogger("kalman_rl").setLevel(logging.ERROR)  # what was skipped is what was damaged
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        start = time.monotonic()
        outcome: Outcome = importlib.import_module(f"benchmarks.chaos.{kind}").run(
            Plan(Path(folder), seed, size)
        )
        outcome.seconds = time.monotonic() - start
    return outcome
