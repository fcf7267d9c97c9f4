"""Beliefs kept apart by source."""

from __future__ import annotations

import pytest
import torch

from kalman_rl.beliefs import BySource, RegressionBelief, make_belief
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
