"""What methods ask for, options by name, and the fields of Rollouts that only some methods read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kalman_rl.errors import ConfigError, NumericError, ShapeError
from kalman_rl.methods import METHODS, make_method
from kalman_rl.objectives.inputs import INPUTS, inputs_of, required
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.rollouts import Current, LastLayerStep, Rollouts, score_norm_squared
from kalman_rl.registry import make

# ---- inputs


def test_a_value_comes_back_as_it_is() -> None:
    value = torch.zeros(2)
    assert required("length", value) is value


@pytest.mark.parametrize("name", list(INPUTS))
def test_every_input_says_what_it_is_and_where_it_goes(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: got None for grpo, expected ") as caught:
        required(name, None, "grpo")
    assert any(word in str(caught.value) for word in ("Rollouts", "Current(", "advantage="))


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_only_ask_for_what_can_be_supplied(name: str) -> None:
    method = make_method(name)
    assert set(method.inputs) <= set(INPUTS)
    for asked in inputs_of(method.advantage):
        assert asked in {f.name for f in dataclasses.fields(Rollouts)} | {"length", "score_norm_squared"}


WITHOUT = {"bapo": (), "otb": ("mask", "score_norm_squared"), "opo": ("length",), "capo": ("step",)}
WITHOUT |= {"a3po": ("lag", "logp_behaviour"), "cppo": ("logp_behaviour",), "cfpo": ()}
WITHOUT |= {"dppo_tv": ("logp_behaviour",), "dppo_topk_kl": ("logp_behaviour", "top_behaviour", "top_logp")}


@pytest.mark.parametrize("name", list(WITHOUT))
def test_what_single_methods_ask_for(name: str) -> None:
    assert make_method(name).inputs == WITHOUT[name]


@pytest.mark.parametrize(
    "name", [name for name in METHODS if set(make_method(name).inputs) - {"length", "mask"}]
)
def test_bare_rollouts_are_refused_by_name(name: str) -> None:
    logp = torch.full((2, 3), -1.0)
    bare = Rollouts(logp, torch.ones(2, 3), reward=torch.tensor([0.0, 1.0]), group=torch.zeros(2).long())
    asked = "|".join(make_method(name).inputs)
    with pytest.raises(ConfigError, match=rf"^({asked}): got None for .*, expected "):
        policy_loss(make_method(name), bare, logp)


# ---- options by name


def build(number: float = 1.0, flag: bool = False, maybe: float | None = None, text: str = "a") -> tuple:
    return number, flag, maybe, text


def made(**options: Any) -> Any:
    return make("thing", {"it": build}, "it", options)


@pytest.mark.parametrize("value", [True, 1, 1.0])
def test_true(value: Any) -> None:
    assert made(flag=value)[1] is True


@pytest.mark.parametrize("value", [False, 0, 0.0])
def test_false(value: Any) -> None:
    assert made(flag=value)[1] is False


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("flag", 2, r"true or false \(1 or 0\)"),
        ("flag", 0.5, "true or false"),
        ("flag", None, "true or false"),
        ("flag", "true", "true or false"),
        ("flag", math.nan, "true or false"),
        ("flag", torch.tensor([1, 0]), "true or false"),
        ("text", 1, "a text"),
        ("text", None, "a text"),
        ("text", True, "a text"),
        ("number", "1", "a number"),
        ("number", None, "a number"),
        ("number", True, "a number"),
        ("number", [1.0], "a number"),
        ("maybe", "none", "a number"),
        ("maybe", True, "a number"),
    ],
)
def test_wrong_types(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"^thing option {name}: got .* for it, expected {expected}"):
        made(**{name: value})


def test_right_types_and_defaults() -> None:
    assert made() == (1.0, False, None, "a")
    assert made(number=2, maybe=0.5, text="b") == (2, False, 0.5, "b")
    assert made(maybe=None) == (1.0, False, None, "a")


def test_unknown_names_point_at_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^thing option: got 'flags' for it, .*did you mean 'flag'\?"):
        made(flags=1)
    with pytest.raises(ConfigError, match=r"^thing: got 'id', expected one of it; did you mean 'it'\?"):
        make("thing", {"it": build}, "id", {})
    with pytest.raises(ConfigError, match=r"^thing option: got 'x' for it, expected none, it has no options"):
        make("thing", {"it": lambda: 0}, "it", {"x": 1})


def test_required_options_are_asked_for() -> None:
    def needy(scale: float, other: float = 1.0) -> float:
        return scale * other

    assert make("thing", {"it": needy}, "it", {"scale": 2.0}) == 2.0
    with pytest.raises(ConfigError, match=r"^thing option scale: got nothing for it, expected a number"):
        make("thing", {"it": needy}, "it", {"other": 2.0})


def test_options_of_methods() -> None:
    assert make_method("bapo", gradient=1) == make_method("bapo", gradient=True)
    assert make_method("bapo", dual=None) == make_method("bapo")
    with pytest.raises(ConfigError, match=r"^method option gradient: got 0.5 for bapo"):
        make_method("bapo", gradient=0.5)


# ---- Rollouts


def rollouts(**changes: Any) -> Rollouts:
    values: dict[str, Any] = {
        "logp_old": torch.full((2, 3), -1.0),
        "mask": torch.tensor([[1, 0, 1], [0, 1, 1]]),
    }
    return Rollouts(**(values | changes))


def top(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities).log().expand(2, 3, len(probabilities)).clone()


def test_fields_are_optional_detached_and_in_float32_at_least() -> None:
    assert rollouts().top_behaviour is None and rollouts().sum_pi_squared is None
    assert rollouts().score_norm_squared is None
    for dtype, stored in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        r = rollouts(
            top_behaviour=top(0.5, 0.25).to(dtype).requires_grad_(),
            sum_pi_squared=torch.full((2, 3), 0.5, dtype=dtype).requires_grad_(),
        )
        assert r.top_behaviour is not None and r.sum_pi_squared is not None
        for field in (r.top_behaviour, r.sum_pi_squared):
            assert field.dtype == stored and not field.requires_grad
            assert (field[~r.mask] == 0).all() and (field[r.mask] != 0).all()


def test_length_and_energy() -> None:
    r = rollouts(sum_pi_squared=torch.full((2, 3), 0.4))
    assert r.length.tolist() == [2, 2]
    p = math.exp(-1)
    assert r.score_norm_squared is not None
    expected = torch.where(r.mask, 1 - 2 * p + 0.4, 0.0)
    torch.testing.assert_close(r.score_norm_squared, expected)
    empty = rollouts(mask=torch.tensor([[1, 0, 1], [0, 0, 0]]), allow_empty=True)
    assert empty.length.tolist() == [2, 0]


def test_poison_under_the_mask_is_not_read() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()
    poison = torch.tensor(math.nan)
    r = rollouts(
        top_behaviour=torch.where(mask[..., None], top(0.5, 0.25), poison),
        sum_pi_squared=torch.where(mask, 0.4, poison),
    )
    assert r.top_behaviour is not None and torch.isfinite(r.top_behaviour).all()
    assert r.score_norm_squared is not None and torch.isfinite(r.score_norm_squared).all()


@pytest.mark.parametrize("bad", [(0.9, 0.2), (0.5, math.nan), (1.1,), (math.inf, 0.1)])
def test_top_behaviour_that_is_no_distribution(bad: tuple[float, ...]) -> None:
    values = top(*(0.1 for _ in bad))
    values[1, 2] = torch.tensor(bad).log()
    with pytest.raises(
        NumericError, match=r"^top_behaviour: got probabilities .* at row 1, token 2, .*at most 1"
    ):
        rollouts(top_behaviour=values)
    with pytest.raises(NumericError, match=r"^top_logp: got probabilities"):
        logp = torch.full((2, 3), -1.0)
        batch = rollouts(logp_behaviour=logp, top_behaviour=top(*(0.1 for _ in bad)))
        advantage = torch.ones(2)
        policy_loss(make_method("dppo_topk_tv"), batch, Current(logp, top_logp=values), advantage=advantage)


def test_impossible_tokens_and_rounding_are_allowed() -> None:
    assert rollouts(top_behaviour=top(1.0, 0.0)).top_behaviour is not None
    assert rollouts(top_behaviour=top(0.5, 0.50004)).top_behaviour is not None


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 0), (3, 2, 4), (2, 3, 1, 1)])
def test_top_behaviour_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"^top_behaviour: got shape .*expected \(2, 3, 'k'\) with k >= 1"):
        rollouts(top_behaviour=torch.full(shape, -9.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1.1])
def test_collision_out_of_range(bad: float) -> None:
    sum_pi_squared = torch.full((2, 3), 0.4)
    sum_pi_squared[0, 2] = bad
    with pytest.raises(
        NumericError, match=r"^sum_pi_squared: got .* at row 0, token 2 .*sum of squared prob"
    ):
        rollouts(sum_pi_squared=sum_pi_squared)


def test_collision_shape() -> None:
    with pytest.raises(ShapeError, match=r"^sum_pi_squared: got shape \(2, 1\), expected \(2, 3\)"):
        rollouts(sum_pi_squared=torch.zeros(2, 1))


def test_score_norm_squared_of_tiny_and_certain_tokens() -> None:
    logp = torch.tensor([0.0, -1e-6, -100.0])
    norms = score_norm_squared(logp, torch.tensor([1.0, 1.0, 0.5]))
    assert norms[0] == 0 and 0.99e-12 <= norms[1] <= 2.01e-12
    assert norms[2].item() == pytest.approx(1.5, rel=1e-6)


# ---- Current


def test_current_carries_only_what_is_given() -> None:
    logp = torch.zeros(1, 2)
    assert Current(logp) == (logp, None, None)
    step = LastLayerStep(logp, logp, 1e-6)
    assert Current(logp, step=step).step is step and Current(logp, step=step).top_logp is None


def test_a_tensor_and_a_bare_current_are_the_same() -> None:
    batch = rollouts(reward=torch.tensor([0.0, 1.0]), group=torch.zeros(2).long())
    logp = torch.full((2, 3), -0.9)
    first, second = (policy_loss(make_method("grpo"), batch, x) for x in (logp, Current(logp)))
    assert torch.equal(first.value, second.value)
