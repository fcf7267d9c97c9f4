"""Bad input to public functions: the error names the argument, what came and what was expected, and nothing changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.beliefs.implied import StopRule

from kalman_rl import KalmanPreferenceTracker
from kalman_rl.beliefs import (
    BetaBelief,
    BySource,
    GaussianBelief,
    RegressionBelief,
    SPOBelief,
    make_belief,
)
from kalman_rl.engine.tasks import load_reward, load_task
from kalman_rl.errors import ConfigError, KalmanRLError, NumericError, ShapeError
from kalman_rl.instruments.board.serve import listen
from kalman_rl.instruments.replay import replay
from kalman_rl.instruments.report import write_report
from kalman_rl.numerics.hadamard import SRHT
from kalman_rl.objectives.advantage.group import leave_one_out
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.sampling.allocate import allocate
from kalman_rl.sampling.budget import Budget
from kalman_rl.sampling.coverage import Coverage
from kalman_rl.sampling.divide import divide, gradient_gains, mixed_group_gains
from kalman_rl.sampling.gains import mixed_group_gain
from kalman_rl.sampling.one_prompt.environment import SimulatedPreferenceEnv
from kalman_rl.sampling.one_prompt.loop import run_adaptive_sampling
from kalman_rl.sampling.price import Price
from kalman_rl.sampling.rounds import RoundPlan
from kalman_rl.sampling.stream import PromptStream
from kalman_rl.sampling.tracking import Tracking

tensor = torch.tensor
IDS, REWARD = ["a", "a", "b"], tensor([1.0, 0.0, 1.0])
ROWS = [[1.0], [1.0], [1.0]]
Call = Callable[[], Any]


def by_source(source: Any = str, make: Any = GaussianBelief) -> BySource:
    return BySource(make, source)


def asked(**options: Any) -> RoundPlan:
    """A plan whose first request waits for rewards."""
    plan = RoundPlan(GaussianBelief(), ["a", "b"], step=0, **{"total": 8, **options})
    plan.next_round()
    return plan


def divided(ids: Any = ("a",), belief: Any = None, **options: Any) -> Any:
    return allocate(GaussianBelief() if belief is None else belief, ids, step=0, **({"total": 4} | options))


def sampled(tracker: Any = None, **options: Any) -> Any:
    tracker = KalmanPreferenceTracker() if tracker is None else tracker
    return run_adaptive_sampling(SimulatedPreferenceEnv(), tracker, **options)


BELIEFS: dict[str, tuple[type[KalmanRLError], str, Call]] = {
    "name": (ConfigError, "belief: got", lambda: make_belief(["beta"])),
    "text": (NumericError, "process_noise: got '0.1'", lambda: make_belief("gaussian", process_noise="0.1")),
    "none": (NumericError, "mean, variance: got 0.5, None", lambda: make_belief("gaussian", variance=None)),
    "bool": (NumericError, "observation_noise: got True", lambda: GaussianBelief(observation_noise=True)),
    "source": (ConfigError, "source: got 'x'", lambda: make_belief("beta", source="x")),
    "prior": (ConfigError, "prior: got 1.0, expected two", lambda: BetaBelief(prior=1.0)),
    "forgetting": (ConfigError, "forgetting: got '0.9'", lambda: BetaBelief(forgetting="0.9")),
    "rho": (ConfigError, "rho, half, low, high: got 'a'", lambda: SPOBelief(rho="a")),
    "bank": (
        ConfigError,
        "process_noise: got 0.001, expected a list",
        lambda: RegressionBelief(process_noise=1e-3),
    ),
    "tau2": (ConfigError, "prior_variance: got .*> 0", lambda: RegressionBelief(prior_variance=[0.0, 1.0])),
    "start lengths": (
        ShapeError,
        "successes, trials: got 2 and 1",
        lambda: SPOBelief().start(["a"], [1, 2], [2]),
    ),
    "start nobody": (ShapeError, "ids: got an empty batch", lambda: SPOBelief().start([], [], [])),
    "start text": (ShapeError, "ids: got str", lambda: SPOBelief().start("ab", [1, 1], [2, 2])),
    "Q": (NumericError, "Q_val: got 'a'", lambda: KalmanPreferenceTracker(Q_val="a")),
    "R": (NumericError, "R_val: got None", lambda: KalmanPreferenceTracker(R_val=None)),
}


@pytest.mark.parametrize("case", BELIEFS)
def test_settings_of_beliefs(case: str) -> None:
    kind, message, call = BELIEFS[case]
    with pytest.raises(kind, match=f"^{message}"):
        call()


BATCHES: dict[str, tuple[str, Any, Any, Any]] = {
    "ids None": ("ids: got NoneType", None, REWARD, None),
    "ids consumed": ("ids: got generator", (name for name in IDS), REWARD, None),
    "tensors as names": ("ids: got tensors as names", list(tensor([1, 1, 2])), REWARD, None),
    "list of rewards": (r"reward: got list, expected a real tensor \(3,\)", IDS, REWARD.tolist(), None),
    "complex rewards": (r"reward: got complex \(3,\)", IDS, REWARD.to(torch.complex64), None),
    "list of features": (r"features: got list, expected floating \(3, F\)", IDS, REWARD, ROWS),
    "features of others": (r"features: got torch.float32 \(1, 1\)", IDS, REWARD, tensor([[1.0]])),
}


@pytest.mark.parametrize("make", [RegressionBelief, lambda: by_source(make=RegressionBelief)])
@pytest.mark.parametrize("case", BATCHES)
def test_batches(case: str, make: Callable[[], Any]) -> None:
    message, ids, reward, features = BATCHES[case]
    belief = make()
    with pytest.raises(ShapeError, match=f"^{message}"):
        belief.update(ids, reward, step=0, features=features)
    assert len(belief) == 0


def test_sources_that_cannot_be_hashed() -> None:
    with pytest.raises(ShapeError, match="^source: got a name that cannot be hashed"):
        by_source(lambda name: [name]).update(IDS, REWARD, step=0)


@pytest.mark.parametrize("phi, y, mask, message", [
    (ROWS, REWARD, None, "phi: got list"),
    (tensor(ROWS), REWARD.tolist(), None, "y: got list"),
    (tensor(ROWS), REWARD.to(torch.complex64), None, r"y: got torch.complex64 \(3,\)"),
    (tensor(ROWS), REWARD, [True] * 3, "mask: got list"),
])  # fmt: skip
def test_batches_of_the_tracker(phi: Any, y: Any, mask: Any, message: str) -> None:
    tracker = KalmanPreferenceTracker(dim=1)
    with pytest.raises(ShapeError, match=f"^{message}"):
        tracker.update(phi, y, mask)
    assert tracker.state_dict()["seen"] == 0


def _stream(pool: Any = ("a", "b")) -> PromptStream:
    return PromptStream(GaussianBelief(), pool, 1)


def _bought() -> Price:
    return Price(4.0, value=0.1)


def _covered() -> Coverage:
    coverage = Coverage(3)
    coverage.visit(["a"], step=1)
    return coverage


def _learned(belief: Any) -> Callable[[], Any]:
    def make() -> Any:
        new = belief()
        new.update(IDS, REWARD, step=0)
        return new

    return make


def _tracked() -> KalmanPreferenceTracker:
    tracker = KalmanPreferenceTracker(dim=1)
    tracker.update(tensor(ROWS), REWARD)
    return tracker


KEEPERS = {
    "stream": _stream,
    "price": _bought,
    "coverage": _covered,
    "tracker": _tracked,
    "sources": _learned(by_source),
    **{kind.__name__: _learned(kind) for kind in (BetaBelief, GaussianBelief, RegressionBelief, SPOBelief)},
}


@pytest.mark.parametrize("name", KEEPERS)
def test_a_state_cut_short_changes_nothing(name: str) -> None:
    """Whatever entry is missing, the error says which, and the object stays as it was."""
    keeper, other = KEEPERS[name](), KEEPERS[name]()
    if name in ("sources", *(k for k in KEEPERS if k.endswith("Belief"))):
        other.update(IDS, REWARD, step=5)
    before, state = repr(keeper.state_dict()), other.state_dict()
    unread = {"budget", "rate"}  # of a price: those of the object stay
    for entry in state.keys() - unread:
        short = {key: value for key, value in copy.deepcopy(state).items() if key != entry}
        with pytest.raises(ConfigError, match=f"state: got no {entry}, expected what state_dict"):
            keeper.load_state_dict(short)
        assert repr(keeper.state_dict()) == before
    with pytest.raises(ConfigError, match="state: got NoneType, expected the dictionary"):
        keeper.load_state_dict(None)
    keeper.load_state_dict(state)
    assert repr(keeper.state_dict()) == repr(state)


ONE, GAINS = tensor([1.0]), tensor([[1.0]])
SAMPLING: dict[str, tuple[type[KalmanRLError], str, Call]] = {
    "k below zero": (ConfigError, "k: got -1", lambda: SimulatedPreferenceEnv().sample(-1)),
    "half a completion": (ConfigError, "k: got 1.5", lambda: SimulatedPreferenceEnv().sample(1.5)),
    "seed": (ConfigError, "seed: got 'x'", lambda: SimulatedPreferenceEnv(seed="x")),
    "features": (ShapeError, "features: got list", lambda: SimulatedPreferenceEnv(features=[1.0])),
    "env": (ConfigError, "env: got NoneType", lambda: run_adaptive_sampling(None, KalmanPreferenceTracker())),
    "tracker": (ConfigError, "tracker: got GaussianBelief", lambda: sampled(GaussianBelief())),
    "rounds": (ConfigError, "rounds: got 2, expected a list", lambda: sampled(rounds=2)),
    "rounds of a bool": (ConfigError, "rounds: got", lambda: sampled(rounds=(True,))),
    "n_max": (ConfigError, "n_min, n_max: got 2, 3.5", lambda: sampled(n_max=3.5)),
    "gap": (NumericError, "gap: got 'x'", lambda: sampled(gap="x")),
    "belief": (ConfigError, "belief: got str", lambda: divided(belief="beta")),
    "unhashable": (ShapeError, "ids: got a name that cannot", lambda: divided([["a"]])),
    "price": (ConfigError, "price: got 0.1, expected a Price", lambda: divided(total=None, price=0.1)),
    "coverage": (ConfigError, "coverage: got 5", lambda: divided(coverage=5)),
    "noise": (NumericError, "reward_noise_variance: got -1.0", lambda: divided(reward_noise_variance=-1.0)),
    "plan's rounds": (ConfigError, "rounds: got 2", lambda: asked(rounds=2)),
    "plan's budget": (ConfigError, "budget: got '8'", lambda: asked(total=None, budget="8")),
    "plan's max_rounds": (ConfigError, "max_rounds: got 1.5", lambda: asked(max_rounds=1.5)),
    "plan's features": (ShapeError, r"features: got torch.float32 \(1, 1\)", lambda: asked(features=GAINS)),
    "told": (ShapeError, "ids: got a name that cannot", lambda: asked().tell([["a"]], ONE)),
    "pool": (ShapeError, "pool: got str", lambda: _stream("ab")),
    "no pool": (ShapeError, "pool: got NoneType", lambda: _stream(None)),
    "stream's features": (ConfigError, "features: got Tensor", lambda: _stream().draw(step=0, features=GAINS)),
    "cost": (ConfigError, "budget: got 'x'", lambda: Price("x")),
    "gains": (ShapeError, "gains: got list", lambda: divide([[1.0]], 1, tensor([0]), tensor([1]))),
    "a gain below 0 after a 0": (NumericError, "gains: got -1.0", lambda: divide(
        tensor([[0.5, 0.0, -1.0]]), 1, tensor([0]), tensor([1]))),
    "bounds of the second prompt": (ConfigError, "least, most: got 2 and 1 at prompt 1", lambda: divide(
        torch.ones(2, 3), 3, tensor([0, 2]), tensor([3, 1]))),
    "least": (ShapeError, "least: got list", lambda: divide(GAINS, 1, [0], tensor([1]))),
    "no completion": (ConfigError, "n_max: got 0", lambda: gradient_gains(ONE, 0)),
    "signal": (ShapeError, "signal: got list", lambda: gradient_gains([0.2], 3)),
    "mixed groups": (ConfigError, "n_max: got -3", lambda: mixed_group_gains(ONE, ONE, -3)),
    "half a step": (NumericError, "k: got 1.5", lambda: mixed_group_gain(1.0, 1.0, 0, 0, k=1.5)),
    "failures": (NumericError, "failures: got -1.0", lambda: mixed_group_gain(1.0, 1.0, 3, -1)),
    "round": (ConfigError, "k, cap: got 1.5, 3", lambda: StopRule(k=1.5, cap=3)),
    "round's prior": (ConfigError, "prior: got", lambda: StopRule(prior=(math.nan, 1.0))),
}  # fmt: skip


@pytest.mark.parametrize("case", SAMPLING)
def test_sampling(case: str) -> None:
    kind, message, call = SAMPLING[case]
    with pytest.raises(kind, match=f"^{message}"):
        call()


@pytest.mark.parametrize("options, message", [
    ({"allocation": "rond"}, "allocation: got 'rond', .*did you mean 'rounds'"),
    ({"aim": "x"}, "aim: got 'x'"),
    ({"reward_range": "x"}, "reward_range: got 'x'"),
    ({"aim": "mixed_groups", "reward_range": "real"}, "aim: got 'mixed_groups' with real-valued rewards"),
    ({"rounds": ()}, "rounds: got"),
    ({"max_rounds": 0}, "max_rounds: got 0"),
    ({"coverage_steps": 0}, "coverage_steps: got 0"),
    ({"completions_min": "1"}, "completions_min, completions_max: got '1', 32"),
    ({"reward_noise_variance": -1.0}, "reward_noise_variance: got -1.0"),
    ({"budget": "4", "allocation": "rounds"}, "budget: got '4'"),
])  # fmt: skip
def test_a_budget_is_checked_before_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        Budget(**options)


def test_a_checkpoint_without_its_beliefs() -> None:
    tracking = Tracking(GaussianBelief(), Budget())
    with pytest.raises(ConfigError, match="^checkpoint's beliefs: got no belief, coverage"):
        tracking.load_state_dict({})


@pytest.mark.parametrize("port", ["80", 1.5, True, -1])
def test_ports_of_the_board(port: Any) -> None:
    with pytest.raises(ConfigError, match="^port: got .*, expected 0 to 65535"):
        listen("127.0.0.1", port)


@pytest.mark.parametrize("options, message", [
    ({"method": None}, "method: got None, expected the name"),
    ({"against": 5}, "against: got 5, expected the name"),
    ({"top": 1.5}, "top: got 1.5"),
    ({"steps": 5}, "steps: got 5"),
    ({"steps": (5,)}, r"steps: got \(5,\)"),
])  # fmt: skip
def test_replay_and_report(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(ConfigError, match=f"^{message}"):
        replay(tmp_path, **({"method": "kpo"} | options))
    with pytest.raises(ConfigError, match="^runs: got .*, expected a list of run directories"):
        write_report(tmp_path)


@pytest.mark.parametrize("name", ["logp_old", "mask", "reward", "group", "logp_behaviour", "segment"])
def test_rollouts_of_lists(name: str) -> None:
    parts = {"logp_old": -torch.ones(1, 2), "mask": torch.ones(1, 2, dtype=torch.bool)}
    with pytest.raises(ShapeError, match=f"^{name}: got list, expected a tensor"):
        Rollouts(**(parts | {name: [[1.0, 1.0]]}))


@pytest.mark.parametrize("call, message", [
    (lambda: SRHT(3.5, 2), "dimension_in, dimension_out: got 3.5, 2"),
    (lambda: SRHT(4, 2)([[1.0] * 4]), "x: got list"),
    (lambda: SRHT(4, 2).load_state_dict({"format": 1}), "SRHT state: got no dimension_in"),
    (lambda: leave_one_out([1.0, 2.0], tensor([0, 0])), "reward: got list"),
    (lambda: load_task(["sort12"]), "task: got"),
    (lambda: load_task("sort12", train_size=1.5), "train_size: got 1.5"),
    (lambda: load_reward(None), "reward: got None"),
])  # fmt: skip
def test_features_advantages_and_tasks(call: Call, message: str) -> None:
    with pytest.raises((ConfigError, ShapeError), match=f"^{message}"):
        call()
