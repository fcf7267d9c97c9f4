"""Groups of fixed sizes, and the numbers about a batch, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from kalman_rl.beliefs import GaussianBelief
from kalman_rl.errors import ConfigError, RunError
from kalman_rl.numerics.kalman import Gaussian
from kalman_rl.sampling.budget import Budget
from kalman_rl.sampling.records import belief_record
from kalman_rl.sampling.tracking import Tracking, fixed_groups, outcome_metrics

NAN = math.nan
NAMES = ["a", "a", "b", "b", "b", "c"]
REWARD = torch.tensor([1.0, 0.0, 1.0, NAN, 1.0, NAN])


@pytest.mark.parametrize(
    ("equal", "weight"), [(False, [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]), (True, [1.0, 1.0, 1.0, 0.0, 1.0, 0.0])]
)
def test_groups_of_fixed_sizes(equal: bool, weight: list[float]) -> None:
    tracking, alone = Tracking(GaussianBelief(), Budget()), GaussianBelief()
    made = fixed_groups(tracking, NAMES, REWARD, 3, equal=equal)
    assert made.weight.tolist() == weight and made.weight.dtype == torch.float64
    assert made.round.dtype == made.tau.dtype == torch.int64
    assert (made.prompts, made.tau.tolist(), made.round.tolist()) == (["a", "b", "c"], [2, 3, 1], [0] * 6)
    assert made.stop_reason == ["planned"] * 3 and made.price is None
    assert torch.equal(made.advantage, alone.advantages(NAMES, REWARD, step=3).advantage)
    alone.update(NAMES, REWARD, step=3)
    assert torch.equal(tracking.belief.predict(["a"], step=4).mean, alone.predict(["a"], step=4).mean)
    assert set(tracking.coverage.visited(9)) == {"a", "b", "c"}


def test_weights_that_make_every_prompt_count_the_same() -> None:
    names, reward = ["a", "b", "b", "b"], torch.tensor([1.0, 0.0, 1.0, 0.0])
    made = fixed_groups(Tracking(GaussianBelief(), Budget()), names, reward, 0, equal=True)
    assert made.weight.tolist() == pytest.approx([2.0, 2 / 3, 2 / 3, 2 / 3])
    plain = fixed_groups(Tracking(GaussianBelief(), Budget()), names, reward, 0)
    assert plain.weight.tolist() == [1.0] * 4


def test_numbers_about_a_batch() -> None:
    tracking = Tracking(GaussianBelief(), Budget())
    made = fixed_groups(tracking, NAMES, REWARD, 3)
    sampled = made._replace(prompts=["a", "b", "c", "d"], tau=torch.tensor([2, 3, 1, 0]))
    tracking.last_step, tracking.skipped = 3, {"a", "x"}
    value = Gaussian(torch.tensor([0.5, 0.0, 0.5, 0.5]), torch.full((4,), 0.01))
    new = Gaussian(value.mean, torch.full((4,), 0.02))
    found = outcome_metrics(sampled, (NAMES, REWARD), (value, new), tracking, rows=16)
    wanted = {
        "budget/used": 6,
        "budget/saved": 10,
        "budget/prompts": 3,
        "budget/largest": 3,
        "groups/informative": 1 / 2,  # a of a and b; c has no known reward
        "belief/coverage_90": 1 / 2,  # a's mean was predicted, b's was not
        "belief/retired": 1,  # d
        "belief/returned": 1,  # a
    }
    assert {name: found[name] for name in wanted} == wanted


def test_the_interval_narrows_with_the_first_round() -> None:
    tracking, reward = Tracking(GaussianBelief(), Budget()), torch.full((4,), 0.8)
    made, tracking.last_step = fixed_groups(tracking, ["a"] * 4, reward, 0), 0
    value, new = (Gaussian(torch.tensor([0.5]), torch.tensor([variance])) for variance in (0.01, 0.05))
    for known, inside in ((1, 1.0), (4, 0.0)):  # 0.3 beside 1.645 sqrt(0.01 + 0.04 / n): 0.37 and 0.23
        first = (["a"] * known, reward[:known])
        assert outcome_metrics(made, first, (value, new), tracking, 4)["belief/coverage_90"] == inside


def test_what_was_passed_over_is_booked() -> None:
    tracking = Tracking(GaussianBelief(), Budget())
    made = fixed_groups(tracking, NAMES, REWARD, 3)
    tracking.skipped = {"a", "x"}
    tracking.note(made._replace(prompts=["a", "b", "c", "d"], tau=torch.tensor([2, 3, 1, 0])))
    assert tracking.skipped == {"x", "d"}


def test_a_checkpoint_has_a_stream_where_the_run_has_one() -> None:
    streaming, plain = (
        Tracking(GaussianBelief(), Budget(select="stream")),
        Tracking(GaussianBelief(), Budget()),
    )
    streaming.open_stream(["a", "b"], 1)
    for of, to, words in ((streaming, plain, "of a stream"), (plain, streaming, "without a stream")):
        with pytest.raises(ConfigError, match=f"^select: got a checkpoint {words}"):
            to.load_state_dict(of.state_dict())
    with pytest.raises(RunError, match="^checkpoint: got no beliefs about prompts"):
        plain.load_state_dict(None)


def test_a_stream_and_a_run_without_sources_go_on_where_they_were() -> None:
    ids = [f"q{i}" for i in range(12)]
    one, two = (Tracking(GaussianBelief(), Budget(select="stream")) for _ in range(2))
    for tracking in (one, two):
        tracking.sources = None
        tracking.open_stream(ids, 4)
    fixed_groups(one, ids[:4], torch.tensor([1.0, 0.0, 0.0, 1.0]), 0)
    assert one.stream is not None and two.stream is not None
    one.stream.draw(step=1)
    two.load_state_dict(one.state_dict())
    assert two.sources is None
    assert two.stream.draw(step=2)[0].tolist() == one.stream.draw(step=2)[0].tolist()


def test_a_batch_written_down() -> None:
    tracking = Tracking(GaussianBelief(), Budget())
    made = fixed_groups(tracking, NAMES, REWARD, 3)
    value = Gaussian(torch.tensor([0.5, 0.0, 0.5]), torch.full((3,), 0.01))
    new = Gaussian(value.mean, torch.tensor([0.05, 0.26, 0.01]))
    found = belief_record(tracking, made, (NAMES, REWARD), (value, new), {"a": "?"}, step=3, rows=16)
    wanted = {
        "id": ["a", "b", "c"], "n": [2, 3, 1], "reward": [0.5, 1.0, None], "mixed": "100", "mean": [0.5, 0.0, 0.5],
        "sd": [0.1, 0.1, 0.1], "noise": [0.2, 0.5, 0.0], "rows": 16, "used": 6, "groups": 2, "informative": 1,
        "judged": 2, "texts": {"a": "?", "b": "", "c": ""},
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted
    later = belief_record(tracking, made, (NAMES, REWARD), (value, new), {}, step=4, rows=16)
    assert "texts" not in later and "next" not in later
