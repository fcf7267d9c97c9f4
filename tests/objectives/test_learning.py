"""One protocol for what learns, and one refusal of what a host does not provide."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch

from kalman_rl.errors import ConfigError
from kalman_rl.methods import METHODS, make_method
from kalman_rl.objectives.inputs import INPUTS, PARTS, STEPS, check_provided, missing
from kalman_rl.objectives.learning import bound_metrics, with_bounds
from kalman_rl.objectives.loss import Method
from kalman_rl.objectives.protocol import Learns
from kalman_rl.objectives.trust.balance import Balance

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
