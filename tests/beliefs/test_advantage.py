"""Advantages that remember, called as a part of a method: the first batch of a run."""

from __future__ import annotations

import pytest
import torch

from kalman_rl.beliefs import BySource, RegressionBelief, make_belief
from kalman_rl.beliefs.advantage import JamesStein, Tracked
from kalman_rl.errors import ConfigError

REWARD = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.3, 0.9], dtype=torch.float64)
GROUP = torch.tensor([3, 3, 3, 5, 5, 8])


@pytest.mark.parametrize("name", ["auto", "beta", "gaussian", "spo"])
def test_it_is_the_first_batch_of_the_belief(name: str) -> None:
    options = {"gaussian": {"mean": 0.3}, "spo": {"rho": 0.9}}.get(name, {})
    part = Tracked(name, tuple(options.items()))
    want = make_belief(name, **options).advantages(GROUP.tolist(), REWARD, step=0).advantage
    for _ in range(2):  # it remembers nothing itself
        assert torch.equal(part(REWARD, GROUP), want)


def test_james_stein_is_the_first_batch_without_a_scale() -> None:
    want = RegressionBelief(scale=False).advantages(GROUP.tolist(), REWARD, step=0).advantage
    assert torch.equal(JamesStein()(REWARD, GROUP), want)


@pytest.mark.parametrize("part", [Tracked("gaussian"), JamesStein()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_type_is_that_of_the_reward_at_least_single(
    part: Tracked | JamesStein, dtype: torch.dtype
) -> None:
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    reward = REWARD.to(dtype).requires_grad_()
    found = part(reward, GROUP)
    assert found.dtype == wanted and not found.requires_grad
    torch.testing.assert_close(found.double(), part(reward.detach().double(), GROUP), rtol=1e-6, atol=1e-7)
    nobody = part(reward[:0], GROUP[:0])
    assert nobody.dtype == wanted and nobody.shape == (0,) and not nobody.requires_grad


def test_sources_and_options() -> None:
    assert isinstance(Tracked("beta").make(lambda name: name), BySource)
    part = Tracked("beta", (("source", str), ("scale", False)))
    assert isinstance(part.make(), BySource)
    with pytest.raises(
        ConfigError, match="^options: got a source beside the one of the dataset, expected one"
    ):
        part.make(str)
    with pytest.raises(ConfigError, match="^belief: got 'bta'"):
        Tracked("bta")
    with pytest.raises(ConfigError, match="^belief option: got 'x' for beta"):
        Tracked("beta", (("x", 1),))
