"""CAPO's predicted step against closed forms, autograd's Hessian and a literal torch.optim.Adam step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kalman_rl.errors import ConfigError, NumericError, ShapeError
from kalman_rl.methods import make_method
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.rollouts import Current, LastLayerStep
from kalman_rl.objectives.trust import curvature
from kalman_rl.objectives.trust.clip import Clip
from kalman_rl.objectives.trust.curvature import Adam, CurvatureMask, last_layer_step, predicted_effect
from tests.oracles.batches import make_batch, run

V, H, ROWS, LENGTH = 5, 3, 2, 4
quick = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


@dataclasses.dataclass
class Tiny:
    """A linear softmax head and a batch of last hidden states, float64."""

    head: Tensor
    hidden: Tensor
    sampled: Tensor
    advantage: Tensor

    @property
    def logp(self) -> Tensor:
        return torch.log_softmax(self.hidden @ self.head.T, -1)

    def step(self, rate: float, adam: Adam | None = None, ids: Tensor | None = None) -> LastLayerStep:
        if ids is None:
            ids = torch.arange(V).expand(*self.sampled.shape, V)
        top = self.logp.gather(-1, ids)
        return last_layer_step(self.advantage, self.hidden, top, ids, self.sampled, rate, adam)


def tiny(seed: int) -> Tiny:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    sampled = torch.randint(V, (ROWS, LENGTH), generator=g)
    return Tiny(normal(V, H), normal(ROWS, LENGTH, H), sampled, normal(ROWS, LENGTH))


def trained_adam(head: Tensor, seed: int, steps: int) -> tuple[torch.nn.Parameter, torch.optim.Adam]:
    """A real optimizer of the head after a few steps on some other loss."""
    weight = torch.nn.Parameter(head.clone())
    optimizer = torch.optim.Adam([weight], lr=1e-3, betas=(0.8, 0.95), eps=1e-3)
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        weight.grad = torch.randn(V, H, generator=g, dtype=torch.float64)
        optimizer.step()
    return weight, optimizer


def moments(weight: Tensor, optimizer: torch.optim.Adam) -> Adam:
    """The state as an optimizer that minimises a loss keeps it."""
    state = optimizer.state[weight]
    return Adam(
        state["exp_avg"].clone(), state["exp_avg_sq"].clone(), int(state["step"]), 0.8, 0.95, epsilon=1e-3
    )


def fisher(pi: Tensor) -> Tensor:
    return torch.diag(pi) - torch.outer(pi, pi)


# ---- gradient steps


@quick
@given(seed=seeds, rate=st.sampled_from([1e-3, 0.1, 2.0]))
def test_gradient_step_closed_forms(seed: int, rate: float) -> None:
    case = tiny(seed)
    objective, policy = predicted_effect(case.step(rate), case.advantage)
    for i in range(ROWS):
        for t in range(LENGTH):
            a, pi = case.advantage[i, t], case.logp[i, t].exp()
            v = torch.eye(V, dtype=torch.float64)[case.sampled[i, t]] - pi
            v2, h2 = v @ v, case.hidden[i, t] @ case.hidden[i, t]
            torch.testing.assert_close(policy[i, t], 0.5 * rate**2 * a**2 * v2**2 * h2**2)
            second = 0.5 * rate**2 * a**3 * h2**2 * (v2**2 - v @ fisher(pi) @ v)
            torch.testing.assert_close(objective[i, t], rate * a**2 * v2 * h2 + second)


@quick
@given(seed=seeds, adaptive=st.booleans())
def test_objective_change_is_the_second_order_taylor_expansion(seed: int, adaptive: bool) -> None:
    """Of A pi(y) / pi_old(y) in the head's weights, by autograd, along the step that the token causes."""
    case, rate = tiny(seed), 0.05
    weight, optimizer = trained_adam(case.head, seed, 3)
    case.head = weight.detach().clone()
    adam = moments(weight, optimizer) if adaptive else None
    objective, _ = predicted_effect(case.step(rate, adam), case.advantage)
    for i in range(ROWS):
        for t in range(LENGTH):
            h, y, a = case.hidden[i, t], case.sampled[i, t], case.advantage[i, t]
            old = case.logp[i, t, y]

            def value(w: Tensor, h: Tensor = h, y: Tensor = y, a: Tensor = a, old: Tensor = old) -> Tensor:
                return a * (torch.log_softmax(w @ h, -1)[y] - old).exp()

            ascent: Tensor = torch.autograd.functional.jacobian(value, case.head)  # type: ignore[assignment]
            change = rate * ascent if adam is None else -literal_descent(weight, optimizer, -ascent, rate)
            _, curved = torch.autograd.functional.hvp(value, case.head, change)
            expected = (ascent * change).sum() + 0.5 * (curved * change).sum()
            torch.testing.assert_close(objective[i, t], expected, rtol=1e-9, atol=1e-12)


def literal_descent(
    weight: torch.nn.Parameter, optimizer: torch.optim.Adam, gradient: Tensor, rate: float
) -> Tensor:
    """``W_before - W_after`` of the optimizer's next step if ``gradient`` is the loss's gradient."""
    copy = torch.nn.Parameter(weight.detach().clone())
    other = torch.optim.Adam([copy], lr=rate, betas=(0.8, 0.95), eps=1e-3)
    state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[weight].items()}
    other.state[copy] = state
    copy.grad = gradient
    other.step()
    return (weight - copy).detach()


@quick
@given(seed=seeds, steps=st.integers(1, 6))
def test_adam_direction_is_the_optimizers_own_step(seed: int, steps: int) -> None:
    """The loss is -A log pi(y), so its moments point downhill; u moves the logits by what the step does."""
    case, rate = tiny(seed), 0.07
    weight, optimizer = trained_adam(case.head, seed, steps)
    case.head = weight.detach().clone()
    step = case.step(rate, moments(weight, optimizer))
    for i in range(ROWS):
        for t in range(LENGTH):
            h, pi = case.hidden[i, t], case.logp[i, t].exp()
            v = torch.eye(V, dtype=torch.float64)[case.sampled[i, t]] - pi
            descent = -case.advantage[i, t] * torch.outer(v, h)
            u = -literal_descent(weight, optimizer, descent, rate) @ h / rate
            torch.testing.assert_close(step.alignment[i, t], v @ u, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(step.curvature[i, t], u @ fisher(pi) @ u, rtol=1e-9, atol=1e-12)


@quick
@given(seed=seeds)
def test_expected_policy_shift_is_the_exact_fisher_value(seed: int) -> None:
    """Averaged over the sampled token, for one and the same direction u, ``(v'u)^2`` is ``u'Fu``."""
    case = tiny(seed)
    g = torch.Generator().manual_seed(seed)
    weight, optimizer = trained_adam(case.head, seed, 2)
    adam = moments(weight, optimizer)._replace(beta1=1 - 1e-16, beta2=1 - 1e-16, steps=10**18)
    adam = adam._replace(first_moment=1e-3 * torch.randn(V, H, generator=g, dtype=torch.float64))
    mean, exact = torch.zeros(ROWS, LENGTH, dtype=torch.float64), None
    for y in range(V):  # beta = 1: the direction is the momentum's alone, whatever token comes
        case.sampled = torch.full_like(case.sampled, y)
        step = case.step(1.0, adam)
        mean += case.logp[..., y].exp() * predicted_effect(step, case.advantage)[1]
        exact = step.curvature / 2
    assert exact is not None and (exact > 0).all()
    torch.testing.assert_close(mean, exact, rtol=1e-6, atol=0)


def test_variance_survives_a_common_shift_of_all_logits_in_float32() -> None:
    """Momentum moves all k logits together; u'Fu does not see that, and must not drown in it."""
    ids = torch.arange(V).expand(1, 1, V)
    top = torch.log_softmax(torch.tensor([[[0.3, -1.0, 0.0, 1.0, 0.5]]]), -1)
    first = torch.full((V, 1), -1e3) + torch.arange(V).float()[:, None]
    adam = Adam(first, torch.ones(V, 1), 10**18, 1 - 1e-16, 1 - 1e-16, 0.0)
    step = last_layer_step(
        torch.ones(1, 1), torch.ones(1, 1, 1), top, ids, torch.zeros(1, 1).long(), 1.0, adam
    )
    u = -torch.arange(V).double()
    pi = top[0, 0].double().exp()
    expected = (u @ fisher(pi / pi.sum()) @ u).item()
    assert step.curvature.item() == pytest.approx(expected, rel=1e-4)


# ---- k tokens


def test_tokens_outside_the_k_are_kept() -> None:
    case = tiny(1)
    case.sampled = torch.full_like(case.sampled, 4)
    ids = torch.arange(3).expand(ROWS, LENGTH, 3)
    weight, optimizer = trained_adam(case.head, 0, 2)
    for adam in (None, moments(weight, optimizer)):
        step = case.step(1.0, adam, ids)
        assert (step.alignment == 0).all() and all(
            (x == 0).all() for x in predicted_effect(step, case.advantage)[1:]
        )


def test_order_of_the_k_does_not_matter_and_zero_advantages_do_nothing() -> None:
    case = tiny(2)
    case.advantage[0] = 0.0
    shuffled = torch.tensor([3, 0, 4, 1, 2]).expand(ROWS, LENGTH, V)
    for ours, other in zip(case.step(0.1)[:2], case.step(0.1, ids=shuffled)[:2]):
        torch.testing.assert_close(ours, other)
        assert (ours[0] == 0).all() and (ours[1] > 0).any()


class Largest(TorchFunctionMode):
    """The most numbers that any tensor held while the mode was on."""

    size = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.size = max(self.size, out.numel())
        return out


@pytest.mark.parametrize("limit", [1, 31, 15 * 2, 15 * 3, 1 << 22])
def test_chunks_change_nothing_and_bound_the_memory(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny(3)
    weight, optimizer = trained_adam(case.head, 3, 2)
    adam = moments(weight, optimizer)
    whole = case.step(0.1, adam)
    monkeypatch.setattr(curvature, "CHUNK_NUMBERS", limit)
    with Largest() as seen:
        parts = case.step(0.1, adam)
    for one, other in zip(whole[:2], parts[:2]):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)
    everything = ROWS * LENGTH * V * H
    small = ROWS * LENGTH * V  # (B, T, k) may be held
    if limit < everything:
        assert seen.size <= max(small, limit, V * H) < everything
    else:
        assert seen.size == everything


def test_gradient_step_never_forms_a_matrix() -> None:
    case = tiny(4)
    with Largest() as seen:
        case.step(0.1)
    assert seen.size == ROWS * LENGTH * V


# ---- the mask


def test_mask_against_a_loop() -> None:
    batch = make_batch(5, ROWS, LENGTH, holes=False)
    case = tiny(5)
    step = case.step(0.5)
    objective, policy = predicted_effect(step, case.advantage)
    part = CurvatureMask(objective.abs().median().item(), policy.quantile(0.7).item(), Clip(0.2, 0.2))
    rollouts = batch.rollouts()
    current = Current(batch.logp, step=step)
    ratio = make_method("grpo").ratio(batch.logp, rollouts)
    out = part(ratio, case.advantage, current, rollouts)
    plain = Clip(0.2, 0.2)(ratio, case.advantage, current, rollouts)
    for i in range(ROWS):
        for t in range(LENGTH):
            calm = abs(objective[i, t]) < part.objective and policy[i, t] < part.policy
            assert out.keep[i, t] == (bool(plain.keep[i, t]) and calm)
            assert out.surrogate[i, t] == (plain.surrogate[i, t] if calm else 0)
    assert 0 < out.keep.sum() < plain.keep.sum()


def test_infinite_bounds_are_grpo() -> None:
    batch, case = make_batch(6, ROWS, LENGTH), tiny(6)
    capo = make_method("capo", objective=math.inf, policy=math.inf)
    logp = batch.logp.clone().requires_grad_()
    loss = policy_loss(capo, batch.rollouts(), Current(logp, step=case.step(1e3)))
    loss.value.backward()
    grpo = run(make_method("grpo"), batch)
    assert logp.grad is not None and torch.equal(logp.grad, grpo.gradient)
    assert torch.equal(loss.value.detach(), grpo.value)


# ---- errors


def test_missing_step_says_how_to_supply_it() -> None:
    batch = make_batch(0)
    with pytest.raises(ConfigError, match=r"^step: got None .*Current\(logp, step=curvature.last_layer_step"):
        policy_loss(make_method("capo"), batch.rollouts(), batch.logp)
    assert make_method("capo").inputs == ("step",)


def test_step_of_another_shape_or_with_nan() -> None:
    batch, case = make_batch(0, ROWS, LENGTH, holes=False), tiny(0)
    step = case.step(0.1)
    with pytest.raises(ShapeError, match=r"^step: got shapes \(2, 1\), .*expected \(2, 4\)"):
        policy_loss(
            make_method("capo"),
            batch.rollouts(),
            Current(batch.logp, step=step._replace(alignment=step.alignment[:, :1])),
        )
    broken = step.alignment.clone()
    broken[1, 2] = math.nan
    current = Current(batch.logp, step=step._replace(alignment=broken))
    with pytest.raises(NumericError, match=r"^step: got nan at row 1, token 2"):
        policy_loss(make_method("capo"), batch.rollouts(), current)
    mask = batch.mask.clone()
    mask[1, 2] = False
    assert torch.isfinite(policy_loss(make_method("capo"), batch.rollouts(mask=mask), current).value)


@pytest.mark.parametrize("name, index", [("hidden", 0), ("top_logp", 1), ("top_ids", 2), ("sampled", 3)])
def test_shapes(name: str, index: int) -> None:
    case = tiny(0)
    ids = torch.arange(V).expand(ROWS, LENGTH, V)
    given = [case.hidden, case.logp, ids, case.sampled]
    given[index] = given[index][:1]
    with pytest.raises(ShapeError, match=rf"^{name}: got shape \(1, .*expected \(2, 4"):
        last_layer_step(case.advantage, *given, 0.1)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("logits, wanted", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32, torch.float64])
def test_a_step_has_the_type_of_the_log_probabilities_float32_at_least(
    other: torch.dtype, logits: torch.dtype, wanted: torch.dtype, adaptive: bool
) -> None:
    case, adam = tiny(0), Adam(torch.zeros(V, H), torch.ones(V, H), 3) if adaptive else None
    ids = torch.arange(V).expand(ROWS, LENGTH, V)
    given = (
        case.advantage.to(other),
        case.hidden.to(other).requires_grad_(),
        case.logp.to(logits).requires_grad_(),
    )
    step = last_layer_step(*given, ids, case.sampled, 0.1, adam)
    for found in (step.alignment, step.curvature):
        assert found.dtype == wanted and not found.requires_grad


@pytest.mark.parametrize("name", ["first_moment", "second_moment"])
def test_moments_of_another_width(name: str) -> None:
    adam = Adam(torch.zeros(V, H), torch.zeros(V, H), 3)._replace(**{name: torch.zeros(V, H + 1)})
    with pytest.raises(ShapeError, match=rf"^{name}: got shape \(5, 4\), expected \(V, 3\)"):
        tiny(0).step(0.1, adam)


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf])
def test_learning_rate(rate: float) -> None:
    with pytest.raises(NumericError, match=rf"^learning_rate: got {rate}, expected"):
        tiny(0).step(rate)


@pytest.mark.parametrize("name", ["objective", "policy"])
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_bounds(name: str, bad: float) -> None:
    with pytest.raises(NumericError, match=rf"^{name}: got {bad}, expected a bound > 0"):
        CurvatureMask(**({"objective": 1.0, "policy": 1.0, "then": Clip()} | {name: bad}))
