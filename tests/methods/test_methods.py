"""The table of methods: names, options, errors, and that every method can travel between processes."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pickle
import re
from typing import Any

import pytest
import torch

from kalman_rl.errors import ConfigError, KalmanRLError, NumericError
from kalman_rl.methods import METHODS, aliases, make_method
from kalman_rl.objectives import advantage, aggregate, penalty, ratio, trust
from kalman_rl.objectives.loss import Method
from tests.oracles.batches import CASES, make_batch, run

every = pytest.mark.parametrize("name", list(METHODS))


# ---- the table


def test_published_names_are_there() -> None:
    published = "reinforce rloo grpo dr_grpo dapo gspo cispo kpo kpo_unclipped kpo_diffuse ratio_one"
    assert set(published.split()) <= set(METHODS)


@every
def test_each_method_knows_its_name_and_says_where_it_comes_from(name: str) -> None:
    method = make_method(name)
    assert method.name == name == METHODS[name].__name__
    assert method == METHODS[name]()
    doc = inspect.getdoc(METHODS[name]) or ""
    assert "Source:" in doc or "arXiv" in doc or "Ours" in doc or "control" in doc
    for option in inspect.signature(METHODS[name]).parameters.values():
        assert option.kind is option.KEYWORD_ONLY and option.default is not option.empty


@pytest.mark.parametrize(
    "name, parts",
    {
        "reinforce": (advantage.ConstantBaseline(0.0), ratio.one, trust.unclipped, aggregate.sequence_mean),
        "rloo": (advantage.leave_one_out, ratio.one, trust.unclipped, aggregate.sequence_mean),
        "grpo": (advantage.GroupZScore(1e-4), ratio.token, trust.Clip(0.2, 0.2), aggregate.sequence_mean),
        "dr_grpo": (advantage.group_centred, ratio.token, trust.Clip(0.2, 0.2), aggregate.SequenceSum(1024)),
        "dapo": (advantage.GroupZScore(1e-4), ratio.token, trust.Clip(0.2, 0.28), aggregate.token_mean),
        "gspo": (
            advantage.GroupZScore(1e-4),
            ratio.sequence_mean,
            trust.Clip(3e-4, 4e-4),
            aggregate.sequence_mean,
        ),
        "cispo": (advantage.GroupZScore(1e-4), ratio.token, trust.Cap(5.0, 0.0), aggregate.token_mean),
        "kpo": (
            advantage.GroupZScore(1e-4),
            ratio.KalmanFiltered(1e-6, 1.0, 0.0),
            trust.Clip(3e-4, 4e-4),
            aggregate.sequence_mean,
        ),
        "kpo_unclipped": (
            advantage.GroupZScore(1e-4),
            ratio.KalmanFiltered(1e-4, 1.0, 0.0),
            trust.unclipped,
            aggregate.sequence_mean,
        ),
        "kpo_diffuse": (
            advantage.GroupZScore(1e-4),
            ratio.KalmanFiltered(1e-6, 1.0, math.inf),
            trust.Clip(0.03, 0.03),
            aggregate.sequence_mean,
        ),
        "ratio_one": (
            advantage.GroupZScore(1e-4),
            ratio.one,
            trust.Clip(3e-4, 4e-4),
            aggregate.sequence_mean,
        ),
    }.items(),
)
def test_published_defaults(name: str, parts: tuple[Any, ...]) -> None:
    """Written out a second time on purpose: a changed default changes what a published name means."""
    m = make_method(name)
    assert (m.advantage, m.ratio, m.trust, m.aggregate, m.penalty) == (*parts, None)


@every
def test_every_option_reaches_the_method(name: str) -> None:
    for option, parameter in inspect.signature(METHODS[name]).parameters.items():
        other = (
            1.75
            if option == "dual"
            else 0.5
            if parameter.default is None
            else parameter.default * 0.5 + 0.013
        )
        if isinstance(parameter.default, bool):
            other = not parameter.default
            assert make_method(name, **{option: float(other)}) == make_method(name, **{option: other})
        changed = make_method(name, **{option: other})
        assert changed != make_method(name), option
        chosen = "BehaviourToken" if (name, option) == ("vespo", "behaviour") else repr(other)
        assert chosen in repr(changed), option
        assert make_method(name, **{option: parameter.default}) == make_method(name)


@pytest.mark.parametrize("name", list(CASES))
def test_repr_shows_every_part_and_setting(name: str) -> None:
    method = CASES[name]
    text = repr(method)
    for field in dataclasses.fields(Method):
        part = getattr(method, field.name)
        if dataclasses.is_dataclass(part):
            assert repr(part) in text
        elif inspect.isfunction(part):
            assert part.__name__ in text
        else:
            assert f"{field.name}={part!r}" in text
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", list(CASES))
def test_methods_travel_between_processes(name: str) -> None:
    method = CASES[name]
    back = pickle.loads(pickle.dumps(method))
    assert back == method and hash(back) == hash(method)
    batch = make_batch(0)
    assert torch.equal(run(back, batch).gradient, run(method, batch).gradient)


# ---- errors


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("kpoo", "kpo"),
        ("GRPO", "grpo"),
        ("KPO", "kpo"),
        ("dr-grpo", "dr_grpo"),
        ("kpo_difuse", "kpo_diffuse"),
        ("", None),
    ],
)
def test_unknown_method(wrong: str, near: str | None) -> None:
    with pytest.raises(ConfigError, match=rf"^method: got {wrong!r}, expected one of a3po, .*rloo") as caught:
        make_method(wrong)
    if near:
        assert str(caught.value).endswith(f"did you mean {near!r}?")
    for name in METHODS:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "name, option, expected",
    [
        ("kpo", "proces_noise", r"one of process_noise, .*; did you mean 'process_noise'\?$"),
        ("grpo", "eps", r"one of low, high, dual, epsilon; did you mean 'epsilon'\?$"),
        ("gspo", "dual", r"one of low, high, epsilon"),
        ("rloo", "low", r"none, it has no options$"),
    ],
)
def test_unknown_option(name: str, option: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"^method option: got {option!r} for {name}, expected {expected}"):
        make_method(name, **{option: 1.0})


@pytest.mark.parametrize("value", ["0.2", True, [0.2], {}])
@every
def test_options_are_numbers(name: str, value: Any) -> None:
    for option, parameter in inspect.signature(METHODS[name]).parameters.items():
        switch = isinstance(parameter.default, bool)
        if switch and value is True:
            continue
        kind = r"true or false \(1 or 0\)" if switch else "a number"
        message = rf"^method option {option}: got {re.escape(repr(value))} for {name}, expected {kind}"
        with pytest.raises(ConfigError, match=message):
            make_method(name, **{option: value})


@every
def test_none_only_where_it_is_the_default(name: str) -> None:
    for option, parameter in inspect.signature(METHODS[name]).parameters.items():
        if parameter.default is None:
            assert make_method(name, **{option: None}) == make_method(name)
        else:
            with pytest.raises(ConfigError, match=rf"^method option {option}: got None for {name}"):
                make_method(name, **{option: None})


@every
def test_nan_is_refused_everywhere_and_negative_where_it_is_a_size(name: str) -> None:
    for option, parameter in inspect.signature(METHODS[name]).parameters.items():
        for bad in (math.nan, -0.5):
            if bad < 0 and option == "baseline":
                continue
            settings = isinstance(parameter.default, bool) or name == "spo"  # a setting of its belief
            kind = ConfigError if settings and option not in ("low", "high", "dual") else NumericError
            with pytest.raises(kind, match=rf"{option}.*: got .*{bad}.*, expected"):
                make_method(name, **{option: bad})


OUT_OF_RANGE = [
    (trust.Clip, {"low": -0.1}, "low: got -0.1, expected a clip distance >= 0"),
    (trust.Clip, {"high": math.nan}, "high: got nan, expected a clip distance >= 0"),
    (trust.Clip, {"dual": 1.0}, "dual: got 1.0, expected a bound > 1, or None"),
    (trust.Clip, {"dual": math.nan}, "dual: got nan, expected a bound > 1"),
    (trust.Cap, {"high": 0.0}, "low, high: got 0.0, 0.0, expected 0 <= low <= high and high > 0"),
    (trust.Cap, {"low": 2.0, "high": 1.0}, "low, high: got 2.0, 1.0, expected 0 <= low <= high"),
    (trust.Cap, {"low": -1.0}, "low, high: got -1.0, 5.0, expected"),
    (trust.Cap, {"high": math.nan}, "low, high: got 0.0, nan, expected"),
    (trust.Cap, {"low": math.inf, "high": math.inf}, "low, high: got inf, inf, expected"),
    (ratio.KalmanFiltered, {"process_noise": -1e-9}, "process_noise: got -1e-09, expected 0 <= value <= inf"),
    (ratio.KalmanFiltered, {"process_noise": math.nan}, "process_noise: got nan, expected"),
    (ratio.KalmanFiltered, {"observation_noise": 0.0}, "observation_noise: got 0.0, expected 0 < R < inf"),
    (
        ratio.KalmanFiltered,
        {"observation_noise": math.inf},
        "observation_noise: got inf, expected 0 < R < inf",
    ),
    (ratio.KalmanFiltered, {"initial_variance": -1.0}, "initial_variance: got -1.0, expected 0 <= value"),
    (
        aggregate.SequenceSum,
        {"length": 0.0},
        "length: got 0.0, expected a constant, finite number of tokens > 0",
    ),
    (aggregate.SequenceSum, {"length": math.inf}, "length: got inf, expected a constant, finite"),
    (
        advantage.GroupZScore,
        {"epsilon": -1.0},
        "epsilon, tolerance: got -1.0, 1e-06, expected finite numbers",
    ),
    (advantage.GroupZScore, {"epsilon": math.inf}, "epsilon, tolerance: got inf"),
    (advantage.GroupZScore, {"tolerance": math.nan}, "epsilon, tolerance: got 0.0001, nan"),
    (advantage.ConstantBaseline, {"value": math.nan}, "baseline: got nan, expected a finite reward"),
    (advantage.ConstantBaseline, {"value": -math.inf}, "baseline: got -inf, expected a finite reward"),
    (trust.Band, {"low": -1.0, "high": 0.0}, "low: got -1.0, expected a distance >= 0 of the log-weight"),
    (trust.Quadratic, {"bound": 0.0}, "bound: got 0.0, expected a distance > 0"),
    (trust.PrefixBudget, {"least": 0.0}, "least: got 0.0, expected the last token's weight in (0, 1]"),
    (trust.PrefixBudget, {"rate": -0.1}, "rate: got -0.1, expected a probability >= 0"),
    (trust.SecondMoment, {"bound": math.nan}, "bound: got nan, expected a mean square > 0"),
    (trust.Decoupled, {"then": trust.unclipped, "cap": 0.0}, "cap: got 0.0, expected an upper bound > 0"),
    (penalty.KL, {"coefficient": -0.1}, "coefficient: got -0.1, expected a finite penalty weight >= 0"),
]


@pytest.mark.parametrize("part, options, message", OUT_OF_RANGE)
def test_parts_refuse_values_out_of_range(part: Any, options: dict[str, float], message: str) -> None:
    with pytest.raises(NumericError, match="^" + re.escape(message)) as caught:
        part(**options)
    assert isinstance(caught.value, KalmanRLError | ArithmeticError)


def test_limits_that_mean_something_are_accepted() -> None:
    assert trust.Clip(0.0, math.inf).high == math.inf  # no upper clip
    assert trust.Cap(math.inf).high == math.inf  # no cap
    assert ratio.KalmanFiltered(math.inf, 1.0, math.inf).process_noise == math.inf  # the token ratio
    assert ratio.KalmanFiltered(0.0, 1.0, 0.0).process_noise == 0.0  # ratio 1
    assert advantage.GroupZScore(0.0, 0.0).epsilon == 0.0


def test_time_constants() -> None:
    assert ratio.KalmanFiltered(1e-6, 1.0).time_constants(1000) == pytest.approx(1.0)
    assert ratio.KalmanFiltered(1e-4, 4.0).time_constants(100) == pytest.approx(0.5)
    assert ratio.KalmanFiltered(0.0, 1.0).time_constants(100) == 0.0


# ---- knobs with two names


def test_hosts_names_mean_what_they_mean_there() -> None:
    """CISPO: verl counts from 1, TRL gives the bound; everywhere else both count from 1."""
    assert make_method("cispo", clip_ratio_low=0.2, clip_ratio_high=0.28) == make_method(
        "cispo", low=0.8, high=1.28
    )
    assert make_method("cispo", epsilon_high=5.0) == make_method("cispo", high=5.0)
    assert (
        make_method("dapo", clip_ratio_high=0.3)
        == make_method("dapo", epsilon_high=0.3)
        == make_method("dapo", high=0.3)
    )
    assert (
        make_method("grpo", clip_ratio_c=3.0)
        == make_method("grpo", delta=3.0)
        == make_method("grpo", dual=3.0)
    )
    assert make_method("kpo", kalman_Q=1e-4, kalman_R=2.0).ratio == ratio.KalmanFiltered(1e-4, 2.0, 0.0)
    assert make_method("sapo", tau_pos=2.0) == make_method("sapo", sapo_temperature_pos=2.0)
    assert make_method("dppo_tv", clip_ratio_c=20.0, clip_ratio_low=0.1) == make_method(
        "dppo_tv", cap=20.0, low=0.1
    )
    assert make_method("dro", dro_beta=0.3) == make_method("dro", beta=0.3)


@pytest.mark.parametrize("name", list(aliases.FOREIGN))
def test_every_foreign_knob_reaches_an_option(name: str) -> None:
    for foreign, (own, _) in aliases.FOREIGN[name].items():
        assert own in inspect.signature(METHODS[name]).parameters, foreign
        assert foreign not in inspect.signature(METHODS[name]).parameters, "our own name must win"
        value = 1.5 if own in ("dual", "cap") else 0.37
        assert make_method(name, **{foreign: value}) != make_method(name), foreign


def test_one_knob_under_two_names_is_refused() -> None:
    with pytest.raises(ConfigError, match="high: got it twice for cispo, as 'high' and 'clip_ratio_high'"):
        make_method("cispo", high=5.0, clip_ratio_high=0.28)
    with pytest.raises(ConfigError, match="method option: got 'clip_ratio_high' for rloo, expected none"):
        make_method("rloo", clip_ratio_high=0.2)
