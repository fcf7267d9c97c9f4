"""prime-rl: a loss by import path (read at 0.8.0, August 2026).

    [trainer.loss]
    type = "custom"
    import_path = "kalman_rl.hosts.recipes.prime_rl.loss"
    kwargs = { method = "kpo_diffuse", process_noise = 1e-4 }

It is called for one sequence at a time with 1-D tensors and returns a sum over tokens; the host divides by the count
of the whole step. The behaviour policy is the only older policy there is, so the ratio is trainer / inference.
"""

from __future__ import annotations

from typing import Any

import torch

from kalman_rl.errors import NumericError
from kalman_rl.hosts.recipes.common import SUM, metrics_of, named, summed
from kalman_rl.objectives.aggregate import token_mean
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.rollouts import Rollouts


def loss(inputs: Any, method: str = "kpo_diffuse", **options: Any) -> Any:
    """prime-rl's ``LossOutputs`` for its ``LossInputs``.

    Args:
        inputs: ``trainer_logprobs`` (with gradient), ``inference_logprobs``, ``ref_logprobs`` or None, ``advantages``,
            ``loss_mask``, ``loss_weights`` or None, each (T,).
        method: name in kalman_rl.METHODS; options are the method's.

    Raises: ConfigError for methods that need more, NumericError for a negative token weight.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    chosen = summed(named("prime-rl", method, tuple(sorted(options.items()))), token_mean)
    advantage, weight = inputs.advantages, inputs.loss_weights
    if weight is not None:
        if bool((weight < 0).any()):
            raise NumericError(
                f"loss_weights: got {float(weight.min())}, expected >= 0; it would turn the clip around"
            )
        advantage = advantage * weight
    old = inputs.inference_logprobs.detach()[None]
    reference = None if inputs.ref_logprobs is None else inputs.ref_logprobs[None]
    rollouts = Rollouts(
        old, inputs.loss_mask[None], logp_behaviour=old, logp_reference=reference, allow_empty=True
    )
    found = policy_loss(
        chosen, rollouts, inputs.trainer_logprobs[None], advantage=advantage[None], totals=SUM
    )
    metrics = {name: value.detach().to(torch.float32) for name, value in metrics_of(found, rollouts).items()}
    return LossOutputs(loss=found.value, metrics=metrics)
