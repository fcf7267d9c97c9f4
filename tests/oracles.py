"""Plain restatements that the tests compare with, and builders of awkward batches."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kalman_rl import ratio
from kalman_rl.advantage import ConstantBaseline
from kalman_rl.aggregate import SequenceSum, Totals, token_mean
from kalman_rl.methods import METHODS, make_method
from kalman_rl.objective import Loss, Method, policy_loss
from kalman_rl.penalty import KL, k2
from kalman_rl.rollouts import Rollouts
from kalman_rl.trust import Cap, Clip

TABLE: dict[str, Method] = {name: make_method(name) for name in METHODS}
"""Every method of the package with its defaults."""

CASES: dict[str, Method] = TABLE | {
    # Options that switch other branches on, and bounds loose enough that some tokens pass and some do not.
    "grpo+dual": make_method("grpo", dual=1.5),
    "gspo+wide": make_method("gspo", low=0.05, high=0.05),
    "cispo+two-sided": make_method("cispo", high=1.28, low=0.8),
    "kpo+open": make_method("kpo", process_noise=0.3, low=0.1, high=0.15),
    "kpo+token-mean": dataclasses.replace(make_method("kpo", process_noise=0.01), aggregate=token_mean),
    "kpo_unclipped+sum": dataclasses.replace(make_method("kpo_unclipped"), aggregate=SequenceSum(7.0)),
    "kpo_diffuse+still": make_method("kpo_diffuse", process_noise=0.0),
    "grpo+kl": dataclasses.replace(make_method("grpo"), penalty=KL(0.1)),
    "gspo+kl2": dataclasses.replace(make_method("gspo"), penalty=KL(0.1, k2)),
}
"""``TABLE`` and a few compositions of the same parts."""


@dataclass
class Batch:
    """The pieces of a batch before they become :class:`Rollouts`."""

    logp_old: Tensor
    logp: Tensor
    mask: Tensor
    reward: Tensor
    group: Tensor
    reference: Tensor
    segment: Tensor | None = None

    def rollouts(self, **changes: Any) -> Rollouts:
        values = {
            "logp_old": self.logp_old,
            "mask": self.mask,
            "reward": self.reward,
            "group": self.group,
            "logp_reference": self.reference,
            "segment": self.segment,
        }
        return Rollouts(**(values | changes))

    def rows(self, index: Tensor) -> Batch:
        return self.each(lambda value: value[index])

    def tokens(self, change: Any) -> Batch:
        """Apply ``change(tensor, fill)`` to the (B, T) fields; ``fill`` is poison where nothing may look."""
        nan = math.nan
        fields = {"logp_old": nan, "logp": nan, "mask": False, "reference": nan}
        return dataclasses.replace(self, **{f: change(getattr(self, f), fill) for f, fill in fields.items()})

    def each(self, change: Any) -> Batch:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{name: None if v is None else change(v) for name, v in values.items()})


def make_batch(
    seed: int, rows: int = 6, length: int = 9, *, scale: float = 0.3, holes: bool = True, groups: int = 2
) -> Batch:
    """A random float64 batch: ragged rows, holes, padding at both ends, at least one token a row."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.ones(rows, length, dtype=torch.bool)
    if holes:
        mask = torch.rand(rows, length, generator=g) < 0.7
        mask[torch.arange(rows), torch.randint(length, (rows,), generator=g)] = True
    old = -normal(rows, length).abs() - 0.1
    group = torch.arange(rows) % groups
    return Batch(
        logp_old=old,
        logp=old + scale * normal(rows, length),
        mask=mask,
        reward=normal(rows),
        group=group[torch.randperm(rows, generator=g)],
        reference=old + scale * normal(rows, length),
    )


def run(method: Method, batch: Batch, *, options: dict[str, Any] | None = None, **kw: Any) -> Outcome:
    """Loss and gradient of a method on a batch; ``options`` go to Rollouts, the rest to ``policy_loss``."""
    logp = batch.logp.clone().requires_grad_()
    rollouts = batch.rollouts(**(options or {}))
    loss = policy_loss(method, rollouts, logp, **kw)
    loss.value.backward()
    assert logp.grad is not None
    return Outcome(loss, logp.grad, rollouts)


@dataclass
class Outcome:
    loss: Loss
    gradient: Tensor
    rollouts: Rollouts

    @property
    def value(self) -> Tensor:
        return self.loss.value.detach()

    @property
    def metrics(self) -> dict[str, float]:
        return {name: value.item() for name, value in self.loss.metrics.items()}


def advantage_of(method: Method, batch: Batch) -> Tensor:
    return method.advantage(batch.reward, batch.group)


def uninformative_reward(method: Method) -> float:
    """The common reward that teaches this method nothing: any for a group baseline, else the baseline."""
    return method.advantage.value if isinstance(method.advantage, ConstantBaseline) else 0.35


def has_band(method: Method) -> bool:
    return isinstance(method.trust, Clip)


def has_cap(method: Method) -> bool:
    return isinstance(method.trust, Cap)


# ---- the literal losses, differentiated by autograd


def ppo_surrogate(
    logp: Tensor, old: Tensor, advantage: Tensor, low: float, high: float, dual: float | None
) -> Tensor:
    """(B, T) textbook PPO loss whose gradient is whatever autograd says."""
    ratio = torch.exp(logp - old)
    loss = torch.max(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - low, 1 + high))
    if dual is None:
        return loss
    return torch.where(advantage < 0, torch.min(loss, -advantage * dual), loss)


def gspo_loss(logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Scalar GSPO loss with one ratio per sequence, advantage (B,)."""
    losses = []
    for i in range(len(logp)):
        ratio = torch.exp((logp[i] - old[i])[mask[i]].mean())
        losses.append(torch.max(-advantage[i] * ratio, -advantage[i] * ratio.clamp(1 - low, 1 + high)))
    return torch.stack(losses).mean()


# ---- log-weights and metrics, one token at a time


def naive_log_weight(method: Method, batch: Batch) -> np.ndarray:
    """(B, T) log-weight of a method from its definition, 0 outside the mask."""
    mask = batch.mask.numpy()
    observed = np.where(mask, (batch.logp - batch.logp_old).numpy(), 0.0)
    if method.ratio is ratio.token:
        return observed
    if method.ratio is ratio.one:
        return np.zeros_like(observed)
    if method.ratio is ratio.sequence_mean:
        return np.where(mask, observed.sum(1, keepdims=True) / mask.sum(1, keepdims=True), 0.0)
    assert isinstance(method.ratio, ratio.KalmanFiltered), "give naive_log_weight the new transform"
    return np.stack([_naive_filter(method.ratio, *row) for row in zip(observed, mask)])


def _naive_filter(noise: ratio.KalmanFiltered, observed: np.ndarray, mask: np.ndarray) -> np.ndarray:
    out, x, p, started = np.zeros_like(observed), 0.0, noise.initial_variance, False
    for t in np.flatnonzero(mask)[0] + np.arange(len(mask)):
        if t > np.flatnonzero(mask)[-1]:
            break
        p = p + noise.process_noise  # time passes in holes, not in padding
        if mask[t]:
            gain = 1.0 if math.isinf(p) else p / (p + noise.observation_noise)
            x = x + gain * (observed[t] - x)
            p = noise.observation_noise * gain
            out[t], started = x, True
    assert started
    return out


def naive_metrics(method: Method, batch: Batch, advantage: Tensor) -> dict[str, float]:
    """The logged metrics from their definitions; advantage (B,)."""
    raw, used, weights, kept, low, high = [], [], [], [], [], []
    switches: dict[str, list[bool]] = {"raw": [], "used": []}
    mask = batch.mask.numpy()
    observed = (batch.logp - batch.logp_old).numpy()
    filtered = naive_log_weight(method, batch)
    for i in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if not mask[i, t]:
                continue
            s, a = float(filtered[i, t]), float(advantage[i])
            w = math.exp(min(s, 20.0))
            keep = True
            if isinstance(method.trust, Clip):
                band = 1 - method.trust.low, 1 + method.trust.high
                keep = not ((a > 0 and w > band[1]) or (a < 0 and w < band[0]))
                if method.trust.dual is not None and a < 0 and w > method.trust.dual:
                    keep = False
            if isinstance(method.trust, Cap):
                w = min(max(w, method.trust.low), method.trust.high)
            raw.append(float(observed[i, t]))
            used.append(s)
            weights.append(w)
            kept.append(keep)
            low.append(not keep and w < 1)
            high.append(not keep and w > 1)
            if t and mask[i, t - 1]:
                switches["raw"].append(observed[i, t] * observed[i, t - 1] < 0)
                switches["used"].append(filtered[i, t] * filtered[i, t - 1] < 0)
    w = np.array(weights)
    return {
        "ratio/raw_log_variance": float(np.var(raw)),
        "ratio/filtered_log_variance": float(np.var(used)),
        "ratio/effective_sample_size": float(w.sum() ** 2 / (len(w) * (w**2).sum())),
        "ratio/max_abs_log_ratio": float(np.abs(raw).max()),
        "ratio/capped": float(np.mean(np.array(used) > 20)),
        "ratio/raw_sign_switch": float(np.mean(switches["raw"] or [0.0])),
        "ratio/filtered_sign_switch": float(np.mean(switches["used"] or [0.0])),
        "ratio/noop": float(all(x == 0 for x in raw)),
        "trust/kept": float(np.mean(kept)),
        "trust/clipped_low": float(np.mean(low)),
        "trust/clipped_high": float(np.mean(high)),
        "policy/kl_old": float(np.mean([math.expm1(x) - x for x in raw])),
    }


__all__ = [
    "CASES",
    "TABLE",
    "Batch",
    "Outcome",
    "Totals",
    "advantage_of",
    "gspo_loss",
    "has_band",
    "has_cap",
    "make_batch",
    "naive_log_weight",
    "naive_metrics",
    "ppo_surrogate",
    "run",
    "uninformative_reward",
]
