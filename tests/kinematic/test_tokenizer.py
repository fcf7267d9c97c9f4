"""Tokens against the spline's derivatives; no look ahead; stream and batch; units; what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import make_smoothing_spline
from torch import Tensor

from kalman_rl.errors import ConfigError, KalmanRLError, NumericError, ShapeError
from kalman_rl.kinematic import KinematicTokenizer
from kalman_rl.kinematic.tokens import CHANNELS
from kalman_rl.numerics import wiener
from tests.oracles.wiener import functionals, posterior

B, T = 3, 16
ORDERS_LAGS = [(1, 1), (2, 0), (2, 1), (2, 2), (2, 5), (3, 0), (3, 1), (3, 3)]


def series(seed: int = 0, length: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """Values, irregular times of each series, and a mask with holes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(B, length, dtype=torch.float64, generator=generator).cumsum(1)
    times = (0.2 + torch.rand(B, length, dtype=torch.float64, generator=generator)).cumsum(1)
    return y, times, torch.rand(B, length, generator=generator) > 0.2


def names(order: int, lag: int | None) -> tuple[str, ...]:
    degree = order if lag == 0 else min(2 * order, 4)
    return CHANNELS[:degree] + CHANNELS[4 : 4 + degree] + CHANNELS[8:]


def plain(order: int = 2, lag: int | None = 1, **options: Any) -> KinematicTokenizer:
    """Everything given, nothing learned, all channels, units of the data."""
    given = {"noise_ratio": 0.7, "noise": 2.0, "channels": names(order, lag), "normalise": False}
    return KinematicTokenizer(order, lag=lag, **{**given, **options})


def same(left: Tensor, right: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(left, right, atol=atol, rtol=1e-11, equal_nan=True)


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_a_token_is_the_spline_of_what_was_seen(lag: int) -> None:
    """Position to jerk of the spline through the first k + lag observations, just after knot k."""
    y, times, _ = series()
    made = plain(lag=lag).transform(y[:1], times[:1])[0].numpy()
    t = times[0].numpy()
    for k in range(6, T - lag):  # SciPy wants five points
        seen = slice(0, k + lag + 1)
        spline = make_smoothing_spline(t[seen], y[0, seen].numpy(), lam=1 / 0.7)
        want = [float(spline.derivative(i)(np.nextafter(t[k], np.inf))) for i in range(4)]
        np.testing.assert_allclose(made[k, :4], want, atol=1e-10 * max(1, np.abs(want).max()), rtol=0)


def test_deviations_are_those_of_a_dense_gaussian() -> None:
    """Of position and velocity of the path, and of the coefficients of the polynomial between two states."""
    y, times, _ = series()
    t = times[0].numpy()
    made = plain(lag=None).transform(y[:1], times[:1])[0].numpy()
    parts = [functionals(2, t, derivative=i, knots=t) for i in range(2)]
    for k in (0, 7, T - 2):
        rows = [part[k : k + 1] for part in parts] + [part[k + 1 : k + 2] for part in parts]
        pair = type(rows[0])(*(np.concatenate(part) for part in zip(*rows)))
        belief = posterior(pair, parts[0], y[0].numpy(), np.ones(T), 0.7)
        between = wiener.polynomial(2, torch.tensor(t[k + 1] - t[k])).numpy()
        deviations = np.sqrt(2.0 * np.diag(between @ belief.covariance @ between.T))
        np.testing.assert_allclose(made[k, 4:8], deviations, rtol=1e-6)
        np.testing.assert_allclose(made[k, :4], between @ belief.mean, atol=1e-9)


def test_the_quartic_of_observed_integrals() -> None:
    y, times, _ = series(3)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, 0] = False
    made = plain(lag=None, integral=True).transform(y, times, mask)
    t = times[0].numpy() - float(times[0, 0])
    data = functionals(2, t, derivative=-1, knots=t)[1:]
    for i in range(2):
        target = functionals(2, t, derivative=i, knots=t)
        want = posterior(target, data, y[0, 1:].numpy(), np.ones(T - 1), 0.7)
        np.testing.assert_allclose(made[0, :, i], want.mean[:-1], atol=1e-9)
        np.testing.assert_allclose(made[0, :, 4 + i], np.sqrt(2 * np.diag(want.covariance))[:-1], rtol=1e-7)
    # The integral of the quartic over a step is the smoothed integral, near the observed one for small noise.
    exact = plain(lag=None, integral=True, noise_ratio=1e12).transform(y, times, mask)
    step = times.diff(dim=1)
    cubic = sum(exact[..., k] * step ** (k + 1) / math.factorial(k + 1) for k in range(4))
    quartic = y[:, 1:] - cubic  # what is left is s d^5 / 5!, and the end value must follow from it
    end = sum(exact[..., k] * step**k / math.factorial(k) for k in range(4)) + quartic * 5 / step
    torch.testing.assert_close(end[:, :-1], exact[:, 1:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("order", "lag"), ORDERS_LAGS)
def test_no_token_moves_by_a_bit_when_the_future_changes(order: int, lag: int) -> None:
    """Value, time, noise and whether there is one: of a knot later than the lag, nothing reaches a token."""
    y, times, mask = series()
    tokenizer, noise = plain(order, lag), torch.ones(B, T, dtype=torch.float64)
    before = tokenizer.transform(y, times, mask, relative_noise=noise)
    assert before.shape == (B, T - lag, len(tokenizer.channels))
    for first in range(lag + 1, T):
        changed, later, holes, other = y.clone(), times.clone(), mask.clone(), noise.clone()
        changed[:, first:] = 1e6
        later[:, first:] += 3.0
        holes[:, first:] = ~holes[:, first:]
        holes[:, first:] |= holes.sum(1, keepdim=True) < order  # else the series is refused
        other[:, first:] = 5.0
        after = tokenizer.transform(changed, later, holes, relative_noise=other)
        unmoved = first - lag  # tokens 0 .. first - lag - 1
        assert torch.equal(after[:, :unmoved].nan_to_num(7.0), before[:, :unmoved].nan_to_num(7.0))
        assert not torch.equal(after[:, unmoved:].nan_to_num(7.0), before[:, unmoved:].nan_to_num(7.0))


def test_the_exact_smoother_does_look_ahead() -> None:
    y, times, _ = series()
    changed = y.clone()
    changed[:, -1] += 1.0
    exact = plain(lag=None)
    assert (exact.transform(y, times)[..., :4] != exact.transform(changed, times)[..., :4]).all()


@pytest.mark.parametrize(("order", "lag"), ORDERS_LAGS)
def test_a_stream_is_the_batch(order: int, lag: int) -> None:
    y, times, mask = series()
    times = times[:1].expand(B, -1)
    noise = torch.rand(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    tokenizer = plain(order, lag)
    got = [
        tokenizer.update(y[:, k], float(times[0, k]), mask[:, k], relative_noise=noise[:, k])
        for k in range(T)
    ]
    assert [each is None for each in got] == [k < lag for k in range(T)]
    want = tokenizer.transform(y, times, mask, relative_noise=noise)
    same(torch.stack([each for each in got if each is not None], 1), want)


def test_a_stream_of_integrals_and_default_times() -> None:
    y, _, mask = series()
    mask[:, 0] = False
    tokenizer = plain(lag=2, integral=True)
    got = [tokenizer.update(y[:, k], None, mask[:, k]) for k in range(T)][2:]
    same(torch.stack(got, 1), tokenizer.transform(y, None, mask))
    tokenizer.reset()
    assert tokenizer.update(y[:, 0], None, mask[:, 0]) is None


def test_a_stream_keeps_a_fixed_size_and_goes_on_from_a_saved_state() -> None:
    y, _, mask = series(length=40)
    tokenizer = KinematicTokenizer(lag=2, channels=CHANNELS).fit(y)
    for k in range(20):
        tokenizer.update(y[:, k], None, mask[:, k])
        if k == 5:
            early = tokenizer.state_dict()
    state = tokenizer.state_dict()
    for name, part in state["stream"].items():
        assert not isinstance(part, Tensor) or part.shape == early["stream"][name].shape
    other = KinematicTokenizer(lag=2, channels=CHANNELS)
    other.load_state_dict(copy.deepcopy(state))
    assert other.noise_ratio == tokenizer.noise_ratio and other.noise == tokenizer.noise
    for k in range(20, 40):
        assert torch.equal(
            other.update(y[:, k], None, mask[:, k]), tokenizer.update(y[:, k], None, mask[:, k])
        )
    assert torch.equal(other.transform(y, None, mask), tokenizer.transform(y, None, mask))


def test_the_newest_acceleration_is_always_zero() -> None:
    """The natural end of a spline of order 2: so lag 0 offers (x, v), and at lag 1 the jerk repeats -a / d."""
    y, times, _ = series()
    knots = torch.cat((times, times[:, -1:] + 1.0), 1)  # one more knot without an observation
    mask = torch.ones(B, T + 1, dtype=torch.bool)
    mask[:, -1] = False
    after = torch.cat((y, y[:, -1:]), 1)
    newest = plain(lag=None).transform(after, knots, mask)[:, -1]
    assert newest[:, 2].abs().max() < 1e-12 and newest[:, :2].abs().min() > 1e-3
    same(newest[:, :2], plain(lag=0).transform(y, times)[:, -1, :2])
    made = plain(lag=1).transform(y, times)[:, 1:]  # the first token knows two points: a line
    same(made[..., 3], -made[..., 2] / times.diff(dim=1)[:, 1:])
    lagged = plain(lag=2).transform(y, times)
    assert (lagged[..., 3] + lagged[..., 2] / times.diff(dim=1)[:, :-1]).abs().min() > 1e-6
    for order, name in ((2, "a"), (2, "sd_j"), (3, "j")):
        with pytest.raises(
            ConfigError, match=f"channels: got '{name}' at order {order} and lag 0, .* lag >= 1"
        ):
            KinematicTokenizer(order, lag=0, channels=(name,))


def test_units() -> None:
    y, times, mask = series()
    base = plain(lag=2).transform(y, times, mask)
    wide = plain(lag=2, noise=2.0 * 9).transform(-3 * y, times, mask)
    same(wide[..., :4], -3 * base[..., :4])
    same(wide[..., 4:8], 3 * base[..., 4:8])
    same(wide[..., 8], -base[..., 8])
    slow = plain(lag=2, noise_ratio=0.7 / 60**3).transform(y, 60 * times + 5, mask)
    units = 60.0 ** torch.arange(4, dtype=torch.float64)
    same(slow[..., :8] * units.repeat(2), base[..., :8], atol=1e-9)


def test_float32_observations_lose_their_own_rounding_only() -> None:
    y, times, _ = series()
    short = plain(lag=2).transform(y.float(), times)
    assert short.dtype == torch.float32
    assert torch.equal(short, plain(lag=2).transform(y.float().double(), times).float())
    tokenizer = plain(lag=2)
    streamed = [tokenizer.update(y[:, k].float(), float(times[0, k])) for k in range(3)][-1]
    assert streamed.dtype == torch.float32


@pytest.mark.parametrize("lag", [0, 1, 3, None])
def test_one_matrix_on_a_regular_grid(lag: int | None) -> None:
    y, _, _ = series()
    tokenizer = plain(lag=lag, channels=("v", "x"))
    tokenizer.normalise, tokenizer.scale = True, None
    tokenizer.fit(y, 0.5 * torch.arange(T))
    matrix = tokenizer.matrix(T, 0.5)
    want = tokenizer.transform(y, 0.5 * torch.arange(T))
    same(torch.einsum("kct,bt->bkc", matrix, y).nan_to_num(7.0), want.nan_to_num(7.0))


def test_what_fit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    y = 0.1 * torch.randn(30, 60, generator=generator).cumsum(1).cumsum(1)  # q near 0.01
    y = y + torch.randn(30, 60, generator=generator)
    tokenizer = KinematicTokenizer(channels=CHANNELS).fit(y)
    assert 0.004 < tokenizer.noise_ratio < 0.025 and 0.85 < tokenizer.noise < 1.15
    made = tokenizer.transform(y)
    torch.testing.assert_close(made[..., :4].square().mean((0, 1)), torch.ones(4), atol=1e-3, rtol=0)
    innovation = made[:, 2:, 8]
    assert abs(innovation.square().mean() - 1) < 0.1 and abs(innovation.mean()) < 0.1
    given = KinematicTokenizer(noise_ratio=0.01).fit(y)
    assert given.noise_ratio == 0.01 and 0.85 < given.noise < 1.15
    with pytest.raises(
        NumericError, match="observations: got series on polynomials of degree 1, expected noise"
    ):
        KinematicTokenizer().fit(torch.arange(9.0)[None])


def test_what_is_not_known_yet_says_so() -> None:
    y, _, _ = series()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :4] = False
    made = plain(lag=1).transform(torch.where(mask, y, math.nan), None, mask)
    unknown = made[0, :, 0].isnan()
    assert unknown.tolist() == [True] * 4 + [False] * (T - 5)  # token 4 has seen knots 4 and 5
    assert made[0, :, 9].tolist() == [1.0] * 4 + [0.0] * (T - 5)
    assert not made[0, :, 8].isnan().any() and not made[1:].isnan().any()


Y = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


def streamed(*values: Any, **options: Any) -> Any:
    tokenizer = plain(**options)
    tokenizer.update(torch.zeros(2), 0.0, torch.tensor([False, False]) if options.get("integral") else None)
    return tokenizer.update(*values)


BAD: dict[str, tuple[type[KalmanRLError], str, Callable[[], Any]]] = {
    "order": (ConfigError, "order: got 4, expected 1, 2 or 3", lambda: KinematicTokenizer(4)),
    "lag": (ConfigError, "lag: got -1, expected an integer from 0 to 64", lambda: KinematicTokenizer(lag=-1)),
    "ratio": (
        NumericError,
        "noise_ratio: got 0.0, expected a finite",
        lambda: KinematicTokenizer(noise_ratio=0.0),
    ),
    "method": (
        NumericError,
        "noise_ratio: got 'gcv', .*'likelihood'",
        lambda: KinematicTokenizer(noise_ratio="gcv"),
    ),
    "noise": (
        NumericError,
        "noise: got -1, expected a finite number > 0",
        lambda: KinematicTokenizer(noise=-1),
    ),
    "channel": (
        ConfigError,
        "channel: got 'V', .*did you mean 'v'",
        lambda: KinematicTokenizer(channels=("V",)),
    ),
    "text": (
        ConfigError,
        "channels: got 'xv', expected different",
        lambda: KinematicTokenizer(channels="xv"),
    ),
    "twice": (ConfigError, "channels: got", lambda: KinematicTokenizer(channels=("x", "x"))),
    "no such": (
        ConfigError,
        "channels: got 'a' at order 1 .*; a path of order 1 has none, raise",
        lambda: KinematicTokenizer(1, channels=("a",)),
    ),
    "unfitted": (ConfigError, "tokenizer: got no scale yet", lambda: KinematicTokenizer().transform(Y)),
    "no noise": (
        ConfigError,
        "tokenizer: got no noise yet",
        lambda: KinematicTokenizer(normalise=False).matrix(3),
    ),
    "short": (
        ShapeError,
        "observations: got 6 knots, expected more than the lag of 6",
        lambda: plain(lag=6).transform(Y),
    ),
    "NaN": (NumericError, "observation: got nan, .* mask it out", lambda: plain().transform(Y.log())),
    "unsorted": (
        NumericError,
        "times: got 4.0, expected more",
        lambda: plain().transform(Y, torch.tensor([0.0, 1.0, 5.0, 4.0, 6.0, 7.0])),
    ),
    "missing": (NumericError, "observation: got 0 observed", lambda: plain().transform(Y, None, Y > 99)),
    "noise of an observation": (
        NumericError,
        "relative_noise: got 0.0, expected a finite variance > 0",
        lambda: plain().transform(Y, relative_noise=0.0),
    ),
    "unit of time": (
        NumericError,
        "times: got steps from 1e-150 to 1e-150, .* another unit",
        lambda: plain().transform(Y, 1e-150 * torch.arange(6, dtype=torch.float64)),
    ),
    "length": (ConfigError, "length: got 1, expected an integer from 2", lambda: plain().matrix(1)),
    "stream without lag": (
        ConfigError,
        "lag: got None, expected a number",
        lambda: plain(lag=None).update(Y[:, 0]),
    ),
    "stream of numbers": (ShapeError, "observation: got float", lambda: plain().update(1.0)),
    "stream width": (
        ShapeError,
        r"observation: got torch.float32, shape \(3,\)",
        lambda: streamed(torch.zeros(3)),
    ),
    "stream time": (NumericError, "time: got 0.0, expected more than 0.0", lambda: streamed(Y[:, 0], 0.0)),
    "stream NaN time": (NumericError, "time: got nan", lambda: streamed(Y[:, 0], math.nan)),
    "stream NaN": (
        NumericError,
        r"observation: got nan, .*\(series,\) = \(1,\)",
        lambda: streamed(torch.tensor([0.0, math.nan])),
    ),
    "stream mask": (ShapeError, "mask: got torch.float32", lambda: streamed(Y[:, 0], 1.0, Y[:, 0])),
    "stream list": (ShapeError, "mask: got list", lambda: streamed(Y[:, 0], 1.0, [True, True])),
    "stream noise": (
        NumericError,
        "relative_noise: got 'a', expected a number",
        lambda: plain().update(Y[:, 0], relative_noise="a"),
    ),
    "first integral": (
        NumericError,
        "mask: got an integral observed at the first",
        lambda: plain(integral=True).update(Y[:, 0]),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    kind, message, call = BAD[case]
    with pytest.raises(kind, match=f"^{message}"):
        call()


def test_a_refused_observation_changes_nothing() -> None:
    tokenizer = plain()
    tokenizer.update(Y[:, 0])
    before = tokenizer.state_dict()
    with pytest.raises(NumericError):
        tokenizer.update(torch.tensor([1.0, math.inf]))
    after = tokenizer.state_dict()
    assert all(
        torch.equal(before["stream"][k], after["stream"][k]) for k in ("time", "mean", "evidence", "seen")
    )
