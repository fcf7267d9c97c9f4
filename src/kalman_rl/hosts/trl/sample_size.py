"""A learning rate that follows the effective sample size: shorter steps where few sequences carry the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kalman_rl.checks import is_real
from kalman_rl.errors import ConfigError, quote

SHARE = "effective_sample_size/sequences_raw"


class SampleSizeRate(TrainerCallback):
    """Scale each optimizer step by the effective sample size of its sequences.

        rate = rate of the schedule * sqrt(min(1, ESS / ESS_0)),   ESS = (sum W)^2 / sum W^2

    W is the product of a sequence's token ratios; the sums are over all micro-batches and ranks of the step. The root
    is for optimizers of Adam's kind. The schedule itself is left as it is, and so is the logged ``learning_rate``.

    Args: reference: ESS_0 / n in (0, 1], the share that is no reason for shorter steps.
    Raises: ConfigError for a reference out of range.
    Source: VCPO (arXiv 2602.17616), whose factor has ESS_0 = n.

    >>> rate = SampleSizeRate(reference=0.9)
    >>> rate.step_metrics({SHARE: 0.225})
    >>> rate.factor
    0.5
    """

    def __init__(self, reference: float = 1.0) -> None:
        if not (is_real(reference) and 0 < reference <= 1):
            raise ConfigError(
                f"reference: got {quote(reference)}, expected a share of the sequences in (0, 1]"
            )
        self.reference = float(reference)
        self.factor = 1.0
        self._kept: list[float] = []

    def step_metrics(self, metrics: Mapping[str, float]) -> None:
        """Called by :class:`~kalman_rl.hosts.trl.KalmanGRPOTrainer` before each optimizer step, alike on all ranks."""
        self.factor = math.sqrt(min(1.0, metrics.get(SHARE, 1.0) / self.reference))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._kept = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= self.factor

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        for group, rate in zip(optimizer.param_groups, self._kept):
            group["lr"] = rate
