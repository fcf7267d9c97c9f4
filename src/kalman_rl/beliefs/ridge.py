"""Ridge regression that forgets, and the standard form of features it is fed with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kalman_rl.beliefs.mixture import is_finite
from kalman_rl.checks import expect, is_real, is_whole, saved
from kalman_rl.errors import ConfigError, ShapeError, quote
from kalman_rl.numerics.hadamard import SRHT

PRIOR_PRECISION = 8.0
"""Of each coefficient, for features of mean squared length 1, over the variance of values over prompts."""
LEVEL_PRECISION = 4.0
"""Of the intercept, divided by the variance of rewards."""


class Features:
    """Features projected to at most ``dimension`` numbers, centred and scaled as in the first batch.

    Args:
        dimension: wider features are projected by an SRHT; narrower ones are taken as they are.
        seed: of the projection, >= 0.

    Raises: ConfigError for a dimension below 1 or a seed below 0.
    """

    def __init__(self, dimension: int, seed: int) -> None:
        if not is_whole(dimension, 1):
            raise ConfigError(f"dimension: got {quote(dimension)}, expected an integer >= 1")
        if not is_whole(seed):
            raise ConfigError(f"seed: got {quote(seed)}, expected an integer >= 0")
        self.dimension, self.seed = dimension, seed
        self.width: int | None = None  # of what comes in, once seen
        self.centre = torch.zeros(0, dtype=torch.float64)
        self.length = 1.0
        self._srht: SRHT | None = None
        self._last: tuple[Tensor, Tensor] | None = None  # an update asks for the same features several times

    def check(self, features: Tensor) -> Tensor:
        """The same features. Raises: ShapeError if their width is 0 or not that of the first batch."""
        if features.shape[1] < 1 or self.width not in (None, features.shape[1]):
            raise ShapeError(
                f"features: got width {features.shape[1]}, expected {self.width or 'at least 1'} as in the "
                "first batch"
            )
        return features

    def fit(self, features: Tensor | None) -> None:
        """Remember width, mean and length of the first features (u, F) seen; later ones change nothing."""
        if features is None or self.width is not None:
            return
        self.width = features.shape[1]
        if self.width > self.dimension:
            self._srht = SRHT(self.width, self.dimension, self.seed)
        projected = (self._srht(features) if self._srht else features).double()
        self.centre = projected.mean(0) if len(projected) > 1 else torch.zeros_like(projected[0])
        self.length = float((projected - self.centre).square().sum(1).mean().sqrt()) or 1.0

    def standard(self, features: Tensor | None, count: int) -> Tensor:
        """(u, 1 + d): an intercept, then features of length about 1; zeros where there are none."""
        one = torch.ones(count, 1, dtype=torch.float64)
        if features is None or self.width is None:
            return torch.cat((one, one.new_zeros(count, len(self.centre))), 1)
        if self._last is None or self._last[0] is not features:
            projected = (self._srht(features) if self._srht else features).double()
            self._last = features, torch.cat((one, (projected - self.centre) / self.length), 1)
        return self._last[1]

    def state_dict(self) -> dict[str, Any]:
        """Width, centre, length and projection; :meth:`checked` reads them back."""
        srht = self._srht.state_dict() if self._srht else None
        return {"width": self.width, "centre": self.centre.clone(), "length": self.length, "srht": srht}

    def checked(self, state: Any) -> Features:
        """A new one from a saved state. Raises: ConfigError or NumericError if it does not fit."""
        if not isinstance(state, dict) or set(state) != {"width", "centre", "length", "srht"}:
            raise ConfigError("belief state: got no features part, expected width, centre, length and srht")
        width, centre, length, srht = saved("belief state", state, "width", "centre", "length", "srht")
        expect("belief state", "width", width is None or is_whole(width, 1), width, "a width or None")
        size = 0 if width is None else min(width, self.dimension)
        expect("belief state", "centre", is_finite(centre, size), centre, f"{size} finite numbers")
        expect("belief state", "length", is_real(length) and 0 < length < math.inf, length, "a number > 0")
        wide = width is not None and width > self.dimension
        expect("belief state", "srht", (srht is not None) == wide, srht, "a projection of wide features only")
        new = Features(self.dimension, self.seed)
        new.width, new.centre, new.length = state["width"], state["centre"].clone(), float(state["length"])
        if state["srht"] is not None:
            new._srht = SRHT(state["width"], self.dimension, self.seed)
            new._srht.load_state_dict(state["srht"])
        return new


class Ridge:
    """``f(x) = x' theta`` from weighted rows whose weight fades by ``forgetting`` per step of time.

    ``theta = (D + J)^-1 h``, ``Sigma = (D + J)^-1``; ``J <- forgetting^gap J + sum w x x'``,
    ``h <- forgetting^gap h + sum w x y``. The prior precision D does not fade, so the system stays
    positive definite
    however long nothing is seen: recursive least squares with forgetting would wind up there.

    Args:
        forgetting: per step, in (0, 1].

    Raises: ConfigError outside the range.
    """

    def __init__(self, forgetting: float) -> None:
        if not (is_real(forgetting) and 0 < forgetting <= 1):
            raise ConfigError(f"forgetting: got {quote(forgetting)}, expected a factor in (0, 1] per step")
        self.forgetting = forgetting
        self.unit = 1.0  # variance of rewards
        self.spread = 0.1  # variance of values over prompts
        self.precision = torch.zeros(1, 1, dtype=torch.float64)
        self.target = torch.zeros(1, dtype=torch.float64)
        self.last_step: int | None = None

    def predict(self, x: Tensor, step: int | None) -> tuple[Tensor, Tensor]:
        """Mean ``x' theta`` and variance ``x' Sigma x`` (u,) at a step; None = as of the last update."""
        fade = self._fade(step)
        precision, target = self._grown(x.shape[1])
        prior = torch.full((x.shape[1],), PRIOR_PRECISION / self.spread, dtype=torch.float64)
        prior[0] = LEVEL_PRECISION / self.unit
        root = torch.linalg.cholesky(fade * precision + prior.diag())
        theta = torch.cholesky_solve((fade * target)[:, None], root)[:, 0]
        spread = torch.linalg.solve_triangular(root, x.T, upper=False)
        return x @ theta, spread.square().sum(0)

    def learn(self, x: Tensor, y: Tensor, weight: Tensor, step: int) -> None:
        """Absorb rows x (u, 1 + d) with targets y and weights = inverse variances (u,)."""
        fade = self._fade(step)
        precision, target = self._grown(x.shape[1])
        weighted = x * weight[:, None]
        self.precision = fade * precision + weighted.T @ x
        self.target = fade * target + weighted.T @ y
        self.last_step = step if self.last_step is None else max(step, self.last_step)

    def _fade(self, step: int | None) -> float:
        if step is None or self.last_step is None:
            return 1.0
        return float(self.forgetting ** max(step - self.last_step, 0))

    def _grown(self, size: int) -> tuple[Tensor, Tensor]:
        """Sums for ``size`` coefficients: zeros where features appeared only later."""
        more = size - len(self.target)
        pad = torch.nn.functional.pad
        return pad(self.precision, (0, more, 0, more)), pad(self.target, (0, more))

    def state_dict(self) -> dict[str, Any]:
        """Sums, scales and the last step; :meth:`checked` reads them back."""
        return {
            "unit": self.unit,
            "spread": self.spread,
            "precision": self.precision.clone(),
            "target": self.target.clone(),
            "last_step": self.last_step,
        }

    def checked(self, state: Any) -> Ridge:
        """A new one from a saved state. Raises: ConfigError or NumericError if it does not fit."""
        if not isinstance(state, dict) or set(state) != {
            "unit",
            "spread",
            "precision",
            "target",
            "last_step",
        }:
            raise ConfigError(
                "belief state: got no ridge part, expected unit, spread, precision, target and last_step"
            )
        for name in ("unit", "spread"):
            value = state[name]
            expect("belief state", name, is_real(value) and 0 < value < math.inf, value, "a variance > 0")
        precision, target, step = state["precision"], state["target"], state["last_step"]
        expect("belief state", "last_step", step is None or is_whole(step), step, "a step or None")
        size = len(target)
        legal = is_finite(target, size) and is_finite(precision, size, size)
        expect("belief state", "precision, target", legal, precision, "finite (d, d) and (d,)")
        expect(
            "belief state",
            "precision",
            torch.allclose(precision, precision.T),
            precision,
            "a symmetric matrix",
        )
        new = Ridge(self.forgetting)
        new.unit, new.spread = float(state["unit"]), float(state["spread"])
        new.last_step = state["last_step"]
        new.precision, new.target = state["precision"].clone(), state["target"].clone()
        return new
