"""What a part of a method looks like to the rest, where it does more than map tensors to tensors."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Learns(Protocol):
    """A ratio or a trust region with settings that are learned from sums over tokens.

    Attributes:
        memory: in [0, 1), the share of the past statistics that an optimizer step keeps; 0 for a trust region.
        learned: names of the settings that are learned; values that a user gave can stand in for them.
    """

    @property
    def memory(self) -> float: ...

    @property
    def learned(self) -> tuple[str, ...]: ...

    def initial(self) -> Tensor:
        """The state before the first step, float64."""
        ...

    def statistics(self, *args: Any, **kwargs: Any) -> Tensor:
        """What a part of an optimizer step adds to the state; it takes what the part itself is called with."""
        ...

    def fitted(self, state: Tensor) -> Any:
        """The ratio or trust region with the settings that the state leads to."""
        ...
