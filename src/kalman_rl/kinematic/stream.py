"""The last knots of a stream of observations: all that the next token needs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.checks import expect, expect_tensor, is_real, is_whole, saved
from kalman_rl.errors import NumericError, ShapeError, quote
from kalman_rl.kinematic.tokens import normalised, pair_after
from kalman_rl.numerics import state_space
from kalman_rl.numerics.arguments import expect_shape, expect_values
from kalman_rl.numerics.kalman import Gaussian, Noise
from kalman_rl.numerics.smoother import expect_begun, made_steps
from kalman_rl.numerics.state_space import Columns, Steps

WHAT = "tokenizer state"
TENSORS = ("time", "mean", "covariance", "innovation", "observed", "evidence", "seen")


class Stream(NamedTuple):
    """K <= lag + 1 knots of B series: ``time`` (K,), filtered ``mean`` (K, B, n, 1 + m) and ``covariance``,
    ``innovation`` (K, B) over its deviation at R = 1, ``observed`` (K, B); what all observations say of the start:
    ``evidence`` (B, 1 + m, 1 + m), ``seen`` (B,)."""

    order: int
    lag: int
    integral: bool
    noise_ratio: float
    time: Tensor
    mean: Tensor
    covariance: Tensor
    innovation: Tensor
    observed: Tensor
    evidence: Tensor
    seen: Tensor

    @classmethod
    def begun(cls, order: int, lag: int, series: int, noise_ratio: float, *, integral: bool) -> Stream:
        """Before the first observation."""
        n, columns = order + integral, 1 + order
        sizes = {
            "time": (0,),
            "mean": (0, series, n, columns),
            "covariance": (0, series, n, n),
            "innovation": (0, series),
            "observed": (0, series),
            "evidence": (series, columns, columns),
            "seen": (series,),
        }
        types = {"observed": torch.bool, "seen": torch.long}
        made = {name: torch.zeros(size, dtype=types.get(name, torch.float64)) for name, size in sizes.items()}
        return cls(order, lag, integral, noise_ratio, **made)

    def after(
        self, observation: Tensor, time: float | None, mask: Tensor | None, relative_noise: Noise
    ) -> Stream:
        """The stream one observation later. Raises: ShapeError, NumericError."""
        value, variance, observed = self._checked(observation, mask, relative_noise)
        now = self._now(time)
        steps = self._steps(torch.cat((self.time[-1:], now)))
        if len(self.time):
            before = Columns(self.mean[-1], self.covariance[-1])
            before = state_space.predict(before, steps.transition[1], steps.noise[1])
        else:
            before = state_space.start(steps, len(value))
        shown = torch.nn.functional.pad(value[:, None], (0, self.order))
        state, innovation, total = state_space.update(before, steps.row, shown, variance)
        expected = state_space.innovation_given(innovation, total, self.evidence, self.seen >= self.order)
        return self._replace(
            time=self._kept(self.time, now),
            mean=self._kept(self.mean, state.mean[None]),
            covariance=self._kept(self.covariance, state.covariance[None]),
            innovation=self._kept(self.innovation, normalised(expected, observed, 1.0)[None]),
            observed=self._kept(self.observed, observed[None]),
            evidence=self.evidence + state_space.evidence_of(innovation, total),
            seen=self.seen + observed.long(),
        )

    def oldest(self) -> tuple[Gaussian, Tensor | None] | None:
        """Belief about the pair of states ``lag`` knots ago and the step between them; of the newest state and None
        at lag 0; None where the stream is too young."""
        if len(self.time) <= self.lag:
            return None
        steps = self._steps(self.time)
        states = [Columns(mean, covariance) for mean, covariance in zip(self.mean, self.covariance)]
        state = (
            pair_after(states, list(steps.transition[1:]), list(steps.noise[1:])) if self.lag else states[0]
        )
        belief = state_space.settled(state, self.evidence, self.seen >= self.order)
        return belief, self.time.diff()[:1] if self.lag else None

    def state_dict(self) -> dict[str, Any]:
        """As tensors and numbers."""
        tensors = {name: getattr(self, name).clone() for name in TENSORS}
        return tensors | {"noise_ratio": self.noise_ratio}

    @classmethod
    def restored(cls, order: int, lag: int, state: Any, *, integral: bool) -> Stream:
        """The stream that was saved. Raises: ConfigError."""
        ratio, seen, time = saved(WHAT, state, "noise_ratio", "seen", "time")
        legal = is_real(ratio) and 0 < ratio < math.inf
        expect(WHAT, "stream.noise_ratio", legal, ratio, "a finite number > 0")
        legal = isinstance(seen, Tensor) and seen.ndim == 1 and is_whole(len(seen), 1)
        expect(WHAT, "stream.seen", legal, seen, "a count for each series")
        knots = len(time) if isinstance(time, Tensor) and time.ndim == 1 else 0
        expect(WHAT, "stream.time", 0 < knots <= lag + 1, time, f"1 to {lag + 1} times")
        made = cls.begun(order, lag, len(seen), float(ratio), integral=integral)
        for name, tensor in zip(TENSORS, saved(WHAT, state, *TENSORS)):
            like = getattr(made, name)
            shape = (
                tuple(like.shape) if name in ("evidence", "seen") else (knots, *like.shape[1:])
            )  # the others grow
            legal = isinstance(tensor, Tensor) and tuple(tensor.shape) == shape and tensor.dtype == like.dtype
            expect(WHAT, f"stream.{name}", legal, tensor, f"{like.dtype} {shape}")
            finite = bool(torch.isfinite(tensor).all())
            expect(WHAT, f"stream.{name}", finite, tensor, "finite numbers")
            made = made._replace(**{name: tensor.clone()})
        expect(WHAT, "stream.time", bool((made.time.diff() > 0).all()), time, "times that increase")
        return made

    # ---- details

    def _kept(self, olds: Tensor, new: Tensor) -> Tensor:
        return torch.cat((olds, new))[-self.lag - 1 :]

    def _steps(self, time: Tensor) -> Steps:
        return made_steps(time[None], time.new_tensor([self.noise_ratio]), self.order, self.integral)

    def _now(self, time: float | None) -> Tensor:
        last = float(self.time[-1]) if len(self.time) else -1.0
        now = last + 1.0 if time is None else time
        if not (is_real(now) and math.isfinite(now)):
            raise NumericError(f"time: got {quote(time)}, expected a finite number")
        if len(self.time) and not now > last:
            raise NumericError(
                f"time: got {now}, expected more than {last}, the time before; sort the stream"
            )
        return self.evidence.new_tensor([float(now)])

    def _checked(
        self, observation: Tensor, mask: Tensor | None, relative_noise: Noise
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value and variance (inf where missing), float64, and what was observed."""
        shape = self.seen.shape
        fits = observation.is_floating_point() and observation.shape == shape
        expect_shape("observation", observation, fits, f"floating point {tuple(shape)}, one per series")
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool)
        expect_tensor("mask", mask)
        expect_shape(
            "mask", mask, mask.dtype == torch.bool and mask.shape == shape, f"torch.bool {tuple(shape)}"
        )
        value = torch.where(mask, observation.detach(), 0.0).double().cpu()
        advice = "mask it out where missing"
        expect_values("observation", value, value.isfinite(), "a finite number", advice, "(series,)")
        expect_begun(self.integral and not len(self.time), mask)
        if not isinstance(relative_noise, Tensor) and not is_real(relative_noise):
            raise NumericError(
                f"relative_noise: got {quote(relative_noise, 80)}, expected a number or a tensor of numbers"
            )
        noise = torch.as_tensor(relative_noise, dtype=torch.float64)
        if noise.ndim > 1 or (noise.ndim == 1 and noise.shape != shape):
            raise ShapeError(
                f"relative_noise: got shape {tuple(noise.shape)}, expected a number or {tuple(shape)}"
            )
        legal = noise.isfinite() & (noise > 0)
        expect_values(
            "relative_noise", noise, legal, "a finite variance > 0", "mask out what is missing", "(series,)"
        )
        return value, torch.where(mask.cpu(), noise, math.inf), mask.cpu()
