"""One protocol for what learns, and one refusal of what a host does not provide."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import pytest
import torch

from kalman_rl.errors import ConfigError, RunError
from kalman_rl.methods import METHODS, make_method
from kalman_rl.objectives.inputs import INPUTS, PARTS, STEPS, check_group_size, check_provided, missing
from kalman_rl.objectives.learning import LearnedState, bound_metrics, step_statistics, with_bounds
from kalman_rl.objectives.loss import Method
from kalman_rl.objectives.protocol import Learns
from kalman_rl.objectives.trust.balance import Balance
from tests.oracles.batches import advantage_of, make_batch

STEP_NAMES = {name for name, _ in STEPS.values()}


def test_the_parts_of_a_method_are_its_fields() -> None:
    assert {field.name for field in dataclasses.fields(Method)} == {"name", *PARTS}


@pytest.mark.parametrize("name", list(METHODS))
def test_what_learns_follows_from_the_parts(name: str) -> None:
    method = make_method(name)
    kinds = {"kpo_auto": {"ratio"}, "kpo_noise": {"ratio"}, "kpo_robust": {"ratio"}}
    kinds |= {"bapo": {"trust"}, "bapo_published": {"trust"}, "m2po": {"trust"}}
    assert set(method.learns) == kinds.get(name, set())
    for part in method.learns.values():
        assert part.fitted(part.initial()) is not None and 0 <= part.memory < 1
        assert all(hasattr(part, setting) for setting in part.learned)
        assert part.initial().dtype == torch.float64 and not part.initial().any()


def test_nothing_seen_leaves_the_start_values() -> None:
    for name in ("kpo_auto", "kpo_noise", "kpo_robust"):
        part = make_method(name).learns["ratio"]
        fitted = part.fitted(part.initial())
        for setting in part.learned:
            assert getattr(fitted, setting) == getattr(part, setting)
    bapo = make_method("bapo")
    bounds = bound_metrics(with_bounds(bapo, bapo.learns["trust"].initial()))
    assert bounds == pytest.approx({"trust/bound_low": 0.6, "trust/bound_high": 1.2})


def test_a_trust_region_keeps_nothing_of_the_past() -> None:
    class Remembering(Balance):
        memory: ClassVar[float] = 0.5

    assert isinstance(Remembering(), Learns)
    with pytest.raises(ConfigError, match=r"^trust: got memory 0.5 for grpo, expected 0"):
        dataclasses.replace(make_method("grpo"), trust=Remembering())


@pytest.mark.parametrize("name", list(METHODS))
def test_missing_is_what_is_asked_less_what_is_provided(name: str) -> None:
    method = make_method(name)
    everything = set(INPUTS) | STEP_NAMES
    assert not missing(method, everything)
    check_provided(method, everything, "a host", "nothing to do")
    asked = set(method.inputs) | {STEPS[part][0] for part in method.learns}
    assert set(missing(method, ())) == asked
    for one in asked:
        with pytest.raises(
            ConfigError, match=rf"^method: got '{name}' for a host, .* without {one} \(.*; do so"
        ):
            check_provided(method, everything - {one}, "a host", "do so")


def test_what_is_missing_is_said_in_short() -> None:
    assert missing(make_method("bapo"), ()) == {STEPS["trust"][0]: STEPS["trust"][1]}
    for name in ("otb", "opo", "dppo_topk_kl", "capo", "a3po"):
        found = missing(make_method(name), ())
        assert found == {one: INPUTS[one].split(";")[0] for one in sorted(make_method(name).inputs)}
        assert list(found) == sorted(found)


def test_a_part_that_the_host_computes_asks_for_nothing() -> None:
    assert set(missing(make_method("otb"), ())) == {"score_norm_squared", "mask"}
    assert not missing(make_method("otb"), {"advantage"})
    assert set(missing(make_method("capo"), {"advantage", "aggregate"})) == {"step"}


def test_an_input_that_nobody_knows_is_named() -> None:
    class Odd:
        inputs = ("moon_phase",)

        def __call__(self, logp: torch.Tensor, rollouts: object) -> None: ...

    odd = dataclasses.replace(make_method("grpo"), ratio=Odd())
    with pytest.raises(ConfigError, match=r"without moon_phase \(no known input\)"):
        check_provided(odd, set(INPUTS), "a host", "do so")


# ---- the state over optimizer steps


def started(name: str, share: float = 1.0) -> LearnedState:
    return LearnedState(make_method(name), lambda total: share * total)


@pytest.mark.parametrize("name", ["kpo_auto", "kpo_robust"])
def test_the_state_is_what_was_kept_and_the_sum_of_the_step(name: str) -> None:
    """Two optimizer steps of two micro-batches, reduced over ranks; nothing seen changes nothing."""
    learned, batches = started(name, 3.0), [make_batch(seed, 8, 40, holes=False) for seed in range(4)]
    part = learned.method.ratio
    parts = [part.statistics(batch.logp, batch.rollouts()) for batch in batches]
    assert learned.now.ratio == part.fitted(part.initial())
    for step in (batches[:2], batches[2:]):
        for batch in step:
            before = learned.now
            learned.observe(batch.logp.requires_grad_(), batch.rollouts())
            assert learned.now is before, "a step does not see itself"
        learned.end_step()
        assert learned.now.ratio != before.ratio
        after = learned.state.clone()
        learned.end_step()
        assert torch.equal(learned.state, after)
    expected = part.memory * 3 * (parts[0] + parts[1]) + 3 * (parts[2] + parts[3])
    torch.testing.assert_close(learned.state, expected, rtol=1e-12, atol=1e-12)
    assert learned.now == dataclasses.replace(learned.method, ratio=part.fitted(learned.state))
    other = started(name)
    other.load_state_dict(learned.state_dict())
    assert other.now == learned.now and torch.equal(other.state_dict()["ratio"], learned.state)


def test_what_learns_nothing_keeps_nothing() -> None:
    learned, batch = started("grpo"), make_batch(0)
    learned.observe(batch.logp, batch.rollouts())
    learned.end_step()
    learned.load_state_dict({})
    assert learned.state is None and learned.state_dict() == {} and learned.now is learned.method
    statistics = torch.ones(2)
    assert learned.with_bounds(None) is learned.with_bounds(statistics) is learned.now
    assert step_statistics(learned.now, batch.rollouts(), batch.logp, advantage=batch.reward) is None


STATE = torch.zeros(256, dtype=torch.float64)


@pytest.mark.parametrize(
    "name, state, got",
    [
        ("kpo_robust", {}, r"\{\}"),
        ("kpo_robust", None, "no finite tensors"),
        ("kpo_robust", {"ratio": STATE[:-1]}, r"\{'ratio': \(255,\)\}"),
        ("kpo_robust", {"ratio": STATE, "trust": STATE}, r"\{'ratio': .*'trust': .*\}"),
        ("kpo_robust", {"ratio": STATE + math.nan}, "no finite tensors"),
        ("kpo_robust", {"ratio": STATE.tolist()}, "no finite tensors"),
        ("grpo", {"ratio": STATE}, r"\{'ratio': \(256,\)\}"),
    ],
)
def test_the_state_of_another_method_is_refused(name: str, state: Any, got: str) -> None:
    learned = started(name)
    before = learned.now
    with pytest.raises(
        RunError, match=rf"^checkpoint: got learned state {got}, expected \{{.*\}} for {name}; continue with"
    ):
        learned.load_state_dict(state)
    assert learned.now is before


@pytest.mark.parametrize("name", ["bapo", "m2po"])
def test_bounds_are_those_of_the_sum_over_ranks(name: str) -> None:
    learned, batch = started(name, 2.0), make_batch(1)
    advantage = advantage_of(learned.method, batch)
    statistics = step_statistics(learned.now, batch.rollouts(), batch.logp, advantage=advantage)
    found = learned.with_bounds(statistics)
    assert found == with_bounds(learned.method, 2 * statistics) != learned.method
    bounds = {f"trust/bound_{side}": getattr(found.trust, side) for side in ("low", "high")}
    signs = {
        "bapo": (1 - found.trust.low, 1 + found.trust.high),
        "m2po": (-found.trust.low, found.trust.high),
    }[name]
    assert bound_metrics(found) == dict(zip(bounds, signs)) and bound_metrics(learned.method) == {}


def test_single_completions_need_a_baseline_of_their_own() -> None:
    for name, size in (("rloo", 2), ("reinforce", 1)):
        check_group_size(make_method(name), size, "num_generations", "tracker")
    with pytest.raises(
        ConfigError,
        match="^num_generations: got 1 for method 'rloo', expected at least 2 .* single completions "
        r"\(tracker\)$",
    ):
        check_group_size(make_method("rloo"), 1, "num_generations", "tracker")
