"""Rewards that are missing: a batch without any teaches nothing, and several in a row are a broken reward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kalman_rl.errors import RewardError

IN_A_ROW = 3
"""Generation batches without any reward that end a run; fewer may be a grader that was away for a moment."""


class MissingRewards:
    """Counts generation batches in a row without any reward."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def see(self, reward: Tensor, names: Sequence[str], step: int) -> None:
        """Judge a whole generation batch: all its rounds, on all ranks.

        Args:
            reward: (n,), NaN = missing.
            names: of the reward functions.
            step: optimizer step that the batch is for.

        Raises: RewardError at the batch number ``IN_A_ROW`` without any reward.
        """
        self.in_a_row = self.in_a_row + 1 if bool(reward.isnan().all()) else 0
        if self.in_a_row >= IN_A_ROW:
            raise RewardError(
                f"reward: got no usable number from {', '.join(names)} in {self.in_a_row} generation batches in a row, "
                f"the last one of {len(reward)} completions for step {step} (all None, NaN or infinite), expected at "
                "least one; there is nothing to learn from missing rewards"
            )
