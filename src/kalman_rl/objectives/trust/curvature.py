"""A trust region by predicted effect: what would an optimizer step on this token alone do?

Model of the step: only the last layer moves. For one token with last hidden state h, head probabilities pi on
k tokens, ``v = onehot(y) - pi`` and Fisher matrix ``F = diag(pi) - pi pi'``, the gradient of ``A log pi(y)``
by the k head rows is the rank-one ``G0 = A v h'``. A step of size eta along G moves the logits by ``eta u``,
``u = G h``, and to second order

    m_H = eta A v'u + eta^2 A ((v'u)^2 - u'Fu) / 2       change of the objective A pi / pi_old
    m_F = eta^2 (v'u)^2 / 2                               shift of the policy (empirical Fisher)

A token is kept if ``|m_H| < objective`` and ``m_F < policy``. With plain gradient steps ``u = A |h|^2 v``: no
matrix is ever formed. With Adam ``u`` needs the optimizer's moments of those rows and is taken in chunks.

Source: CAPO (arXiv 2510.00819). Deviations: rank-one algebra, no (B, T, k, H) tensor; the sampled token is
always among the k (:func:`kalman_rl.objectives.trust.top_k_with_sampled`); ``u'Fu`` as a variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError, quote
from kalman_rl.objectives.inputs import required
from kalman_rl.objectives.ratio.transforms import Ratio
from kalman_rl.objectives.rollouts import Current, LastLayerStep, Rollouts
from kalman_rl.objectives.trust.clip import Trust, TrustRegion

CHUNK_NUMBERS = 1 << 22
"""Numbers (tokens x k x H) that the Adam step holds at a time: 16 MB in float32."""


class Adam(NamedTuple):
    """Adam's state for the head: moments (V, H) of the *loss's* gradient as the optimizer keeps them (not
    bias-corrected), the number of ``steps`` >= 1 taken, and its constants."""

    first_moment: Tensor
    second_moment: Tensor
    steps: int
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


def last_layer_step(
    advantage: Tensor,
    hidden: Tensor,
    top_logp: Tensor,
    top_ids: Tensor,
    sampled: Tensor,
    learning_rate: float,
    adam: Adam | None = None,
) -> LastLayerStep:
    """Effect of the optimizer step that each token alone would cause.

    Args:
        advantage: (B, T).
        hidden: (B, T, H) input of the last layer.
        top_logp: (B, T, k) current log-probabilities of k tokens; renormalised on those k.
        top_ids: (B, T, k) their ids, the sampled one among them.
        sampled: (B, T) ids of the sampled tokens. One not among the k is kept (effect unknown).
        learning_rate: eta >= 0, of the optimizer step to come.
        adam: the optimizer's state for the head; None = plain gradient step, which is also what published
            code takes before Adam's first step.

    Returns:
        LastLayerStep: ``v'u`` and ``u'Fu`` (B, T), detached.

    Raises: ShapeError for shapes that do not match, NumericError for a negative or non-finite learning rate.
    """
    k = top_logp.shape[-1]
    expected = {"hidden": (*advantage.shape, hidden.shape[-1]), "sampled": tuple(advantage.shape)}
    expected |= dict.fromkeys(("top_logp", "top_ids"), (*advantage.shape, k))
    given = {"hidden": hidden, "sampled": sampled, "top_logp": top_logp, "top_ids": top_ids}
    for name, tensor in given.items():
        if tuple(tensor.shape) != expected[name]:
            raise ShapeError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected[name]}")
    for name in () if adam is None else ("first_moment", "second_moment"):
        shape = tuple(getattr(adam, name).shape)
        if shape[1:] != (hidden.shape[-1],):
            raise ShapeError(f"{name}: got shape {shape}, expected (V, {hidden.shape[-1]}) like the head")
    if not 0 <= learning_rate < math.inf:
        raise NumericError(f"learning_rate: got {quote(learning_rate)}, expected a finite step size >= 0")
    dtype = torch.promote_types(top_logp.dtype, torch.float32)
    advantage, hidden = advantage.detach().to(dtype), hidden.detach().to(dtype)
    pi = torch.softmax(top_logp.detach().to(dtype), dim=-1)
    hit = top_ids == sampled[..., None]
    v = torch.where(hit.any(-1, keepdim=True), hit.to(dtype) - pi, 0.0)
    if adam is None:
        u = (advantage * hidden.square().sum(-1))[..., None] * v
    else:
        u = _adam_direction(advantage, hidden, v, top_ids, adam)
    u = u - (pi * u).sum(-1, keepdim=True)  # a shift of all k logits changes nothing, but drowns the rest
    return LastLayerStep((v * u).sum(-1), (pi * u.square()).sum(-1), learning_rate)


def _adam_direction(advantage: Tensor, hidden: Tensor, v: Tensor, ids: Tensor, adam: Adam) -> Tensor:
    """``u = G h`` (B, T, k), G = Adam's normalised direction if this token's gradient came next.

    G raises the objective, the optimizer lowers a loss: its first moment enters with a minus.
    """
    shape, width = v.shape, hidden.shape[-1]
    rows, states = (advantage[..., None] * v).reshape(-1, shape[-1]), hidden.reshape(-1, width)
    index = ids.reshape(-1, shape[-1])
    step = adam.steps + 1
    correct1, correct2 = 1 - adam.beta1**step, 1 - adam.beta2**step
    out = torch.empty_like(rows)
    size = max(1, CHUNK_NUMBERS // (shape[-1] * width))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        gradient = rows[part, :, None] * states[part, None, :]
        first = (1 - adam.beta1) * gradient - adam.beta1 * adam.first_moment[index[part]]
        second = adam.beta2 * adam.second_moment[index[part]] + (1 - adam.beta2) * gradient.square()
        direction = first / correct1 / ((second / correct2).sqrt() + adam.epsilon)
        out[part] = torch.einsum("nkh,nh->nk", direction.to(out.dtype), states[part])
    return out.reshape(shape)


def predicted_effect(step: LastLayerStep, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """``m_H`` and ``m_F`` (B, T) of the module's formula."""
    eta, along = step.learning_rate, step.alignment
    objective = eta * advantage * along + eta**2 * advantage * (along.square() - step.curvature) / 2
    return objective, (eta * along).square() / 2


@dataclass(frozen=True)
class CurvatureMask:
    """Drop tokens whose own optimizer step would move objective or policy too far, then clip as usual.

    Args:
        objective: bound > 0 of ``|m_H|``, in units of the advantage; inf drops nothing.
        policy: bound > 0 of ``m_F``, nats; inf drops nothing.
        then: the trust region of the tokens that are kept.

    Both grow with the square of the learning rate, so they have to be chosen together with it.
    Needs: ``step``.
    Raises: NumericError for a value outside its range and for a NaN effect at a trained token.
    """

    objective: float
    policy: float
    then: TrustRegion
    inputs: ClassVar[tuple[str, ...]] = ("step",)

    def __post_init__(self) -> None:
        for name in ("objective", "policy"):
            value = getattr(self, name)
            if not value > 0:
                raise NumericError(
                    f"{name}: got {quote(value)}, expected a bound > 0 of the predicted effect"
                )

    def __call__(self, ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Trust:
        step = _checked(current.step, rollouts.mask)
        objective, policy = predicted_effect(step, advantage)
        calm = (objective.abs() < self.objective) & (policy < self.policy)
        inner = self.then(ratio, advantage, current, rollouts)
        return Trust(inner.keep & calm, inner.weight, torch.where(calm, inner.surrogate, 0.0))


def _checked(step: LastLayerStep | None, mask: Tensor) -> LastLayerStep:
    """The step if it fits the mask and is no NaN inside it: NaN is below no bound and would drop silently."""
    required("step", None if step is None else step.alignment, "the curvature mask (CAPO)")
    assert step is not None
    if not step.alignment.shape == step.curvature.shape == mask.shape:
        shapes = f"{tuple(step.alignment.shape)}, {tuple(step.curvature.shape)}"
        raise ShapeError(f"step: got shapes {shapes}, expected {tuple(mask.shape)} like the mask")
    bad = mask & (step.alignment.isnan() | step.curvature.isnan())
    if bad.any():
        row, token = bad.nonzero()[0].tolist()
        raise NumericError(
            f"step: got nan at row {row}, token {token} ({int(bad.sum())} such tokens), expected numbers "
            "where the mask is True; look for NaN in the hidden states or the optimizer's moments"
        )
    return step
