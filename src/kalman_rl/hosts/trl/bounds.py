"""Bounds that a trust region learns are those of the whole optimizer step; TRL shows one micro-batch at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kalman_rl.hosts.trl.factors import scaled_advantage
from kalman_rl.objectives.learning import bound_metrics, step_statistics
from kalman_rl.objectives.loss import Method
from kalman_rl.objectives.rollouts import Current, Rollouts


def step_method(
    trainer: Any, model: Any, inputs: dict[str, Any], rollouts: Rollouts, current: Current, advantage: Tensor
) -> Method:
    """The method for a micro-batch, with the bounds of its optimizer step.

    They take a forward pass without gradient over the step's other micro-batches, before the first of them.
    """
    method: Method = trainer.learning.now
    if "trust" not in method.learns:
        return method
    if not trainer.model.training:
        found: Method = trainer.learning.with_bounds(
            step_statistics(method, rollouts, current, advantage=advantage)
        )
        return found
    share = trainer.current_gradient_accumulation_steps
    if trainer._step % share == 0:
        total = step_statistics(method, rollouts, current, advantage=advantage)
        for i in range(1, share):
            other = trainer._buffered_inputs[(trainer._step + i) % trainer.args.steps_per_generation]
            with torch.no_grad():
                logp, entropy, _ = trainer._score(model, other)
            scaled = scaled_advantage(trainer, other, logp, entropy, trainer._loss_mask(other))
            part = step_statistics(method, trainer._rollouts(other, logp), logp, advantage=scaled)
            total = part if total is None or part is None else total + part
        trainer._step_method = trainer.learning.with_bounds(total)
        for name, bound in bound_metrics(trainer._step_method).items():
            trainer._metrics["train"][name].append(bound)
    chosen: Method = trainer._step_method
    return chosen
