"""``KalmanPreferenceTracker``: rewards as a linear function of features, learned one batch at a time."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.checks import expect, is_real, is_whole, reading, saved
from kalman_rl.errors import ConfigError, NumericError, ShapeError, quote
from kalman_rl.kernels import jit
from kalman_rl.kernels.tracker import Absorber
from kalman_rl.numerics.hadamard import SRHT
from kalman_rl.numerics.kalman import Gaussian

FORMAT = 1
_BLOCK = 64  # rows absorbed by one QR decomposition


class Absorbed(NamedTuple):
    """What an update absorbed: ``innovation`` (n,), 0 where masked, and ``innovation_variance`` (n,), P + R,
    from before it; ``noise`` (), the learned R after it."""

    innovation: Tensor
    innovation_variance: Tensor
    noise: Tensor


class KalmanPreferenceTracker:
    """Recursive ridge regression as a Kalman filter: ``y = phi' theta + eps``, theta drifting.

    ``theta_0 ~ N(0, P_0 I)``; between batches ``P <- P + Q gap I``; a batch is absorbed exactly, in any
    order of its rows. With Q = 0 the mean is ridge regression with penalty ``R / P_0``.

    The covariance is kept as a square root (``P = L L'``) and updated by orthogonal transformations, so it
    stays symmetric positive definite in float32 too. Features of another width than ``dim`` are projected
    to it by an SRHT that is created when they are first absorbed (narrow ones are padded with zeros).

    All *variances* are scaled by a learned factor: R has an inverse-gamma prior worth ``noise_strength``
    observations around ``R_val``, so the width of the belief depends on the rewards, not only on the
    features. The scaling is common to P, Q and R and leaves the mean as it is.

    Args:
        dim: number of coefficients d >= 1; 1 with phi = 1 tracks a scalar.
        Q_val: process noise >= 0 per unit of gap.
        R_val: observation noise > 0 of one reward, in squared reward units.
        P_val: prior variance P_0 > 0 of each coefficient.
        noise_strength: > 0, or None to keep R at R_val.
        seed: of the projection. dtype: float64 or float32, of the state.

    Raises: NumericError, ConfigError for a setting outside its range.
    Gradient: none; every tensor is detached and results are on the CPU.
    Source: Kalman (1960); square-root form Kailath, Sayed and Hassibi (2000); the name and the defaults of
    dim, Q and R are those of the K-GRPO repository, whose code has neither Q nor a transform.

    >>> tracker = KalmanPreferenceTracker(dim=1, Q_val=0.0, R_val=1.0)
    >>> _ = tracker.update(torch.ones(3, 1), torch.tensor([1.0, 2.0, 3.0]))
    >>> round(tracker.value(torch.ones(1, 1)).mean.item(), 6)  # sum y / (3 + R / P_0)
    1.5
    """

    def __init__(
        self,
        dim: int = 128,
        Q_val: float = 1e-5,
        R_val: float = 1.0,
        *,
        P_val: float = 1.0,
        noise_strength: float | None = 4.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if not is_whole(dim, 1):
            raise ConfigError(f"dim: got {quote(dim)}, expected an integer >= 1")
        if dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"dtype: got {quote(dtype)}, expected torch.float32 or torch.float64")
        positive = {
            "R_val": R_val,
            "P_val": P_val,
            "noise_strength": 1.0 if noise_strength is None else noise_strength,
        }
        for name, value in positive.items():
            if not (is_real(value) and 0 < value < math.inf):
                raise NumericError(f"{name}: got {quote(value)}, expected a finite number > 0")
        if not (is_real(Q_val) and 0 <= Q_val < math.inf):
            raise NumericError(f"Q_val: got {quote(Q_val)}, expected a finite variance >= 0")
        self.dim, self.Q_val, self.R_val, self.P_val = dim, float(Q_val), float(R_val), float(P_val)
        self.noise_strength, self.seed, self.dtype = noise_strength, seed, dtype
        self.mean = torch.zeros(dim, dtype=dtype)
        self.root = math.sqrt(P_val) * torch.eye(dim, dtype=dtype)
        self.projection: SRHT | None = None
        self._width: int | None = None
        self._surprise = self._seen = 0.0
        self._absorber: Absorber | None = None  # the same mean and root, changed in place

    def __repr__(self) -> str:
        settings = f"dim={self.dim}, Q_val={self.Q_val:g}, R_val={self.R_val:g}, P_val={self.P_val:g}"
        return f"<KalmanPreferenceTracker({settings}), rewards: {self._seen:g}, R: {self.noise:.3g}>"

    # ---- time and rewards

    def predict(self, gap: float = 1.0) -> None:
        """Let time pass: ``P <- P + Q gap I``. Raises: NumericError for a negative or infinite gap."""
        if not (is_real(gap) and 0 <= gap < math.inf):
            raise NumericError(f"gap: got {quote(gap)}, expected a finite number of steps >= 0")
        if self.Q_val * gap:
            added = math.sqrt(self.Q_val * gap) * torch.eye(self.dim, dtype=self.dtype)
            self.root = _triangle(torch.cat((self.root, added), dim=1))

    def update(self, phi: Tensor, y: Tensor, mask: Tensor | None = None) -> Absorbed:
        """Absorb n rewards; no time passes.

        Args:
            phi: (n, F) features, finite; F must not change once seen.
            y: (n,) rewards; NaN = missing. mask: (n,) bool, True = observed; None = all.

        Raises: ShapeError, NumericError; nothing has changed then.
        """
        compiled = self._update_compiled(phi, y, mask)
        if compiled is not None:
            return compiled
        x, y, known = self._checked(phi, y, mask)
        before = self._explained(x)
        innovation = torch.where(known, y - x @ self.mean, 0.0)
        out = (innovation.double(), self.noise * (before + self.R_val).double() / self.R_val)
        self._fix_width(phi.shape[1])
        mean, root, surprise = self.mean, self.root, 0.0
        for rows in torch.split(known.nonzero().flatten(), _BLOCK):
            mean, root, gained = _absorbed(mean, root, x[rows], y[rows], self.R_val)
            surprise += gained
        self.mean, self.root = mean, root
        self._surprise += surprise
        self._seen += float(known.sum())
        return Absorbed(*out, torch.tensor(self.noise, dtype=torch.float64))

    def _update_compiled(self, phi: Tensor, y: Tensor, mask: Tensor | None) -> Absorbed | None:
        """:meth:`update` one reward after another; None where the input has to be looked at first."""
        if not (
            isinstance(phi, Tensor) and isinstance(y, Tensor) and (mask is None or isinstance(mask, Tensor))
        ):
            return None
        shape, count = phi.shape, y.shape
        if not (len(shape) == 2 and len(count) == 1 and shape[0] == count[0] > 0):
            return None
        if not jit.usable(phi, y, mask):
            return None
        width = shape[1]
        known = self._width == width or (self._width is None and width == self.dim)
        if not (known and phi.is_floating_point() and y.is_floating_point()):
            return None
        if mask is not None and (mask.dtype != torch.bool or mask.shape != y.shape):
            return None
        belief = self._absorber
        if belief is None or belief.mean is not self.mean or belief.root is not self.root:
            belief = Absorber(self.mean, self.root)
        x, y = (part.detach() if part.requires_grad else part for part in (phi, y))
        if x.dtype != self.dtype or y.dtype != self.dtype:
            x, y = x.to(self.dtype), y.to(self.dtype)
        done = belief(self._shaped(x), y, mask, self.R_val, self.noise / self.R_val)
        if done is None:
            return None
        innovation, variance, surprise, used = done
        self._fix_width(width)
        self._absorber, self.mean, self.root = belief, belief.mean, belief.root
        self._surprise += surprise
        self._seen += used
        return Absorbed(innovation, variance, torch.scalar_tensor(self.noise, dtype=torch.float64))

    # ---- what is believed

    @property
    def noise(self) -> float:
        """Learned R: ``R_val (strength + sum of squared standardised innovations) / (strength + count)``."""
        if self.noise_strength is None:
            return self.R_val
        return self.R_val * (self.noise_strength + self._surprise) / (self.noise_strength + self._seen)

    @property
    def covariance(self) -> Tensor:
        """P (d, d) of theta, float64, scaled by the learned noise."""
        root = self.root.double()
        product = self.noise / self.R_val * (root @ root.T)
        return (product + product.T) / 2  # a matrix product rounds its two halves differently

    def value(self, phi: Tensor) -> Gaussian:
        """Belief about the mean reward at the features (n, F): ``phi' m``, ``phi' P phi``, (n,) float64."""
        x = self._projected(phi)
        return Gaussian((x @ self.mean).double(), self.noise / self.R_val * self._explained(x).double())

    def predictive(self, phi: Tensor) -> Gaussian:
        """Of one new reward at the features (n, F): variance ``phi' P phi + R``, (n,) float64."""
        mean, variance = self.value(phi)
        return Gaussian(mean, variance + self.noise)

    def loo_residuals(self, phi: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Each reward minus its prediction from the past and all *other* rows; changes nothing.

        ``[S^-1 nu]_i / [S^-1]_ii`` with ``nu = y - phi m``, ``S = phi P phi' + R I``, equal to refitting
        without row i; computed as y_i minus a sum over the other rows, so that a reward does not touch its
        own baseline.

        Returns: (n,) float64, 0 where missing. Cost O(n^3). Arguments and errors as :meth:`update`.
        """
        x, y, known = self._checked(phi, y, mask)
        x, y = x[known].double(), y[known].double()
        out = torch.zeros(len(known), dtype=torch.float64)
        if len(y):
            shown = x @ self.root.double()
            total = shown @ shown.T + self.R_val * torch.eye(len(y), dtype=torch.float64)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(total))
            weight = -inverse / inverse.diagonal()[:, None]
            weight.fill_diagonal_(0.0)
            predicted = x @ self.mean.double()
            out[known] = y - (predicted + weight @ (y - predicted))
        return out

    def information(self, phi: Tensor | None = None) -> Tensor:
        """Nats learned since the prior; P and V carry the learned noise, so rewards matter.

        About theta: ``(log det P_0 - log det P) / 2`` (); with features (n, F), about the mean reward at
        each: ``log(V_0 / V) / 2`` (n,).
        """
        if phi is None:
            growth = self.dim * math.log(self.noise / self.R_val / self.P_val)
            return -self.root.double().diagonal().abs().log().sum() - 0.5 * growth
        x = self._projected(phi)
        prior = self.P_val * x.double().square().sum(1)
        return 0.5 * torch.log(prior / (self.noise / self.R_val * self._explained(x).double()))

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Everything learned and the settings, as tensors and numbers."""
        return {
            "format": FORMAT,
            "settings": self._settings(),
            "mean": self.mean.clone(),
            "root": self.root.clone(),
            "width": self._width,
            "projection": self.projection.state_dict() if self.projection else None,
            "surprise": self._surprise,
            "seen": self._seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the saved tracker. Raises: ConfigError for another format or settings; nothing changed."""
        with reading("tracker state", state):
            self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        got = saved("tracker state", state, "format", "settings")
        if got != (FORMAT, self._settings()):
            raise ConfigError(
                f"tracker state: got format {got[0]} with settings {got[1]}, expected format {FORMAT} with "
                f"{self._settings()}; build the tracker with the saved settings"
            )
        names = ("mean", "root", "width", "projection", "surprise", "seen")
        mean, root, width, projection, surprise, seen = saved("tracker state", state, *names)
        if mean.shape != self.mean.shape or root.shape != self.root.shape:
            raise ConfigError(f"tracker state: got mean {tuple(mean.shape)}, expected ({self.dim},)")
        if not (torch.isfinite(mean).all() and torch.isfinite(root).all()):
            raise NumericError("tracker state: got NaN or infinity, expected finite numbers")
        what = "tracker state"
        types = mean.dtype == root.dtype == self.dtype
        expect(what, "mean, root", types, (mean.dtype, root.dtype), f"{self.dtype}")
        expect(what, "root", bool((root.diagonal() != 0).all()), root, "a triangle without 0 on its diagonal")
        expect(what, "width", width is None or is_whole(width, 1), width, "a width or None")
        for name, value in (("surprise", surprise), ("seen", seen)):
            expect(what, name, is_real(value) and 0 <= value < math.inf, value, "a finite number >= 0")
        wide = width is not None and width > self.dim
        expect(what, "projection", (projection is not None) == wide, projection, "one for wide features only")
        transform = None
        if projection is not None:
            transform = SRHT(width, self.dim, self.seed)
            transform.load_state_dict(projection)
        self.mean, self.root = mean.to(self.dtype).clone(), root.to(self.dtype).clone()
        self.projection, self._width = transform, width
        self._surprise, self._seen = surprise, seen

    def _settings(self) -> dict[str, Any]:
        names = ("dim", "Q_val", "R_val", "P_val", "noise_strength", "seed")
        return {**{name: getattr(self, name) for name in names}, "dtype": str(self.dtype)}

    # ---- details

    def _explained(self, x: Tensor) -> Tensor:
        """(n,) ``x' P x`` before scaling by the learned noise."""
        return (x @ self.root).square().sum(1)

    def _fix_width(self, width: int) -> None:
        """Remember the width of the features and how they are projected."""
        if self._width is None:
            self._width, self.projection = width, self._projection_of(width)

    def _projection_of(self, width: int) -> SRHT | None:
        wide = width > self.dim
        return SRHT(width, self.dim, self.seed) if wide else None

    def _projected(self, phi: Tensor) -> Tensor:
        """(n, d) checked features in the type of the state."""
        if not isinstance(phi, Tensor) or phi.dim() != 2 or not phi.is_floating_point() or phi.shape[1] < 1:
            raise ShapeError(f"phi: got {_kind(phi)}, expected floating (n, F), one row per reward")
        if self._width not in (None, phi.shape[1]):
            raise ShapeError(f"phi: got width {phi.shape[1]}, expected {self._width} as in the first batch")
        x = phi.detach().cpu().to(self.dtype)
        bad = ~torch.isfinite(x)
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            raise NumericError(
                f"phi: got {x[row, column].item()} at row {row}, column {column}, expected finite numbers"
            )
        return self._shaped(x)

    def _shaped(self, x: Tensor) -> Tensor:
        """(n, d) from features of any width: projected, or padded with zeros."""
        if x.shape[1] == self.dim:
            return x
        project = self.projection if self._width is not None else self._projection_of(x.shape[1])
        return project(x) if project else torch.nn.functional.pad(x, (0, self.dim - x.shape[1]))

    def _checked(self, phi: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x = self._projected(phi)
        if not isinstance(y, Tensor) or y.shape != x.shape[:1] or not len(x) or y.is_complex():
            got = tuple(y.shape) if isinstance(y, Tensor) and not y.is_complex() else _kind(y)
            raise ShapeError(f"y: got {got}, expected real ({len(x)},) with at least one row, like phi")
        y = y.detach().cpu().to(self.dtype)
        known = ~torch.isnan(y)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.shape != y.shape or mask.dtype != torch.bool:
                raise ShapeError(f"mask: got {_kind(mask)}, expected bool ({len(y)},)")
            known = known & mask.cpu()
        if torch.isinf(y[known]).any():
            row = int((torch.isinf(y) & known).nonzero()[0])
            raise NumericError(
                f"y: got {y[row].item()} at row {row}, expected a finite reward, or NaN for missing"
            )
        return x, torch.where(known, y, 0.0), known


def _kind(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _triangle(wide: Tensor) -> Tensor:
    """Lower triangular L with ``L L' = W W'``, by QR of W'."""
    upper: Tensor = torch.linalg.qr(wide.T, mode="r").R
    return upper.T.contiguous()


def _absorbed(mean: Tensor, root: Tensor, x: Tensor, y: Tensor, noise: float) -> tuple[Tensor, Tensor, float]:
    """Posterior mean and root, and the squared length of the standardised innovation.

    ``[[sqrt(R) I, X L], [0, L]]`` is made lower triangular; its blocks are then ``S^(1/2)``, the gain times
    ``S^(1/2)`` and the new L.
    """
    n, d = x.shape
    array = mean.new_zeros(n + d, n + d)
    array[:n, :n] = math.sqrt(noise) * torch.eye(n, dtype=mean.dtype)
    array[:n, n:] = x @ root
    array[n:, n:] = root
    lower = _triangle(array)
    spread = torch.linalg.solve_triangular(lower[:n, :n], (y - x @ mean)[:, None], upper=False)
    return mean + (lower[n:, :n] @ spread)[:, 0], lower[n:, n:].contiguous(), float(spread.square().sum())
