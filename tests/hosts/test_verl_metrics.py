"""Metrics of our losses after verl's own reduction over micro-batches, ranks and optimizer steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", exc_type=ImportError)
from verl.trainer.ppo import core_algos
from verl.utils.metric import AggregationType, Metric, reduce_metrics
from verl.utils.py_functional import append_to_dict, rename_dict
from verl.workers.config import FSDPActorConfig

from kalman_rl.hosts.verl import KalmanPolicyLossConfig, register
from kalman_rl.hosts.verl.metrics import divided
from tests.oracles.batches import Batch, make_batch

register()
LENGTH = 17
EXACT = (
    "ratio/capped",
    "trust/kept",
    "trust/clipped_low",
    "trust/clipped_high",
    "policy/kl_old",
    "ppo_kl",
    "pg_clipfrac",
)
"""Means over tokens."""
OF_SUMS = (
    "ratio/raw_log_variance",
    "ratio/filtered_log_variance",
    "ratio/raw_sign_switch",
    "ratio/effective_sample_size",
    "effective_sample_size/tokens_raw",
    "effective_sample_size/tokens",
    "effective_sample_size/sequences_raw",
    "effective_sample_size/sequences",
)
"""No means: read from sums, which our trainer does."""
SPLITS = {
    "even": [[[0, 1], [2, 3]], [[4, 5], [6, 7]]],
    "one rank": [[[0, 1], [2, 3], [4, 5], [6, 7]]],
    "packed": [[[0, 1, 2], [3]], [[4], [5, 6, 7]]],
}
"""Rows of each micro-batch of each rank."""


def batch_of(seed: int, *, empty: bool) -> Batch:
    batch = make_batch(seed, 8, LENGTH, scale=0.4)
    batch.mask[:] = torch.arange(LENGTH) < torch.tensor([17, 16, 2, 1, 3, 9, 1, 5])[:, None]
    if empty:
        batch.mask[[2, 3]] = False
    return batch


def call(batch: Batch, rows: list[int], config: Any) -> dict[str, float]:
    advantages = torch.where(torch.arange(8)[:, None] % 2 == 0, 1.0, -1.0).expand(8, LENGTH).double()
    part, index = batch.rows(torch.tensor(rows)), torch.tensor(rows)
    _, metrics = core_algos.get_policy_loss_fn("kalman_rl/grpo")(
        old_log_prob=part.logp_old,
        log_prob=part.logp.clone().requires_grad_(),
        advantages=advantages[index],
        response_mask=part.mask,
        loss_agg_mode="token-mean",
        config=config,
    )
    return dict(metrics)


def configuration(batch: Batch, ranks: int, dynamic: bool) -> Any:
    loss = KalmanPolicyLossConfig(loss_mode="kalman_rl/grpo")
    made = FSDPActorConfig(
        rollout_n=1, ppo_micro_batch_size_per_gpu=2, policy_loss=loss, use_dynamic_bsz=dynamic
    )
    info = {"dp_size": ranks, "batch_num_tokens": int(batch.mask.sum()), "global_batch_size": 8}
    made.global_batch_info.update(info)
    return made


def one_step(batch: Batch, split: list[list[list[int]]], dynamic: bool) -> dict[str, Any]:
    """What verl's worker makes of an optimizer step: ppo_loss wraps, the ranks are gathered, then averaged."""
    config = configuration(batch, len(split), dynamic)
    ranks: list[dict[str, Any]] = []
    for micro_batches in split:
        ranks.append({})
        for rows in micro_batches:
            found = Metric.from_dict(call(batch, rows, config), aggregation=AggregationType.MEAN)
            append_to_dict(ranks[-1], found)
    return {name: Metric.aggregate_dp([rank[name] for rank in ranks]) for name in ranks[0]}


def reported(steps: list[dict[str, Any]]) -> dict[str, float]:
    metrics: dict[str, Any] = {}
    for step in steps:
        append_to_dict(metrics, step)
    return dict(reduce_metrics(rename_dict(metrics, "actor/")))


def whole(batch: Batch) -> dict[str, float]:
    return rename_dict(call(batch, list(range(8)), configuration(batch, 1, False)), "actor/")


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("split", ["even", "one rank"])
def test_means_are_those_over_all_tokens(split: str, empty: bool) -> None:
    batch = batch_of(3, empty=empty)
    found, expected = reported([one_step(batch, SPLITS[split], False)]), whole(batch)
    assert found.keys() == expected.keys()
    for name in EXACT:
        assert found[f"actor/{name}"] == pytest.approx(expected[f"actor/{name}"], rel=1e-6), name
    micro_batches = [rows for rank in SPLITS[split] for rows in rank if batch.mask[rows].any()]
    alone = [call(batch, rows, None)["trust/kept"] for rows in micro_batches]
    assert abs(np.mean(alone) - expected["actor/trust/kept"]) > 0.01, "the mean of means is another number"


@pytest.mark.parametrize("split", list(SPLITS))
def test_micro_batches_packed_by_tokens(split: str) -> None:
    """verl shows a loss no number of micro-batches there: our trainer divides."""
    batch = batch_of(4, empty=split == "even")
    found, expected = reported([one_step(batch, SPLITS[split], True)]), whole(batch)
    assert all(name.startswith("actor/weighted/") for name in found)
    assert divided(found).keys() == divided(expected).keys()
    for name in EXACT:
        assert divided(found)[f"actor/{name}"] == pytest.approx(expected[f"actor/{name}"], rel=1e-6), name


@pytest.mark.parametrize(
    ("split", "dynamic"),
    [
        ("even", False),
        ("even", True),
        ("one rank", False),
        ("packed", True),
    ],  # uneven in the dynamic mode only
)
def test_what_is_no_mean_is_read_from_sums(split: str, dynamic: bool) -> None:
    batch = batch_of(9, empty=split == "one rank")
    found, expected = divided(reported([one_step(batch, SPLITS[split], dynamic)])), whole(batch)
    for name in OF_SUMS:
        assert found[f"actor/{name}"] == pytest.approx(expected[f"actor/{name}"], rel=1e-6), name


def test_optimizer_steps_are_averaged() -> None:
    batches = [batch_of(5, empty=False), batch_of(6, empty=True)]
    found = reported([one_step(batch, SPLITS["even"], False) for batch in batches])
    for name in EXACT:
        expected = np.mean([whole(batch)[f"actor/{name}"] for batch in batches])
        assert found[f"actor/{name}"] == pytest.approx(expected, rel=1e-6), name


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_step_without_tokens_is_missing(dynamic: bool) -> None:
    batch = batch_of(7, empty=False)
    batch.mask[:] = False
    found = divided(reported([one_step(batch, SPLITS["even"], dynamic)]))
    assert len(found) > len(EXACT) + len(OF_SUMS) and all(math.isnan(value) for value in found.values())


def test_without_our_trainer_a_variance_is_the_one_within_micro_batches() -> None:
    """Documented: verl's mean cannot be more. The whole variance is larger, by that of the micro-batches' means."""
    batch = batch_of(8, empty=False)
    found = reported([one_step(batch, SPLITS["even"], False)])["actor/ratio/raw_log_variance"]
    parts = [rows for rank in SPLITS["even"] for rows in rank]
    share = [batch.mask[rows].sum().item() / batch.mask.sum().item() for rows in parts]
    within = [spread(batch, rows) for rows in parts]
    assert found == pytest.approx(float(np.dot(share, within)), rel=1e-5)
    assert found < whole(batch)["actor/ratio/raw_log_variance"]


def spread(batch: Batch, rows: list[int]) -> float:
    values: Tensor = (batch.logp - batch.logp_old)[rows][batch.mask[rows]]
    return values.var(correction=0).item()
