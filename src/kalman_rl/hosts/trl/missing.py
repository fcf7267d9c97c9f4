"""Rewards that are missing: a batch without any teaches nothing, and several in a row are a broken reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kalman_rl.errors import RewardError

IN_A_ROW = 3
"""Generation batches without any reward that end a run; fewer may be a grader that was away for a moment."""


def check_finite(rewards: Tensor, names: Sequence[str]) -> None:
    """Refuse an infinite reward: it would make the advantages of its whole group undefined.

    Args: rewards: (n, K), one column per reward function; NaN = missing. names: K.
    Raises: RewardError that names the function.
    """
    bad = torch.isinf(rewards)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise RewardError(
            f"reward {names[column]}: got {rewards[row, column].item()} for completion {row} of the generation batch "
            f"({int(bad.sum())} such numbers), expected a finite number; return None where there is none"
        )


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
