"""REPPO against closed forms: optimal control, enumeration, sums over n-step returns, exact divergences."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.linalg import solve_discrete_are
from torch import Tensor

from kalman_rl.reppo.learner import (
    Duals,
    Learner,
    Rollout,
    expectation,
    gated,
    score_objective,
    soft_lambda_targets,
)
from kalman_rl.reppo.networks import CategoricalPolicy, GaussianPolicy, HLGauss, RunningNorm
from kalman_rl.reppo.settings import Settings


def settings(**changes: float | str | bool) -> Settings:
    return Settings(**({"low": -10.0, "high": 10.0, "hidden": 16, "bins": 21} | changes))  # type: ignore[arg-type]


def test_quadratic_bandit_ends_at_the_gaussian_of_the_closed_form() -> None:
    """max E[-(a - a*)^2 - alpha log pi] is N(a*, alpha / 2)."""
    alpha, best, generator = 0.3, 1.7, torch.Generator().manual_seed(0)
    mean, log_std = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_std], lr=0.05)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 250)
        policy = GaussianPolicy(mean, log_std.exp(), squash=False)
        value, log_prob = expectation(
            policy, lambda a: -(a[..., 0] - best).square(), samples=256, generator=generator
        )
        optimizer.zero_grad()
        (alpha * log_prob - value).mean().backward()
        optimizer.step()
    assert mean.item() == pytest.approx(best, abs=0.01)
    assert log_std.exp().square().item() == pytest.approx(alpha / 2, rel=0.03)


def test_policy_iteration_on_its_own_targets_solves_a_noisy_linear_regulator() -> None:
    """Scalar x' = A x + B a, reward -(Q x^2 + R a^2): Riccati's gain, variance alpha / (2 (R + gamma B^2 P)).

    The critic is a quadratic fitted by least squares to soft lambda-targets of rollouts; the actor follows the
    pathwise gradient through it.
    """
    a, b, q, r, gamma, alpha, lam = 0.9, 0.5, 1.0, 0.5, 0.8, 0.1, 0.9  # without gamma the gain is 18 % larger
    p = solve_discrete_are(math.sqrt(gamma) * a, math.sqrt(gamma) * b, q, r).item()
    gain, variance = gamma * a * b * p / (r + gamma * b * b * p), alpha / (2 * (r + gamma * b * b * p))
    generator = torch.Generator().manual_seed(1)
    gain_now, log_std = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    critic = torch.zeros(6, dtype=torch.float64)

    def features(x: Tensor, u: Tensor) -> Tensor:
        return torch.stack([x * x, x * u, u * u, x, u, torch.ones_like(x)], -1).double()

    def policy(x: Tensor) -> GaussianPolicy:
        return GaussianPolicy((-gain_now * x)[..., None], log_std.exp().expand(*x.shape, 1), squash=False)

    late = []
    for round_ in range(30):
        x, rows = torch.randn(512, generator=generator), []
        for _ in range(12):
            with torch.no_grad():
                u = policy(x).sample(generator=generator)[0][0, ..., 0]
            rows.append((x, u, a * x + b * u))
            x = rows[-1][2]
        states, actions, successors = map(torch.stack, zip(*rows))
        with torch.no_grad():
            nexts, log_prob = policy(successors).sample(64, generator=generator)
            value = (features(successors.expand(nexts.shape[:-1]), nexts[..., 0]) @ critic).mean(0)
        none = torch.zeros(states.shape, dtype=torch.bool)
        targets = soft_lambda_targets(
            -(q * states**2 + r * actions**2).double(),
            -alpha * log_prob.mean(0).double(),
            value,
            none,
            none,
            gamma=gamma,
            lam=lam,
        )
        critic = torch.linalg.lstsq(features(states, actions).flatten(0, 1), targets.flatten()).solution
        optimizer = torch.optim.Adam([gain_now, log_std], lr=0.05 if round_ < 15 else 0.01)
        seen = states[:2].flatten()
        for _ in range(30):
            optimizer.zero_grad()
            found, log_prob = expectation(
                policy(seen),
                lambda u, x=seen, w=critic: features(x.expand(u.shape[:-1]), u[..., 0]) @ w,
                samples=4,
                generator=generator,
            )
            (alpha * log_prob - found).mean().backward()
            optimizer.step()
        late.append((gain_now.item(), 2 * log_std.item()))
    gains, logs = torch.tensor(late[15:]).T
    assert gains.mean().item() == pytest.approx(gain, rel=0.02)
    assert logs.mean().exp().item() == pytest.approx(variance, rel=0.05)


def test_pathwise_and_score_gradients_agree_and_the_pathwise_one_is_quieter(
    record_property: pytest.RecordProperty,
) -> None:
    """Means of 1e5 samples within four standard errors, on a smooth Q under the squashed policy."""
    number, alpha = 100_000, 0.2
    found = {}
    for name in ("pathwise", "score"):
        mean = torch.full((number, 1), 0.3, requires_grad=True)
        log_std = torch.full((number, 1), -0.5, requires_grad=True)
        policy = GaussianPolicy(mean, log_std.exp())
        generator = torch.Generator().manual_seed(2)

        def q(action: Tensor) -> Tensor:
            return torch.sin(2 * action[..., 0]) - action[..., 0].square()

        if name == "pathwise":
            value, log_prob = expectation(policy, q, samples=4, generator=generator)
            loss = alpha * log_prob - value
        else:
            loss, _ = score_objective(policy, q, alpha, samples=4, generator=generator)
        loss.sum().backward()
        found[name] = torch.cat(
            [mean.grad, log_std.grad], -1
        ).double()  # one row per state: independent samples
    error = sum(g.var(0) / number for g in found.values()).sqrt()
    assert ((found["pathwise"].mean(0) - found["score"].mean(0)).abs() < 4 * error).all()
    ratio = found["score"].var(0) / found["pathwise"].var(0)
    record_property("variance_ratio", ratio.tolist())
    assert (ratio > 1).all() and (found["pathwise"].mean(0).abs() > 10 * error).all()


def test_the_critic_s_gradient_reaches_mean_and_scale_of_the_actor() -> None:
    """Sampling without reparameterisation leaves both zero."""
    mean, std = torch.zeros(5, 2, requires_grad=True), torch.ones(5, 2, requires_grad=True)
    value, _ = expectation(
        GaussianPolicy(mean, std), lambda a: (3 * a).sum(-1), generator=torch.Generator().manual_seed(0)
    )
    by_mean, by_std = torch.autograd.grad(-value.sum(), [mean, std])
    assert (by_mean < 0).all() and (by_std != 0).all()


@pytest.mark.parametrize("gradient", ["expected", "score"])
def test_a_step_of_the_actor_moves_the_actor_and_leaves_the_critic(gradient: str) -> None:
    learner = Learner(3, 2, discrete=False, settings=settings(gradient=gradient), seed=0)
    observation = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        old = learner.actor(observation)
        learner.critic.head[-1].weight.mul_(100)
    before = [{n: p.clone() for n, p in part.named_parameters()} for part in (learner.actor, learner.critic)]
    learner.actor_step(observation, old)
    after = [dict(part.named_parameters()) for part in (learner.actor, learner.critic)]
    assert all(not torch.equal(before[0][n], p) for n, p in after[0].items())
    assert (
        learner.duals.alpha < learner.settings.alpha
    )  # a policy that begins wide is above its target entropy
    assert all(torch.equal(before[1][n], p) and p.requires_grad for n, p in after[1].items())


def by_n_step_returns(
    reward: Tensor, bonus: Tensor, value: Tensor, term: Tensor, trunc: Tensor, gamma: float, lam: float
) -> Tensor:
    """G_t = sum_n (1 - lambda) lambda^(n-1) G_t^(n), the longest takes the rest; O(N^2), one number at a time."""
    steps, envs = reward.shape
    out = torch.zeros_like(reward)
    for e in range(envs):
        for t in range(steps):
            total, weight, so_far, discount = 0.0, 1.0, 0.0, 1.0
            for k in range(t, steps):
                ends = bool(term[k, e])
                so_far += discount * (reward[k, e].item() + (0 if ends else gamma * bonus[k, e].item()))
                discount *= gamma
                n_step = so_far + (0 if ends else discount * value[k, e].item())
                if ends or trunc[k, e] or k == steps - 1:
                    total += weight * n_step
                    break
                total += weight * (1 - lam) * n_step
                weight *= lam
            out[t, e] = total
    return out


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_targets_are_the_weighted_sum_of_n_step_returns(lam: float) -> None:
    generator = torch.Generator().manual_seed(3)
    reward, bonus, value = torch.randn(3, 15, 6, generator=generator, dtype=torch.float64)
    term, trunc = torch.rand(2, 15, 6, generator=generator) < 0.15
    found = soft_lambda_targets(reward, bonus, value, term, trunc, gamma=0.9, lam=lam)
    torch.testing.assert_close(found, by_n_step_returns(reward, bonus, value, term, trunc, 0.9, lam))
    if lam == 0:
        torch.testing.assert_close(found, reward + 0.9 * (bonus + value) * ~term)
    paid = soft_lambda_targets(reward, bonus, value, term, trunc, gamma=0.9, lam=lam, entropy_at_end=True)
    other = soft_lambda_targets(reward + 0.9 * bonus * term, bonus, value, term, trunc, gamma=0.9, lam=lam)
    torch.testing.assert_close(paid, other)


def test_histogram_keeps_a_return_inside_and_is_biased_at_the_border_as_computed() -> None:
    head = HLGauss(-3.0, 147.0, 151).double()  # bins of width 1
    inside = torch.linspace(0.0, 144.0, 1001, dtype=torch.float64)
    encoded = head.encode(inside)
    torch.testing.assert_close(encoded.sum(-1), torch.ones(1001, dtype=torch.float64))
    assert (head.decode(encoded.log()) - inside).abs().max() < 1e-5
    near = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64) + head.low
    bias = head.decode(head.encode(near).log()) - near
    torch.testing.assert_close(
        bias, torch.tensor([0.37, 0.15, 0.047, 0.0013], dtype=torch.float64), rtol=0.02, atol=2e-3
    )
    outside = torch.tensor([-1e6, 1e6], dtype=torch.float64)
    torch.testing.assert_close(head.encode(outside), head.encode(outside.clamp(head.low, head.high)))


def test_a_critic_begins_at_zero_and_its_loss_is_least_at_the_target() -> None:
    learner = Learner(2, 1, discrete=False, settings=settings(bins=151, high=30.0))  # the middle is not 0
    q = learner.critic(torch.randn(50, 2), torch.rand(50, 1))
    assert q.abs().max() < 0.05
    assert learner.critic.start.sum().item() == pytest.approx(1)  # learned before the factor of 40, not after
    head = HLGauss(-10.0, 10.0, 151)
    logits = head.encode(torch.tensor([2.0])).log().clamp(min=-40).requires_grad_()
    (slope,) = torch.autograd.grad(head.loss(logits, torch.tensor([2.0])).sum(), logits)
    assert slope.abs().max() < 1e-6


def test_logarithms_of_the_duals_move_by_the_step_size_and_do_not_decay() -> None:
    lr = 0.01
    high, low = torch.tensor(0.3), torch.tensor(0.0)

    def after(entropy: Tensor, kl: Tensor) -> tuple[float, float]:
        duals = Duals(settings(dual_lr=lr), target_entropy=-1.0)
        start = duals.log_alpha.item(), duals.log_beta.item()
        for _ in range(5):
            duals.step(entropy, kl)
        return duals.log_alpha.item() - start[0], duals.log_beta.item() - start[1]

    five = pytest.approx(5 * lr, rel=0.01)
    down = pytest.approx(
        -5 * lr, rel=0.03
    )  # the gradient shrinks with the value, Adam remembers the larger one
    assert after(torch.tensor(-2.0), high) == (five, five)
    assert after(torch.tensor(2.0), low) == (down, down)
    assert after(torch.tensor(-1.0), torch.tensor(0.1)) == (0.0, pytest.approx(0.0, abs=1e-6))
    no_gate = Duals(settings(kl_bound=math.inf), target_entropy=-1.0)
    no_gate.step(torch.tensor(-2.0), high)
    assert no_gate.beta.item() == pytest.approx(0.01)


def test_outside_the_gate_the_gradient_does_not_know_q() -> None:
    old, beta = GaussianPolicy(torch.zeros(2, 1), torch.ones(2, 1)), 0.5
    gradients = []
    for height in (1.0, 100.0):
        mean = torch.tensor([[0.1], [2.0]], requires_grad=True)  # KL 0.005 and 2
        policy = GaussianPolicy(mean, torch.ones(2, 1))
        value, log_prob = expectation(
            policy, lambda a, h=height: h * a[..., 0], generator=torch.Generator().manual_seed(0)
        )
        gated(0.1 * log_prob - value, old.kl(policy), kl_bound=0.1, beta=beta).sum().backward()
        gradients.append(mean.grad[:, 0])
    assert gradients[0][1] == gradients[1][1] == pytest.approx(beta * 2.0)  # d KL / d mean = mean
    assert (gradients[1][0] - gradients[0][0]).abs() > 5  # inside, it does


@pytest.mark.parametrize("squash", [True, False])
def test_divergence_before_the_squash_is_the_divergence_of_the_actions(squash: bool) -> None:
    first = GaussianPolicy(torch.tensor([[0.4, -1.0]]), torch.tensor([[0.5, 0.8]]), squash)
    second = GaussianPolicy(torch.tensor([[0.1, -0.7]]), torch.tensor([[0.7, 0.6]]), squash)
    action, log_prob = first.sample(200_000, generator=torch.Generator().manual_seed(0))
    u = action.double().atanh() if squash else action.double()
    slope = (1 - u.tanh() ** 2).log() if squash else torch.zeros_like(u)
    densities = [
        (torch.distributions.Normal(p.mean.double(), p.std.double()).log_prob(u) - slope).sum(-1)
        for p in (first, second)
    ]
    torch.testing.assert_close(densities[0].float(), log_prob, atol=2e-3, rtol=1e-3)
    sampled = densities[0] - densities[1]
    error = sampled.std() / math.sqrt(len(sampled))
    assert abs(sampled.mean() - first.kl(second)) < 4 * error


@pytest.mark.parametrize("discrete", [True, False])
def test_an_update_measures_the_divergence_from_the_policy_that_sampled(discrete: bool) -> None:
    """KL(old || new), of a batch from before its first step on; every minibatch sees other rows of it."""
    learner = Learner(3, 2, discrete=discrete, settings=settings(lr=0.1, minibatches=3))
    generator = torch.Generator().manual_seed(0)
    observation = 5 + 2 * torch.randn(8, 4, 3, generator=generator)
    with torch.no_grad():
        action, log_prob = learner.act(observation.flatten(0, 1))
    no = torch.zeros(8, 4, dtype=torch.bool)
    shape = action.shape[1:]
    found = learner.update(
        Rollout(
            observation,
            action.reshape(8, 4, *shape),
            log_prob.reshape(8, 4),
            log_prob.reshape(8, 4),
            observation,
            no,
            no,
        )
    )
    assert found["kl"] > 1e-3
    seen = observation.flatten(0, 1)
    torch.testing.assert_close(learner.norm.mean, seen.double().mean(0))
    before = learner.actor(learner.norm(seen))
    with torch.no_grad():
        learner.actor.last.bias += torch.tensor([1.0, -0.5, 0.3, 0.7][: len(learner.actor.last.bias)])
    after = learner.actor(learner.norm(seen))
    if discrete:
        kinds = [torch.distributions.Categorical(logits=p.log_probs) for p in (before, after)]
        want = torch.distributions.kl_divergence(*kinds).mean()
    else:
        kinds = [torch.distributions.Normal(p.mean, p.std) for p in (before, after)]
        want = torch.distributions.kl_divergence(*kinds).sum(-1).mean()
    torch.testing.assert_close(learner.actor_step(learner.norm(seen), before)["kl"], want.detach())
    for epoch in torch.cat(list(learner._minibatches(10))).reshape(-1, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert learner.duals.target_entropy == pytest.approx(0.5 * math.log(2) if discrete else -1.0)


def test_statistics_of_two_batches_are_those_of_both() -> None:
    first, second = 3 + torch.randn(5, 2), 2 * torch.randn(11, 2) - 1
    norm, whole = RunningNorm(2), torch.cat([first, second]).double()
    norm.update(first)
    norm.update(second)
    torch.testing.assert_close(norm.mean, whole.mean(0))
    torch.testing.assert_close(norm.variance, whole.var(0, correction=0))
    torch.testing.assert_close(norm(first), ((first - norm.mean) / (norm.variance + 0.01).sqrt()).float())


def test_discrete_gradient_is_the_enumeration() -> None:
    """d/dlogit_b of sum_a pi_a (alpha log pi_a - Q_a) = pi_b (c_b - sum_a pi_a c_a), c = alpha log pi - Q."""
    logits = torch.tensor([[0.2, -1.0, 0.7]], requires_grad=True)
    q, alpha = torch.tensor([[1.0, 3.0, -2.0]]), 0.5
    policy = CategoricalPolicy(logits.log_softmax(-1))
    value, log_prob = expectation(policy, q)
    (found,) = torch.autograd.grad((alpha * log_prob - value).sum(), logits)
    pi = logits.detach().softmax(-1)
    cost = alpha * pi.log() - q
    torch.testing.assert_close(found, pi * (cost - (pi * cost).sum(-1, keepdim=True)))
    (logits_many,) = [logits.detach().expand(50_000, 3).clone().requires_grad_()]
    surrogate, _ = score_objective(
        CategoricalPolicy(logits_many.log_softmax(-1)),
        q.expand(50_000, 3),
        alpha,
        generator=torch.Generator().manual_seed(0),
    )
    surrogate.sum().backward()
    rows = logits_many.grad.double()
    assert ((rows.mean(0) - found[0]).abs() < 4 * rows.std(0) / math.sqrt(50_000)).all()


def test_a_greedy_discrete_policy_is_reached_only_as_fast_as_the_gate_lets_it() -> None:
    """Q is one-hot and alpha nearly 0. Each round may move by about the bound; without the gate one round is enough."""
    q = torch.tensor([[0.0, 1.0, 0.0, 0.0]])

    def rounds(bound: float, number: int) -> list[tuple[float, float]]:
        logits, told = torch.zeros(1, 4, requires_grad=True), []
        optimizer = torch.optim.Adam([logits], lr=0.02)
        for _ in range(number):
            old = CategoricalPolicy(logits.detach().log_softmax(-1))
            for _ in range(200):
                policy = CategoricalPolicy(logits.log_softmax(-1))
                value, log_prob = expectation(policy, q)
                kl = old.kl(policy)
                optimizer.zero_grad()
                gated(1e-6 * log_prob - value, kl, kl_bound=bound, beta=10.0).sum().backward()
                optimizer.step()
            now = CategoricalPolicy(logits.detach().log_softmax(-1))
            told.append((old.kl(now).item(), now.log_probs.exp()[0, 1].item()))
        return told

    held = rounds(0.1, 12)
    assert all(kl < 0.15 for kl, _ in held) and held[0][1] < 0.6 and held[-1][1] > 0.95
    assert [share for _, share in held] == sorted(share for _, share in held)
    assert rounds(math.inf, 1)[0][1] > held[0][1] + 0.25


@pytest.mark.parametrize("ending", ["truncated", "terminated"])
def test_the_target_of_a_last_step_uses_the_terminal_observation(ending: str) -> None:
    """State 1 is where an episode stops and is worth 8; state 0 is where the next one begins and is worth -8."""
    learner = Learner(
        1, 2, discrete=True, settings=settings(gamma=0.5, lam=1.0, alpha=1e-9, reward_scale=4.0)
    )
    learner.critic.forward = (
        lambda observation, action=None: (  # type: ignore[method-assign]
            torch.where(observation > 0.5, 8.0, -8.0).expand(*observation.shape[:-1], 2)
        )
    )
    learner.norm.variance.fill_(0.99)  # the identity
    observation = torch.tensor([0.0, 0.0, 0.0]).reshape(3, 1, 1)
    following = torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1)
    no, at_one = torch.zeros(3, 1, dtype=torch.bool), torch.tensor([[False], [True], [False]])
    rollout = Rollout(
        observation,
        torch.zeros(3, 1, dtype=torch.long),
        torch.zeros(3, 1),
        torch.full((3, 1), 0.25),
        following,
        terminated=at_one if ending == "terminated" else no,
        truncated=at_one if ending == "truncated" else no,
    )
    targets, _ = learner.targets(rollout)
    last = 1 + (0.5 * 8 if ending == "truncated" else 0)
    torch.testing.assert_close(targets.T, torch.tensor([[1 + 0.5 * last, last, 1 - 0.5 * 8]]))


def test_the_executed_action_s_entropy_is_paid_where_there_is_one() -> None:
    """Its log-probability at t + 1 inside an episode; a fresh one where the episode stops."""
    learner = Learner(
        1, 1, discrete=False, settings=settings(gamma=0.5, lam=0.0, alpha=1.0, executed_entropy=True)
    )
    log_prob = torch.tensor([[7.0], [3.0], [5.0], [9.0]])
    cut = torch.tensor([[False], [True], [False], [False]])
    zeros = torch.zeros(4, 1)
    rollout = Rollout(zeros[..., None], zeros[..., None], log_prob, zeros, zeros[..., None], cut & False, cut)
    found = learner.targets(rollout)[0]
    assert found[0].item() == pytest.approx(-1.5, abs=0.1) and found[2].item() == pytest.approx(-4.5, abs=0.1)
    assert all(found[t].item() > -1.4 for t in (1, 3))  # the density of a standard normal action is small
