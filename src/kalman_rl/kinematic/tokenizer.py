"""``KinematicTokenizer``: series in, tokens of motion out, in one batch or one observation at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kalman_rl.checks import expect, is_real, is_whole, reading, saved
from kalman_rl.errors import ConfigError, NumericError, ShapeError, quote, unknown_name
from kalman_rl.kinematic import tokens
from kalman_rl.kinematic.stream import Stream
from kalman_rl.numerics import state_space
from kalman_rl.numerics.kalman import Gaussian, Noise
from kalman_rl.numerics.smoother import likely_noise, prepared

FORMAT = 1
LONGEST_LAG = 64


class KinematicTokenizer:
    """Tokens (position, velocity, acceleration, jerk, ...) of noisy series.

    Each series is an integrated Wiener process of order m seen through noise. Token k describes the path just after
    knot k: the derivatives of the smoothing spline of degree 2m - 1 between knots k and k + 1.

    With ``lag`` L >= 1 token k is made of the observations up to knot k + L and no later ones, so there are T - L of
    them. At the newest knot a spline of order 2 always has the acceleration 0, so L = 0 gives derivatives below the
    order only, T tokens of the filter. At L = 1 the jerk is ``-a / d`` and adds nothing. With ``lag=None`` every token
    knows the whole series: right for a window that ends at the time of decision, a look into the future for a
    series that is cut into windows afterwards.

    Args:
        order: m, 1 to 3. noise_ratio: q / R > 0 in units of 1 / time^(2m-1), or "likelihood": :meth:`fit` learns it.
        lag: L from 0 to 64, or None.
        channels: names out of x, v, a, j, their standard deviations sd_x, sd_v, sd_a, sd_j, innovation (of knot k, over
            its standard deviation), missing (1 where knot k was not observed).
        noise: R > 0 in squared units of the observations; None: :meth:`fit` learns it.
        normalise: divide x, v, a, j and their deviations by their root mean square in :meth:`fit`.
        integral: observation k is the integral of the path since knot k - 1; the first is masked.

    Raises: ConfigError, NumericError for a setting outside its range.
    Gradient: flows through the observations in :meth:`transform`.
    Source: after arXiv:2601.09949, whose constants are not published; lag, deviations and innovation are ours.

    >>> made = KinematicTokenizer(noise_ratio=1.0, noise=1.0, channels=("x", "v"), normalise=False)
    >>> made.transform(torch.tensor([[1.0, 3.0, 5.0, 7.0]]))
    tensor([[[1., 2.],
             [3., 2.],
             [5., 2.]]])
    """

    def __init__(
        self,
        order: int = 2,
        noise_ratio: float | str = "likelihood",
        lag: int | None = 1,
        channels: Sequence[str] = tokens.VALUES,
        *,
        noise: float | None = None,
        normalise: bool = True,
        integral: bool = False,
    ) -> None:
        if not is_whole(order, 1, 3):
            raise ConfigError(f"order: got {quote(order)}, expected 1, 2 or 3")
        if lag is not None and not is_whole(lag, 0, LONGEST_LAG):
            raise ConfigError(
                f"lag: got {quote(lag)}, expected an integer from 0 to {LONGEST_LAG}, or None for no limit"
            )
        for name, value in (("noise_ratio", noise_ratio), ("noise", noise)):
            learned = "likelihood" if name == "noise_ratio" else None
            if value != learned and not (is_real(value) and 0 < float(value) < math.inf):  # type: ignore[arg-type]
                raise NumericError(
                    f"{name}: got {quote(value)}, expected a finite number > 0, or {quote(learned)} to learn it"
                )
        if isinstance(channels, str) or not channels or len(set(channels)) < len(channels):
            raise ConfigError(
                f"channels: got {quote(channels)}, expected different names out of {tokens.CHANNELS}"
            )
        self.order, self.lag, self.integral = order, lag, bool(integral)
        self.channels, self.normalise = tuple(channels), bool(normalise)
        for name in self.channels:
            self._check_channel(name)
        self._given = (noise_ratio, noise)
        self.noise_ratio = None if noise_ratio == "likelihood" else float(noise_ratio)
        self.noise = None if noise is None else float(noise)
        self.scale: Tensor | None = None if self.normalise else torch.ones(self._degree, dtype=torch.float64)
        self._stream: Stream | None = None

    def __repr__(self) -> str:
        learned = f"noise_ratio={self.noise_ratio}, noise={self.noise}"
        return (
            f"<KinematicTokenizer(order={self.order}, lag={self.lag}, {learned}), channels: {self.channels}>"
        )

    # ---- batch

    def fit(
        self,
        observations: Tensor,
        times: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        relative_noise: Noise = 1.0,
    ) -> KinematicTokenizer:
        """Learn what was not given: q / R and R by the likelihood, and the constants of the scale. Returns itself.

        Arguments and errors as :meth:`transform`; all series share what is learned. NumericError where the series
        hold no noise to learn from.
        """
        ratio, noise = (None if value in ("likelihood", None) else float(value) for value in self._given)
        if ratio is None or noise is None:
            found = likely_noise(
                observations,
                times,
                mask,
                relative_noise=relative_noise,
                order=self.order,
                integral=self.integral,
                noise_ratio=ratio,
            )
            if found is None:
                raise NumericError(
                    f"observations: got series on polynomials of degree {self.order - 1}, expected noise to learn "
                    "from; give noise_ratio and noise"
                )
            ratio = math.exp(found.log_shape) if ratio is None else ratio
            noise = found.scale if noise is None else noise
        self.noise_ratio, self.noise, self._stream = ratio, noise, None
        if self.normalise:
            values, _ = self._tokens(observations, times, mask, relative_noise)[:2]
            known = values.isfinite().all(-1)
            size = values[known].square().mean(0).sqrt()
            self.scale = torch.where(size > 0, size, 1.0).detach().cpu()
        return self

    def transform(
        self,
        observations: Tensor,
        times: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        relative_noise: Noise = 1.0,
    ) -> Tensor:
        """Tokens of whole series.

        Args:
            observations: (series, T), any floating type, T > lag.
            times: (T,) or (series, T), strictly increasing; None = 0, 1, 2, ...
            mask: (series, T) bool, True = observed; None = all.
            relative_noise: R_k / R > 0, a number or broadcastable to (series, T).

        Returns:
            (series, tokens, channels) in the type of the observations, at least float32. Where fewer than ``order``
            observations were seen, NaN in all channels but ``innovation`` and ``missing``.

        Raises: ConfigError before :meth:`fit`, where something is to be learned; ShapeError, NumericError.
        """
        self._ready()
        values, deviations, innovation, missing = self._tokens(observations, times, mask, relative_noise)
        made = self._chosen(values, deviations, innovation, missing)
        return made.to(torch.promote_types(observations.dtype, torch.float32))

    def matrix(self, length: int, step: float = 1.0) -> Tensor:
        """The tokens of a regular grid without holes as one linear map B (tokens, values, length): ``B @ series``.

        ``values`` are those of ``channels`` out of x, v, a, j, in their order; the others do not depend on the
        series, or not linearly. Raises: ConfigError, ShapeError.

        >>> made = KinematicTokenizer(noise_ratio=1.0, noise=1.0, channels=("v",), normalise=False)
        >>> made.matrix(3)[0]  # the first token knows two observations
        tensor([[-1.0000,  1.0000,  0.0000]], dtype=torch.float64)
        """
        scale = self._ready()
        if not is_whole(length, 2, 4096):
            raise ConfigError(f"length: got {quote(length)}, expected an integer from 2 to 4096")
        unit = torch.eye(length, dtype=torch.float64)
        mask = torch.ones_like(unit, dtype=torch.bool)
        mask[:, 0] = not self.integral
        values = self._tokens(unit, step * torch.arange(float(length)), mask, 1.0)[0] / scale
        names = [tokens.VALUES.index(name) for name in self.channels if name in tokens.VALUES]
        return values[..., names].permute(1, 2, 0)

    # ---- stream

    def update(
        self,
        observation: Tensor,
        time: float | None = None,
        mask: Tensor | None = None,
        *,
        relative_noise: Noise = 1.0,
    ) -> Tensor | None:
        """Take one observation of every series; memory and time do not grow.

        Args:
            observation: (series,), as many each time. time: more than the time before; None = one more.
            mask: (series,) bool, True = observed. relative_noise: R_k / R, a number or (series,).

        Returns: the token of the knot ``lag`` updates ago (series, channels), equal to :meth:`transform`'s; None for
        the first ``lag`` updates.

        Raises: ConfigError for ``lag=None``; ShapeError, NumericError; nothing has changed then.
        """
        self._ready()
        if self.lag is None:
            raise ConfigError(
                "lag: got None, expected a number; a stream cannot wait for the end of the series"
            )
        if not isinstance(observation, Tensor) or observation.ndim != 1 or not len(observation):
            shape = (
                tuple(observation.shape) if isinstance(observation, Tensor) else type(observation).__name__
            )
            raise ShapeError(f"observation: got {shape}, expected a tensor (series,)")
        ratio, noise = self._noises()
        stream = self._stream
        if stream is None:
            stream = Stream.begun(self.order, self.lag, len(observation), ratio, integral=self.integral)
        self._stream = stream = stream.after(observation, time, mask, relative_noise)
        found = stream.oldest()
        if found is None:
            return None
        innovation, missing = stream.innovation[0] / math.sqrt(noise), (~stream.observed[0]).double()
        made = self._chosen(*self._motion(*found), innovation, missing)
        return made.to(torch.promote_types(observation.dtype, torch.float32))

    def reset(self) -> None:
        """Forget the stream; what was learned by :meth:`fit` stays."""
        self._stream = None

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Everything learned, the stream and the settings, as tensors and numbers."""
        return {
            "format": FORMAT,
            "settings": self._settings(),
            "noise_ratio": self.noise_ratio,
            "noise": self.noise,
            "scale": None if self.scale is None else self.scale.clone(),
            "stream": None if self._stream is None else self._stream.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the saved tokenizer. Raises: ConfigError for another format or settings; nothing changed."""
        what = "tokenizer state"
        with reading(what, state):
            got = saved(what, state, "format", "settings")
            if got != (FORMAT, self._settings()):
                raise ConfigError(
                    f"{what}: got format {got[0]} with settings {got[1]}, expected format {FORMAT} with "
                    f"{self._settings()}; build the tokenizer with the saved settings"
                )
            ratio, noise, scale, kept = saved(what, state, "noise_ratio", "noise", "scale", "stream")
            for name, value in (("noise_ratio", ratio), ("noise", noise)):
                legal = value is None or (is_real(value) and 0 < value < math.inf)
                expect(what, name, legal, value, "a finite number > 0 or None")
            fitted = ratio is not None and noise is not None
            expect(
                what,
                "noise_ratio, noise",
                fitted or kept is None,
                (ratio, noise),
                "numbers where a stream began",
            )
            legal = scale is None or (scale.shape == (self._degree,) and bool((scale > 0).all()))
            legal = legal and (scale is None or bool(scale.isfinite().all()))
            expect(what, "scale", legal, scale, f"{self._degree} finite numbers > 0 or None")
            expect(what, "scale", kept is None or scale is not None, scale, "numbers where a stream began")
            stream = None
            if kept is not None:
                expect(what, "stream", self.lag is not None, kept, "None without a lag")
                stream = Stream.restored(self.order, self.lag or 0, kept, integral=self.integral)
        self.noise_ratio, self.noise, self._stream = ratio, noise, stream
        self.scale = None if scale is None else scale.double().clone()

    # ---- details

    @property
    def _degree(self) -> int:
        """How many derivatives a token can name, from x on."""
        whole = self.order if self.lag == 0 else 2 * self.order + self.integral
        return min(whole, len(tokens.VALUES))

    def _check_channel(self, name: str) -> None:
        if name not in tokens.CHANNELS:
            raise unknown_name("channel", name, tokens.CHANNELS)
        base = name.removeprefix("sd_")
        if base in tokens.VALUES and tokens.VALUES.index(base) >= self._degree:
            why = (
                "at the newest knot it is always 0"
                if self.lag == 0
                else f"a path of order {self.order} has none"
            )
            advice = "take lag >= 1" if self.lag == 0 and self.order > 1 else "raise the order"
            raise ConfigError(
                f"channels: got {quote(name)} at order {self.order} and lag {self.lag}, expected names out of "
                f"{tokens.VALUES[: self._degree]}; {why}, {advice}"
            )

    def _ready(self) -> Tensor:
        """The scale. Raises: ConfigError where something is still to be learned."""
        if self.scale is None:
            raise ConfigError("tokenizer: got no scale yet, expected fit() before; or set normalise=False")
        self._noises()
        return self.scale

    def _noises(self) -> tuple[float, float]:
        """q / R and R."""
        if self.noise_ratio is None or self.noise is None:
            raise ConfigError(
                "tokenizer: got no noise yet, expected fit() before; or give noise_ratio and noise"
            )
        return self.noise_ratio, self.noise

    def _tokens(
        self, observations: Tensor, times: Tensor | None, mask: Tensor | None, relative_noise: Noise
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Derivatives and deviations (series, tokens, degree), innovation and missing (series, tokens), float64."""
        ratio, noise = self._noises()
        given = (observations, times, mask, ratio, relative_noise)
        series, steps = prepared(*given, self.order, self.integral, name="relative_noise")
        length = series.value.shape[1]
        count = length - (1 if self.lag is None else self.lag)
        if count < 1:
            raise ShapeError(
                f"observations: got {length} knots, expected more than the lag of {self.lag}; give longer windows"
            )
        path = state_space.filtered(series.value, series.variance, steps)
        if self.lag is None:
            states = tokens.every_pair(path, steps)
            evidence, seen = path.evidence[-1].expand_as(path.evidence[1:]), path.seen[-1:].expand(count, -1)
        else:
            here = [state_space.Columns(*(p[i : i + count] for p in path.state)) for i in range(self.lag + 1)]
            moves = [
                [m[i : i + count] for i in range(1, self.lag + 1)] for m in (steps.transition, steps.noise)
            ]
            states = tokens.pair_after(here, *moves) if self.lag else here[0]
            evidence, seen = path.evidence[self.lag :], path.seen[self.lag :]
        belief = state_space.settled(states, evidence, seen >= self.order)
        gap = None if self.lag == 0 else series.time.diff(dim=-1).T[:count]
        values, deviations = self._motion(belief, gap)
        expected = state_space.innovations(path, self.order)
        innovation = tokens.normalised(expected, series.observed.T, noise)[:count]
        missing = (~series.observed[:, :count]).double()
        return values.transpose(0, 1), deviations.transpose(0, 1), innovation.T, missing

    def _motion(self, belief: Gaussian, gap: Tensor | None) -> tuple[Tensor, Tensor]:
        if gap is None:
            deviations = belief.variance.diagonal(dim1=-2, dim2=-1).sqrt()
            return belief.mean[..., : self._degree], deviations[..., : self._degree]
        values, deviations = tokens.motion(belief, gap, self.order, integral=self.integral)
        return values[..., : self._degree], deviations[..., : self._degree]

    def _chosen(self, values: Tensor, deviations: Tensor, innovation: Tensor, missing: Tensor) -> Tensor:
        """The channels asked for, in their order and scale."""
        scale = self._ready().to(values.device)
        columns = dict(zip(tokens.VALUES, (values / scale).unbind(-1)))
        spread = math.sqrt(self._noises()[1]) * deviations / scale
        columns |= dict(zip(tokens.DEVIATIONS, spread.unbind(-1)))
        columns |= {"innovation": innovation, "missing": missing}
        return torch.stack([columns[name] for name in self.channels], -1)

    def _settings(self) -> dict[str, Any]:
        names = ("order", "lag", "channels", "normalise", "integral")
        settings = {name: getattr(self, name) for name in names}
        return settings | {"noise_ratio": self._given[0], "noise": self._given[1]}
