"""What TRL's fused head does not return: whole next-token distributions, and the last hidden state.

TRL 1.16 computes log-probabilities and entropies in tiles and drops the logits. Methods that look at more
(top-k divergences, curvature masks, the optimal token baseline) cost one extra forward pass without gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.hosts.trl.config import KalmanGRPOConfig
from kalman_rl.objectives.rollouts import Current
from kalman_rl.objectives.trust.curvature import Adam, last_layer_step
from kalman_rl.objectives.trust.divergence import log_probabilities, top_k_with_sampled

PASSED_ON = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
"""What TRL passes on of a batch beside its tokens."""
_MODEL_KEYS = tuple(key for key in PASSED_ON if key not in ("num_images", "num_tiles"))
"""Of these, what the model itself reads; the others are TRL's own counts."""


class NextTokens(NamedTuple):
    """Per completion position, (B, T, ...): ids and log-probabilities of the top tokens, the sampled token's
    log-probability, ``sum_pi_squared`` (``sum_v pi(v)^2``), and the head's input divided by the
    temperature."""

    top_ids: Tensor
    top_logp: Tensor
    logp: Tensor
    sum_pi_squared: Tensor
    hidden: Tensor | None


@torch.no_grad()
def next_tokens(
    model: Any,
    inputs: dict[str, Any],
    *,
    top_k: int,
    temperature: float,
    top_ids: Tensor | None = None,
    hidden: bool = False,
    rows: int = 0,
    extra: dict[str, Any] | None = None,
) -> NextTokens:
    """Distributions over the next token at every completion position.

    Args:
        model: a causal language model; its ordinary forward pass is used.
        inputs: TRL's batch, with ``prompt_ids``, ``prompt_mask``, ``completion_ids``, ``completion_mask``.
        top_k: number of tokens per position, the sampled one among them.
        temperature: the logits are divided by it, as for sampling and loss.
        top_ids: (B, T, k) tokens to look at instead of the most likely ones.
        hidden: return the last hidden state as well.
        rows: completions per forward pass; 0 = all at once.
        extra: further arguments of the forward pass (images); all rows then go at once.

    Returns: NextTokens in float32, detached.
    """
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    sampled = inputs["completion_ids"]
    keep = sampled.shape[1]
    size = rows if rows and not extra else max(len(ids), 1)
    parts = []
    for start in range(0, len(ids), size):
        part = slice(start, start + size)
        out = model(
            input_ids=ids[part],
            attention_mask=attention[part],
            logits_to_keep=keep + 1,
            output_hidden_states=hidden,
            use_cache=False,
            **(extra or {}),
        )
        logits = out.logits[:, -keep - 1 : -1].float() / temperature
        if top_ids is None:
            chosen, top_logp = top_k_with_sampled(logits, sampled[part], min(top_k, logits.shape[-1]))
        else:
            chosen, top_logp = top_ids[part], log_probabilities(logits, top_ids[part])
        logp = log_probabilities(logits, sampled[part][..., None])[..., 0]
        sum_pi_squared = torch.softmax(logits, -1).square().sum(-1)
        state = out.hidden_states[-1][:, -keep - 1 : -1].float() / temperature if hidden else None
        parts.append(NextTokens(chosen, top_logp, logp, sum_pi_squared, state))
    columns = list(zip(*parts, strict=True))
    joined = [None if column[0] is None else torch.cat(column) for column in columns]
    return NextTokens(*joined)  # type: ignore[arg-type]


def head_moments(model: Any, optimizer: Any) -> Adam | None:
    """Adam's moments of the language-model head, or None where there are none: before the first step, with a
    frozen head (LoRA), a sharded one, or another optimizer. The curvature mask then takes a gradient step."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return None
    inner = getattr(optimizer, "optimizer", optimizer)
    state = getattr(inner, "state", {}).get(head.weight, {})
    first, second = state.get("exp_avg"), state.get("exp_avg_sq")
    if first is None or second is None or first.shape != head.weight.shape:
        return None
    group = next(g for g in inner.param_groups if any(p is head.weight for p in g["params"]))
    beta1, beta2 = group["betas"]
    return Adam(first.float(), second.float(), int(state["step"]), beta1, beta2, group["eps"])


def next_tokens_of(
    trainer: Any, model: Any, inputs: dict[str, Any], top_ids: Tensor | None = None, hidden: bool = False
) -> NextTokens:
    """:func:`next_tokens` as the trainer's settings ask for them."""
    extra = {key: inputs[key] for key in _MODEL_KEYS if inputs.get(key) is not None}
    with trainer.accelerator.autocast():
        return next_tokens(
            model,
            inputs,
            top_k=getattr(trainer.args, "top_k_distribution", KalmanGRPOConfig.top_k_distribution),
            temperature=trainer.temperature,
            top_ids=top_ids,
            hidden=hidden,
            rows=trainer.args.per_device_train_batch_size,
            extra=extra,
        )


def current_policy(
    trainer: Any, model: Any, inputs: dict[str, Any], logp: Tensor, advantage: Tensor
) -> Current:
    """The current policy with what the method's trust region needs besides ``logp``."""
    asked, optimizer = trainer.method.inputs, trainer.optimizer
    if "top_logp" in asked:
        return Current(logp, top_logp=next_tokens_of(trainer, model, inputs, inputs["top_ids"]).top_logp)
    if "step" in asked:
        now = next_tokens_of(trainer, model, inputs, hidden=True)
        assert now.hidden is not None
        rate = optimizer.param_groups[0]["lr"] if optimizer is not None else 0.0
        moments = head_moments(trainer.accelerator.unwrap_model(trainer.model), optimizer)
        step = last_layer_step(
            advantage, now.hidden, now.top_logp, now.top_ids, inputs["completion_ids"], rate, moments
        )
        return Current(logp, step=step)
    return Current(logp)
