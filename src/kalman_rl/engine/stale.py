"""Training on samples of another policy, to study it: weights of some optimizer steps ago, or rounded ones.

In asynchronous training the sampler is behind; in a fast engine its weights are coarser. Here one model plays both:
it gets the sampler's weights while it samples. Ratios are then taken to the sampler, because the old log-probabilities
are its own.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from transformers import TrainerCallback

from kalman_rl.engine.models.weights import Weights, load_weights, rounded, trained_weights
from kalman_rl.engine.saving import RunTrainer
from kalman_rl.hosts.trl import KalmanGRPOTrainer


class StaleTrainer(KalmanGRPOTrainer):
    """A trainer whose completions come from another policy.

    Args:
        lag: >= 0, optimizer steps by which the sampler is behind when it samples. It never is behind the start.
        bits: of the sampler's matrices, 2 or more; 0 = as they are.
        Everything else as in KalmanGRPOTrainer. The older weights are not part of checkpoints.
    """

    def __init__(self, *args: Any, lag: int = 0, bits: int = 0, **kwargs: Any) -> None:
        self.bits, self.off_policy = bits, lag > 0 or bits > 0
        super().__init__(*args, **kwargs)
        self.past: deque[Weights] = deque([trained_weights(self.model)], lag + 1)
        self.add_callback(_Remember(self.past))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        now, sampler = trained_weights(self.model), self.past[0]
        load_weights(self.model, rounded(sampler, self.bits) if self.bits else sampler)
        try:
            output = super()._generate_and_score_completions(inputs)
            if (
                "old_per_token_logps" not in output
            ):  # TRL leaves them out where it takes the update for on-policy
                with torch.no_grad():
                    output["old_per_token_logps"], _, _ = self._score(self.model, output)
        finally:
            load_weights(self.model, now)
        return output

    def _warn_noop(self, why: str) -> None:
        if not self.off_policy:
            super()._warn_noop(why)


class StaleRunTrainer(StaleTrainer, RunTrainer):
    """The same, as the trainer of a run."""


class _Remember(TrainerCallback):
    def __init__(self, past: deque[Weights]) -> None:
        self.past = past

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.past.append(trained_weights(model))
