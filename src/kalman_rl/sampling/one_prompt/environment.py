"""Where completions and their rewards come from, one prompt at a time.

An environment is anything with two methods. Your own takes ten lines::

    class Dice:
        def features(self):                 # (F,) what is known about the prompt before sampling
            return torch.tensor([1.0, 0.0])

        def sample(self, k):                # k completions, one reward each; NaN = missing
            return torch.randint(0, 2, (k,)).float()

    k_taken, history = run_adaptive_sampling(Dice(), KalmanPreferenceTracker(dim=2), threshold=1.5)
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kalman_rl.checks import is_real, is_whole
from kalman_rl.errors import ConfigError, ShapeError, quote


@runtime_checkable
class PreferenceEnvironment(Protocol):
    """One prompt: its features, and rewards of new completions."""

    def features(self) -> Tensor:
        """(F,) finite floating features of the prompt, known before sampling and the same at every call."""
        ...

    def sample(self, k: int) -> Tensor:
        """Rewards (k,) of k new completions; NaN = missing. What it raises, the caller sees."""
        ...


class SimulatedPreferenceEnv:
    """A prompt whose truth is known: a completion succeeds with probability ``success``.

    ``reward = success or not (1 or 0) + noise * N(0, 1)``.

    Args:
        success: probability in [0, 1], the true value of the prompt.
        dim: F, number of features >= 1: a random direction of length 1 drawn from the seed, or
        features: (F,) your own features; then ``dim`` is their number.
        noise: standard deviation >= 0 of the scorer; 0 = rewards 0 and 1.
        missing: probability in [0, 1) that a reward is NaN.
        seed: of the own generator.

    Raises: ConfigError for a value out of range, ShapeError for features that are not (F,).

    >>> SimulatedPreferenceEnv(success=1.0, dim=4).sample(3)
    tensor([1., 1., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        success: float = 0.5,
        dim: int = 128,
        noise: float = 0.0,
        seed: int = 0,
        *,
        features: Tensor | None = None,
        missing: float = 0.0,
    ) -> None:
        if not (is_real(success) and 0 <= success <= 1):
            raise ConfigError(f"success: got {quote(success)}, expected a probability in [0, 1]")
        if not (is_real(noise) and 0 <= noise < math.inf):
            raise ConfigError(f"noise: got {quote(noise)}, expected a finite standard deviation >= 0")
        if not (is_real(missing) and 0 <= missing < 1):
            raise ConfigError(f"missing: got {quote(missing)}, expected a probability in [0, 1)")
        if not is_whole(dim, 1):
            raise ConfigError(f"dim: got {quote(dim)}, expected an integer >= 1")
        if not is_whole(seed, -(2**63), 2**64 - 1):
            raise ConfigError(f"seed: got {quote(seed)}, expected an integer of 64 bits")
        tensor = isinstance(features, Tensor)
        if features is not None and (not tensor or features.dim() != 1 or not len(features)):
            got = f"shape {tuple(features.shape)}" if tensor else type(features).__name__
            raise ShapeError(f"features: got {got}, expected a tensor (F,), F >= 1")
        self.success, self.noise, self.missing = success, noise, missing
        self.taken = 0
        self._generator = torch.Generator().manual_seed(seed)
        if features is None:
            features = torch.randn(dim, generator=self._generator, dtype=torch.float64)
            features = features / features.norm()
        self._features = features.detach().clone()

    def features(self) -> Tensor:
        """(F,) features, a copy."""
        return self._features.clone()

    def sample(self, k: int) -> Tensor:
        """Rewards (k,) float64 of k new completions, NaN = missing. Raises: ConfigError unless k >= 0."""
        if not is_whole(k):
            raise ConfigError(f"k: got {quote(k)}, expected a number of completions >= 0")
        uniform = torch.rand(2, k, generator=self._generator, dtype=torch.float64)
        noise = torch.randn(k, generator=self._generator, dtype=torch.float64)
        self.taken += k
        reward = (uniform[0] < self.success).double() + self.noise * noise
        return torch.where(uniform[1] < self.missing, math.nan, reward)
