"""``kalman-rl contract``: ours keeps every promise, and each promise has something that breaks it, alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro")

from kalman_rl import make_method
from kalman_rl.beliefs import Advantages, GaussianBelief
from kalman_rl.beliefs.protocol import Observed
from kalman_rl.cli.main import main
from kalman_rl.errors import ConfigError
from kalman_rl.instruments.contract import Promise, contract
from kalman_rl.instruments.contract import belief as beliefs
from kalman_rl.instruments.contract import method as methods
from kalman_rl.instruments.contract import reward as rewards
from kalman_rl.numerics.kalman import Gaussian
from kalman_rl.objectives.trust import Trust, everything, weight_of


def broken(promises: Any) -> list[str]:
    """Names of the promises that were broken."""
    return [each.name for each in promises if not each.kept]


# ---- what is ours


@pytest.mark.parametrize("name", "grpo kpo_diffuse kpo_auto dppo_topk_kl bapo k_grpo auto beta".split())
def test_ours_keep_every_promise(name: str) -> None:
    found = contract(name)
    assert found.kind == ("belief" if name in ("auto", "beta") else "method")
    assert len(found.promises) >= 7 and broken(found.promises) == []


@pytest.mark.parametrize("name", ["krpo", "k_score"])
def test_a_filter_over_the_rows_depends_on_their_order(name: str) -> None:
    """A property of the published methods, which ``krpo_invariant`` does not have."""
    assert broken(contract(name).promises) == ["the order of rows changes nothing"]


def test_the_default_reward_keeps_every_promise() -> None:
    found = contract("kalman_rl.engine.tasks.rows:first_line_reward")
    assert found.kind == "reward" and len(found.promises) == 6 and broken(found.promises) == []


# ---- methods and trust regions that break one


def with_advantage(advantage: Callable[..., Any]) -> list[str]:
    return broken(methods.promises(dataclasses.replace(make_method("rloo"), advantage=advantage)))


def by_row(reward: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    return reward * torch.arange(len(reward))


def by_number(reward: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    return reward * group


def in_place(reward: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    return reward.sub_(reward.mean())


def too_many(reward: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    return reward.repeat(2)


def restless(reward: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    return reward + torch.rand(())


def plain(ratio: Any, advantage: Any, current: Any, rollouts: Any) -> Trust:
    weight = weight_of(ratio.log_weight)
    return Trust(everything(weight), weight, -advantage * weight)


def overflowing(ratio: Any, advantage: Any, current: Any, rollouts: Any) -> Trust:
    weight = (20 * ratio.log_weight.float()).exp().to(ratio.log_weight)
    return Trust(everything(weight), weight, -advantage * weight)


def signed(ratio: Any, advantage: Any, current: Any, rollouts: Any) -> Trust:
    return Trust(everything(ratio.log_weight), advantage.sign(), advantage)


def one_for_all(ratio: Any, advantage: Any, current: Any, rollouts: Any) -> Trust:
    """The mean over the batch, padding included: it sees what it should not, and parts of a batch do not add up."""
    weight = torch.full_like(ratio.log_weight, current.logp.exp().mean().item())
    return Trust(everything(weight), weight, -advantage * weight)


@pytest.mark.parametrize(
    ("advantage", "promise"),
    {
        by_row: "the order of rows changes nothing",
        by_number: "the numbers of groups are names only",
        in_place: "what it is given stays as it was",
        too_many: "a batch gives a loss",
        restless: "the same batch gives the same gradient",
    }.items(),
)
def test_a_method_that_breaks_a_promise(advantage: Callable[..., Any], promise: str) -> None:
    assert promise in with_advantage(advantage)


def test_trust_regions() -> None:
    assert broken(methods.trust_promises(plain)) == []
    assert "gradients are finite, also far from the old policy" in broken(methods.trust_promises(overflowing))
    assert broken(methods.trust_promises(signed)) == ["it returns keep, weight and surrogate, (B, T) each"]
    found = broken(methods.trust_promises(one_for_all))
    assert found == ["what stands outside the mask is not read", "parts of a batch add up to the whole"]


# ---- beliefs that break one


class Biased(GaussianBelief):
    def advantages(self, ids: Any, reward: Any, **more: Any) -> Advantages:
        baseline = reward.nanmean().expand(len(ids))
        return Advantages((reward - baseline).nan_to_num(), baseline, torch.ones((), dtype=torch.float64))


class Sharpening(GaussianBelief):
    def predict(self, ids: Any, *, step: int, features: Any = None) -> Gaussian:
        value = super().predict(ids, step=step)
        return Gaussian(value.mean, value.variance / (1 + step))

    def predictive(self, ids: Any, *, step: int, features: Any = None) -> Gaussian:
        return super().predict(ids, step=step)


class Certain(GaussianBelief):
    def predictive(self, ids: Any, *, step: int, features: Any = None) -> Gaussian:
        value = super().predict(ids, step=step)
        return Gaussian(value.mean, value.variance / 2)


class Curious(GaussianBelief):
    def predict(self, ids: Any, *, step: int, features: Any = None) -> Gaussian:
        self._noise.pooled_count = getattr(self._noise, "pooled_count", 0) + 1
        self.looks = getattr(self, "looks", 0) + 1
        return super().predict(ids, step=step)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"looks": getattr(self, "looks", 0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({name: value for name, value in state.items() if name != "looks"})


class Forgetful(GaussianBelief):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Greedy(GaussianBelief):
    parts = itertools.count(1)

    def update(self, ids: Any, reward: Any, *, step: int, features: Any = None, part: int = 0) -> Observed:
        return super().update(ids, reward, step=step, part=next(self.parts))


class Dreaming(GaussianBelief):
    def update(self, ids: Any, reward: Any, *, step: int, features: Any = None, part: int = 0) -> Observed:
        return super().update(ids, reward.nan_to_num(1.0), step=step, part=part)


class Random(GaussianBelief):
    def __init__(self) -> None:
        super().__init__(mean=random.random())


@pytest.mark.parametrize(
    ("make", "promise"),
    {
        Biased: "the own reward of a completion never moves its own baseline",
        Sharpening: "certainty fades with time, or stays",
        Certain: "one new reward is at least as uncertain as the value",
        Curious: "looking changes nothing",
        Forgetful: "a saved state goes on bit for bit",
        Greedy: "a batch cannot count twice: the same step and part is refused",
        Dreaming: "a missing reward (NaN) has advantage 0 and teaches nothing",
        Random: "the same rewards give the same belief",
    }.items(),
)
def test_a_belief_that_breaks_a_promise(make: Callable[[], Any], promise: str) -> None:
    assert promise in broken(beliefs.promises(make))


# ---- rewards that break one


def raising(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    return [float(int(reply or 0) == int(right)) for reply, right in zip(completions, answer)]


def flipping(completions: list[Any], **columns: Any) -> list[float]:
    return [random.random() for _ in completions]


def ranked(completions: list[Any], **columns: Any) -> list[float]:
    return [float(place) for place, _ in enumerate(completions)]


def tidying(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    scores = [float(reply == right) for reply, right in zip(completions, answer)]
    answer.append("seen")
    return scores


@pytest.mark.parametrize(
    ("reward", "promise"),
    {
        raising: "odd replies raise nothing",
        flipping: "the same replies get the same rewards",
        ranked: "a reply gets the same reward alone as in a batch",
        tidying: "what it is given stays as it was",
        (
            lambda completions, **columns: [None] * len(completions)
        ): "it gives one number, or None, per completion",
        (lambda completions, **columns: 1.0): "it gives one number, or None, per completion",
    }.items(),
)
def test_a_reward_that_breaks_a_promise(reward: Callable[..., Any], promise: str) -> None:
    assert promise in broken(rewards.promises(reward, rewards.MADE_UP))


# ---- names, and the command


def test_what_a_name_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "parts_of_mine.py").write_text(
        "from tests.instruments.test_contract import *\n"
        "def soft():\n    return dataclasses.replace(make_method('grpo'), trust=plain)\n"
        "def nothing():\n    return 3\n"
        "def needy(x):\n    return x\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    kinds = {"raising": "reward", "plain": "trust region", "soft": "method", "GaussianBelief": "belief"}
    assert {name: contract(f"parts_of_mine:{name}").kind for name in kinds} == kinds
    for name, words in {
        "nothing": "which gives a int; expected a reward",
        "needy": "called without arguments",
    }.items():
        with pytest.raises(ConfigError, match=words):
            contract(f"parts_of_mine:{name}")
    with pytest.raises(ConfigError, match="did you mean 'grpo'"):
        contract("GRPO")

    rows = [{"prompt": "2 + 2 =", "answer": "4"}, {"prompt": "2 + 3 =", "answer": "5"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["contract", "parts_of_mine:raising", "--data", "rows.jsonl"]) == 1
    table = capsys.readouterr().out
    assert (
        table.startswith("parts_of_mine:raising, a reward\nkept    it gives")
        and "5 of 6 promises kept" in table
    )
    assert "BROKEN  odd replies raise nothing\n        found: ' ': reward: raising raised ValueError" in table
    assert main(["contract", "gaussian", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "belief"


def test_foreign_text_cannot_move_the_cursor() -> None:
    assert "\x1b" not in Promise("name", False, "\x1b[31mred\n").text()
