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


def test_features_go_with_their_prompts() -> None:
    """Every answer is that of one belief a source, each given its own rows."""
    make = lambda: RegressionBelief(dimension=3)  # noqa: E731
    both, alone = BySource(make, lambda name: name[0]), {"x": make(), "y": make()}
    generator = torch.Generator().manual_seed(0)
    ids = [f"{'xy'[i % 3 == 0]}{i % 8}" for i in range(24)]
    prompts = torch.randn(10, 5, generator=generator)
    features = prompts[[int(name[1]) for name in ids]]
    for step in range(4):
        reward = torch.randn(24, generator=generator)
        for own, belief in alone.items():
            rows = [i for i, name in enumerate(ids) if name[0] == own]
            mine, given = [ids[i] for i in rows], {"step": step, "features": features[rows]}
            found = both.advantages(ids, reward, step=step, features=features)
            want = belief.advantages(mine, reward[rows], **given)
            assert torch.equal(found.advantage[rows], want.advantage)
            assert (
                torch.equal(found.baseline[rows], want.baseline) and (found.scale[rows] == want.scale).all()
            )
            for what in ("predict", "predictive"):
                found = getattr(both, what)(ids, step=step, features=features)
                for a, b in zip(found, getattr(belief, what)(mine, **given)):
                    assert torch.equal(a[rows], b)
        seen = both.update(ids, reward, step=step, features=features, part=1)
        for own, belief in alone.items():
            rows = [i for i, name in enumerate(ids) if name[0] == own]
            want = belief.update(
                [ids[i] for i in rows], reward[rows], step=step, features=features[rows], part=1
            )
            places = [seen.ids.index(name) for name in want.ids]
            for a, b in zip(seen[1:], want[1:]):
                assert torch.equal(a[places], b)
    assert len(both) == sum(map(len, alone.values())) and repr(both).endswith("sources: 2, prompts: 16>")
    assert {own: belief.state_dict() for own, belief in both.sources.items()}.keys() == alone.keys()
    for own, belief in alone.items():
        assert repr(both.sources[own].state_dict()) == repr(belief.state_dict())


def other() -> BySource:
    """A belief that is none of a table."""
    return BySource(RegressionBelief, str)


def test_a_belief_of_another_kind_takes_no_source() -> None:
    with pytest.raises(
        ConfigError, match="^source: got one with belief 'tests.beliefs.test_by_source:other', a BySource"
    ):
        make_belief("tests.beliefs.test_by_source:other", source=str)
