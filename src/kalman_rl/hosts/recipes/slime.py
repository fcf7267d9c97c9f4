"""slime: a loss by import path (read at 0.3.1, August 2026).

    --loss-type custom_loss --custom-loss-function-path kalman_rl.hosts.recipes.slime.loss
    --custom-config-path kalman_rl.yaml      # kalman_rl_method: kpo_diffuse, kalman_rl_options: {process_noise: 1e-4}

slime passes logits of packed samples and a function that reduces per-token values to its loss. That function is
linear, so its gradient is the weight of every token, and these weights take the place of our aggregation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kalman_rl.errors import ConfigError
from kalman_rl.hosts.recipes.common import SUM, named, summed
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.rollouts import Rollouts

_OTHERS = ("use_kl_loss", "use_tis", "use_opsm", "get_mismatch_metrics", "entropy_coef")


def loss(args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's ``(loss, log)`` for one micro-batch of its policy.

    Args:
        args: slime's; reads ``kalman_rl_method`` and ``kalman_rl_options``, which the custom config file adds.
        batch: lists with one 1-D tensor a sample: ``advantages``, ``loss_masks``, ``log_probs``, ``rollout_log_probs``.
        logits: (1, T, V) of the packed samples.
        sum_of_sample_mean: concatenated per-token values to a scalar.

    Raises: ConfigError for methods that need more, for context parallelism (a filter needs whole completions), and for
        terms of slime's own policy loss, which would be left out silently.
    """
    from slime.backends.megatron_utils import loss as host

    used = [name for name in _OTHERS if getattr(args, name, None)]
    if getattr(args, "context_parallel_size", 1) > 1:
        used.append("context_parallel_size")
    if used:
        raise ConfigError(
            f"{', '.join(used)}: got it set beside a custom loss, expected it off; it would not act"
        )
    options = tuple(sorted(getattr(args, "kalman_rl_options", {}).items()))
    method = named("slime", getattr(args, "kalman_rl_method", "kpo_diffuse"), options)
    lengths = {name: batch[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths")}
    extra = host.get_rollout_top_p_logprob_kwargs(args, batch)
    now = host.get_log_probs_and_entropy(logits, args=args, **lengths, **extra)[1]["log_probs"]
    logp_behaviour = batch.get("rollout_log_probs")
    old = logp_behaviour if args.use_rollout_logprobs else batch.get("log_probs")
    old = old or [row.detach() for row in now]

    flat = torch.zeros(sum(len(row) for row in now), device=logits.device, requires_grad=True)
    with torch.enable_grad():
        (share,) = torch.autograd.grad(sum_of_sample_mean(flat), flat)
    weights = _rows(share.split([len(row) for row in now]))
    mask = _rows(batch["loss_masks"]) > 0
    rollouts = Rollouts(_rows(old), mask, logp_behaviour=_rows(logp_behaviour or old), allow_empty=True)
    whole = summed(method, lambda rollouts, totals: weights)
    found = policy_loss(whole, rollouts, _rows(now), advantage=_rows(batch["advantages"]), totals=SUM)
    dropped = (weights * (mask & ~found.tokens.kept)).sum()
    return found.value, {"loss": found.value.detach(), "pg_clipfrac": dropped}


def _rows(parts: Any) -> Tensor:
    return pad_sequence(list(parts), batch_first=True)
