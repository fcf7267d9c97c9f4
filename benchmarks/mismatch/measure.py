"""What a sampler's log-probabilities differ from the trainer's, and what corrections make of the gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kalman_rl.objectives.correction import CORRECTIONS
from kalman_rl.objectives.ratio.token_noise import calibrate
from kalman_rl.objectives.rollouts import Rollouts

PROBABILITIES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)
POSITIONS = (0, 4, 8, 16, 32, 48)


@dataclass(frozen=True)
class Sampled:
    """Completions of a sampler with both policies' log-probabilities.

    ``prompts`` and ``tokens``: lists of token ids. ``logp_sampler``, ``logp_trainer`` (B, T) nats; ``mask`` (B, T).
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    logp_sampler: Tensor
    logp_trainer: Tensor
    mask: Tensor

    @property
    def gap(self) -> Tensor:
        """``log p_trainer - log p_sampler`` (B, T), float64; 0 outside the mask."""
        return torch.where(self.mask, self.logp_trainer.double() - self.logp_sampler.double(), 0.0)


def completion_logp(
    model: Any, prompts: list[list[int]], tokens: list[list[int]], rows: int = 16
) -> Iterator[tuple[slice, Tensor]]:
    """Log-probabilities (rows, T) of the completions under ``model``, a batch at a time, and which rows they are of.

    What stands behind a completion's end is finite and means nothing.
    """
    width = torch.arange(max(map(len, tokens)))
    for start in range(0, len(tokens), rows):
        part = slice(start, start + rows)
        whole = [p + t for p, t in zip(prompts[part], tokens[part], strict=True)]
        longest = max(map(len, whole))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in whole])
        attention = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in whole])
        logits = model(ids, attention_mask=attention).logits[:, :-1].float()
        logp = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        place = torch.tensor([len(row) - 1 for row in prompts[part]])[:, None] + width
        yield part, logp.gather(1, place.clamp(max=longest - 2))


def trainer_logp(model: Any, prompts: list[list[int]], tokens: list[list[int]]) -> Tensor:
    """(B, T) log-probabilities of the completions under ``model``, without gradient."""
    with torch.no_grad():
        return torch.cat([logp for _, logp in completion_logp(model, prompts, tokens)])


def by_bin(values: Tensor, of: Tensor, edges: tuple[float, ...]) -> list[dict[str, float]]:
    """Number, mean size, root mean square and mean of ``values`` where ``of`` lies between neighbouring ``edges``."""
    rows = []
    for low, high in itertools.pairwise(edges):
        inside = values[(of > low) & (of <= high)]
        if len(inside):
            rows.append(
                {
                    "low": low,
                    "high": high,
                    "tokens": len(inside),
                    "size": inside.abs().mean().item(),
                    "rms": inside.square().mean().sqrt().item(),
                    "mean": inside.mean().item(),
                }
            )
    return rows


def gaps(sampled: Sampled) -> dict[str, Any]:
    """The gap as a whole, by the trainer's probability, by position, and summed over sequences."""
    gap, mask = sampled.gap, sampled.mask
    probability = sampled.logp_trainer.double().exp()[mask]
    position = torch.arange(mask.shape[1]).expand_as(mask)[mask].double()
    sums, lengths = gap.sum(1), mask.sum(1)
    return {
        "tokens": int(mask.sum()),
        "size": gap[mask].abs().mean().item(),
        "largest": gap[mask].abs().max().item(),
        "sequence_rms": sums.square().mean().sqrt().item(),
        "sequence_rms_if_independent": gap.square().sum(1).mean().sqrt().item(),
        "mean_length": lengths.double().mean().item(),
        "token_ess": ess(gap[mask]),
        "sequence_ess": ess(sums),
        "by_probability": by_bin(gap[mask], probability, PROBABILITIES),
        "by_position": by_bin(gap[mask], position + 1, (*POSITIONS, float(mask.shape[1]))),
    }


def ess(log_weight: Tensor) -> float:
    """Effective share of samples, ``(sum w)^2 / (n sum w^2)``, of weights ``exp(log_weight)``."""
    weight = (log_weight - log_weight.max()).exp()
    return (weight.sum().square() / weight.square().sum() / len(weight)).item()


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "(1 - p)^2": lambda p: (1 - p).square(),
    "(1 - p)": lambda p: 1 - p,
    "p (1 - p)": lambda p: p * (1 - p),
    "-log p": lambda p: -p.log(),
}
"""Candidates f for the variance ``floor + scale f(p)`` of a token's gap."""


def noise_models(sampled: Sampled) -> dict[str, Any]:
    """Each shape fitted on even sequences (least negative log-likelihood on a grid of floor / scale), and its mean
    negative log-likelihood in nats per token on odd ones. ``calibrate`` is the package's own fit of ``(1 - p)^2``."""
    even = torch.zeros_like(sampled.mask)
    even[::2] = True
    gap, p = sampled.gap, sampled.logp_trainer.double().exp().clamp(min=1e-12)
    fit, test = sampled.mask & even, sampled.mask & ~even
    found: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        best = (math.inf, 0.0, 0.0)
        for ratio in torch.logspace(-8, 4, 61, dtype=torch.float64).tolist():
            form = ratio + shape(p[fit])
            scale = (gap[fit].square() / form).mean()
            cost = 0.5 * ((scale * form).log().mean() + 1).item()
            best = min(best, (cost, (scale * ratio).item(), scale.item()))
        variance = best[1] + best[2] * shape(p[test])
        cost = 0.5 * (variance.log() + gap[test].square() / variance).mean().item()
        found[name] = {"floor": best[1], "scale": best[2], "held_out": cost}
    model = calibrate(gap, sampled.logp_trainer.double(), fit)
    found["calibrate"] = {"floor": model.floor, "scale": model.scale}
    z = (gap / (model.floor + model.scale * (1 - p).square()).sqrt())[test]
    found["calibrated_z"] = by_bin(z, p[test], PROBABILITIES)
    return found


WEIGHTS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "none": None,
    "truncated 2, token": ("truncated", {"cap": 2.0}),
    "masked 0.5 to 2, token": ("masked", {"low": 0.5, "high": 2.0}),
    "truncated 2, sequence": ("truncated", {"cap": 2.0, "level": "sequence"}),
    "masked 0.5 to 2, sequence": ("masked", {"low": 0.5, "high": 2.0, "level": "sequence"}),
    "masked 0.999 to 1.001, geometric": ("masked", {"low": 0.999, "high": 1.001, "level": "geometric"}),
}


def weights(sampled: Sampled) -> dict[str, Tensor]:
    """The factor (B, T) of each correction, and the exact one of the whole sequence, ``reference``."""
    rollouts = Rollouts(logp_old=sampled.logp_trainer, mask=sampled.mask, logp_behaviour=sampled.logp_sampler)
    found = {
        name: torch.ones_like(sampled.logp_trainer)
        if part is None
        else CORRECTIONS[part[0]](**part[1])(rollouts).float()
        for name, part in WEIGHTS.items()
    }
    found["reference"] = sampled.gap.sum(1, keepdim=True).exp().float().expand_as(sampled.mask)
    return found


def gradients(
    model: Any, sampled: Sampled, advantage: Tensor, factors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """``sum_i A_i sum_t w_it grad log p(token)`` for each factor w, over the parameters of ``model`` that want one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = {name: torch.zeros(sum(p.numel() for p in parameters)) for name in factors}
    for part, logp in completion_logp(model, sampled.prompts, sampled.tokens):
        for name, factor in factors.items():
            coefficient = torch.where(sampled.mask[part], factor[part] * advantage[part, None], 0.0)
            got = torch.autograd.grad((coefficient * logp).sum(), parameters, retain_graph=True)
            total[name] += torch.cat([g.flatten() for g in got])
    return total
