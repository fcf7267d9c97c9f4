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

from kalman_rl import aggregate, balance, divergence, penalty, ratio, trust
from kalman_rl.advantage import GroupZScore, LengthWeighted, group_centred, leave_one_out
from kalman_rl.objective import Method, policy_loss
from kalman_rl.rollouts import Rollouts

GOLDEN = json.loads((Path(__file__).parent / "golden" / "published_losses.json").read_text())

TOLERANCE = {"float32": 2e-5, "sequence": 2e-8, "token": 1e-12}
"""Relative. The recorded KPO works in float32 inside; verl's sequence means carry 1e-8 in a denominator."""


def _band(config: dict[str, Any]) -> trust.Clip:
    return trust.Clip(config["clip_ratio_low"], config["clip_ratio_high"], config.get("clip_ratio_c"))


def _verl_cap(config: dict[str, Any]) -> trust.Cap:
    return trust.Cap(high=1 + config["clip_ratio_high"], low=1 - config["clip_ratio_low"])


def _kpo(config: dict[str, Any]) -> tuple[Any, Any]:
    limits = _band(config) if config["is_clip"] else trust.unclipped
    return ratio.KalmanFiltered(config["kalman_Q"], config["kalman_R"], 0.0), limits


def _dppo(distance: Any) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    return lambda config: (
        ratio.BehaviourToken(),
        divergence.DivergenceMask(
            distance, config["clip_ratio_low"], config["clip_ratio_high"], config["clip_ratio_c"]
        ),
    )


def _bapo(config: dict[str, Any]) -> tuple[Any, Any]:
    ends = {
        f"{ours}{suffix}": config[f"ratio_{theirs}_{key}"]
        for ours, theirs in (("low", "lower"), ("high", "upper"))
        for suffix, key in (("", "start"), ("_end", "max"), ("_step", "step"))
    }
    dual = config["clip_ratio_c"]
    return ratio.token, balance.Balance(config["adv_ratio_target"], "quotient", "low", dual=dual, **ends)


PARTS: dict[str, Callable[[dict[str, Any]], tuple[Any, Any]]] = {
    "ppo_clip": lambda config: (ratio.token, _band(config)),
    "gspo": lambda config: (ratio.sequence_mean, _band(config)),
    "cispo": lambda config: (ratio.token, _verl_cap(config)),
    "kpo": _kpo,
    "gmpo": lambda config: (
        ratio.token,
        trust.GeometricClip(config["clip_ratio_low"], config["clip_ratio_high"]),
    ),
    "sapo": lambda config: (ratio.token, trust.SoftGate(config["tau_pos"], config["tau_neg"])),
    "gpg": lambda config: (ratio.one, trust.log_likelihood),
    "dro": lambda config: (ratio.one, trust.log_likelihood),
    "dppo_tv": _dppo(divergence.binary_tv),
    "dppo_kl": _dppo(divergence.binary_kl),
    "bapo": _bapo,
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
    "opo": lambda reward, group: LengthWeighted()(reward, group, length=torch.full_like(group, 7)),
}


def _named(records: list[dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(r, id=f"{n:02d}-{r['method']}-{r.get('aggregation', 'advantage')}")
        for n, r in enumerate(records)
    ]


def test_every_recorded_method_is_compared() -> None:
    losses = {r["method"] for r in GOLDEN["policy_losses"]}
    advantages = {r["method"] for r in GOLDEN["advantages"]}
    assert losses == set(PARTS)
    assert advantages == set(ADVANTAGE)


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
    pull = None
    if record["method"] == "dro":
        pull = penalty.SquaredLogRatio(record["config"]["policy_loss"]["dro_beta"])
    method = Method(record["method"], group_centred, transform, limits, reduce, pull)
    old = tensor("old_log_prob")
    rollouts = Rollouts(old, tensor("mask"), logp_behaviour=old)  # recorded with sampler = old policy
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


@pytest.mark.parametrize("record", [r for r in GOLDEN["policy_losses"] if r["method"] == "bapo"])
def test_bapo_ends_with_the_recorded_bounds(record: dict[str, Any]) -> None:
    found: list[trust.Clip] = []

    def note(self: balance.Balance, statistics: Tensor) -> trust.Clip:
        found.append(settle(self, statistics))
        return found[-1]

    settle = balance.Balance.settle
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance.Balance, "settle", note)
        test_value_and_gradient(record)
    bounds = record["chosen_bounds"]
    assert 1 - found[0].low == pytest.approx(bounds["clip_low"], rel=1e-12)
    assert 1 + found[0].high == pytest.approx(bounds["clip_high"], rel=1e-12)
