"""What a rollout holds: true successors, scaled actions, returns of whole episodes; what is refused, in a sentence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kalman_rl.errors import AdapterError, ConfigError, NumericError
from kalman_rl.reppo.learner import Learner
from kalman_rl.reppo.settings import Settings

gymnasium = pytest.importorskip("gymnasium", reason="needs the extra control")

from kalman_rl.reppo import environments  # noqa: E402
from kalman_rl.reppo.environments import Environments, evaluate, make  # noqa: E402
from tests.reppo.worlds import register  # noqa: E402


@pytest.fixture(autouse=True)
def worlds() -> None:
    register()


def learner_of(envs: Environments) -> Learner:
    settings = Settings(-10.0, 10.0, hidden=8, bins=11)
    return Learner(envs.inputs, envs.actions, discrete=envs.discrete, settings=settings)


@pytest.mark.parametrize(("name", "length"), [("Counter", 3), ("Ends", 4)])
def test_the_successor_of_a_last_step_is_where_the_episode_stopped(name: str, length: int) -> None:
    envs = Environments(f"test/{name}-v0", 2, seed=0)
    rollout = envs.rollout(learner_of(envs), 9)
    place = torch.arange(9) % length
    for row in range(2):
        assert rollout.observation[:, row, 0].tolist() == place.tolist()
        assert rollout.next_observation[:, row, 0].tolist() == (place + 1).tolist()
    over = (place == length - 1)[:, None].expand(9, 2)
    assert torch.equal(rollout.terminated, over & (name == "Ends"))
    assert torch.equal(rollout.truncated, over & (name == "Counter"))
    per_episode = rollout.reward[: 9 // length * length].double().unflatten(0, (-1, length)).sum(1)
    assert envs.finished == pytest.approx(per_episode.flatten().tolist())


def test_actions_are_scaled_to_the_bounds_and_numbered_from_the_start_of_the_space() -> None:
    envs = Environments("test/Counter-v0", 2, seed=0)  # reward = the action, from -2 to 6
    reward, *_ = envs.step(torch.tensor([[-1.0], [0.5]]))
    assert reward.tolist() == [-2.0, 4.0]
    arms = Environments("test/Arms-v0", 3, seed=0)  # 5, 6, 7
    assert (arms.discrete, arms.actions) == (True, 3)
    assert arms.step(torch.tensor([0, 1, 2]))[0].tolist() == [5.0, 6.0, 7.0]


def test_log_probabilities_of_a_rollout_are_those_of_its_actions() -> None:
    for name in ("Counter", "Arms"):
        envs = Environments(f"test/{name}-v0", 2, seed=0)
        learner = learner_of(envs)
        rollout = envs.rollout(learner, 5)
        with torch.no_grad():
            policy = learner.actor(learner.norm(rollout.observation))
        if envs.discrete:
            found = policy.log_probs.gather(-1, rollout.action[..., None])[..., 0]
        else:
            u = rollout.action.double().atanh()
            normal = torch.distributions.Normal(policy.mean, policy.std).log_prob(u)
            found = (normal - (1 - rollout.action.double() ** 2).log()).sum(-1).float()
        torch.testing.assert_close(found, rollout.log_prob, atol=1e-3, rtol=1e-3)


def test_evaluation_takes_the_first_episode_of_each_copy() -> None:
    def act(seen: Tensor) -> Tensor:
        return torch.full((len(seen), 1), 0.5)

    assert evaluate("test/Counter-v0", act, episodes=3, seed=0) == [12.0] * 3


def test_an_evaluation_of_an_episode_without_an_end_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "LONGEST_EPISODE", 2)  # one step less than the episode has
    with pytest.raises(
        ConfigError, match=r"test/Counter-v0: got an episode of more than 2 steps.*max_episode_steps"
    ):
        evaluate("test/Counter-v0", lambda seen: torch.zeros(len(seen), 1), episodes=1, seed=0)


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("Pendulm-v1", ConfigError, r"env: got 'Pendulm-v1'.*did you mean 'Pendulum-v1'\?"),
        ("Pendulum-v99", ConfigError, r"env: got 'Pendulum-v99', expected an environment of gymnasium"),
        ("no_such_module:Thing-v0", ConfigError, r"env: got 'no_such_module:Thing-v0'"),
        ("Nowhere/Pong-v5", ConfigError, r"env: got 'Nowhere/Pong-v5'.*Namespace Nowhere not found[^;]*$"),
        ("test/Many-v0", ConfigError, r"test/Many-v0: got actions MultiDiscrete.*expected Discrete or a Box"),
        ("test/Free-v0", ConfigError, r"test/Free-v0: got actions Box\(-inf, inf.*finite bounds"),
        ("test/Mapping-v0", ConfigError, r"test/Mapping-v0: got observations Dict.*expected a Box"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(name: str, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        Environments(name, 1, seed=0)
    assert "\n" not in str(caught.value)


def test_a_missing_package_of_an_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise gymnasium.error.DependencyNotInstalled("MuJoCo is not installed")

    monkeypatch.setattr(gymnasium, "make", refuse)
    with pytest.raises(AdapterError, match=r"Hopper-v5: got no package.*kalman-rl\[control\]"):
        make("Hopper-v5", {})


@pytest.mark.parametrize("what", ["reward", "observation"])
def test_nan_of_an_environment_is_named_at_once(what: str) -> None:
    envs = Environments(f"test/Bad{what.capitalize()}-v0", 1, seed=0)
    with pytest.raises(NumericError, match=rf"got an? {what} that is NaN or infinite"):
        envs.rollout(learner_of(envs), 3)
