"""Rollouts: the one batch type that every objective reads, built once and checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError

_OPTIONAL = "reward group logp_behaviour logp_reference top_behaviour sum_pi_squared lag segment".split()


@dataclass(frozen=True)
class Rollouts:
    """A batch of sampled completions and what was known about them before the update.

    Args:
        logp_old: (B, T) log-probabilities (nats) of the sampled tokens under the old policy, the
            policy at the start of the update. Stored in float32 at least, because a ratio such as
            ``exp(3e-4)`` is exactly 1 in bfloat16; positions outside the mask are stored as 0.
        mask: (B, T) bool or {0, 1}; True = token written by the model and trained. May have holes
            (tool output in the middle of a turn) and padding on either side. None = all tokens.
        reward: (B,) one number per completion; NaN = missing (not zero).
        group: (B,) integers; completions of the same prompt share a number.
        prompt_id: B stable prompt names, for beliefs that live longer than the batch.
        logp_behaviour: (B, T) log-probabilities under the behaviour policy (an inference engine may differ
            from the trainer), or None if the behaviour policy is the old policy.
        logp_reference: (B, T) log-probabilities under the reference policy, for penalties.
        top_behaviour: (B, T, k) log-probabilities under the behaviour policy of k different tokens, the sampled one
            among them (:func:`kalman_rl.objectives.trust.top_k_with_sampled`), for top-k trust regions.
        sum_pi_squared: (B, T) ``sum_v pi_old(v)^2`` at each position, for the optimal token baseline.
        lag: (B, T) optimizer steps >= 0 from the behaviour policy to the current one, for ratios that look at it.
        segment: (B, T) integers for packed rows: a change of value along T starts a new sequence.
        allow_empty: accept rows without any trained token; they contribute nothing.

    Raises:
        ShapeError: a tensor does not match (B, T) or (B,), or a row has no trained token.
        NumericError: a log-probability at a trained position is NaN or infinite.

    Gradient: none; every tensor is detached.

    >>> r = Rollouts(logp_old=torch.tensor([[-1.0, -2.0]]), mask=torch.tensor([[1, 0]]))
    >>> r.logp_old
    tensor([[-1.,  0.]])
    """

    logp_old: Tensor
    mask: Tensor = None  # type: ignore[assignment]  # a tensor once it is checked
    reward: Tensor | None = None
    group: Tensor | None = None
    prompt_id: Sequence[str] | None = None
    logp_behaviour: Tensor | None = None
    logp_reference: Tensor | None = None
    top_behaviour: Tensor | None = None
    sum_pi_squared: Tensor | None = None
    lag: Tensor | None = None
    segment: Tensor | None = None
    allow_empty: bool = False

    def __post_init__(self) -> None:
        if self.mask is None and isinstance(self.logp_old, Tensor):
            self._store("mask", torch.ones_like(self.logp_old, dtype=torch.bool))
        for name in ("logp_old", "mask", *_OPTIONAL):
            value = getattr(self, name)
            if not (isinstance(value, Tensor) or (value is None and name in _OPTIONAL)):
                raise ShapeError(f"{name}: got {type(value).__name__}, expected a tensor")
        if self.logp_old.dim() != 2 or self.logp_old.shape[1] == 0:
            raise ShapeError(
                f"logp_old: got shape {tuple(self.logp_old.shape)}, expected (B, T) with T >= 1: one row per "
                "completion (or per packed row), one column per token"
            )
        shape = self.logp_old.shape
        mask = _as_mask(self.mask, shape)
        empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
        if empty and not self.allow_empty:
            raise ShapeError(
                f"mask: row {empty[0]} has no trained token ({len(empty)} such rows), expected at least one; "
                "drop the row, or pass allow_empty=True"
            )
        self._store("mask", mask)
        for name in ("logp_old", "logp_behaviour", "logp_reference"):
            value = getattr(self, name)
            if value is not None:
                self._store(name, masked_logp(name, value.detach(), mask))
        if self.top_behaviour is not None:
            self._store("top_behaviour", checked_top("top_behaviour", self.top_behaviour, mask))
        if self.sum_pi_squared is not None:
            self._store("sum_pi_squared", _checked_sum_pi_squared(self.sum_pi_squared, mask))
        if self.lag is not None:
            self._store("lag", _checked_lag(self.lag, mask))
        for name in ("reward", "group"):
            value = getattr(self, name)
            if value is not None and value.shape != shape[:1]:
                raise ShapeError(
                    f"{name}: got shape {tuple(value.shape)}, expected ({shape[0]},): one per completion"
                )
        if self.reward is not None:
            self._store("reward", self.reward.detach())
        if self.segment is not None and self.segment.shape != shape:
            raise ShapeError(f"segment: got shape {tuple(self.segment.shape)}, expected {tuple(shape)}")
        if self.prompt_id is not None and len(self.prompt_id) != shape[0]:
            raise ShapeError(f"prompt_id: got {len(self.prompt_id)} names, expected {shape[0]}")

    def _store(self, name: str, value: Tensor) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everybody else

    @property
    def sequence_index(self) -> Tensor:
        """(B, T) number of the sequence each position belongs to: the row, or the segment in packed rows."""
        rows = torch.arange(len(self.mask), device=self.mask.device)[:, None].expand_as(self.mask)
        if self.segment is None:
            return rows
        starts = torch.ones_like(self.mask)
        starts[:, 1:] = self.segment[:, 1:] != self.segment[:, :-1]
        return starts.flatten().cumsum(0).reshape(self.mask.shape) - 1

    def per_sequence_sum(self, values: Tensor) -> Tensor:
        """Sum (B, T) values over the trained tokens of each sequence, repeated at all its positions."""
        values = torch.where(self.mask, values, 0.0)
        if self.segment is None:
            return values.sum(dim=1, keepdim=True).expand_as(values)
        index = self.sequence_index.flatten()
        total = values.new_zeros(values.numel()).index_add_(0, index, values.flatten())
        return total[index].reshape(values.shape)

    def by_sequence(self, values: Tensor) -> Tensor:
        """Sums (S,) of values (B, T), 0 outside the mask, over each sequence; S may count empty ones."""
        if self.segment is None:
            return values.sum(dim=1)
        return values.new_zeros(values.numel()).index_add_(0, self.sequence_index.flatten(), values.flatten())

    @property
    def lengths(self) -> Tensor:
        """(B, T) number of trained tokens of the sequence each position belongs to."""
        return self.per_sequence_sum(self.mask.to(self.logp_old.dtype))

    @property
    def length(self) -> Tensor:
        """(B,) number of trained tokens of each row."""
        return self.mask.sum(dim=1)

    @property
    def score_norm_squared(self) -> Tensor | None:
        """(B, T) squared norm of each token's score by the logits, ``1 - 2 pi_old(y) + sum_v pi_old(v)^2``;
        0 outside the mask, None without ``sum_pi_squared``."""
        if self.sum_pi_squared is None:
            return None
        return torch.where(self.mask, score_norm_squared(self.logp_old, self.sum_pi_squared), 0.0)

    @property
    def sequence_count(self) -> int:
        """Number of sequences with at least one trained token."""
        return int(torch.unique(self.sequence_index[self.mask]).numel())


class LastLayerStep(NamedTuple):
    """What one optimizer step from each token alone would do in the last layer, (B, T) each: ``alignment``
    ``v'u`` and ``curvature`` ``u'Fu``; see :func:`kalman_rl.objectives.trust.last_layer_step`."""

    alignment: Tensor
    curvature: Tensor
    learning_rate: float


class Current(NamedTuple):
    """The current policy on a batch. ``logp`` (B, T) carries the gradient; the rest is for trust regions that
    ask for it: ``top_logp`` (B, T, k), its log-probabilities of the tokens behind ``Rollouts.top_behaviour``,
    and the ``step`` that each token alone would cause."""

    logp: Tensor
    top_logp: Tensor | None = None
    step: LastLayerStep | None = None


def score_norm_squared(logp: Tensor, sum_pi_squared: Tensor) -> Tensor:
    """``1 - 2 p + sum_v p_v^2``, the squared norm of ``onehot(y) - p``, for the sampled token's ``logp``.

    Taken as ``(1 - p)^2`` plus the other tokens' squares, which lie between 0 and ``(1 - p)^2``: never
    negative, and right within a factor of two where the plain sum is all rounding.

    >>> score_norm_squared(torch.tensor([0.5]).log(), torch.tensor([0.375]))  # p = 1/2, 1/4, 1/4
    tensor([0.3750])
    """
    logp = logp.clamp(max=0.0)
    rest = torch.expm1(logp).square()
    others = sum_pi_squared - (2 * logp).exp()
    return rest + torch.minimum(others.clamp(min=0.0), rest)


def masked_logp(name: str, logp: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities as :func:`masked_finite` values."""
    return masked_finite(
        name,
        logp,
        mask,
        "finite log-probabilities where the mask is True; mask the token out, or look for a token that the "
        "policy gives probability 0",
    )


def masked_finite(name: str, values: Tensor, mask: Tensor, expected: str) -> Tensor:
    """Values (B, T) in float32 at least, with 0 outside the mask, refusing NaN and infinity inside it.

    The fill is a ``where``, not a product: ``0 * nan`` is nan, and so is its gradient.
    Gradient: flows through ``values`` at trained positions only.
    """
    if values.shape != mask.shape:
        raise ShapeError(
            f"{name}: got shape {tuple(values.shape)}, expected {tuple(mask.shape)} like the mask"
        )
    values = values if values.dtype == torch.float64 else values.float()
    inside = torch.where(mask, values, 0.0)
    if (
        inside.detach().sum().isfinite()
    ):  # nothing bad adds up to a finite number, and this is five times as fast
        return inside
    bad = ~torch.isfinite(inside)
    if bad.any():
        row, token = bad.nonzero()[0].tolist()
        raise NumericError(
            f"{name}: got {values[row, token].item()} at row {row}, token {token} "
            f"({int(bad.sum())} such tokens), expected {expected}"
        )
    return inside


def checked_top(name: str, top: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities (B, T, k) of several tokens per position, detached, in float32 at least, 0 outside
    the mask. ``-inf`` is allowed (probability 0); NaN, positive values and sums above 1 are refused."""
    if top.dim() != 3 or top.shape[:2] != mask.shape or top.shape[2] == 0:
        raise ShapeError(f"{name}: got shape {tuple(top.shape)}, expected {(*mask.shape, 'k')} with k >= 1")
    top = top.detach()
    top = torch.where(mask[..., None], top if top.dtype == torch.float64 else top.float(), 0.0)
    bad = mask & ~(top.exp().sum(-1) <= 1 + 1e-4)
    if bad.any():
        row, token = bad.nonzero()[0].tolist()
        raise NumericError(
            f"{name}: got probabilities {top[row, token].exp().tolist()} at row {row}, token {token}, "
            "expected k different tokens whose probabilities sum to at most 1; list no token twice"
        )
    return top


def prepared(rollouts: Rollouts, logp: Tensor | Current, advantage: Tensor) -> tuple[Tensor, Current, Tensor]:
    """Checked ``logp`` (with gradient), the current policy without gradient, advantages (B, T), 0 outside the mask.

    Args: logp: (B, T), or with what a trust region asks for. advantage: (B,) or (B, T).
    Raises: ShapeError, NumericError for bad shapes, or NaN and infinity at trained positions.
    """
    current = logp if isinstance(logp, Current) else Current(logp)
    logp = masked_logp("logp", current.logp, rollouts.mask)
    top = current.top_logp
    if top is not None:
        top = checked_top("top_logp", top, rollouts.mask)
    shape = rollouts.mask.shape
    if advantage.shape == shape[:1]:
        advantage = advantage[:, None].expand(shape)
    if advantage.shape != shape:
        raise ShapeError(
            f"advantage: got shape {tuple(advantage.shape)}, expected ({shape[0]},) or {tuple(shape)}"
        )
    advantage = masked_finite(
        "advantage",
        advantage.detach(),
        rollouts.mask,
        "finite numbers where the mask is True; 0 skips a token",
    )
    return logp, Current(logp.detach(), top, current.step), advantage.to(logp.dtype)


def _checked_sum_pi_squared(sum_pi_squared: Tensor, mask: Tensor) -> Tensor:
    """Sums of squared probabilities as :func:`masked_finite` values, refusing what is outside [0, 1]."""
    expected = "a sum of squared probabilities, 0 to 1, where the mask is True"
    values = masked_finite("sum_pi_squared", sum_pi_squared.detach(), mask, expected)
    bad = (values < 0) | (values > 1 + 1e-3)  # rounding may end a little above 1
    if bad.any():
        row, token = bad.nonzero()[0].tolist()
        got = f"{values[row, token].item()} at row {row}, token {token} ({int(bad.sum())} such tokens)"
        raise NumericError(f"sum_pi_squared: got {got}, expected {expected}")
    return values


def _checked_lag(lag: Tensor, mask: Tensor) -> Tensor:
    """Lags as :func:`masked_finite` values, refusing negative ones."""
    expected = "optimizer steps >= 0 since the token was sampled, where the mask is True"
    values = masked_finite("lag", lag.detach(), mask, expected)
    if (values < 0).any():
        row, token = (values < 0).nonzero()[0].tolist()
        raise NumericError(
            f"lag: got {values[row, token].item()} at row {row}, token {token}, expected {expected}"
        )
    return values


def _as_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    if mask.shape != shape:
        raise ShapeError(f"mask: got shape {tuple(mask.shape)}, expected {tuple(shape)} like logp_old")
    if mask.dtype == torch.bool:
        return mask
    if not ((mask == 0) | (mask == 1)).all():
        raise ShapeError("mask: got values other than 0 and 1, expected a bool tensor or zeros and ones")
    return mask.bool()
