"""Our compositions against the recorded outputs of published implementations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kalman_rl import aggregate, ratio, trust
from kalman_rl.advantage import GroupZScore, group_centred, leave_one_out
from kalman_rl.objective import Method, policy_loss
from kalman_rl.rollouts import Rollouts

GOLDEN = json.loads((Path(__file__).parent / "golden" / "published_losses.json").read_text())

NOT_YET = {"gmpo", "sapo", "dppo_tv", "dppo_kl", "dro", "gpg", "bapo", "opo"}
"""Recorded methods that this package does not have; remove a name when it gets the method."""

TOLERANCE = {"float32": 2e-5, "sequence": 2e-8, "token": 1e-12}
"""Relative. The recorded KPO works in float32 inside; verl's sequence means carry 1e-8 in a denominator."""


def _band(config: dict[str, Any]) -> trust.Clip:
    return trust.Clip(config["clip_ratio_low"], config["clip_ratio_high"], config.get("clip_ratio_c"))


def _verl_cap(config: dict[str, Any]) -> trust.Cap:
    return trust.Cap(high=1 + config["clip_ratio_high"], low=1 - config["clip_ratio_low"])


def _kpo(config: dict[str, Any]) -> tuple[Any, Any]:
    limits = _band(config) if config["is_clip"] else trust.unclipped
    return ratio.KalmanFiltered(config["kalman_Q"], config["kalman_R"], 0.0), limits


PARTS: dict[str, Callable[[dict[str, Any]], tuple[Any, Any]]] = {
    "ppo_clip": lambda config: (ratio.token, _band(config)),
    "gspo": lambda config: (ratio.sequence_mean, _band(config)),
    "cispo": lambda config: (ratio.token, _verl_cap(config)),
    "kpo": _kpo,
}
"""Recorded method -> our ratio transform and trust region."""

AGGREGATE: dict[str, Callable[[int], Any]] = {
    "token-mean": lambda length: aggregate.token_mean,
    "seq-mean-token-mean": lambda length: aggregate.sequence_mean,
    "seq-mean-token-sum": lambda length: aggregate.SequenceSum(1.0),
    "seq-mean-token-sum-norm": lambda length: aggregate.SequenceSum(float(length)),
}

ADVANTAGE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": GroupZScore(epsilon=1e-6),
    "dr_grpo": group_centred,
    "rloo": leave_one_out,
}


def _named(records: list[dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(r, id=f"{n:02d}-{r['method']}-{r.get('aggregation', 'advantage')}")
        for n, r in enumerate(records)
        if r["method"] not in NOT_YET
    ]


def test_every_recorded_method_is_compared_or_listed() -> None:
    losses = {r["method"] for r in GOLDEN["policy_losses"]}
    advantages = {r["method"] for r in GOLDEN["advantages"]}
    assert losses - NOT_YET == set(PARTS)
    assert advantages - NOT_YET == set(ADVANTAGE)
    assert losses | advantages >= NOT_YET, "a name in NOT_YET has no record"


def test_the_records_cover_what_they_should() -> None:
    count = Counter((r["method"], r["holes"]) for r in GOLDEN["policy_losses"])
    for method in ("ppo_clip", "gspo", "cispo"):
        assert count[method, True] and count[method, False]
    assert {r["aggregation"] for r in GOLDEN["policy_losses"] if r["method"] == "ppo_clip"} == set(AGGREGATE)
    assert {r["config"]["is_clip"] for r in GOLDEN["policy_losses"] if r["method"] == "kpo"} == {True, False}


@pytest.mark.parametrize("record", _named(GOLDEN["policy_losses"]))
def test_value_and_gradient(record: dict[str, Any]) -> None:
    def tensor(key: str) -> Tensor:
        return torch.tensor(record[key], dtype=torch.float64)

    transform, limits = PARTS[record["method"]](record["config"])
    reduce = AGGREGATE[record["aggregation"]](len(record["mask"][0]))
    method = Method(record["method"], group_centred, transform, limits, reduce)
    rollouts = Rollouts(tensor("old_log_prob"), tensor("mask"))
    logp = tensor("log_prob").requires_grad_()
    loss = policy_loss(method, rollouts, logp, advantage=tensor("advantages"))
    loss.value.backward()
    assert logp.grad is not None

    kind = "sequence" if record["aggregation"] == "seq-mean-token-mean" else "token"
    tolerance = TOLERANCE["float32" if record["method"] == "kpo" else kind]
    expected = tensor("grad_log_prob")
    assert loss.value.item() == pytest.approx(record["loss"], rel=tolerance)
    torch.testing.assert_close(logp.grad, expected, rtol=tolerance, atol=tolerance * expected.abs().max())
    assert torch.equal(logp.grad == 0, expected == 0), "another set of tokens lost its gradient"


@pytest.mark.parametrize("record", _named(GOLDEN["advantages"]))
def test_advantage(record: dict[str, Any]) -> None:
    """verl works in float32; it gives the reward itself to a group of one, we give 0 (nothing to compare)."""
    group = torch.tensor(record["group"])
    ours = ADVANTAGE[record["method"]](torch.tensor(record["rewards"], dtype=torch.float64), group)
    alone = torch.tensor([record["group"].count(g) == 1 for g in record["group"]])
    assert alone.any() and not alone.all()
    assert (ours[alone] == 0).all()
    theirs = torch.tensor(record["advantage"], dtype=torch.float64)
    torch.testing.assert_close(ours[~alone], theirs[~alone], rtol=1e-6, atol=1e-6)
