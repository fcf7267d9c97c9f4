"""The checks that users run: they pass, they cover every method, and they can fail."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from kalman_rl.errors import ConfigError
from kalman_rl.instruments.verify import golden, oracles, verify
from kalman_rl.instruments.verify.check import Check, relative_error
from kalman_rl.instruments.verify.example import example
from kalman_rl.instruments.verify.place import SINGLE, Place, place_of
from kalman_rl.methods import METHODS, make_method
from kalman_rl.objectives import ratio, trust
from kalman_rl.objectives.advantage.group import group_centred
from kalman_rl.objectives.loss import Method
from kalman_rl.objectives.rollouts import Rollouts

RECORDED = set(
    "grpo dr_grpo dapo opo gpg spo k_grpo gspo gspo_token kpo kpo_unclipped cispo gmpo sapo dro "
    "dppo_tv dppo_kl bapo_published maxrl vespo drpo cfpo cppo m2po vaco a3po".split()
)
"""Methods with numbers of a published implementation; those without are compared by definition only."""


@pytest.mark.parametrize("name", list(METHODS))
def test_every_check_of_a_method_passes(name: str) -> None:
    results = verify([name])
    assert {result.method for result in results} == {name}
    assert [result for result in results if not result.passed] == []
    titles = " ".join(result.name for result in results)
    for oracle in ("loop over tokens", "autograd of the literal loss", "its definition", "REINFORCE"):
        assert oracle in titles
    if name in RECORDED:
        assert "recorded loss" in titles


@pytest.mark.parametrize("name", list(METHODS))
def test_every_check_passes_in_single_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[torch.dtype] = set()
    for module in (golden, oracles):
        loss = module.policy_loss

        def note(method: Method, rollouts: Rollouts, *rest: Any, loss: Any = loss, **more: Any) -> Any:
            used.add(rollouts.logp_old.dtype)
            return loss(method, rollouts, *rest, **more)

        monkeypatch.setattr(module, "policy_loss", note)
    monkeypatch.setattr("kalman_rl.instruments.verify.place_of", lambda _: Place(dtype=torch.float32))
    results = verify([name], device="mps")
    assert [result for result in results if not result.passed] == []
    assert used == {torch.float32} and {result.tolerance for result in results} == {SINGLE}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_check_passes_on_the_gpu() -> None:
    assert [result for result in verify(device="cuda") if not result.passed] == []


def test_all_numbers_of_the_example_batch_are_put_in_their_place() -> None:
    batch, usual = example(place=Place(dtype=torch.float32)), example()
    for ours, other in zip(*([*vars(each.rollouts).values(), *each, *each.step] for each in (batch, usual))):
        if isinstance(ours, torch.Tensor) and ours.is_floating_point():
            assert ours.dtype == torch.float32 and torch.equal(ours, other.float())


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    for name in ("cuda", "mps", "tpu"):
        with pytest.raises(ConfigError, match=f"device: got '{name}', expected cpu, which"):
            verify(["grpo"], device=name)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert place_of("mps") == (torch.device("mps"), torch.float32)
    with pytest.raises(ConfigError, match="expected cpu or mps"):
        place_of("cuda")


def test_recorded_losses_speak_for_their_own_kind_only() -> None:
    def found(name: str) -> set[str]:
        return {record["method"] for record in golden.records_for(make_method(name))}

    assert found("grpo") == {"ppo_clip"} and found("kpo") == {"kpo"} and found("dro") == {"dro"}
    assert found("bapo_published") == {"bapo"} and found("bapo") == set()
    assert found("dppo_kl") == {"dppo_kl"} and found("dppo_topk_kl") == set()
    assert found("kpo_diffuse") == set()  # another start than the recorded one


def test_the_example_batch_makes_trust_regions_act() -> None:
    for name in METHODS:
        method = make_method(name)
        if isinstance(method.trust, trust.Clip) and method.ratio is not ratio.one:
            batch = example()
            advantage = oracles.advantage_of(method, batch)
            dropped = (oracles.gradient(method, batch) == 0) & batch.rollouts.mask & (advantage != 0)
            few = name in ("kpo",)  # pinned to 1: nothing to clip
            assert few or dropped.any(), name


@pytest.mark.parametrize(
    "change",
    [
        {"trust": trust.Clip(0.2, 0.05)},
        {"ratio": ratio.one},
        {"advantage": group_centred},
    ],
)
def test_limits_are_not_true_of_another_method(change: dict[str, object]) -> None:
    other = dataclasses.replace(make_method("grpo"), **change)
    assert oracles._same(other, make_method("grpo"), own=True)(Place()) > 1e-3


def test_the_example_batch_makes_shrinkage_and_clipped_innovations_act() -> None:
    for seed in oracles.SEEDS:
        batch = example(seed)
        reward, group = batch.rollouts.reward, batch.rollouts.group
        assert reward is not None and group is not None
        assert len(group.unique()) > 2 and reward.min() >= 0 and reward.max() <= 1
        shrunk = make_method("james_stein").advantage(reward, group)
        for other in ("rloo", "batch_mean"):
            assert relative_error(shrunk, make_method(other).advantage(reward, group)) > 1e-3
        tight, open_ = (
            make_method("kpo_robust", observation_noise=0.05, threshold=c).ratio(batch.logp, batch.rollouts)
            for c in (0.5, math.inf)
        )
        assert (tight.log_weight != open_.log_weight).any()


def test_a_transform_without_definition_fails() -> None:
    def doubled(logp: torch.Tensor, rollouts: object) -> ratio.Ratio:
        found = ratio.token(logp, rollouts)  # type: ignore[arg-type]
        return found._replace(log_weight=2 * found.log_weight)

    method = dataclasses.replace(make_method("grpo"), ratio=doubled)
    failed = [check.name for check in oracles.checks(method) if not check.passed]
    assert "log-weights against a loop over tokens" in failed


def test_nan_does_not_pass() -> None:
    assert not Check("x", "y", math.nan, 1.0).passed and Check("x", "y", 1.0, 1.0).passed
    assert relative_error(torch.ones(2), torch.ones(3)) == math.inf


def test_unknown_method() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cispo'"):
        verify(["cisp"])
