"""Trust regions by divergence: keep a token unless it moved too much probability mass the wrong way.

    w_t = exp(logp - logp_behaviour);    drop if sign(A) pushes away from the behaviour policy and D_t > delta
    loss_t = -A sg(min(w_t, cap) keep_t) logp_t

D is a divergence between the behaviour policy ``mu`` and the current policy ``pi`` at one position, on a partition of
the vocabulary: {sampled token, rest} (binary) or {k tokens, rest} (top-k). A finer partition never gives a
smaller divergence: binary <= top-k <= whole vocabulary.

Source: DPPO (arXiv 2602.04879), VACO (arXiv 2603.01365). Deviations: ``log(1 - p)`` is taken without cancellation and
without an added constant; the k tokens contain the sampled one exactly once; the rest's mass is not taken below its
rounding error; thresholds have separate names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError, quote
from kalman_rl.objectives.inputs import required
from kalman_rl.objectives.ratio.transforms import Ratio, behaviour
from kalman_rl.objectives.rollouts import Current, Rollouts
from kalman_rl.objectives.trust.clip import LOG_WEIGHT_CAP, Trust, weight_of

Divergence = Callable[[Current, Rollouts], Tensor]


def log_complement(logp: Tensor) -> Tensor:
    """``log(1 - exp(logp))`` for ``logp <= 0``, accurate at both ends; -inf at 0.

    >>> log_complement(torch.tensor([-1e-12], dtype=torch.float64))
    tensor([-27.6310], dtype=torch.float64)
    """
    small = logp > -math.log(2)
    inner = torch.where(small, -1.0, logp)
    return torch.where(
        small, torch.log(-torch.expm1(torch.where(small, logp, -1.0))), torch.log1p(-inner.exp())
    )


def _mass_times(mass: Tensor, log_quotient: Tensor) -> Tensor:
    """``p log(p / q)``, 0 where p is 0."""
    return torch.where(mass > 0, mass * log_quotient, 0.0)


def binary_tv(current: Current, rollouts: Rollouts) -> Tensor:
    """Total variation on {sampled, rest}: ``|pi(y) - mu(y)|`` (B, T), in [0, 1]."""
    mu, pi = behaviour(rollouts).clamp(max=0.0), current.logp.clamp(max=0.0)
    return (pi.exp() - mu.exp()).abs()


def ratio_distance(current: Current, rollouts: Rollouts) -> Tensor:
    """``|w - 1|`` (B, T), in [0, inf): its mean under the behaviour policy is twice the total variation."""
    return torch.expm1((current.logp - behaviour(rollouts)).clamp(max=LOG_WEIGHT_CAP)).abs()


def binary_kl(current: Current, rollouts: Rollouts) -> Tensor:
    """KL(mu || pi) on {sampled, rest} (B, T), nats, in [0, inf]."""
    mu, pi = behaviour(rollouts).clamp(max=0.0), current.logp.clamp(max=0.0)
    rest_mu = log_complement(mu)
    rest = _mass_times(rest_mu.exp(), rest_mu - log_complement(pi))
    return (_mass_times(mu.exp(), mu - pi) + rest).clamp(min=0.0)


def _top(current: Current, rollouts: Rollouts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-masses (B, T, k) of both policies on the k tokens, and the masses (B, T) of the rest."""
    mu = required("top_behaviour", rollouts.top_behaviour, "a top-k divergence")
    pi = required("top_logp", current.top_logp, "a top-k divergence").to(mu.dtype)
    if mu.shape != pi.shape:
        raise ShapeError(
            f"top_logp: got shape {tuple(pi.shape)}, expected {tuple(mu.shape)} like top_behaviour: the same "
            "k tokens at every position"
        )
    return mu, pi, _rest(mu), _rest(pi)


def _rest(top: Tensor) -> Tensor:
    """``1 - sum_k p`` (B, T), not below what rounding leaves of it: where k tokens hold all the mass one
    policy's residue may be 0 and the other's 6e-8, and their quotient infinite. One token's is exact."""
    rounding = torch.finfo(top.dtype).eps * (top.shape[-1] - 1)
    return (-torch.expm1(top.logsumexp(-1))).clamp(min=rounding)


def top_k_tv(current: Current, rollouts: Rollouts) -> Tensor:
    """Total variation on {k tokens, rest}: ``(sum_S |mu - pi| + |mu_rest - pi_rest|) / 2`` (B, T)."""
    mu, pi, rest_mu, rest_pi = _top(current, rollouts)
    return ((mu.exp() - pi.exp()).abs().sum(-1) + (rest_mu - rest_pi).abs()) / 2


def top_k_kl(current: Current, rollouts: Rollouts) -> Tensor:
    """KL(mu || pi) on {k tokens, rest} (B, T), nats, in [0, inf]."""
    mu, pi, rest_mu, rest_pi = _top(current, rollouts)
    inside = _mass_times(mu.exp(), mu - pi).sum(-1)
    return (inside + _mass_times(rest_mu, rest_mu.log() - rest_pi.log())).clamp(min=0.0)


@dataclass(frozen=True)
class Averaged:
    """A divergence averaged over the trained tokens of each sequence, the same (B, T) at all of them."""

    divergence: Divergence

    def __call__(self, current: Current, rollouts: Rollouts) -> Tensor:
        total = rollouts.per_sequence_sum(self.divergence(current, rollouts))
        return total / rollouts.lengths.clamp(min=1.0)


@dataclass(frozen=True)
class DivergenceMask:
    """Keep a token unless it moves away from the behaviour policy and its divergence exceeds a threshold.

        drop = (A > 0 and pi(y) > mu(y) and D > high) or (A <= 0 and pi(y) < mu(y) and D > low)

    Args:
        divergence: one of this module's: :func:`binary_tv`, :func:`binary_kl`, :func:`top_k_tv`,
            :func:`top_k_kl`, :func:`ratio_distance`; or one of them :class:`Averaged` over the sequence.
        low, high: thresholds >= 0, in probability (TV) or nats (KL); inf drops nothing.
        cap: upper bound > 0 of the weight.

    The ratio beside it should be :class:`kalman_rl.objectives.ratio.BehaviourToken`.
    Inputs: ``logp_behaviour``; the top-k divergences also ``top_behaviour`` and ``top_logp``.
    Raises: NumericError for a value outside its range.
    """

    divergence: Divergence
    low: float
    high: float
    cap: float = 1e4
    inputs: tuple[str, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if not value >= 0:
                raise NumericError(f"{name}: got {quote(value)}, expected a divergence threshold >= 0")
        if not self.cap > 0:
            raise NumericError(f"cap: got {quote(self.cap)}, expected an upper bound > 0 of the weight")
        inner = self.divergence.divergence if isinstance(self.divergence, Averaged) else self.divergence
        top = ("top_behaviour", "top_logp") if inner in (top_k_tv, top_k_kl) else ()
        object.__setattr__(self, "inputs", ("logp_behaviour", *top))

    def __call__(self, ratio: Ratio, advantage: Tensor, current: Current, rollouts: Rollouts) -> Trust:
        moved = current.logp - behaviour(rollouts)
        distance = self.divergence(current, rollouts)
        drop = torch.where(
            advantage > 0, (moved > 0) & (distance > self.high), (moved < 0) & (distance > self.low)
        )
        weight = weight_of(ratio.log_weight).clamp(max=self.cap)
        keep = ~drop
        return Trust(keep, weight, -advantage * torch.where(keep, weight, 0.0) * current.logp)


def top_k_with_sampled(logits: Tensor, sampled: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most likely tokens, the sampled one always among them, exactly once.

    Args:
        logits: (..., V), any floating type; the softmax is taken in float32 at least.
        sampled: (...) token ids.
        k: 1 to V.

    Returns:
        Token ids (..., k) and their log-probabilities (..., k). If the sampled token is not among the k most
        likely it takes the last place.

    Raises: NumericError for another k or a token id outside the vocabulary, ShapeError for another shape.

    >>> ids, logp = top_k_with_sampled(torch.tensor([[0.0, 3.0, 2.0, 1.0]]), torch.tensor([0]), 2)
    >>> ids
    tensor([[1, 0]])
    """
    if not 1 <= k <= logits.shape[-1]:
        raise NumericError(f"top_k: got {quote(k)}, expected 1 to the vocabulary size {logits.shape[-1]}")
    if sampled.shape != logits.shape[:-1]:
        raise ShapeError(f"sampled: got shape {tuple(sampled.shape)}, expected {tuple(logits.shape[:-1])}")
    outside = sampled[(sampled < 0) | (sampled >= logits.shape[-1])]
    if len(outside):
        raise NumericError(
            f"sampled: got {int(outside[0])}, expected token ids 0 to {logits.shape[-1] - 1}; give "
            "padding any id of the vocabulary"
        )
    ids = logits.topk(k, dim=-1).indices
    absent = (ids != sampled[..., None]).all(-1)
    ids[..., -1] = torch.where(absent, sampled, ids[..., -1])
    return ids, log_probabilities(logits, ids)


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-softmax of ``logits`` (..., V) at the tokens ``ids`` (..., k), in float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
