"""KL penalties on a softmax small enough to enumerate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kalman_rl.errors import ConfigError, NumericError
from kalman_rl.objectives.penalty import KL, k1, k2, k3
from kalman_rl.objectives.rollouts import Rollouts
from tests.oracles.batches import make_batch

THETA = torch.tensor([0.4, -1.1, 0.0, 0.9, -0.3], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([0.1, -0.6, 0.5, 0.2, 0.0], dtype=torch.float64), 0)


def _policy() -> tuple[Tensor, Tensor]:
    theta = THETA.clone().requires_grad_()
    return theta, torch.log_softmax(theta, 0)


def _backward_kl(logp: Tensor) -> Tensor:
    return (logp.exp() * (logp - REFERENCE)).sum()  # KL(policy || reference)


def _forward_kl(logp: Tensor) -> Tensor:
    return (REFERENCE.exp() * (REFERENCE - logp)).sum()  # KL(reference || policy)


def _gradient(value: Tensor, theta: Tensor) -> Tensor:
    return torch.autograd.grad(value, theta)[0]


def _expected_penalty_gradient(estimator: object) -> Tensor:
    """E over tokens drawn from the policy of the gradient of the *penalty loss* (the draw is a constant)."""
    theta, logp = _policy()
    rows = len(THETA)  # one completion of one token per possible token
    rollouts = Rollouts(
        logp.detach()[:, None], torch.ones(rows, 1), logp_reference=REFERENCE[:, None].clone()
    )
    penalty = KL(1.0, estimator)(logp[:, None], rollouts)  # type: ignore[arg-type]
    return _gradient((logp.detach().exp()[:, None] * penalty).sum(), theta)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased_values(estimator: object) -> None:
    _, logp = _policy()
    mean = (logp.exp() * estimator(REFERENCE - logp)).sum()  # type: ignore[operator]
    torch.testing.assert_close(mean, _backward_kl(logp), rtol=1e-13, atol=0.0)


def test_k2_is_biased_by_third_order_in_the_distance() -> None:
    _, logp = _policy()
    errors = []
    for step in (0.04, 0.02, 0.01):
        near = torch.log_softmax(logp + step * (REFERENCE - logp), 0).detach()
        exact = (logp.exp() * (logp - near)).sum()
        errors.append(((logp.exp() * k2(near - logp)).sum() - exact).abs().item())
    assert errors[0] > 1e-8
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(8, rel=0.1)


def test_gradient_of_k1_has_mean_zero() -> None:
    torch.testing.assert_close(_expected_penalty_gradient(k1), torch.zeros(5).double(), rtol=0, atol=1e-15)


def test_gradient_of_k2_is_that_of_kl_policy_reference() -> None:
    theta, logp = _policy()
    torch.testing.assert_close(_expected_penalty_gradient(k2), _gradient(_backward_kl(logp), theta))


def test_gradient_of_k3_is_that_of_kl_reference_policy() -> None:
    theta, logp = _policy()
    forward = _gradient(_forward_kl(logp), theta)
    torch.testing.assert_close(_expected_penalty_gradient(k3), forward)
    theta, logp = _policy()
    assert (forward - _gradient(_backward_kl(logp), theta)).norm() > 0.1 * forward.norm(), (
        "the KLs must differ"
    )


@pytest.mark.parametrize("d", [-3.0, -0.2, 0.0, 1e-3, 0.7, 5.0])
def test_values(d: float) -> None:
    x = torch.tensor(d, dtype=torch.float64)
    assert k1(x).item() == -d
    assert k2(x).item() == pytest.approx(d * d / 2)
    assert k3(x).item() == pytest.approx(math.exp(d) - 1 - d, abs=1e-15)
    assert k3(x).item() >= 0


@pytest.mark.parametrize("d", [1e-6, -1e-6, 3e-5, -3e-4])
def test_k3_does_not_cancel_in_float32(d: float) -> None:
    x = torch.tensor(d)
    exact = math.expm1(x.item()) - x.item()
    plain = (x.exp() - 1 - x).item()
    assert abs(k3(x).item() - exact) <= 1.2e-7 * abs(d)  # one unit in the last place of d
    assert k3(x).item() >= 0
    assert abs(plain - exact) > 100 * abs(k3(x).item() - exact), "the plain formula would do, so simplify"
    y = torch.tensor(d, requires_grad=True)
    k3(y).backward()
    assert y.grad is not None and y.grad.item() == pytest.approx(math.expm1(d), abs=1.2e-7)


def test_mask_and_coefficient() -> None:
    mask = torch.tensor([[True, False, True]])
    reference = torch.tensor([[-1.0, math.nan, -2.0]])
    logp = torch.tensor([[-1.5, math.inf, -2.0]], requires_grad=True)
    rollouts = Rollouts(torch.zeros(1, 3), mask, logp_reference=reference)
    penalty = KL(0.5)(torch.where(mask, logp, 0.0), rollouts)
    assert penalty.tolist() == [[pytest.approx(0.5 * (math.expm1(0.5) - 0.5)), 0.0, 0.0]]
    penalty.sum().backward()
    assert logp.grad is not None
    assert logp.grad[0].tolist() == [pytest.approx(-0.5 * math.expm1(0.5)), 0.0, 0.0]


def test_without_reference() -> None:
    rollouts = Rollouts(torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(
        ConfigError,
        match=r"^logp_reference: got None, expected \(B, T\).*pass them in Rollouts.*drop the penalty",
    ):
        KL()(torch.zeros(1, 2), rollouts)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_coefficient_out_of_range(bad: float) -> None:
    with pytest.raises(NumericError, match=rf"^coefficient: got {bad}, expected"):
        KL(bad)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
@pytest.mark.parametrize("packed", [False, True])
def test_the_weight_of_a_sequence_is_its_geometric_mean(estimator: Any, packed: bool) -> None:
    """By loops: ``beta exp(mean of logp - logp_old) estimator(d)``, gradient through the estimate alone."""
    batch = make_batch(2)
    segment = (torch.arange(9) // 5).expand(6, 9) if packed else None
    rollouts, logp = (
        batch.rollouts(segment=segment),
        torch.where(batch.mask, batch.logp, 0.0).requires_grad_(),
    )
    found = KL(0.3, estimator, importance_weighted=True, level="sequence")(logp, rollouts)
    index = rollouts.sequence_index
    for i, t in batch.mask.nonzero().tolist():
        same = batch.mask & (index == index[i, t])
        weight = math.exp((logp - batch.logp_old)[same].mean().item())
        d = (batch.reference - logp)[i, t]
        assert found[i, t].item() == pytest.approx(0.3 * weight * estimator(d).item(), rel=1e-9)
    assert not found[~batch.mask].any()


def test_another_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="^level: got 'geometric', expected token or sequence$"):
        KL(level="geometric")  # type: ignore[arg-type]
