"""Settings that do not fit the length of the completions are said: a wide clip of an averaged ratio, a zero start."""

import pytest

from kalman_rl.hosts.lengths import notes_on_length
from kalman_rl.methods import make_method

AVERAGED = ("kpo_diffuse", "kpo_noise", "kpo_robust", "pnpo")


@pytest.mark.parametrize("name", AVERAGED)
def test_a_wide_clip_of_an_averaged_ratio_is_said_for_long_completions_alone(name: str) -> None:
    method = make_method(name)
    assert notes_on_length(method, 50) == []
    (note,) = notes_on_length(method, 51)
    assert note.startswith(
        f"{name}: got a clip of 0.03 for a ratio averaged over up to 51 tokens, expected one of"
    )
    assert "1e-3" in note


@pytest.mark.parametrize("name", (*AVERAGED, "gspo", "gspo_token"))
def test_one_wide_side_is_enough_and_a_narrow_clip_is_not_named(name: str) -> None:
    for sides in ({"low": 0.01, "high": 1e-3}, {"low": 1e-3, "high": 0.01}):
        assert "got a clip of 0.01" in notes_on_length(make_method(name, **sides), 4096)[0]
    assert notes_on_length(make_method(name, low=3e-3, high=3e-3), 4096) == []


@pytest.mark.parametrize(
    "name", ("grpo", "dapo", "gspo", "luspo", "k_grpo", "kpo_unclipped", "reinforce", "gmpo")
)
def test_published_settings_and_token_ratios_pass(name: str) -> None:
    assert not [note for note in notes_on_length(make_method(name), 4096) if "clip of" in note]


def test_a_filter_that_cannot_leave_ratio_1_is_said_below_half_a_time_constant() -> None:
    method = make_method("kpo")  # Q/R = 1e-6: a time constant of 1000 tokens
    assert "0.499 filter time constants in 499 tokens" in notes_on_length(method, 499)[0]
    assert notes_on_length(method, 500) == []
    assert notes_on_length(make_method("kpo", process_noise=1e-2), 10) == []
