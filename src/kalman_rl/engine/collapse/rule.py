"""The reward has fallen: its filtered level lies below half of its best, by more than its margin of error.

A local-level filter of the reward, ``Q = q R`` with R the discounted mean of squared innovations over their variance;
level m with standard deviation s. An alarm when ``m + MARGIN s < best / 2``, where best is the largest
``m - MARGIN s`` so far; the next one only after ``m`` has been above ``best / 2`` again. Rewards whose best is not
positive never alarm.

Alarms are kept in ``alarms.jsonl`` in the run's folder, one whole line each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kalman_rl.engine.runs.files import append_row, explained, write_file
from kalman_rl.engine.runs.received import parse_json, read_lines
from kalman_rl.errors import RunError, quote
from kalman_rl.numerics.kalman import Gaussian, predict, update

RATIO = 0.2
MEMORY = 0.95
WARM_UP = 4
MARGIN = 1.0
MIN_DEVIATION = 0.01
"""Smallest standard deviation of the level."""
LARGEST = 1e100
"""A reward beyond it is taken for missing: its square would overflow."""
MAX_SHOWN_TOKENS = 3
"""Tokens that an alarm names."""
ADVICE = "the newest checkpoint from before the fall, with a lower learning rate or a KL penalty (kl)"
FILE = "alarms.jsonl"
SIZE = "effective_sample_size/sequences_raw"


@dataclass(frozen=True)
class Token:
    """A token with a large log-ratio in the updates before an alarm."""

    text: str
    log_ratio: float
    prompt_id: str = ""
    position: int = -1


@dataclass(frozen=True)
class Alarm:
    """A fallen reward: its level, its best so far, ``z = (level - best / 2) / s``, the tokens that moved most."""

    step: int
    level: float
    best: float
    z: float
    tokens: tuple[Token, ...] = ()
    sample_size: float = 1.0

    def happened(self) -> str:
        """What happened, without the step."""
        return (
            f"the reward has fallen to {self.level:.3g}, below half of its best {self.best:.3g} "
            f"({self.z:+.1f} deviations)"
        )

    def sentence(self) -> str:
        """One line for a terminal."""
        text = f"step {self.step}: {self.happened()}"
        if self.tokens:
            text += "; tokens " + ", ".join(
                f"{quote(token.text)} {token.log_ratio:+.2f}" for token in self.tokens
            )
        return f"{text}; effective sample size {self.sample_size:.2f}; try {ADVICE}"


class Fall:
    """Watches the reward's level, fed one logged row at a time.

    >>> fall = Fall()
    >>> rewards = [0.40, 0.41, 0.39, 0.40, 0.41, 0.40, 0.05, 0.05, 0.05, 0.05, 0.05]
    >>> [t for t, reward in enumerate(rewards) if fall.see(t, {"reward": reward})]
    [9]
    """

    def __init__(self) -> None:
        self._mean, self._variance = 0.0, math.inf  # of the level, in units of R
        self._weight = self._squares = 0.0
        self._count, self._best, self._down = 0, -math.inf, False
        self._size = 1.0  # lowest since the reward before

    def see(self, step: int, row: Mapping[str, Any]) -> Alarm | None:
        """Take in the row logged at a step; a missing reward changes nothing. Returns: an alarm, if there is one."""
        value, size = read_number(row, "reward"), read_number(row, SIZE)
        self._size = min(self._size, 1.0 if size is None else size)
        if value is None:
            return None
        size, self._size = self._size, 1.0
        state = Gaussian(*(torch.tensor(part, dtype=torch.float64) for part in (self._mean, self._variance)))
        after, info = update(predict(state, RATIO), torch.tensor(value, dtype=torch.float64), 1.0)
        if math.isfinite(self._variance):
            self._weight = MEMORY * self._weight + 1.0
            self._squares = (
                MEMORY * self._squares + (info.innovation.square() / info.innovation_variance).item()
            )
        self._mean, self._variance = after.mean.item(), after.variance.item()
        self._count += 1
        if self._count <= WARM_UP:
            return None
        spread = max(math.sqrt(self._variance * self._squares / self._weight), MIN_DEVIATION)
        self._best = max(self._best, self._mean - MARGIN * spread)
        half = self._best / 2
        if self._best <= 0 or self._mean > half:
            self._down = False
        if self._down or self._best <= 0 or self._mean + MARGIN * spread >= half:
            return None
        self._down = True
        return Alarm(step, self._mean, self._best, (self._mean - half) / spread, sample_size=size)

    def state_dict(self) -> dict[str, Any]:
        """JSON-safe state."""
        return {name: None if value in (math.inf, -math.inf) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        unset = {"_variance": math.inf, "_best": -math.inf}
        for name in vars(self):
            setattr(self, name, unset[name] if state[name] is None else state[name])


def read_number(row: Mapping[str, Any], name: str) -> float | None:
    """A number of a logged row; None where it is absent, null, not finite or out of range."""
    value = row.get(name)
    if not isinstance(value, (int, float)) or not math.isfinite(value) or abs(value) > LARGEST:
        return None
    return float(value)


def append_alarm(folder: Path, alarm: Alarm, action: str) -> None:
    """Append one alarm, in one write, with the action that was taken.

    Raises: RunError if the file cannot be written.
    """
    path = Path(folder) / FILE
    with explained(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        append_row(path, {**asdict(alarm), "action": action})


def read_alarms(folder: Path) -> list[Alarm]:
    """The alarms of a run, oldest first; none if there is no file. Lines that are no alarms are skipped."""
    try:
        return [alarm for line in read_lines(folder, FILE) if (alarm := _alarm(line)) is not None]
    except RunError:
        return []


def keep_alarms(folder: Path, step: int) -> None:
    """Drop the alarms after ``step``, which a run resumed there raises again if they come again."""
    path = Path(folder) / FILE
    if not path.is_file():
        return
    lines = [line.strip() for line in read_lines(folder, FILE)]
    kept = [line for line in lines if (alarm := _alarm(line)) is not None and alarm.step <= step]
    write_file(path, b"".join(line + b"\n" for line in kept))


def _alarm(line: bytes) -> Alarm | None:
    try:
        row: Mapping[str, Any] = parse_json(line)
        tokens = tuple(
            Token(str(t["text"]), float(t["log_ratio"]), str(t["prompt_id"]), int(t["position"]))
            for t in row["tokens"]
        )
        level, best, z, size = (float(row[name]) for name in ("level", "best", "z", "sample_size"))
        return Alarm(int(row["step"]), level, best, z, tokens, size)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
