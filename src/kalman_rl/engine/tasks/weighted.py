"""Several reward functions as one: their weighted sum, as TRL's trainer adds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kalman_rl.engine.runs.run import name_part
from kalman_rl.engine.tasks.task import Reward
from kalman_rl.hosts.rewards.record import digest

Scores = tuple[float | None, ...]
"""What each function says of one reply; None is missing."""


class Part(NamedTuple):
    """One of several reward functions: its name in metrics, the function, its weight."""

    name: str
    function: Reward
    weight: float


@dataclass(frozen=True)
class WeightedReward:
    """The weighted sum of reward functions, in TRL's signature; a missing one adds nothing, and where all are missing
    there is no reward."""

    parts: tuple[Part, ...]

    @property
    def __name__(self) -> str:
        return " + ".join(part.name for part in self.parts)

    @property
    def source(self) -> str | None:
        """SHA-256 of the files that hold the functions, None where none is known."""
        known = [getattr(part.function, "source", None) for part in self.parts]
        return digest(*known) if any(known) else None

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        return [self.total(scores) for scores in self.each(completions, **columns)]

    def each(self, completions: list[Any], **columns: Any) -> list[Scores]:
        """What each function says, a tuple per completion."""
        return list(zip(*(part.function(completions=completions, **columns) for part in self.parts)))

    def total(self, scores: Scores) -> float | None:
        """``sum_k weight_k score_k`` over those that are there.

        >>> WeightedReward((Part("a", None, 1.0), Part("b", None, 0.5))).total((1.0, None))
        1.0
        """
        known = [part.weight * score for part, score in zip(self.parts, scores) if score is not None]
        return sum(known) if known else None


def parts_of(reward: Any) -> tuple[Part, ...]:
    """The functions that a reward consists of; one that is no weighted sum is its own only part."""
    if isinstance(reward, WeightedReward):
        return reward.parts
    return (Part(getattr(reward, "__name__", type(reward).__name__), reward, 1.0),)


def joined(names: Sequence[str], functions: Sequence[Callable[..., Any]], weights: Sequence[float]) -> Any:
    """The functions as one reward: itself where there is one of weight 1.

    Args:
        names: ``module:function`` of each. A metric is called after the function, and after both where two
            functions have one name.
        functions: in TRL's signature.
        weights: of each; none is 1 for all.
    """
    if len(functions) == 1 and tuple(weights) in ((), (1.0,)):
        return functions[0]
    short = [name.partition(":")[2] for name in names]
    said = [one if short.count(one) == 1 else name_part(name) for one, name in zip(short, names)]
    return WeightedReward(tuple(map(Part, said, functions, weights or [1.0] * len(functions))))
