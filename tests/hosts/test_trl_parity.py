"""TRL's own loss functions on given log-probabilities, without trainer or model: value and gradient.

``_compute_loss`` of TRL's trainers is called on a stand-in that has the attributes it reads, so it is TRL's
arithmetic that runs. Not compared: entropy terms, which are TRL's own there.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kalman_rl.objectives import aggregate, correction, penalty, ratio, trust
from kalman_rl.objectives.advantage.group import group_centred
from kalman_rl.objectives.loss import Method, policy_loss
from tests.oracles.batches import Batch, make_batch

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError)
gmpo_trainer = pytest.importorskip("trl.experimental.gmpo.gmpo_trainer", exc_type=ImportError)

LENGTH = 17
ROWS = 7


class Host(NamedTuple):
    """What TRL is told, and our ratio, trust region and aggregation."""

    settings: dict[str, Any]
    ratio: Any
    trust: Any
    aggregate: Any
    trainer: Any = grpo_trainer.GRPOTrainer


def _grpo(loss_type: str, how: Any, level: str = "token", dual: float | None = None, **limits: float) -> Host:
    low, high = limits.get("low", 0.2), limits.get("high", 0.28)
    settings = {
        "loss_type": loss_type,
        "epsilon_low": low,
        "epsilon_high": high,
        "importance_sampling_level": level,
    }
    change = ratio.token if level == "token" else ratio.sequence_mean
    return Host(settings | {"delta": dual}, change, trust.Clip(low, high, dual), how)


HOSTS: dict[str, Host] = {
    "grpo": _grpo("grpo", aggregate.sequence_mean),
    "bnpo": _grpo("bnpo", aggregate.token_mean),
    "dapo": _grpo("dapo", aggregate.token_mean),
    "dr_grpo": _grpo("dr_grpo", aggregate.SequenceSum(float(LENGTH))),
    "gspo": _grpo("grpo", aggregate.sequence_mean, "sequence", low=0.02, high=0.03),
    "luspo": _grpo("luspo", aggregate.SequenceSum(1.0), "sequence", low=0.02, high=0.03),
    "two-sided": _grpo("grpo", aggregate.sequence_mean, dual=1.4),
    "vespo": Host(
        {"loss_type": "vespo", "vespo_k_pos": 0.5, "vespo_lambda_pos": 0.25}
        | {"vespo_k_neg": 0.75, "vespo_lambda_neg": 0.5},
        ratio.token,
        trust.Gamma(0.5, 0.25, 0.75, 0.5),
        aggregate.token_mean,
    ),
    "cispo": Host(
        {"loss_type": "cispo", "epsilon_high": 1.3}, ratio.token, trust.Cap(1.3), aggregate.token_mean
    ),
    "sapo": Host(
        {"loss_type": "sapo", "sapo_temperature_pos": 1.5, "sapo_temperature_neg": 2.25},
        ratio.token,
        trust.SoftGate(1.5, 2.25),  # TRL rounds temperatures to float32
        aggregate.sequence_mean,
    ),
    "gmpo": Host(
        {"epsilon_low": 0.2, "epsilon_high": 0.3},
        ratio.token,
        trust.GeometricClip(0.2, 0.3),
        aggregate.sequence_mean,
        gmpo_trainer.GMPOTrainer,
    ),
}


SEQUENCE = ("gspo", "luspo")
"""Ratio and clip of a whole sequence."""

Result = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Value, gradient, metrics."""


def theirs(host: Host, batch: Batch, advantages: Tensor, beta: float = 0.0, **inputs: Any) -> Result:
    """TRL's value and gradient, no metrics."""
    logp = batch.logp.clone().requires_grad_()
    options = {"loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2} | host.settings
    args = SimpleNamespace(
        delta=options.pop("delta", None),
        vespo_k_pos=options.pop("vespo_k_pos", 2.0),
        vespo_lambda_pos=options.pop("vespo_lambda_pos", 3.0),
        vespo_k_neg=options.pop("vespo_k_neg", 3.0),
        vespo_lambda_neg=options.pop("vespo_lambda_neg", 2.0),
        use_bias_correction_kl=inputs.pop("weighted_kl", False),
        sapo_temperature_pos=options.pop("sapo_temperature_pos", 1.0),
        sapo_temperature_neg=options.pop("sapo_temperature_neg", 1.05),
        steps_per_generation=1,
    )
    same = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
    )
    options = {"importance_sampling_level": "token"} | options
    stand_in = SimpleNamespace(
        **options,
        args=args,
        accelerator=same,
        beta=beta,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=LENGTH,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm="importance_sampling_ratio" in inputs,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        get_gamma_weights=grpo_trainer.GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *a, **kw: (logp, torch.zeros_like(logp), None),
    )
    ids = torch.zeros(len(logp), LENGTH, dtype=torch.long)
    given = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": batch.mask.long(),
        "advantages": advantages,
        "old_per_token_logps": batch.logp_old,
        "ref_per_token_logps": batch.reference,
        "num_items_in_batch": batch.mask.sum(),
    }
    value = host.trainer._compute_loss(stand_in, stand_in.model, given | inputs)
    value.backward()
    assert logp.grad is not None
    return value.detach(), logp.grad, {}


def ours(host: Host, batch: Batch, advantages: Tensor, **parts: Any) -> Result:
    method = Method("ours", group_centred, host.ratio, host.trust, host.aggregate, **parts)
    logp = batch.logp.clone().requires_grad_()
    loss = policy_loss(method, batch.rollouts(), logp, advantage=advantages)
    loss.value.backward()
    assert logp.grad is not None
    return loss.value.detach(), logp.grad, loss.metrics


def agree(ours: Result, theirs: Result, *, spread: bool = False) -> None:
    """Equal to rounding; ``spread``: TRL hands each token of a sequence the mean of what ours leaves in
    place, so gradients agree in sum over the sequence."""
    mine, other = ours[1], theirs[1]
    if spread:
        assert (mine - other).abs().max() > 1e-6
        mine, other = mine.sum(1), other.sum(1)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)
    assert other.abs().max() > 1e-4


def _case(seed: int, holes: bool = True) -> tuple[Batch, Tensor]:
    batch = make_batch(200 + seed, ROWS, LENGTH, scale=0.4, holes=holes)
    return batch, torch.randn(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", list(HOSTS))
def test_loss(name: str, holes: bool, seed: int) -> None:
    host, (batch, advantages) = HOSTS[name], _case(seed, holes)
    mine = ours(host, batch, advantages)
    agree(mine, theirs(host, batch, advantages))
    assert name in ("cispo", "sapo", "vespo") or 0 < mine[2]["trust/kept"] < 1


@pytest.mark.parametrize("name", [n for n in HOSTS if n not in ("gmpo", "vespo")])
def test_advantages_per_token(name: str) -> None:
    """TRL's GMPO takes one advantage a sequence, ours may take more."""
    host, (batch, _) = HOSTS[name], _case(4)
    g = torch.Generator().manual_seed(1)
    advantages = torch.randn(ROWS, LENGTH, dtype=torch.float64, generator=g)
    # One ratio a sequence with advantages a token is GSPO-token in ours, GSPO of the mean advantage in TRL.
    agree(ours(host, batch, advantages), theirs(host, batch, advantages), spread=name in SEQUENCE)


KL_CASES = [(n, w) for n in HOSTS for w in (False, True) if not (n == "gmpo" and w)]
"""TRL's GMPO has no weighted penalty."""


@pytest.mark.parametrize(("name", "weighted"), KL_CASES)
def test_kl_penalty(name: str, weighted: bool) -> None:
    host, (batch, advantages) = HOSTS[name], _case(5)
    expected = theirs(host, batch, advantages, beta=0.3, weighted_kl=weighted)
    level: Any = "sequence" if name in SEQUENCE else "token"
    agree(
        ours(host, batch, advantages, penalty=penalty.KL(0.3, importance_weighted=weighted, level=level)),
        expected,
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "luspo", "cispo", "sapo"])
def test_importance_correction(name: str, level: str) -> None:
    """The factor as TRL makes it for vLLM: truncated ``exp`` of the difference, (B, T) or (B, 1)."""
    host, (batch, advantages) = HOSTS[name], _case(6)
    batch = dataclasses.replace(batch, behaviour=batch.logp_old + 3 * (batch.behaviour - batch.logp_old))
    difference = torch.where(batch.mask, batch.logp_old - batch.behaviour, 0.0)
    if level == "sequence":
        difference = difference.sum(1, keepdim=True)
    factor = difference.exp().clamp(max=1.1)
    assert 0 < (factor == 1.1).double().mean() < 1
    expected = theirs(host, batch, advantages, importance_sampling_ratio=factor)
    mine = ours(host, batch, advantages, correction=correction.Truncated(1.1, level))
    agree(mine, expected, spread=name in SEQUENCE and level == "token")
