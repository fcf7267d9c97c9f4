"""Metrics of the loss between two lines of the log: sums over tokens, micro-batches, ranks and optimizer steps, divided
once. TRL averages the averages of micro-batches, which lets an empty one count as much as a full one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kalman_rl.objectives.diagnostics import joined, metric, sample_sizes, sums_of
from kalman_rl.objectives.loss import Loss, Method, Tokens
from kalman_rl.objectives.ratio import sequence_mean
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.objectives.trust.clip import Cap, GeometricClip, weight_of
from kalman_rl.objectives.trust.gamma import Gamma


class Tally:
    """Sums (4,) by name, as in :mod:`kalman_rl.objectives.diagnostics`.

    Args:
        gather: a tensor (n, 4) of this rank to those of all ranks, one after another.
    """

    def __init__(self, gather: Callable[[Tensor], Tensor]) -> None:
        self.gather = gather
        self.own: list[Mapping[str, Tensor]] = []
        self.all: list[Mapping[str, Tensor]] = []

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Note one micro-batch of this rank. No rank waits for another."""
        self.own.append(sums)

    def share(self) -> dict[str, float]:
        """Take in what every rank has noted, and return its metrics; all ranks call this together, with the same names.

        A metric that is not finite is kept from those of other steps, as TRL keeps NaN.
        """
        own = together(self.own)
        everyone = self.gather(torch.stack(list(own.values())))
        sums = dict(zip(own, joined(everyone.reshape(-1, len(own), 4)).unbind(), strict=True))
        found = read(sums)
        self.all.append({name: sums[name] for name, value in found.items() if math.isfinite(value)})
        self.own = []
        return found

    def end(self) -> dict[str, float]:
        """The metrics of all that was shared; the tally starts anew."""
        found = read(together(self.all))
        self.all = []
        return found


def read(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics from their sums, without those that no token stands behind."""
    if not sums:
        return {}
    values = torch.stack([metric(name, value) for name, value in sums.items()])
    counts = torch.stack([value[0] for value in sums.values()])
    both = torch.stack([values, counts]).tolist()
    return {name: value for name, value, count in zip(sums, *both) if count > 0}


def together(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sums of several parts, by name."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: joined(torch.stack([part[name] for part in parts if name in part])) for name in names}


def sums_behind(
    method: Method,
    loss: Loss,
    advantage: Tensor,
    rollouts: Rollouts,
    share: int,
    more: Mapping[str, Tensor | None],
    aux_loss: Tensor | None = None,
) -> dict[str, Tensor]:
    """Sums (4,) behind every metric of one micro-batch.

    Args:
        method: with the bounds of this step.
        advantage: (B,) or (B, T), as TRL compares its sign. rollouts: of the micro-batch.
        share: micro-batches in an optimizer step; the surrogate is a part of the step's sum.
        more: values per token (B, T) by name.
        aux_loss: the router's, a number for the micro-batch.
    """
    mask = rollouts.mask
    found = {name: sums_of(values.detach(), mask) for name, values in more.items() if values is not None}
    sizes = sample_sizes(loss.tokens.log_ratio, loss.tokens.coefficient, rollouts)
    found = loss.sums | sizes | found | clip_ratios(method, loss.tokens, advantage, mask)
    for name in ("objective/surrogate", "objective/penalty"):
        if name in loss.metrics:
            found[name] = counted(loss.metrics[name], 1 / share)
    tokens = mask.sum()
    found["objective/fused"] = counted(loss.metrics["objective/fused"] * tokens, tokens)
    if aux_loss is not None:
        found["aux_loss"] = counted(aux_loss.detach(), 1.0)
    return found


def counted(total: Tensor, count: Tensor | float) -> Tensor:
    """Sums (4,) of a number that is a total already, and of how much it stands for."""
    return torch.stack([torch.as_tensor(x, device=total.device).double() for x in (count, total, 0.0, 0.0)])


def clip_ratios(method: Method, tokens: Tokens, advantage: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Sums (4,) behind TRL's ``clip_ratio/*``, ``cispo_clip_ratio`` and ``vespo/phi_seq_mean``, as its
    ``_compute_loss`` defines them.

        low:  w < 1 - epsilon      and A < 0          high:  w > 1 + epsilon_high  and A > 0

    Means are over tokens, or over sequences where the ratio is the sequence's; ``low_min`` and ``high_max`` are of the
    shares in a sequence. A trust region without such a band has ``region_mean`` alone: the share of dropped tokens.

    Args:
        method: with the bounds of this step.
        tokens: of the loss. advantage: (B,) or (B, T). mask: (B, T).
    """
    advantage = advantage[:, None] if advantage.dim() == 1 else advantage
    weight, dropped = weight_of(tokens.log_weight), mask & ~tokens.kept
    bounds = getattr(method.trust, "bounds", None)
    length = mask.sum(dim=1)
    filled, region = length > 0, {"clip_ratio/region_mean": sums_of(dropped, mask)}
    if isinstance(method.trust, Cap):
        beyond = mask & (weight > method.trust.high) & (advantage > 0)
        return region | {"cispo_clip_ratio": mean_of(method, beyond, mask)}
    if isinstance(method.trust, Gamma):
        phi = method.trust.phi(
            tokens.log_weight, advantage, lambda x: torch.where(mask, x, 0.0).sum(1, keepdim=True)
        )
        whole = torch.where(mask, phi, 0.0).sum(dim=1) / length.clamp(min=1)
        return region | {"vespo/phi_seq_mean": sums_of(whole, filled)}
    if bounds is not None:
        low, high = (weight < bounds["low"]) & (advantage < 0), (weight > bounds["high"]) & (advantage > 0)
    elif isinstance(method.trust, GeometricClip):
        low, high = dropped & (advantage < 0), dropped & (advantage > 0)
    else:
        return region
    low, high = low & mask, high & mask
    shares = {name: x.sum(dim=1) / length.clamp(min=1) for name, x in (("low", low), ("high", high))}
    means = {"low": low, "high": high, "region": low | high}
    found = {f"clip_ratio/{name}_mean": mean_of(method, x, mask) for name, x in means.items()}
    return found | {
        "clip_ratio/low_min": sums_of(-shares["low"], filled),
        "clip_ratio/high_max": sums_of(shares["high"], filled),
    }


def mean_of(method: Method, hit: Tensor, mask: Tensor) -> Tensor:
    """Sums (4,) behind the share of tokens (B, T) that are hit, or of sequences where the ratio is the sequence's."""
    if method.ratio is sequence_mean:
        return sums_of(hit.any(dim=1), mask.any(dim=1))
    return sums_of(hit, mask)
