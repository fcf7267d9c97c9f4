"""The learned, the token-wise and the robust filter against statsmodels, dense normals and plain loops."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.tsa.statespace.structural import UnobservedComponents
from torch import Tensor

from kalman_rl.errors import ConfigError, NumericError, ShapeError
from kalman_rl.methods import make_method
from kalman_rl.numerics.likelihood import pack, peak, profile
from kalman_rl.numerics.log_bins import bin_of, edge
from kalman_rl.objectives import ratio
from kalman_rl.objectives.ratio.learned import LOG_GRID, AutoFiltered, observed_series, rounding
from kalman_rl.objectives.ratio.robust import BINS, NORMAL_MEDIAN, RobustFiltered
from kalman_rl.objectives.ratio.token_noise import NoiseFiltered, NoiseModel, calibrate
from kalman_rl.objectives.ratio.transforms import KalmanFiltered
from kalman_rl.objectives.rollouts import Rollouts

INF = math.inf
quick = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def close(actual: Any, expected: Any, rtol: float = 1e-11, atol: float = 1e-12) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual), torch.as_tensor(expected), rtol=rtol, atol=atol, check_dtype=False
    )


# ---- plain definitions


def naive_row(z: np.ndarray, mask: np.ndarray, q: float, r: np.ndarray, p0: float, c: float) -> np.ndarray:
    """One sequence, one token after another: time passes in holes, not in padding; innovations clipped."""
    out, x, p = np.zeros(len(z)), 0.0, p0
    observed = np.flatnonzero(mask)
    for t in range(observed[0], observed[-1] + 1) if len(observed) else []:
        p = p + q
        if mask[t]:
            gain = 1.0 if math.isinf(p) else p / (p + r[t])
            limit = c * math.sqrt(p + r[t])
            x = x + gain * min(max(z[t] - x, -limit), limit)
            p, out[t] = r[t] * gain, x
    return out


def naive_filtered(part: Any, rollouts: Rollouts, logp: Tensor) -> np.ndarray:
    """(B, T) log-weight of a filter of this file by its definition (the learned one at its start values)."""
    before = rollouts.logp_behaviour if getattr(part, "behaviour", False) else rollouts.logp_old
    mask, old = rollouts.mask.numpy(), before.double().numpy()
    z = np.where(mask, logp.detach().double().numpy() - old, 0.0)
    if isinstance(part, NoiseFiltered):
        r, p0, c = part.floor + part.scale * (1 - np.exp(old)) ** 2, part.initial_variance, INF
    else:
        r = np.full(mask.shape, part.observation_noise)
        p0, c = getattr(part, "initial_variance", INF), getattr(part, "threshold", INF)
    out, sequence = np.zeros(mask.shape), rollouts.sequence_index.numpy()
    for name in np.unique(sequence):
        here = sequence == name
        out[here] = naive_row(z[here], mask[here], part.process_noise, r[here], p0, c)
    return out


naive_auto = naive_noise = naive_robust = naive_filtered

PARTS: dict[str, Any] = {
    "auto": AutoFiltered(0.02, 0.3),
    "noise": NoiseFiltered(0.05, 0.4, 0.01),
    "noise+zero start": NoiseFiltered(0.05, 0.4, 0.01, initial_variance=0.0),
    "noise+behaviour": NoiseFiltered(0.05, 0.4, 0.01, behaviour=True),
    "robust": RobustFiltered(0.01, 0.05, INF, threshold=1.0),
    "robust+start": RobustFiltered(0.0, 0.05, 0.1, threshold=0.5),
}
every = pytest.mark.parametrize("name", list(PARTS))


def random_rollouts(seed: int, rows: int = 6, length: int = 24, holes: bool = True, segments: bool = False):
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    start, size = uniform(rows, 1) * length / 3, 1 + uniform(rows, 1) * length
    place = torch.arange(length)[None]
    mask = (place >= start.floor()) & (place < start.floor() + size.floor())
    if holes:
        mask &= uniform(rows, length) < 0.75
    old = -3 * uniform(rows, length)
    spikes = 4.0 * (uniform(rows, length) < 0.1)
    logp = old + 0.4 * torch.randn(rows, length, generator=g, dtype=torch.float64) + spikes
    behaviour = old + 0.1 * torch.randn(rows, length, generator=g, dtype=torch.float64)
    segment = (uniform(rows, length) < 0.15).cumsum(1) if segments else None
    logp[~mask] = math.nan
    options = {"logp_behaviour": behaviour, "segment": segment, "allow_empty": True}
    return Rollouts(old, mask, **options), logp


def part_of(rollouts: Rollouts, change: Any) -> Rollouts:
    """Every (B, T) field changed by ``change(tensor, fill)``."""
    names = ("logp_old", "mask", "logp_behaviour", "segment")
    fields = {n: getattr(rollouts, n) for n in names if getattr(rollouts, n) is not None}
    return Rollouts(**{n: change(v, 0) for n, v in fields.items()}, allow_empty=True)


@every
@pytest.mark.parametrize("segments", [False, True])
@quick
@given(seed=seeds)
def test_definition(name: str, segments: bool, seed: int) -> None:
    rollouts, logp = random_rollouts(seed, segments=segments)
    out = PARTS[name](logp, rollouts)
    close(out.log_weight, naive_filtered(PARTS[name], rollouts, logp))
    assert (out.log_ratio[~rollouts.mask] == 0).all() and out.log_weight.dtype == torch.float64
    assert out.info.gain.min() >= 0 and out.info.gain.max() <= 1
    assert all(field.shape == logp.shape and not field.isnan().any() for field in out.info)


@every
@quick
@given(seed=seeds)
def test_invariances(name: str, seed: int) -> None:
    part, (rollouts, logp) = PARTS[name], random_rollouts(seed)
    weight, state = part(logp, rollouts).log_weight, part.statistics(logp, rollouts)

    order = torch.randperm(len(logp), generator=torch.Generator().manual_seed(seed))
    permuted = part_of(rollouts, lambda v, _: v[order])
    close(part(logp[order], permuted).log_weight, weight[order])
    close(part.statistics(logp[order], permuted), state)

    def pad(v: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(v, (2, 3), value=fill)

    padded = part_of(rollouts, pad)
    close(part(pad(logp, math.nan), padded).log_weight, pad(weight, 0.0))
    close(part.statistics(pad(logp, math.nan), padded), state)

    packed = part_of(rollouts, lambda v, _: v.reshape(1, -1))
    packed = dataclasses.replace(packed, segment=rollouts.sequence_index.reshape(1, -1))
    close(part(logp.reshape(1, -1), packed).log_weight, weight.reshape(1, -1))
    close(part.statistics(logp.reshape(1, -1), packed), state)

    single = part(logp.float(), part_of(rollouts, lambda v, _: v.float() if v.is_floating_point() else v))
    assert single.log_weight.dtype == torch.float32
    if not name.startswith("robust"):  # a spike at the threshold may fall on either side
        close(single.log_weight, weight, rtol=1e-4, atol=1e-5)


@every
@quick
@given(seed=seeds, cut=st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_statistics_add_up_over_any_split(name: str, seed: int, cut: list[int]) -> None:
    part, (rollouts, logp) = PARTS[name], random_rollouts(seed)
    total = part.initial()
    edges = sorted({0, 6, *cut})
    for a, b in itertools.pairwise(edges):
        total = total + part.statistics(logp[a:b], part_of(rollouts, lambda v, _, a=a, b=b: v[a:b]))
    state = part.statistics(logp, rollouts)
    assert state.dtype == torch.float64 and state.shape == part.initial().shape and state.isfinite().all()
    close(total, state)


@every
def test_the_past_decides_and_bad_states_do_not(name: str) -> None:
    part, (rollouts, logp) = PARTS[name], random_rollouts(0, 40)
    start = part(logp, rollouts).log_weight
    state = part.statistics(logp, rollouts)
    ones, nan = torch.ones_like(state), torch.full_like(state, math.nan)
    for bad in (part.initial(), state * 1e-6, nan, ones * INF):
        assert torch.equal(part.fitted(bad)(logp, rollouts).log_weight, start)
    learned = part.fitted(state)
    assert learned == part.fitted(state) and pickle.loads(pickle.dumps(learned)) == learned
    if hasattr(part, "observation_noise"):  # the same again changes nothing
        again = part.fitted(0.9 * state + state)
        assert again.observation_noise == pytest.approx(learned.observation_noise)
    weight = learned(logp, rollouts).log_weight
    assert weight.isfinite().all()
    if name not in ("noise", "noise+zero start"):  # these have nothing to learn from
        assert not torch.equal(weight, start)
        assert 0 <= part.memory < 1


@every
def test_an_unchanged_policy_teaches_nothing(name: str) -> None:
    rollouts, _ = random_rollouts(1, 40)
    rollouts = dataclasses.replace(rollouts, logp_behaviour=rollouts.logp_old)
    state = PARTS[name].statistics(rollouts.logp_old, rollouts)
    assert (state == 0).all()
    empty = Rollouts(torch.zeros(2, 3), torch.zeros(2, 3), allow_empty=True, logp_behaviour=torch.zeros(2, 3))
    assert (PARTS[name].statistics(torch.zeros(2, 3), empty) == 0).all()


@every
@pytest.mark.parametrize("segments", [False, True])
def test_rounding_of_an_unchanged_policy_teaches_nothing(name: str, segments: bool) -> None:
    """Whether the log-ratio of an unchanged sequence is 0 to the last bit depends on the batch that it was computed
    in, and must not be seen in what is learned."""
    rollouts, logp = random_rollouts(1, 12, segments=segments)
    still = (torch.arange(12) % 2 == 0)[:, None]
    wave = torch.where(torch.arange(24) % 3 == 0, -2e-5, 1e-5)

    def learned(error: Tensor | float) -> Tensor:
        behaviour = torch.where(still, rollouts.logp_old + error, rollouts.logp_behaviour).float()
        given = part_of(rollouts, lambda v, _: v.float() if v.is_floating_point() else v)
        given = dataclasses.replace(given, logp_behaviour=behaviour)
        return PARTS[name].statistics(torch.where(still, rollouts.logp_old + error, logp).float(), given)

    assert torch.equal(learned(wave), learned(0.0))
    if name not in ("noise", "noise+zero start"):
        assert learned(0.0).any() and not torch.equal(learned(1e2 * wave), learned(0.0))


@every
def test_gradient_stops(name: str) -> None:
    rollouts, logp = random_rollouts(2)
    logp.requires_grad_()
    assert not PARTS[name](logp, rollouts).log_weight.requires_grad
    assert not PARTS[name].statistics(logp, rollouts).requires_grad


# ---- reductions


def same_ratio(part: Any, other: Any, seed: int = 3, atol: float = 0.0) -> None:
    for segments in (False, True):
        rollouts, logp = random_rollouts(seed, segments=segments)
        for r, x in ((rollouts, logp), (part_of(rollouts, lambda v, _: v[:1, :]), logp[:1])):
            a, b = part(x, r), other(x, r)
            close(a.log_weight, b.log_weight, rtol=0, atol=atol)
            if b.info is not None and atol == 0:
                assert all(torch.equal(u, v) for u, v in zip(a.info, b.info, strict=True))


@pytest.mark.parametrize("p0", [0.0, 0.5, INF])
@pytest.mark.parametrize("q", [0.0, 1e-6, 0.3])
def test_robust_without_a_threshold_is_kpo_to_the_last_bit(q: float, p0: float) -> None:
    same_ratio(RobustFiltered(q, 0.7, p0, threshold=INF), KalmanFiltered(q, 0.7, p0))
    same_ratio(RobustFiltered(q, 1e6, p0), KalmanFiltered(q, 1e6, p0))  # nothing is a spike


@pytest.mark.parametrize("p0", [0.0, 0.5, INF])
def test_constant_token_noise_is_kpo_to_the_last_bit(p0: float) -> None:
    same_ratio(NoiseFiltered(0.7, 0.0, 0.1, p0), KalmanFiltered(0.1, 0.7, p0))
    same_ratio(NoiseFiltered(0.7, 1e-300, 0.1, p0), KalmanFiltered(0.1, 0.7, p0), atol=1e-12)  # continuous


def test_auto_at_its_start_is_kpo_diffuse() -> None:
    same_ratio(AutoFiltered(), make_method("kpo_diffuse").ratio)


@pytest.mark.parametrize(
    "part", [NoiseFiltered(0.1, 1.0, INF), RobustFiltered(INF, threshold=INF), AutoFiltered(INF)]
)
def test_infinite_process_noise_is_grpo(part: Any) -> None:
    same_ratio(part, lambda logp, rollouts: ratio.token(logp, rollouts)._replace(info=None), atol=1e-15)


@pytest.mark.parametrize(
    "part", [NoiseFiltered(0.1, 0.0, 0.0), RobustFiltered(0.0, 1.0, INF, threshold=INF), AutoFiltered(0.0)]
)
def test_still_and_diffuse_ends_in_gspo(part: Any) -> None:
    rollouts, logp = random_rollouts(4)
    ours, theirs = part(logp, rollouts).log_weight, ratio.sequence_mean(logp, rollouts).log_weight
    for row, mask in enumerate(rollouts.mask):
        last = mask.nonzero().flatten()[-1:]
        close(ours[row, last], theirs[row, last])


def test_learned_extremes_are_gspo_and_grpo() -> None:
    g = torch.Generator().manual_seed(0)
    still = 0.1 + 0.2 * torch.tensor([1.0, -1.0]).repeat(8, 40) * torch.ones(8, 1)
    wandering = torch.randn(8, 80, generator=g).cumsum(1)
    rollouts = Rollouts(torch.zeros(8, 80), torch.ones(8, 80))
    auto = AutoFiltered()
    assert auto.fitted(auto.statistics(still, rollouts)).process_noise == 0.0
    learned = auto.fitted(auto.statistics(wandering, rollouts))
    weight = learned(wandering, rollouts).log_weight
    assert (weight - wandering).abs().max() < 0.2  # near the token ratio, against steps of size 1


# ---- the learned filter


def local_level(seed: int, rows: int, length: int, q: float, r: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    walk = rng.normal(0, math.sqrt(q), (rows, length)).cumsum(1)
    return walk + rng.normal(0, 0.3, (rows, 1)) + rng.normal(0, math.sqrt(r), (rows, length))


def full(z: np.ndarray, mask: np.ndarray | None = None) -> tuple[Tensor, Rollouts]:
    mask = np.ones(z.shape, bool) if mask is None else mask
    return torch.from_numpy(z), Rollouts(
        torch.zeros(z.shape).double(), torch.from_numpy(mask), allow_empty=True
    )


@pytest.mark.parametrize("holes", [False, True])
def test_likelihood_is_the_filters_own_and_that_of_the_dense_normal(holes: bool) -> None:
    rollouts, logp = random_rollouts(5, holes=holes)
    state = AutoFiltered().statistics(logp, rollouts)
    curve, n = profile(state), state[0].item()
    assert n == (rollouts.mask.sum(1) - 1).clamp(min=0).sum()
    for i in (0, 1, 9, 20, 32):
        q, scale = math.exp(LOG_GRID[i]), state[1 + i].item() / n
        part = KalmanFiltered(q * scale, scale, INF)(logp, rollouts)
        close(curve[i], part.info.log_likelihood.sum(), rtol=1e-10)
        dense = 0.0
        for z, mask in zip(part.log_ratio.numpy(), rollouts.mask.numpy()):
            place = np.flatnonzero(mask)
            if len(place) > 1:  # the steps between observed tokens, whose variance is q gap + 2 in units of R
                near = np.eye(len(place) - 1, k=1) + np.eye(len(place) - 1, k=-1)
                covariance = scale * (np.diag(q * np.diff(place) + 2.0) - near)
                step = np.diff(z[place])
                dense += scipy.stats.multivariate_normal(np.zeros(len(step)), covariance).logpdf(step)
        close(curve[i], dense, rtol=1e-9)


def statsmodels_likelihood(rows: np.ndarray, q: float, r: float) -> float:
    """Sum over rows of the local-level likelihood after the first observation, NaN = missing."""
    total = 0.0
    for z in rows:
        model = UnobservedComponents(z, "llevel", use_exact_diffuse=True)
        total += model.smooth([r, q]).llf_obs[np.flatnonzero(~np.isnan(z))[0] + 1 :].sum()
    return total


@pytest.mark.parametrize("q", [0.01, 0.05, 2.0])
@pytest.mark.parametrize("rows, length", [(1, 600), (4, 120)])
def test_statsmodels_finds_the_same_noises(q: float, rows: int, length: int) -> None:
    z = local_level(int(1e4 * q) + rows, rows, length, q * 0.04, 0.04)
    mask = np.random.default_rng(0).random(z.shape) < (1.0 if rows == 1 else 0.9)
    auto = AutoFiltered()
    ours = auto.fitted(auto.statistics(*full(z, mask)))
    holed = np.where(mask, z, np.nan)

    def loss(log: np.ndarray) -> float:
        return -statsmodels_likelihood(holed, *np.exp(log))

    if rows == 1:
        model = UnobservedComponents(z[0], "llevel", use_exact_diffuse=True)
        r, q_ = model.fit(disp=False, maxiter=200).params
    else:
        start = np.log([q * 0.04, 0.04])
        q_, r = np.exp(scipy.optimize.minimize(loss, start, method="Nelder-Mead", tol=1e-3).x)
    best = -loss(np.log([q_, r]))
    found = statsmodels_likelihood(holed, ours.process_noise, ours.observation_noise)
    assert found > best - 0.02  # nats, of hundreds: the grid and the interpolation cost no more
    assert ours.observation_noise == pytest.approx(r, rel=0.01)
    assert math.log(ours.process_noise) == pytest.approx(math.log(q_), abs=0.03)


@pytest.mark.parametrize("q", [1e-4, 1e-2, 1.0])
def test_known_noises_are_recovered(q: float) -> None:
    """Twice the log-likelihood ratio of the estimate to the truth is chi-squared with two degrees."""
    auto, excess = AutoFiltered(), []
    for seed in range(8):
        logp, rollouts = full(local_level(seed, 40, 250, q * 0.09, 0.09))
        found = auto.fitted(auto.statistics(logp, rollouts))
        truth = KalmanFiltered(q * 0.09, 0.09, INF)
        best, true = (part(logp, rollouts).info.log_likelihood.sum().item() for part in (found, truth))
        excess.append(2 * (best - true))
        assert abs(math.log(found.process_noise / found.observation_noise / q)) < 1.5
        assert found.observation_noise == pytest.approx(0.09, rel=0.1)
    assert min(excess) >= -0.01
    assert scipy.stats.kstest(excess, scipy.stats.chi2(2).cdf).pvalue > 1e-3


def test_likelihood_depends_on_scale_only_through_r() -> None:
    z = local_level(1, 5, 60, 0.01, 0.1)
    auto = AutoFiltered()
    one, ten = (auto.fitted(auto.statistics(*full(k * z))) for k in (1.0, 1e-4))
    assert ten.observation_noise == pytest.approx(1e-8 * one.observation_noise, rel=1e-9)
    assert ten.process_noise == pytest.approx(1e-8 * one.process_noise, rel=1e-9)


@given(x=st.floats(-0.49, 0.49), bend=st.floats(0.1, 50))
@quick
def test_peak_of_a_parabola(x: float, bend: float) -> None:
    """With n = 2 and quadratic = 2 the profile is -log_determinant / 2 and a constant."""
    grid = [-INF, -1.0, 0.0, 1.0, 2.0]
    wanted = torch.tensor([99.0, *(2 * bend * (p - x) ** 2 for p in grid[1:])], dtype=torch.float64)
    found = peak(pack(2, torch.full((5,), 2.0), wanted), grid, 1.0)
    assert found is not None
    assert found.log_shape == pytest.approx(x, abs=6e-4) and found.scale == pytest.approx(1.0)
    wanted[0] = -1.0  # the limit wins: no polynomial through infinity
    assert peak(pack(2, torch.full((5,), 2.0), wanted), grid, 1.0) == (-INF, 1.0)
    assert peak(pack(2, torch.full((5,), 2.0), wanted), grid, 3.0) is None


# ---- the noise of a token


def test_first_order_error_of_a_log_probability() -> None:
    """The derivative of log softmax, by autograd: its squared norm is the bracket of the module's formula."""
    z = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    p = z.softmax(1)
    for y in range(7):
        slope = torch.autograd.functional.jacobian(lambda z, y=y: z.log_softmax(1)[:, y].sum(), z)
        bracket = slope.square().sum(1)
        f = (1 - p[:, y]) ** 2
        close(bracket, f + (p.square().sum(1) - p[:, y] ** 2))
        assert (bracket >= f).all() and (bracket <= 2 * f + 1e-15).all()
        rollouts = Rollouts(
            p[:, [y]].log(), torch.ones(50, 1), sum_pi_squared=p.square().sum(1, keepdim=True)
        )
        close(rollouts.score_norm_squared[:, 0], bracket)


def rounded(seed: int, centre: float, spread: float, tokens: int = 8000) -> tuple[Tensor, Tensor]:
    """Log-probabilities of sampled tokens, and their errors when the logits pass through bfloat16."""
    g = torch.Generator().manual_seed(seed)
    z = spread * torch.randn(tokens, 128, generator=g, dtype=torch.float64)
    z[:, 0] = 8 * torch.rand(tokens, generator=g, dtype=torch.float64)  # from hesitant to certain
    z += centre
    if centre:
        z = z.clamp(16.0, 31.9)
    exact = z.log_softmax(1)
    chosen = torch.multinomial(exact.exp(), 1, generator=g)
    rough = z.bfloat16().double().log_softmax(1)
    return exact.gather(1, chosen).T, (rough - exact).gather(1, chosen).T


def noise_likelihood(error: Tensor, variance: Tensor) -> float:
    return torch.distributions.Normal(0.0, variance.sqrt()).log_prob(error).mean().item()


def test_bfloat16_logits_of_one_exponent_have_this_noise() -> None:
    logp, error = rounded(0, 23.9, 1.2)
    model = calibrate(error, logp, torch.ones_like(error, dtype=torch.bool))
    constant = error.square().mean().expand_as(error)
    assert noise_likelihood(error, model.variance(logp)) > noise_likelihood(error, constant) + 0.1  # nats
    sigma2 = 0.125**2 / 12  # of rounding to a multiple of 1/8, which is bfloat16 from 16 to 32
    assert 0.95 * sigma2 < model.scale < 2 * sigma2 and model.floor < 0.01 * model.scale
    p = logp.exp()
    shares = []
    for low, high in ((0.0, 0.1), (0.1, 0.4), (0.4, 0.7), (0.7, 0.95)):
        here = (p >= low) & (p < high)
        shares.append(error[here].square().mean() / model.variance(logp)[here].mean())
        assert 0.7 < shares[-1] < 1.3
    assert (error[p > 0.9].square().mean() / error.square().mean()) < 0.1  # where a constant is 10 times off


def test_logits_around_zero_do_not_have_it() -> None:
    """The limit that the docstring states: small logits round less, and they are the unlikely tokens."""
    logp, error = rounded(0, 0.0, 1.2)
    model = calibrate(error, logp, torch.ones_like(error, dtype=torch.bool))
    here = (logp.exp() > 0.1) & (logp.exp() < 0.4)
    assert error[here].square().mean() > 1.5 * model.variance(logp)[here].mean()


@pytest.mark.parametrize("floor, scale", [(0.01, 0.2), (0.2, 0.2), (1e-6, 0.04), (0.3, 0.0)])
def test_calibration_recovers_the_model_and_matches_a_direct_search(floor: float, scale: float) -> None:
    g = torch.Generator().manual_seed(1)
    logp = torch.rand(100, 200, generator=g, dtype=torch.float64).clamp(min=1e-3).log()
    truth = NoiseModel(floor, scale)
    error = truth.variance(logp).sqrt() * torch.randn(100, 200, generator=g, dtype=torch.float64)
    mask = torch.rand(100, 200, generator=g) < 0.8
    found = calibrate(torch.where(mask, error, math.nan), logp, mask)
    assert found.floor == pytest.approx(floor, rel=0.1, abs=2e-6)
    assert found.scale == pytest.approx(scale, rel=0.06, abs=0.03)

    def loss(log: np.ndarray) -> float:
        return -noise_likelihood(error[mask], NoiseModel(*np.exp(log)).variance(logp[mask])) * int(mask.sum())

    start = np.log([found.floor, max(found.scale, 1e-4)])
    best = scipy.optimize.minimize(loss, start, method="Nelder-Mead").fun
    assert -noise_likelihood(error[mask], found.variance(logp[mask])) * int(mask.sum()) < best + 0.05


def test_calibration_refuses_what_teaches_nothing() -> None:
    logp, mask = -torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(
        NumericError, match="^log_ratio: got 6 tokens with log-ratios that are all 0, expected"
    ):
        calibrate(torch.zeros(2, 3), logp, mask)
    with pytest.raises(NumericError, match="^log_ratio: got 0 tokens"):
        calibrate(torch.ones(2, 3), logp, ~mask)
    with pytest.raises(NumericError, match="^log_ratio: got nan at row 0, token 0"):
        calibrate(torch.full((2, 3), math.nan), logp, mask)
    with pytest.raises(ShapeError, match="^logp_old: got shape"):
        calibrate(torch.ones(2, 3), logp[:1], mask)


def test_learning_the_samplers_noise_is_calibration() -> None:
    rollouts, logp = random_rollouts(6, 20, 40)
    part = NoiseFiltered(behaviour=True)
    learned = part.fitted(part.statistics(logp, rollouts))
    direct = calibrate(rollouts.logp_old - rollouts.logp_behaviour, rollouts.logp_behaviour, rollouts.mask)
    assert learned.model == direct
    before, after = part.process_noise / 1.1, learned.process_noise / (direct.floor + direct.scale)
    assert after == pytest.approx(before)
    assert part.inputs == ("logp_behaviour",) and NoiseFiltered().inputs == ()
    with pytest.raises(ConfigError, match="^logp_behaviour: got None"):
        part(logp, dataclasses.replace(rollouts, logp_behaviour=None))


# ---- the robust filter


@pytest.mark.parametrize("size", [1.0, 1e2, 1e6])
def test_a_spike_moves_the_ratio_by_a_bounded_amount(size: float) -> None:
    z = torch.zeros(1, 40).double()
    z[0, 20] = size
    rollouts = Rollouts(torch.zeros(1, 40).double(), torch.ones(1, 40))
    part = RobustFiltered(1e-3, 0.01, INF)
    out, plain = part(z, rollouts), KalmanFiltered(1e-3, 0.01, INF)(z, rollouts)
    bound = (plain.info.gain * plain.info.innovation_variance.sqrt())[0, 20] * part.threshold
    close(out.log_weight[0, 20], bound)
    assert plain.log_weight[0, 20] > out.log_weight[0, 20]
    assert out.info.innovation[0, 20] == size
    close(out.info.gain[0, 20] * size, bound)


def test_robust_diffuse_start_believes_the_first_token_and_a_prior_does_not() -> None:
    z = torch.zeros(1, 10)
    z[0, 0] = 50.0
    rollouts = Rollouts(torch.zeros(1, 10), torch.ones(1, 10))
    diffuse = RobustFiltered(observation_noise=0.01, initial_variance=INF)
    assert diffuse(z, rollouts).log_weight[0, 0] == 50
    assert RobustFiltered(observation_noise=0.01, initial_variance=0.01)(z, rollouts).log_weight[0, 0] < 0.15


@pytest.mark.parametrize("q", [1e-6, 0.5])
def test_robust_scale_is_learned_in_spite_of_spikes(q: float) -> None:
    z = local_level(0, 40, 250, q * 0.04, 0.04)
    spikes = np.random.default_rng(1).random(z.shape) < 0.03
    part = RobustFiltered(q, 1.0, 2.0)
    clean = part.fitted(part.statistics(*full(z)))
    spiky = part.fitted(part.statistics(*full(z + 5.0 * spikes)))
    assert clean.observation_noise == pytest.approx(0.04, rel=0.06)
    assert spiky.observation_noise == pytest.approx(0.04, rel=0.2)
    for learned in (clean, spiky):
        close(learned.process_noise, q * learned.observation_noise)
        close(learned.initial_variance, 2.0 * learned.observation_noise)
    step = np.abs(np.diff(z, axis=1))
    scale = (np.median(step) / scipy.stats.norm.ppf(0.75)) ** 2 / (2 + q)
    assert clean.observation_noise == pytest.approx(scale, rel=0.02)  # up to the width of a bin
    auto = AutoFiltered()
    assert (
        auto.fitted(auto.statistics(*full(z + 5.0 * spikes))).observation_noise > 0.5
    )  # what it guards from


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("p0", [0.1, INF])
def test_what_a_clipped_filter_reports_belongs_together(segments: bool, p0: float) -> None:
    """The gain times the innovation is the step of the mean; the likelihood is the normal density of the innovation."""
    rollouts, logp = random_rollouts(3, holes=False, segments=segments)
    part = RobustFiltered(0.01, 0.05, p0, threshold=0.5)
    _, weight, info = part(logp, rollouts)
    seen, variance = rollouts.mask & info.innovation_variance.isfinite(), info.innovation_variance
    density = torch.distributions.Normal(0.0, variance[seen].sqrt()).log_prob(info.innovation[seen])
    close(info.log_likelihood[seen], density)
    assert not info.log_likelihood[~seen].any() and not info.innovation[~rollouts.mask].any()
    before = torch.where(rollouts.mask, logp - rollouts.logp_old, 0.0) - info.innovation
    close((before + info.gain * info.innovation)[rollouts.mask], weight[rollouts.mask], atol=1e-9)
    index = rollouts.sequence_index
    follows = rollouts.mask[:, 1:] & rollouts.mask[:, :-1] & (index[:, 1:] == index[:, :-1])
    close(before[:, 1:][follows], weight[:, :-1][follows], atol=1e-9)


@pytest.mark.parametrize("gap", [1, 2])
def test_two_tokens_are_enough_to_learn_from(gap: int) -> None:
    logp = torch.tensor([[0.25, 7.0, 0.75]]) if gap == 2 else torch.tensor([[0.25, 0.75, 7.0]])
    mask = torch.tensor([[1, gap == 1, gap == 2]])
    rollouts = Rollouts(torch.zeros(1, 3), mask)
    counts = RobustFiltered().statistics(logp, rollouts)
    assert counts.sum() == counts[bin_of(torch.tensor([0.5]), BINS)] == (gap == 1), (
        "a step across a hole is none"
    )
    n, *sums = AutoFiltered().statistics(logp, rollouts).tolist()
    at_rest = math.log(2), 0.25 / 2  # q = 0: the second is seen with the noise of both
    assert (
        n == 1 and sums[0] == pytest.approx(at_rest[1]) and sums[len(LOG_GRID)] == pytest.approx(at_rest[0])
    )


def test_the_noise_is_read_off_the_bin_of_the_median_step() -> None:
    """Half of the counts lie below; steps of 0 and steps beyond reason say nothing."""
    part = RobustFiltered(0.5, 1.0, 2.0, least=4.0)
    for place, share in ((100, 0.5), (1, 0.25), (BINS - 2, 1.0)):
        state = part.initial()
        state[0], state[place], state[-1] = max(8 - 16 * share, 0), 8.0, max(16 * share - 8, 0)
        scale = (edge(place + share, BINS) / NORMAL_MEDIAN) ** 2 / 2.5
        learned = part.fitted(state)
        close([learned.process_noise, learned.observation_noise, learned.initial_variance],
              [0.5 * scale, scale, 2 * scale], atol=0.0)  # fmt: skip
    for place in (0, BINS - 1):
        state = part.initial()
        state[place] = 8.0
        assert part.fitted(state) is part
    state = part.initial()
    state[100] = 4.0
    assert part.fitted(state) != part == part.fitted(state * (1 - 1e-9))
    assert dataclasses.replace(part, process_noise=INF).fitted(state).process_noise == INF


# ---- types, sizes and small parts


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_has_the_type_of_the_log_probabilities(name: str, dtype: torch.dtype) -> None:
    rollouts, logp = random_rollouts(2)
    rollouts = Rollouts(
        rollouts.logp_old.to(dtype),
        rollouts.mask,
        logp_behaviour=rollouts.logp_behaviour.to(dtype),
        allow_empty=True,
    )
    found = PARTS[name](logp.to(dtype), rollouts)
    assert {value.dtype for value in (found.log_ratio, found.log_weight, *found.info)} == {dtype}
    assert PARTS[name].statistics(logp.to(dtype), rollouts).dtype == torch.float64


def test_rounding_is_512_units_in_the_last_place() -> None:
    assert rounding(torch.zeros(1)) == 2.0**-14 and rounding(torch.zeros(1).double()) == 2.0**-43


def test_series_of_nothing_and_of_sequences_without_holes() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    value, gap, alive = observed_series(values, Rollouts(torch.zeros(3, 4), mask))
    assert value.tolist() == [[5.0, 2.0], [6.0, 3.0], [7.0, 0.0]] and value.dtype == torch.float64
    assert gap.tolist() == [[1.0]] * 3 and alive == [2, 2, 1]
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    value, gap, alive = observed_series(values, Rollouts(torch.zeros(3, 4), mask))
    assert value.tolist() == [[1.0, 5.0], [3.0, 6.0], [4.0, 7.0]] and alive == [2, 2, 2]
    assert gap.tolist() == [[1.0, 1.0], [2.0, 1.0], [1.0, 1.0]]
    value, gap, alive = observed_series(0 * values, Rollouts(torch.zeros(3, 4)))
    assert (value.shape, gap.shape, alive) == ((0, 0), (0, 1), [])


def test_time_constants_are_those_of_the_ratio_of_the_noises() -> None:
    assert KalmanFiltered(1e-6, 4.0).time_constants(100) == pytest.approx(0.05)


# ---- methods and bad values


def test_methods_are_the_parts() -> None:
    assert make_method("kpo_auto").ratio == AutoFiltered(1e-6, 1.0, 0.9)
    assert make_method("kpo_noise", floor=0.2, behaviour=True).ratio == NoiseFiltered(0.2, behaviour=True)
    assert "logp_behaviour" in make_method("kpo_noise", behaviour=True).inputs
    assert make_method("kpo_robust", threshold=3.0).ratio == RobustFiltered(threshold=3.0)
    open_ = make_method("kpo_robust", threshold=INF, initial_variance=INF).ratio
    same_ratio(open_, make_method("kpo_diffuse").ratio)
    same_ratio(make_method("kpo_robust", threshold=INF, initial_variance=0.0).ratio, make_method("kpo").ratio)
    diffuse = make_method("kpo_diffuse")
    for name in ("kpo_noise", "kpo_robust"):
        assert dataclasses.replace(make_method(name), name="", ratio=None) == dataclasses.replace(
            diffuse, name="", ratio=None
        )


@pytest.mark.parametrize(
    "part, options, message",
    [
        (AutoFiltered, {"process_noise": -1.0}, "process_noise: got -1.0"),
        (AutoFiltered, {"observation_noise": 0.0}, "observation_noise: got 0.0"),
        (AutoFiltered, {"memory": 1.0}, "memory: got 1.0, expected"),
        (AutoFiltered, {"memory": math.nan}, "memory: got nan"),
        (AutoFiltered, {"least": 0.0}, "least: got 0.0"),
        (NoiseModel, {"floor": 0.0}, "floor: got 0.0, expected 0 < floor"),
        (NoiseModel, {"scale": -1.0}, "scale: got -1.0, expected 0 <= scale"),
        (NoiseFiltered, {"floor": math.nan}, "floor: got nan"),
        (NoiseFiltered, {"scale": INF}, "scale: got inf"),
        (NoiseFiltered, {"process_noise": math.nan}, "process_noise: got nan"),
        (NoiseFiltered, {"initial_variance": -1.0}, "initial_variance: got -1.0"),
        (NoiseFiltered, {"memory": -0.1}, "memory: got -0.1"),
        (RobustFiltered, {"threshold": 0.0}, "threshold: got 0.0"),
        (RobustFiltered, {"threshold": math.nan}, "threshold: got nan"),
        (RobustFiltered, {"observation_noise": INF}, "observation_noise: got inf"),
        (RobustFiltered, {"least": INF}, "least: got inf"),
    ],
)
def test_bad_values_are_refused(part: Any, options: dict[str, float], message: str) -> None:
    with pytest.raises(NumericError, match="^" + message):
        part(**options)
