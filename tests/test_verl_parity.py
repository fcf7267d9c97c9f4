"""Gradients of our compositions against verl's own loss functions, where verl is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kalman_rl import aggregate, ratio, trust
from kalman_rl.advantage import group_centred
from kalman_rl.objective import Method, policy_loss
from kalman_rl.rollouts import Rollouts
from oracles import make_batch

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
ActorConfig = pytest.importorskip("verl.workers.config", exc_type=ImportError).ActorConfig

LENGTH = 23
AGGREGATE: dict[str, Any] = {
    "token-mean": aggregate.token_mean,
    "seq-mean-token-mean": aggregate.sequence_mean,
    "seq-mean-token-sum": aggregate.SequenceSum(1.0),
    "seq-mean-token-sum-norm": aggregate.SequenceSum(float(LENGTH)),
}
LOSSES: dict[str, tuple[dict[str, float], Any, Any]] = {
    "vanilla": (
        {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1.7},
        ratio.token,
        trust.Clip(0.2, 0.28, 1.7),
    ),
    "gspo": (
        {"clip_ratio_low": 0.01, "clip_ratio_high": 0.015},
        ratio.sequence_mean,
        trust.Clip(0.01, 0.015),
    ),
    "cispo": (
        {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28},
        ratio.token,
        trust.Cap(high=1.28, low=0.8),
    ),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("mode", list(AGGREGATE))
@pytest.mark.parametrize("name", list(LOSSES))
def test_gradient(name: str, mode: str, holes: bool, seed: int) -> None:
    settings, transform, limits = LOSSES[name]
    batch = make_batch(100 + seed, 7, LENGTH, scale=0.3, holes=holes)
    advantage = torch.randn(7, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if name == "gspo":
        advantage = advantage[:, :1].expand(-1, LENGTH)

    theirs = batch.logp.clone().requires_grad_()
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)
    loss = core_algos.get_policy_loss_fn(name)
    value, _ = loss(batch.logp_old, theirs, advantage, batch.mask.double(), mode, config)
    value.backward()

    ours = batch.logp.clone().requires_grad_()
    method = Method(name, group_centred, transform, limits, AGGREGATE[mode])
    out = policy_loss(method, Rollouts(batch.logp_old, batch.mask), ours, advantage=advantage)
    out.value.backward()

    assert theirs.grad is not None and ours.grad is not None
    clipped = out.metrics["trust/clipped_low"] + out.metrics["trust/clipped_high"]
    assert name == "cispo" or 0 < clipped < 1, "choose inputs where the clip acts on some tokens"
    tolerance = 2e-8 if mode == "seq-mean-token-mean" else 1e-12  # verl adds 1e-8 to the sequence length
    torch.testing.assert_close(
        ours.grad, theirs.grad, rtol=tolerance, atol=tolerance * theirs.grad.abs().max().item()
    )
    assert out.value.item() == pytest.approx(value.item(), rel=10 * tolerance, abs=1e-12)
