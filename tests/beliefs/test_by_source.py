"""Beliefs kept apart by source."""

from __future__ import annotations

import pytest
import torch

from kalman_rl.beliefs import BySource, RegressionBelief, Sources, make_belief
from kalman_rl.errors import ConfigError, NumericError


def test_sources_are_checked_before_any_is_written() -> None:
    belief = make_belief("beta", source=lambda name: name[0])
    belief.update(["x1", "y1"], torch.tensor([1.0, 0.0]), step=0)
    before = repr(belief.state_dict())
    with pytest.raises(NumericError, match=r"expected \[0, 1\]"):
        belief.update(["x2", "y2"], torch.tensor([1.0, 7.0]), step=1)
    with pytest.raises(ConfigError, match="second time"):
        belief.update(["x2", "y1"], torch.tensor([1.0, 0.0]), step=0)
    assert repr(belief.state_dict()) == before


def test_sources_learn_apart() -> None:
    """Each source's numbers are those of a belief that never saw the other one."""
    both = BySource(RegressionBelief, lambda name: name[0])
    alone = RegressionBelief()
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        mine, other = [f"x{i}" for i in range(8)] * 2, [f"y{i}" for i in range(5)]
        reward = torch.randn(16, generator=generator)
        both.update(other + mine, torch.cat((100 * torch.randn(5, generator=generator), reward)), step=step)
        alone.update(mine, reward, step=step)
    torch.testing.assert_close(
        both.predict(["x1", "x9"], step=7), alone.predict(["x1", "x9"], step=7), rtol=0, atol=0
    )
    result = both.advantages(["y1", "x1"], torch.tensor([0.0, 0.0]), step=7)
    assert result.scale.shape == (2,) and result.scale[0] > 10 * result.scale[1]


def test_one_source_is_as_no_source() -> None:
    plain, apart = make_belief("auto"), make_belief("auto", source=lambda name: "all")
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        ids = [f"p{i % 6}" for i in range(step, step + 16)]
        reward = torch.randn(16, generator=generator)
        one, other = plain.advantages(ids, reward, step=step), apart.advantages(ids, reward, step=step)
        assert torch.equal(one.advantage, other.advantage) and torch.equal(one.baseline, other.baseline)
        assert torch.equal(one.scale.expand(16), other.scale)
        plain.update(ids, reward, step=step)
        apart.update(ids, reward, step=step)
        for what in ("predict", "predictive"):
            for a, b in zip(getattr(plain, what)(ids, step=step), getattr(apart, what)(ids, step=step)):
                assert torch.equal(a, b)


def test_sources_of_a_dataset() -> None:
    sources = Sources("source_column")
    sources.note([1, "b", 1], ["maths", "code", "maths"])
    with pytest.raises(
        ConfigError, match="^source_column: got 'code' for prompt 1, which was of 'maths' before"
    ):
        sources.note(["c", 1], ["code", "code"])
    with pytest.raises(ConfigError, match="^source_column: got 'y' for prompt 'd', which was of 'x' before"):
        sources.note(["d", "d"], ["x", "y"])
    for bad in (None, 1.5, True, ["x"]):
        with pytest.raises(
            ConfigError, match="^source_column: got .* for prompt 'c', expected a text or integer"
        ):
            sources.note(["c"], [bad])
    for unknown in ("c", "d"):
        with pytest.raises(ConfigError, match=f"^source_column: got prompt '{unknown}' before its source"):
            sources(unknown)
    again = Sources("source_column")
    again.load_state_dict(sources.state_dict())
    assert [again(1), again("b")] == ["maths", "code"]
    with pytest.raises(ConfigError, match="^sources: got"):
        again.load_state_dict([("maths", 5)])
    assert again(1) == "maths"
