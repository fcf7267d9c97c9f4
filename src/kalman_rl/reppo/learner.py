"""REPPO, relative entropy pathwise policy optimisation: on-policy, no replay, no target network, no importance ratio.

One update: soft lambda-targets of the whole batch, then epochs of minibatches; each is a step of the critic on the
targets and a step of the actor through the critic, gated per state by the divergence from the policy that sampled.
Discrete actions need no sample: their expectations are sums. Source: arXiv 2507.11019, built after the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kalman_rl.checks import reading, saved
from kalman_rl.errors import ConfigError, NumericError
from kalman_rl.reppo.networks import Actor, CategoricalPolicy, Critic, Policy, RunningNorm, value_head
from kalman_rl.reppo.settings import Settings


@dataclass(frozen=True)
class Rollout:
    """T steps of E environments with one policy; all tensors begin with (T, E).

    Args:
        observation, next_observation: (T, E, S), raw. The next one is the true successor, also where an episode ended.
        action: (T, E, A) in (-1, 1), or whole numbers (T, E). log_prob: of the executed action, (T, E).
        reward: (T, E). terminated, truncated: bool (T, E).
    """

    observation: Tensor
    action: Tensor
    log_prob: Tensor
    reward: Tensor
    next_observation: Tensor
    terminated: Tensor
    truncated: Tensor


def soft_lambda_targets(
    reward: Tensor,
    bonus: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    lam: float,
    entropy_at_end: bool = False,
) -> Tensor:
    """Soft lambda-returns of a batch.

        r~_t = r_t + gamma (1 - term_t) bonus_t
        G_t = r~_t + gamma (1 - term_t) [v_t if truncated_t or t is last, else lambda G_(t+1) + (1 - lambda) v_t]

    Args:
        reward, bonus, next_value: (T, E); bonus is -alpha log pi at the successor, v its value without the bonus.
        terminated, truncated: bool (T, E); a step that is both counts as terminated.
        entropy_at_end: pay the bonus on terminating steps too.
    Returns: targets (T, E) without a gradient.
    Source: arXiv 2507.11019; without bonus it is TD(lambda).

    >>> one, no = torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.bool)
    >>> soft_lambda_targets(one, 0 * one, 10 * one, no, no, gamma=0.5, lam=1.0).T
    tensor([[4., 6.]])
    """
    going = (~terminated).to(reward.dtype)
    reward = reward + gamma * bonus * (1.0 if entropy_at_end else going)
    following = next_value[-1]
    targets = torch.empty_like(reward)
    for t in reversed(range(len(reward))):
        mixed = lam * following + (1 - lam) * next_value[t]
        ahead = torch.where(truncated[t], next_value[t], mixed) if t < len(reward) - 1 else next_value[t]
        following = targets[t] = reward[t] + gamma * going[t] * ahead
    return targets.detach()


def expectation(
    policy: Policy,
    q: Callable[[Tensor], Tensor] | Tensor,
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """E[Q(s, a)] and E[log pi(a|s)] under the policy, (B) each, with the gradient of the expectation.

    Args:
        q: of a discrete policy the table (B, A); of a continuous one a function of actions (samples, B, A).
        samples: reparameterised actions per state; a discrete policy sums exactly.
    """
    if isinstance(policy, CategoricalPolicy):
        assert isinstance(q, Tensor)
        return policy.mean(q), policy.mean(policy.log_probs)
    assert not isinstance(q, Tensor)
    action, log_prob = policy.sample(samples, generator=generator)
    return q(action).mean(0), log_prob.mean(0)


def score_objective(
    policy: Policy,
    q: Callable[[Tensor], Tensor] | Tensor,
    alpha: float | Tensor,
    *,
    samples: int = 4,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The same gradient by the score function: mean_i (c_i - b_i) log pi(a_i|s), c = alpha log pi - Q without gradient.

    Args:
        q: as for :func:`expectation`. samples: actions per state, at least two; b_i is the mean of the others.
    Returns: surrogate (B), whose value means nothing, and mean log pi (B).
    """
    action, log_prob = policy.draw(samples, generator=generator)
    if isinstance(q, Tensor):
        found = q.expand(samples, *q.shape).gather(-1, action[..., None])[..., 0]
    else:
        found = q(action)
    cost = (alpha * log_prob - found).detach()
    others = (cost.sum(0) - cost) / (samples - 1)
    return ((cost - others) * log_prob).mean(0), log_prob.mean(0)


def gated(objective: Tensor, kl: Tensor, *, kl_bound: float, beta: float | Tensor) -> Tensor:
    """The objective where KL < bound, beta KL elsewhere: a state outside the region is only pulled back, (B)."""
    return torch.where(kl < kl_bound, objective, beta * kl)


class Duals(nn.Module):
    """alpha prices entropy and beta the divergence; an Adam of their own, without decay, learns their logarithms.

    loss = alpha (H - H*) - beta (KL - kappa): alpha grows where the entropy is below its target, beta where the mean
    divergence is above the bound.
    """

    def __init__(self, settings: Settings, target_entropy: float) -> None:
        super().__init__()
        self.kl_bound, self.target_entropy = settings.kl_bound, target_entropy
        self.log_alpha = nn.Parameter(torch.tensor(math.log(settings.alpha)))
        self.log_beta = nn.Parameter(torch.tensor(math.log(settings.beta)))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=settings.dual_lr)

    @property
    def alpha(self) -> Tensor:
        return self.log_alpha.detach().exp()

    @property
    def beta(self) -> Tensor:
        return self.log_beta.detach().exp()

    def step(self, entropy: Tensor, kl: Tensor) -> None:
        """One step of Adam from the mean entropy and the mean divergence of a minibatch."""
        self.log_alpha.grad = self.alpha * (entropy.detach() - self.target_entropy)
        if math.isfinite(self.kl_bound):
            self.log_beta.grad = -self.beta * (kl.detach() - self.kl_bound)
        self.optimizer.step()


class Learner:
    """Actor, critic, dual variables and their optimisers; :meth:`update` is the whole algorithm.

    Args:
        inputs: size S of an observation. actions: dimensions of the action, or their number if ``discrete``.
        seed: of weights, actions and minibatches.
    """

    def __init__(
        self, inputs: int, actions: int, *, discrete: bool, settings: Settings, seed: int = 0
    ) -> None:
        if discrete and settings.auxiliary:
            raise ConfigError(
                "auxiliary: got a weight with discrete actions, expected 0; their critic sees none"
            )
        self.settings, self.discrete = settings, discrete
        self.generator = torch.Generator().manual_seed(seed)
        target = settings.target_entropy
        if target is None:
            target = 0.5 * math.log(actions) if discrete else -0.5 * actions
        values = value_head(settings.critic, settings.low, settings.high, settings.bins)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = Actor(
                inputs, actions, discrete=discrete, hidden=settings.hidden, least_std=settings.least_std
            )
            self.critic = Critic(inputs, actions, discrete=discrete, hidden=settings.hidden, values=values)
        self.norm = RunningNorm(inputs)
        self.duals = Duals(settings, target)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=settings.lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=settings.lr, fused=True)

    @torch.no_grad()
    def act(self, observation: Tensor, *, greedy: bool = False) -> tuple[Tensor, Tensor]:
        """Actions for raw observations (E, S) and their log-probabilities (E); ``greedy`` takes the mode."""
        policy = self.actor(self.norm(observation))
        if greedy:
            return policy.mode, torch.zeros(len(observation))
        action, log_prob = policy.draw(generator=self.generator)
        return action[0], log_prob[0]

    @torch.no_grad()
    def targets(self, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
        """Soft lambda-targets (T, E) of a batch, and the features (T, E, hidden) that the auxiliary loss predicts."""
        s = self.settings
        following = self.norm(rollout.next_observation)
        policy = self.actor(following)
        number = s.next_actions
        value, log_prob = expectation(policy, self._q(following), samples=number, generator=self.generator)
        if s.executed_entropy:
            goes_on = ~(rollout.terminated | rollout.truncated)[:-1]
            log_prob = torch.cat([torch.where(goes_on, rollout.log_prob[1:], log_prob[:-1]), log_prob[-1:]])
        features = None
        if s.auxiliary:
            action, _ = policy.sample(generator=self.generator)
            features = self.critic.features(following, action[0])
        targets = soft_lambda_targets(
            rollout.reward * s.reward_scale,
            -self.duals.alpha * log_prob,
            value,
            rollout.terminated,
            rollout.truncated & ~rollout.terminated,
            gamma=s.gamma,
            lam=s.lam,
            entropy_at_end=s.entropy_at_end,
        )
        return targets, features

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Learn from one batch of the current policy.

        Returns: means over the minibatches: losses, KL, entropy, share of states outside the gate; the share of
        targets outside the critic's range; alpha and beta.
        Raises: NumericError if a loss is not finite.
        """
        s = self.settings
        self.norm.update(rollout.observation.flatten(0, 1))
        targets, features = self.targets(rollout)
        observation, action = self.norm(rollout.observation).flatten(0, 1), rollout.action.flatten(0, 1)
        targets = targets.flatten()
        features = None if features is None else features.flatten(0, 1)
        with torch.no_grad():
            old = self.actor(observation)
        seen: list[dict[str, Tensor]] = []
        for rows in self._minibatches(len(targets)):
            aux = None if features is None else features[rows]
            losses = self.critic_step(observation[rows], action[rows], targets[rows], aux)
            seen.append(losses | self.actor_step(observation[rows], old.at(rows)))
        means = {name: torch.stack([row[name] for row in seen]).mean().item() for name in seen[0]}
        outside = ((targets < s.low) | (targets > s.high)).double().mean().item()
        return means | {
            "outside": outside,
            "target": targets.mean().item(),
            "alpha": self.duals.alpha.item(),
            "beta": self.duals.beta.item(),
        }

    def critic_step(
        self, observation: Tensor, action: Tensor, target: Tensor, features: Tensor | None
    ) -> dict[str, Tensor]:
        """One step of the critic at the executed actions of a minibatch."""
        found = self.critic.features(observation, None if self.discrete else action)
        logits = self.critic.logits(found)
        if self.discrete:
            logits = logits[torch.arange(len(action)), action]
        loss = self.critic.values.loss(logits, target).mean()
        if features is not None:
            guess = self.critic.predict(found)
            loss = loss + self.settings.auxiliary * (guess - features).square().mean()
        self._step(self.critic_optimizer, self.critic, loss, "critic")
        return {"critic_loss": loss.detach()}

    def actor_step(self, observation: Tensor, old: Policy) -> dict[str, Tensor]:
        """One step of the actor through the critic, and one of the dual variables."""
        s, policy = self.settings, self.actor(observation)
        if s.gradient == "score":
            with torch.no_grad():
                q = self._q(observation)
            objective, log_prob = score_objective(policy, q, self.duals.alpha, generator=self.generator)
        else:
            value, log_prob = expectation(policy, self._q(observation), generator=self.generator)
            objective = self.duals.alpha * log_prob - value
        kl = old.kl(policy)
        loss = gated(objective, kl, kl_bound=s.kl_bound, beta=self.duals.beta).mean()
        self._step(self.actor_optimizer, self.actor, loss, "actor")
        self.duals.step(-log_prob.mean(), kl.mean())
        return {
            "kl": kl.detach().mean(),
            "gated": (kl >= s.kl_bound).double().mean(),
            "entropy": -log_prob.detach().mean(),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; ``torch.load(weights_only=True)`` reads it."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return parts | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises: ConfigError if it is damaged or of other networks."""
        names = list(self._parts())
        values = saved("reppo state", state, *names, "generator")
        with reading("reppo state", state):
            for name, value in zip(names, values):
                self._parts()[name].load_state_dict(value)
            self.generator.set_state(values[-1])

    def _parts(self) -> dict[str, Any]:
        return {
            "actor": self.actor,
            "critic": self.critic,
            "norm": self.norm,
            "duals": self.duals,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "duals_optimizer": self.duals.optimizer,
        }

    def _q(self, observation: Tensor) -> Callable[[Tensor], Tensor] | Tensor:
        if self.discrete:
            found: Tensor = self.critic(observation)
            return found
        return lambda action: self.critic(observation, action)

    def _minibatches(self, number: int) -> Iterator[Tensor]:
        for _ in range(self.settings.epochs):
            order = torch.randperm(number, generator=self.generator)
            yield from order.tensor_split(min(self.settings.minibatches, number))

    def _step(self, optimizer: torch.optim.Optimizer, module: nn.Module, loss: Tensor, name: str) -> None:
        if not torch.isfinite(loss):
            raise NumericError(
                f"{name}: got a loss of {loss.item()}, expected a finite one; lower lr, or look at the rewards"
            )
        optimizer.zero_grad()
        loss.backward(inputs=list(module.parameters()))  # the actor's loss leaves the critic alone
        nn.utils.clip_grad_norm_(module.parameters(), self.settings.clip)
        optimizer.step()
