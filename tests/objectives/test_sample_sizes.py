"""Effective sample sizes of tokens and sequences against plain loops, over splits, packing and dropped batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kalman_rl.methods import make_method
from kalman_rl.objectives.diagnostics import joined, metric, sample_sizes
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.rollouts import Rollouts
from tests.oracles.batches import Batch, make_batch

KINDS = ("tokens_raw", "tokens", "sequences_raw", "sequences")


def kish(weights: list[float]) -> float:
    """``(sum w)^2 / (n sum w^2)``."""
    total, squares = math.fsum(weights), math.fsum(w * w for w in weights)
    return total**2 / (len(weights) * squares) if squares else 0.0


def by_loops(batch: Batch, coefficient: Tensor) -> dict[str, float]:
    ratios, used, products, means = [], [], [], []
    for row in range(len(batch.mask)):
        places = [t for t in range(batch.mask.shape[1]) if batch.mask[row, t]]
        if not places:
            continue
        logs = [float(batch.logp[row, t] - batch.logp_old[row, t]) for t in places]
        own = [abs(float(coefficient[row, t])) for t in places]
        ratios += [math.exp(log) for log in logs]
        used += own
        products.append(math.exp(math.fsum(logs)))
        means.append(math.fsum(own) / len(own))
    return dict(zip(KINDS, map(kish, (ratios, used, products, means))))


def found(sums: dict[str, Tensor]) -> dict[str, float]:
    return {name.rpartition("/")[2]: metric(name, value).item() for name, value in sums.items()}


def sizes(method: str, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    rollouts = Rollouts(batch.logp_old, batch.mask, allow_empty=True)
    advantage = torch.where(torch.arange(len(batch.mask)) % 2 == 0, 1.0, -1.0).double()
    tokens = policy_loss(make_method(method), rollouts, batch.logp, advantage=advantage, fused=False).tokens
    return sample_sizes(tokens.log_ratio, tokens.coefficient, rollouts), tokens.coefficient


@pytest.mark.parametrize("method", ["grpo", "gspo", "cispo", "kpo_diffuse"])
def test_they_are_those_of_loops(method: str) -> None:
    batch = make_batch(11, 6, 9, scale=0.4)
    batch.mask[4] = False
    sums, coefficient = sizes(method, batch)
    assert found(sums) == pytest.approx(by_loops(batch, coefficient), rel=1e-6)
    assert (
        found(sums)["sequences_raw"] < found(sums)["tokens_raw"] < 1
    )  # a product is wilder than its factors


def test_sums_of_parts_give_the_size_of_the_whole() -> None:
    batch = make_batch(12, 6, 9, scale=0.4)
    whole, _ = sizes("grpo", batch)
    parts = [sizes("grpo", batch.rows(torch.tensor(rows)))[0] for rows in ([0, 1], [2, 3], [4, 5])]
    together = {name: joined(torch.stack([part[name] for part in parts])) for name in whole}
    assert found(together) == pytest.approx(found(whole), rel=1e-9)
    mean = sum(found(part)["sequences_raw"] for part in parts) / 3
    assert mean > found(whole)["sequences_raw"] + 0.05, "a mean of sizes is another number"


def test_packed_rows_are_the_same_sequences() -> None:
    batch = make_batch(13, 4, 5, scale=0.4)
    batch.mask[:] = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    coefficient = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).double()
    apart = Rollouts(batch.logp_old, batch.mask, allow_empty=True)
    segment = torch.arange(2).repeat_interleave(5).expand(2, 10)
    packed = Rollouts(batch.logp_old.reshape(2, 10), batch.mask.reshape(2, 10), segment=segment)
    log_ratio = torch.where(batch.mask, batch.logp - batch.logp_old, 0.0)
    one = sample_sizes(log_ratio, coefficient, apart)
    other = sample_sizes(log_ratio.reshape(2, 10), coefficient.reshape(2, 10), packed)
    for name in one:
        assert one[name].tolist() == pytest.approx(other[name].tolist(), rel=1e-12), name


def test_nothing_left_is_a_size_of_zero_and_extremes_stay_finite() -> None:
    rollouts = Rollouts(torch.zeros(2, 3), torch.ones(2, 3))
    far = torch.tensor([[800.0, 800.0, 800.0], [-800.0, -800.0, -800.0]])
    sums = sample_sizes(far, torch.zeros(2, 3), rollouts)
    assert all(torch.isfinite(value).all() for value in sums.values())
    assert found(sums) == pytest.approx(
        {"tokens_raw": 0.5, "tokens": 0, "sequences_raw": 0.5, "sequences": 0}
    )
