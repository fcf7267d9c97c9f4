"""Many settings run side by side and weighted by how well each predicted: nobody tunes the process noise.

:class:`Evidence` keeps the log-likelihoods. :class:`LocalLevels` holds, for every prompt, a Kalman filter
for each process noise *and every* prior variance tau^2 at once, in five numbers per process noise:

    given the value V_0 at the first visit, the value now is N(a + b (V_0 - f_0), c);
    what the rewards said about V_0 - f_0 is a normal likelihood of precision l and natural mean e (= l
    times mean).

With V_0 - f_0 ~ N(0, tau^2 + s), s the variance of the first prediction f_0, both combine in closed form,
so tau^2 may be a grid, or change later, without another number stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.checks import expect, is_whole, saved

MEMORY = 0.997
"""Forgetting of the evidence per step."""


class Evidence:
    """Discounted log-likelihood of each setting, pooled over prompts.

    Args:
        log_likelihood: starting values of any shape, usually zeros.
        memory: factor per step of time.
    """

    def __init__(self, log_likelihood: Tensor, memory: float = MEMORY) -> None:
        self.log_likelihood, self.memory = log_likelihood, memory
        self.last_step: int | None = None

    @property
    def weights(self) -> Tensor:
        """Weights of all settings, summing to 1."""
        return torch.softmax(self.log_likelihood.flatten(), 0).reshape(self.log_likelihood.shape)

    def learn(self, gained: Tensor, step: int) -> None:
        """Add the log-likelihoods of a batch; an earlier step than the last adds without forgetting."""
        passed = 0 if self.last_step is None else max(step - self.last_step, 0)
        total = self.memory**passed * self.log_likelihood + gained
        self.log_likelihood = total - total.max()
        self.last_step = step if self.last_step is None else max(step, self.last_step)

    def state_dict(self) -> dict[str, Any]:
        """Log-likelihoods and the step they are of; :meth:`checked` reads them back."""
        return {"log_likelihood": self.log_likelihood.clone(), "last_step": self.last_step}

    def checked(self, state: Any) -> Evidence:
        """A new one from a saved state. Raises: ConfigError if it is of another shape."""
        found, step = saved("belief state", state, "log_likelihood", "last_step")
        shape = tuple(self.log_likelihood.shape)
        legal = is_finite(found, *shape)
        expect("belief state", "log_likelihood", legal, found, f"finite float64 of shape {shape}")
        expect("belief state", "last_step", step is None or is_whole(step), step, "a step or None")
        new = Evidence(found.clone(), self.memory)
        new.last_step = step
        return new


def is_finite(value: object, *shape: int) -> bool:
    """Whether a saved value is a float64 tensor without NaN and infinity, of a shape where one is given."""
    legal = isinstance(value, Tensor) and value.dtype == torch.float64 and bool(value.isfinite().all())
    return legal and (not shape or value.shape == shape)  # type: ignore[attr-defined]


class LocalLevels(NamedTuple):
    """Filters of u prompts for K process noises; fields (u, K), but ``s`` (u,). See the module docstring."""

    a: Tensor
    b: Tensor
    c: Tensor
    e: Tensor
    l: Tensor  # noqa: E741
    s: Tensor

    @staticmethod
    def start(mean: Tensor, variance: Tensor, settings: int) -> LocalLevels:
        """Prompts before their first visit: ``mean`` (u,) with variance ``variance + tau^2``."""
        zero = mean.new_zeros(len(mean), settings)
        return LocalLevels(mean[:, None] + zero, zero + 1, zero, zero, zero, variance)

    def moments(self, tau2: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (u, K, T) of the value now, for T prior variances tau^2 > 0."""
        precision = 1 / (tau2 + self.s[:, None, None]) + self.l[..., None]
        mean = self.a[..., None] + (self.b * self.e)[..., None] / precision
        return mean, self.c[..., None] + self.b.square()[..., None] / precision

    def shifted(self, by: Tensor) -> LocalLevels:
        """The values move by a known amount (u,)."""
        return self._replace(a=self.a + by[:, None])

    def diffused(self, process_noise: Tensor) -> LocalLevels:
        """Time passes: variance (u, K) is added."""
        return self._replace(c=self.c + process_noise)

    def observed(self, y: Tensor, noise: Tensor) -> LocalLevels:
        """Absorb a mean reward y (u,) of variance ``noise`` > 0 (u, K)."""
        total = self.c + noise
        keep = noise / total
        off = y[:, None] - self.a
        return LocalLevels(
            a=self.a + (self.c / total) * off,
            b=self.b * keep,
            c=self.c * keep,
            e=self.e + self.b * off / total,
            l=self.l + self.b.square() / total,
            s=self.s,
        )
