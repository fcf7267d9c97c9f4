"""Rewards that are missing: a batch without any teaches nothing, and several in a row are a broken reward."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kalman_rl.errors import RewardError

IN_A_ROW = 3
"""Generation batches without any reward that end a run; fewer may be a grader that was away for a moment."""
FAILED = 0.2
"""Share of completions whose supervised calls failed, over that many batches, above which a run ends."""


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
    """Counts generation batches in a row without any reward, and completions whose reward calls failed."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self.failed: deque[tuple[float, int]] = deque(maxlen=IN_A_ROW)

    def see(
        self, reward: Tensor, names: Sequence[str], step: int, failed: float = 0.0, why: str = ""
    ) -> None:
        """Judge a whole generation batch: all its rounds, on all ranks.

        Args:
            reward: (n,), NaN = missing.
            names: of the reward functions.
            step: optimizer step that the batch is for.
            failed: completions whose supervised calls failed. why: they did.

        Raises: RewardError at the batch number ``IN_A_ROW`` without any reward, and where more than ``FAILED`` of the
            last ``IN_A_ROW`` batches failed.
        """
        self.failed.append((failed, len(reward)))
        lost, total = (sum(part) for part in zip(*self.failed))
        if len(self.failed) == IN_A_ROW and lost > FAILED * total:
            raise RewardError(
                f"reward: got no result of {', '.join(names)} for {lost / total:.0%} of the completions in the last "
                f"{IN_A_ROW} generation batches because the calls failed, expected at most {FAILED:.0%} ({why}); mend "
                f"the function or its limits, then resume: a checkpoint of step {step - 1} is there"
            )
        self.in_a_row = self.in_a_row + 1 if bool(reward.isnan().all()) else 0
        if self.in_a_row >= IN_A_ROW:
            raise RewardError(
                f"reward: got no usable number from {', '.join(names)} in {self.in_a_row} generation batches in a row, "
                f"the last one of {len(reward)} completions for step {step} (all None, NaN or infinite), expected at "
                "least one; there is nothing to learn from missing rewards"
            )


def judge(trainer: Any, reward: Tensor) -> None:
    """Show a trainer's generation batch to its :class:`MissingRewards`; before an error, the step that was reached is
    saved. TRL alone warns of missing rewards and goes on, and so do its settings.

    Args: reward: (n,), of all ranks.
    """
    failed, trainer.failed_calls = trainer.failed_calls, 0
    if trainer.supervised:
        share = torch.tensor(failed / len(trainer.supervised))
        failed = float(trainer._sum_over_ranks(share))
    elif trainer.as_trl:
        return
    step = trainer.state.global_step
    why = "; ".join(filter(None, (function.summary() for function in trainer.supervised)))
    why = why or "those of another process"
    try:
        trainer.missing.see(reward, trainer.reward_func_names, step + 1, failed, why)
    except RewardError:
        if step and not (Path(trainer._get_output_dir(trial=None)) / f"checkpoint-{step}").exists():
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        raise
