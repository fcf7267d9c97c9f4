"""The filter against a plain Python reference, statsmodels, dense linear algebra and closed forms."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.tsa.statespace.kalman_filter import KalmanFilter
from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError
from kalman_rl.kernels import jit
from kalman_rl.numerics.kalman import (
    Filtered,
    Gaussian,
    Info,
    causal_filter,
    causal_filter_loop,
    causal_mean,
    predict,
    update,
)
from tests.project.test_borders import WORDED

INF = math.inf


def scan(*args: Any, **options: Any) -> Filtered:
    """The filter without compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(jit.SWITCH, "1")
        return causal_filter(*args, **options)


FILTERS = [causal_filter, scan, causal_filter_loop]
FIELDS = ["mean", "variance", "gain", "innovation", "innovation_variance", "log_likelihood"]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


seeds = st.integers(0, 10_000)
quick = settings(max_examples=20, deadline=None, derandomize=True)


def filtered(
    z: Tensor, mask: Tensor | None = None, q=1e-6, r=1.0, p0=0.0, run=causal_filter, **options
) -> Filtered:
    mask = torch.ones_like(z, dtype=torch.bool) if mask is None else mask
    return run(z, mask, process_noise=q, observation_noise=r, initial_variance=p0, **options)


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fields(result: Filtered) -> dict[str, Tensor]:
    return dict(zip(FIELDS, (*result.state, *result.info), strict=True))


def assert_same(left: Filtered, right: Filtered, atol: float = 1e-12, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(fields(left), fields(right), atol=atol, rtol=rtol)


def reference_row(z, mask, q, r, mean, variance, segment) -> np.ndarray:
    """One row in plain floats, written from the definition alone; columns as in FIELDS."""
    length, first, rows = len(z), 0, []
    prior = (mean, variance)
    for t in range(length):
        if t == 0 or segment[t] != segment[t - 1]:
            mean, variance = prior
            first = t
        end = t
        while end + 1 < length and segment[end + 1] == segment[t]:
            end += 1
        inside = mask[t] or (any(mask[first:t]) and any(mask[t : end + 1]))
        variance += q[t] if inside else 0.0
        total = variance + r[t]
        gain = innovation = log_likelihood = 0.0
        if mask[t] and r[t] != INF:
            innovation = z[t] - mean
            if variance == INF:
                gain, mean, variance = 1.0, z[t], r[t]
            else:
                gain = variance / total
                mean, variance = mean + gain * innovation, variance * r[t] / total
                log_likelihood = -0.5 * (math.log(2 * math.pi * total) + innovation**2 / total)
        rows.append((mean, variance, gain, innovation, total, log_likelihood))
    return np.array(rows)


def reference(
    z, mask, process_noise, observation_noise, initial_mean=0.0, initial_variance=0.0, segment=None
):
    q, r = (
        torch.as_tensor(noise, dtype=torch.float64).expand(z.shape).tolist()
        for noise in (process_noise, observation_noise)
    )
    segment = torch.zeros_like(mask).long() if segment is None else segment
    rows = [
        reference_row(*row, initial_mean, initial_variance, marks)
        for *row, marks in zip(z.tolist(), mask.tolist(), q, r, segment.tolist(), strict=True)
    ]
    mean, variance, *info = torch.from_numpy(np.stack(rows)).unbind(-1)
    return Filtered(Gaussian(mean, variance), Info(*info))


def random_case(seed: int, rows: int = 6, length: int = 37) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Holes, padding on both sides, empty rows, segments, and noises that include 0 and inf."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    z = 3 * uniform(rows, length) - 1
    mask = uniform(rows, length) < uniform(rows, 1)
    z[~mask] = torch.tensor([math.nan, INF, -INF, 1e300], dtype=torch.float64)[seed % 4]
    q = 10 ** (12 * uniform(rows, length) - 8)
    q[uniform(rows, length) < 0.15] = 0.0
    q[uniform(rows, length) < 0.05] = INF
    r = 10 ** (8 * uniform(rows, length) - 4)
    r[uniform(rows, length) < 0.1] = INF
    tensors = {"process_noise": q, "observation_noise": r}
    scalars = {"process_noise": [0.0, 1e-6, 0.3, INF][seed % 4], "observation_noise": [0.7, 1e-3][seed % 2]}
    options = {
        **(tensors if seed % 3 else scalars),
        "initial_mean": [0.0, -0.4][seed % 2],
        "initial_variance": [0.0, 0.5, INF][(seed // 2) % 3],
        "segment": (uniform(rows, length) < 0.1).cumsum(-1) if seed % 5 else None,
    }
    return z, mask, options


# ---- against other ways of computing the same


@pytest.mark.parametrize("run", FILTERS)
@pytest.mark.parametrize("seed", range(24))
def test_random_cases_match_the_plain_reference(run, seed):
    z, mask, options = random_case(seed)
    assert_same(run(z, mask, **options), reference(z, mask, **options), atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("seed", range(24))
def test_scan_matches_loop(seed):
    z, mask, options = random_case(100 + seed, rows=4, length=65)
    assert_same(scan(z, mask, **options), causal_filter_loop(z, mask, **options))


@given(seeds)
@quick
def test_variance_shared_by_all_rows_matches_the_plain_reference(seed):
    """Fixed noises, padding and segments, but no holes: one row of variances serves all."""
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.normal(size=(3, 30)))
    segment = torch.from_numpy((rng.random((3, 30)) < 0.15).cumsum(-1))
    mask = torch.ones(3, 30, dtype=torch.bool)
    for row in range(3):
        for mark in segment[row].unique():
            place = (segment[row] == mark).nonzero().flatten()
            start, stop = sorted(rng.integers(0, len(place) + 1, 2))
            mask[row, place[:start]] = mask[row, place[stop:]] = False
    for p0 in (0.0, 0.5, INF):
        options = {"process_noise": 0.2, "observation_noise": 0.7, "initial_variance": p0, "segment": segment}
        assert_same(causal_filter(z, mask, **options), reference(z, mask, **options), rtol=1e-11)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-30, 1e160, 1e290])
@pytest.mark.parametrize("p0", [0.0, 1.0, INF])
def test_only_ratios_of_variances_matter(scale, p0):
    z, mask = double(2, 50), torch.rand(2, 50) < 0.8
    plain = filtered(z, mask, 0.1, 2.0, p0).state
    scaled = filtered(z, mask, 0.1 * scale, 2.0 * scale, p0 * scale).state
    torch.testing.assert_close(scaled.mean, plain.mean, atol=1e-13, rtol=0)
    torch.testing.assert_close(scaled.variance / scale, plain.variance, atol=0, rtol=1e-12)


RATIOS = [0.0, 1e-13, 1e-12, 1e-8, 1e-7, 1e-6, 1e-4, 1e-2, 1.0, 1e3, 1e6, INF]


def scalar_means(z: np.ndarray, mask: np.ndarray, q: np.ndarray, p0: float) -> np.ndarray:
    """Means for many process noises at once, R = 1: a loop over time in float64, (Q, B, T)."""
    mean = np.zeros((len(q), len(z)))
    variance = np.full_like(mean, p0)
    out = np.empty((*mean.shape, z.shape[1]))
    for t in range(z.shape[1]):
        variance = variance + q[:, None]
        with np.errstate(invalid="ignore"):
            gain = np.where(np.isinf(variance), 1.0, variance / (variance + 1.0)) * mask[:, t]
        mean = mean + gain * (z[:, t] - mean)
        variance = np.where(mask[:, t], gain, variance)
        out[..., t] = mean
    return out


@pytest.mark.parametrize("p0", [0.0, 1.0, INF])
@pytest.mark.parametrize("length", [1, 2, 64, 4096, 32768])
def test_float32_accuracy_at_every_ratio_and_length(p0, length):
    g = torch.Generator().manual_seed(length)
    z = torch.randn(2, length, generator=g) + 0.5
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1] = torch.rand(length, generator=g) < 0.7
    mask[:, 0] = mask[:, -1] = True
    expected = scalar_means(z.double().numpy(), mask.numpy(), np.array(RATIOS), p0)
    for q, means in zip(RATIOS, expected, strict=True):
        for rows in ([0], [0, 1]):  # without holes: one row of variances serves all; with: the full scan
            out = filtered(z[rows], mask[rows], q, 1.0, p0, scan)
            assert all(f.dtype == torch.float32 for f in fields(out).values())
            error = (out.state.mean.double() - torch.from_numpy(means[rows])).abs().max().item()
            assert error <= 2e-6, (q, rows, error)


@pytest.mark.parametrize("q", [0.0, 1e-6, 0.3, 50.0])
@pytest.mark.parametrize("p0", [0.0, 2.0])
def test_statsmodels_agrees_including_missing_observations(q, p0):
    rng = np.random.default_rng(3)
    z = rng.normal(0.5, 1.3, (3, 80))
    mask = rng.random((3, 80)) < np.array([[1.0], [0.8], [0.3]])
    mask[:, [0, -1]] = True  # the outermost observed tokens: inside, masked means missing there as here
    ours = fields(filtered(torch.from_numpy(z), torch.from_numpy(mask), q, 0.7, p0, initial_mean=0.2))
    for row in range(3):
        model = KalmanFilter(k_endog=1, k_states=1, k_posdef=1, tolerance=0)
        model["design", 0, 0] = model["transition", 0, 0] = model["selection", 0, 0] = 1.0
        model["state_cov", 0, 0], model["obs_cov", 0, 0] = q, 0.7
        model.bind(np.where(mask[row], z[row], np.nan))
        model.initialize_known(np.array([0.2]), np.array([[p0 + q]]))  # it starts from the prediction
        theirs = model.filter()
        for name, value in {
            "mean": theirs.filtered_state[0],
            "variance": theirs.filtered_state_cov[0, 0],
            "gain": np.where(mask[row], theirs.kalman_gain[0, 0], 0.0),
            "innovation_variance": theirs.predicted_state_cov[0, 0, :-1] + 0.7,
            "log_likelihood": theirs.llf_obs,
        }.items():
            np.testing.assert_allclose(ours[name][row], value, atol=1e-10, rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("q", [0.0, 0.05, 3.0])
@pytest.mark.parametrize("p0", [0.0, 0.4])
def test_conditioning_the_joint_normal_agrees(q, p0):
    n, m0 = 24, -0.3
    g = torch.Generator().manual_seed(1)
    z = double(1, n)
    mask = torch.rand(1, n, generator=g) < 0.7
    mask[:, [0, -1]] = True
    noise = 0.3 + torch.rand(1, n, generator=g, dtype=torch.float64)
    out = filtered(z, mask, q, noise, p0, initial_mean=m0)
    steps = torch.arange(1, n + 1, dtype=torch.float64)
    latent = p0 + q * torch.minimum(steps[:, None], steps)
    close = functools.partial(torch.testing.assert_close, atol=1e-12, rtol=1e-11)
    for t in range(n):
        seen = mask[0, : t + 1].nonzero().flatten()
        inner = latent[seen][:, seen] + torch.diag(noise[0, seen])
        weights = torch.linalg.solve(inner, latent[seen, t])
        joint = torch.distributions.MultivariateNormal(torch.full_like(weights, m0), inner)
        close(out.state.mean[0, t], m0 + weights @ (z[0, seen] - m0))
        close(out.state.variance[0, t], latent[t, t] - weights @ latent[seen, t])
        close(out.info.log_likelihood[0, : t + 1].sum(), joint.log_prob(z[0, seen]))


# ---- closed forms


def u(t: np.ndarray, q: float) -> np.ndarray:
    """Diffuse start: the share of the old state, 1 - K_t."""
    if q == 0:
        return (t - 1) / t
    eta = 2 * math.asinh(math.sqrt(q) / 2)
    return np.exp(-eta) * np.expm1(-2 * (t - 1) * eta) / np.expm1(-2 * t * eta)


@pytest.mark.parametrize("q", [0.0, 1e-12, 1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("p0", [0.0, 1e-3, 1.0, 1e4, INF])
def test_gain_closed_form(q, p0):
    length, r = 5000, 0.25
    t = np.arange(1, length + 1)
    gain = filtered(torch.zeros(1, length, dtype=torch.float64), None, q * r, r, p0 * r).info.gain[0]
    move = 1 - u(t, q)
    if p0 == INF:
        expected = move
    elif q == p0 == 0:
        expected = np.zeros(length)
    else:
        expected = (move * p0 + q) / (p0 + q + move)
    np.testing.assert_allclose(gain, expected, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("q", [1e-8, 1e-6, 1e-4, 1e-2, 1.0])
def test_weight_of_the_prior_closed_form(q):
    """All observations zero and a prior mean of one: the mean is the product of the 1 - K."""
    eta = 2 * math.asinh(math.sqrt(q) / 2)
    t = np.arange(1, 401)
    out = filtered(torch.zeros(1, 400, dtype=torch.float64), None, q, initial_mean=1.0)
    expected = np.exp(np.logaddexp(eta / 2, -eta / 2) - np.logaddexp((t + 0.5) * eta, -(t + 0.5) * eta))
    np.testing.assert_allclose(out.state.mean[0], expected, rtol=1e-10)


def test_published_setting_hardly_moves_on_short_sequences():
    share = filtered(torch.ones(1, 4096)).state.mean[0]
    for token, expected in ((50, 0.0013), (200, 0.020), (1000, 0.35), (4096, 0.97)):
        assert share[token - 1].item() == pytest.approx(expected, rel=0.03)


# ---- properties


@given(seeds, st.integers(0, 36))
@quick
def test_causal(seed, t):
    z, mask, options = random_case(seed)
    changed = z.clone()
    changed[:, t:] = torch.where(mask[:, t:], z[:, t:] + 5, z[:, t:])
    before, after = causal_filter(z, mask, **options), causal_filter(changed, mask, **options)
    torch.testing.assert_close(before.state.mean[:, :t], after.state.mean[:, :t], atol=0, rtol=0)
    for name in ("variance", "gain", "innovation_variance"):  # these never depend on the values at all
        torch.testing.assert_close(fields(before)[name], fields(after)[name], atol=0, rtol=0)


@given(seeds)
@quick
def test_rows_are_independent(seed):
    z, mask, options = random_case(seed)
    together = causal_filter(z, mask, **options)
    for row in range(len(z)):
        pick = slice(row, row + 1)
        own = {k: v[pick] if isinstance(v, Tensor) else v for k, v in options.items()}
        alone = causal_filter(z[pick], mask[pick], **own)
        for name, value in fields(alone).items():
            torch.testing.assert_close(value, fields(together)[name][pick], atol=1e-13, rtol=1e-12)


@given(seeds, st.integers(0, 9), st.integers(0, 9))
@quick
def test_padding_changes_nothing(seed, left, right):
    z, mask, options = random_case(seed)
    short = causal_filter(z, mask, **options)

    def pad(tensor: Any, value: float | None = None) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        ends = (tensor[:, :1].expand(-1, left), tensor[:, -1:].expand(-1, right))
        if value is not None:
            ends = tuple(torch.full_like(end, value) for end in ends)
        return torch.cat((ends[0], tensor, ends[1]), dim=1)

    padded = causal_filter(pad(z, math.nan), pad(mask, 0), **{k: pad(v) for k, v in options.items()})
    stop = left + z.shape[1]
    for name, value in fields(short).items():
        torch.testing.assert_close(fields(padded)[name][:, left:stop], value, atol=1e-12, rtol=1e-12)
    mean, variance = padded.state
    assert (mean[:, :left] == options["initial_mean"]).all()
    assert (variance[:, :left] == options["initial_variance"]).all()
    for end in padded.state:
        last = end[:, stop - 1, None].expand(-1, right)
        torch.testing.assert_close(end[:, stop:], last, atol=1e-14, rtol=1e-14)


@given(seeds, st.lists(st.integers(1, 12), min_size=1, max_size=6))
@quick
def test_packed_rows_equal_unpacked_rows(seed, lengths):
    z, mask, options = random_case(seed, rows=1, length=sum(lengths))
    marks = torch.tensor(
        [i % 2 for i, n in enumerate(lengths) for _ in range(n)]
    )  # 0 1 0 1: a change is enough
    packed = fields(causal_filter(z, mask, **{**options, "segment": marks[None]}))
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        start += n
        own = {k: v[:, part] if isinstance(v, Tensor) else v for k, v in options.items()}
        alone = causal_filter(z[:, part], mask[:, part], **{**own, "segment": None})
        for name, value in fields(alone).items():
            torch.testing.assert_close(packed[name][:, part], value, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("run", FILTERS)
@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_masked_values_reach_neither_values_nor_gradients(run, poison):
    z, mask, options = random_case(7)
    grads, results = [], []
    for value in (0.0, poison):
        leaf = torch.where(mask, z, value).requires_grad_()
        out = run(leaf, mask, **options)
        (out.state.mean.sum() + out.info.log_likelihood.sum() + out.info.innovation.sum()).backward()
        grads.append(leaf.grad)
        results.append(out)
    assert_same(*results, atol=0, rtol=0)
    assert torch.equal(*grads)
    assert (grads[0][~mask] == 0).all() and (grads[0][mask] != 0).any()


@pytest.mark.parametrize("run", FILTERS)
def test_infinite_process_noise_follows_the_observations(run):
    z, mask = torch.randn(3, 40), torch.rand(3, 40) < 0.8
    out = filtered(z, mask, INF, 1e-3, run=run, initial_mean=9.0)
    assert torch.equal(out.state.mean[mask], z[mask])
    assert (out.info.gain == mask).all() and (out.info.log_likelihood == 0).all()


@pytest.mark.parametrize("run", FILTERS)
def test_diffuse_constant_is_the_running_mean(run):
    z, count = double(2, 50), torch.arange(1, 51, dtype=torch.float64)
    out = filtered(z, None, 0.0, 3.0, INF, run)
    torch.testing.assert_close(out.state.mean, z.cumsum(-1) / count, atol=1e-14, rtol=1e-13)
    torch.testing.assert_close(out.state.variance, (3 / count).expand(2, -1), atol=0, rtol=1e-13)
    torch.testing.assert_close(out.state.mean[:, -1], z.mean(-1), atol=1e-14, rtol=1e-13)


@pytest.mark.parametrize("run", FILTERS)
def test_certain_constant_stays_at_the_prior_exactly(run):
    out = filtered(torch.randn(2, 50), None, 0.0, run=run, initial_mean=0.3)
    assert (out.state.mean == torch.tensor(0.3)).all()
    assert (out.state.variance == 0).all() and (out.info.gain == 0).all()


@pytest.mark.parametrize("q", [0.0, 1e-8, 0.5, INF])
def test_diffuse_start_passes_a_constant(q):
    z = torch.full((1, 3000), 0.7)
    assert torch.equal(filtered(z, None, q, 1.0, INF).state.mean, z)


@given(st.integers(0, 59), st.sampled_from([1e-6, 1e-2, 1.0, 1e3]), st.sampled_from([0.0, 1.0, INF]))
@quick
def test_impulse_response(s, q, p0):
    z = torch.zeros(1, 60, dtype=torch.float64)
    z[0, s] = 1.0
    out = filtered(z, None, q, 1.0, p0)
    gain = out.info.gain[0]
    expected = torch.zeros(60, dtype=torch.float64)
    expected[s:] = gain[s] * torch.cat((torch.ones(1), 1 - gain[s + 1 :])).cumprod(0)
    torch.testing.assert_close(out.state.mean[0], expected, atol=1e-15, rtol=1e-9)


@pytest.mark.parametrize("run", FILTERS)
def test_infinite_observation_noise_is_a_missing_observation(run):
    """The same as a hole, but for what is reported about the value that was not used."""
    z = double(2, 30)
    seen = torch.rand(2, 30) < 0.6
    seen[:, [0, -1]] = True
    noise = torch.full_like(z, 0.8).masked_fill(~seen, INF)
    for q in (0.0, 0.1, INF):
        by_noise = filtered(z, None, q, noise, 0.5, run)
        by_mask = filtered(z, seen, q, 0.8, 0.5, run)
        unseen = {"innovation_variance": torch.where(seen, by_noise.info.innovation_variance, INF)}
        expected = fields(by_mask) | unseen
        torch.testing.assert_close(fields(by_noise), expected, atol=1e-14, rtol=1e-13)
        assert (by_noise.info.gain[~seen] == 0).all()


def test_empty_rows_and_segments_keep_the_prior():
    z = torch.full((2, 6), math.nan)
    out = filtered(z, z == z, p0=2.0, initial_mean=0.5)
    assert (out.state.mean == 0.5).all() and (out.state.variance == 2).all()
    assert (out.info.innovation_variance == 3).all() and (out.info.gain == 0).all()


@pytest.mark.parametrize("run", FILTERS)
def test_no_rows(run):
    assert filtered(torch.zeros(0, 5), run=run).state.mean.shape == (0, 5)


# ---- one step


def test_step_limits_are_exact():
    after, info = update(Gaussian(torch.tensor(7.0), torch.tensor(INF)), torch.tensor(0.1), 0.5)
    assert (after.mean.item(), after.variance.item()) == (torch.tensor(0.1).item(), 0.5)
    assert (info.gain.item(), info.log_likelihood.item(), info.innovation_variance.item()) == (1, 0, INF)
    for variance in (0.0, 2.0, INF):
        before = Gaussian(torch.tensor(7.0), torch.tensor(variance))
        after, info = update(before, torch.tensor(math.nan), INF)
        assert after == before
        assert (info.gain.item(), info.innovation.item(), info.log_likelihood.item()) == (0, 0, 0)
    assert predict(before, 1.0) == before


@given(st.floats(-50, 50), st.floats(1e-6, 1e6), st.floats(-50, 50), st.floats(1e-6, 1e6))
@quick
def test_step_is_bayes_rule(mean, variance, z, noise):
    state = Gaussian(*torch.tensor([mean, variance], dtype=torch.float64))
    after, info = update(state, torch.tensor(z, dtype=torch.float64), noise)
    precision = 1 / variance + 1 / noise
    assert after.variance.item() == pytest.approx(1 / precision, rel=1e-12)
    assert after.mean.item() == pytest.approx((mean / variance + z / noise) / precision, rel=1e-9, abs=1e-9)
    evidence = scipy.stats.norm.logpdf(z, mean, math.sqrt(variance + noise))
    assert info.log_likelihood.item() == pytest.approx(evidence, rel=1e-12)


def test_step_broadcasts_over_any_shape():
    state = Gaussian(torch.zeros(4, 1, 3), torch.ones(4, 1, 3))
    after, info = update(state, torch.ones(2, 3), torch.tensor([1.0, 2.0, INF]))
    assert after.mean.shape == info.innovation.shape == (4, 2, 3)
    torch.testing.assert_close(after.mean[0, 0], torch.tensor([1 / 2, 1 / 3, 0.0]))


# ---- gradients


@pytest.mark.parametrize("run", FILTERS)
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 10])
def test_gradient_of_the_observation(run, seed):
    z, mask, options = random_case(seed, rows=2, length=9)
    z = torch.where(mask, z, 0.5).requires_grad_()

    def outputs(z: Tensor) -> tuple[Tensor, ...]:
        out = run(z, mask, **options)
        return out.state.mean, out.info.innovation, out.info.log_likelihood

    assert torch.autograd.gradcheck(outputs, (z,))


@pytest.mark.parametrize("holes", [True, False])
@pytest.mark.parametrize("p0", [0.0, 0.5, INF])
def test_gradient_of_the_noises(holes, p0):
    g = torch.Generator().manual_seed(5)
    z = torch.randn(2, 9, generator=g, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :2] = mask[1, -2:] = False
    mask[0, 4] = mask[1, 3] = not holes
    q = (0.1 + torch.rand((2, 9) if holes else (), generator=g, dtype=torch.float64)).requires_grad_()
    r = (0.1 + torch.rand((2, 1) if holes else (), generator=g, dtype=torch.float64)).requires_grad_()

    def outputs(q: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        out = filtered(z, mask, q, r, p0)
        return tuple(torch.where(f.isinf(), 0.0, f) for f in fields(out).values())

    assert torch.autograd.gradcheck(outputs, (q, r))


@pytest.mark.parametrize("function", [causal_filter, causal_mean])
@pytest.mark.parametrize("name", ["observation", "process_noise", "observation_noise"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_gradient_of_one_argument_alone_is_that_of_the_loop(name, function, compiled, monkeypatch):
    monkeypatch.setenv(jit.SWITCH, "" if compiled else "1")
    found = []
    for run in (function, causal_filter_loop):
        given = {"observation": double(2, 9)} | {
            key: torch.tensor(value, dtype=torch.float64)
            for key, value in (("process_noise", 0.3), ("observation_noise", 0.7))
        }
        leaf = given[name].requires_grad_()
        out = run(**given, initial_variance=0.4)
        mean = out if isinstance(out, Tensor) else out.state.mean
        found.append(torch.autograd.grad((mean * double(2, 9, seed=1)).sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


# ---- types, memory and bad input


@pytest.mark.parametrize("run", FILTERS)
@pytest.mark.parametrize("given_type", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types(run, given_type):
    returned = torch.float64 if given_type == torch.float64 else torch.float32
    z = torch.randn(2, 20).to(given_type)
    out, exact = filtered(z, run=run), filtered(z.double(), run=run)
    for name, value in fields(out).items():
        assert value.dtype == returned and value.shape == z.shape
        torch.testing.assert_close(value, fields(exact)[name].to(returned), atol=0, rtol=0)


def test_input_is_not_changed_and_layout_does_not_matter():
    z, mask, options = random_case(8)
    plain = causal_filter(z, mask, **options)
    tensors = {"z": z, "mask": mask, **{k: v for k, v in options.items() if isinstance(v, Tensor)}}
    copies = {k: v.clone() for k, v in tensors.items()}

    def strided(t: Any) -> Any:
        return t.T.contiguous().T if isinstance(t, Tensor) else t

    other = causal_filter(strided(z), strided(mask), **{k: strided(v) for k, v in options.items()})
    assert_same(plain, other, atol=0, rtol=0)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, copies[name], atol=0, rtol=0, equal_nan=True)


def test_expanded_input():
    z = torch.randn(1, 20).expand(3, 20)
    mask = torch.ones(1, 1, dtype=torch.bool).expand(3, 20)
    segment = torch.arange(20).div(7, rounding_mode="floor").expand(3, 20)
    dense = filtered(z.clone(), mask.clone(), segment=segment.clone())
    assert_same(filtered(z, mask, segment=segment), dense, atol=0, rtol=0)


GOOD: dict[str, Any] = {
    "observation": torch.zeros(2, 5),
    "mask": torch.ones(2, 5, dtype=torch.bool),
    "process_noise": 1e-6,
    "observation_noise": 1.0,
}
NAN_AT_1_3 = torch.zeros(2, 5).index_put_((torch.tensor(1), torch.tensor(3)), torch.tensor(math.nan))


@pytest.mark.parametrize("run", FILTERS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"observation": torch.zeros(5)}, ShapeError, r"observation: got .*\(5,\), expected floating"),
        ({"observation": torch.zeros(2, 0)}, ShapeError, r"observation: got .*\(2, 0\).*T >= 1"),
        ({"observation": torch.zeros(2, 5).long()}, ShapeError, r"observation: got torch.int64"),
        ({"mask": torch.ones(2, 5)}, ShapeError, r"mask: got torch.float32.*expected torch.bool \(2, 5\)"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ShapeError, r"mask: got .*\(2, 4\).*\(2, 5\)"),
        ({"segment": torch.zeros(2, 4).long()}, ShapeError, r"segment: got .*\(2, 4\).*\(2, 5\)"),
        ({"segment": torch.zeros(2, 5)}, ShapeError, r"segment: got torch.float32.*integers"),
        ({"process_noise": torch.ones(3)}, ShapeError, r"process_noise: got .*\(3,\).*\(2, 5\)"),
        ({"observation_noise": torch.ones(1, 2, 5)}, ShapeError, r"observation_noise: got .*\(1, 2, 5\)"),
        ({"observation": NAN_AT_1_3}, NumericError, r"observation: got nan.*\(1, 3\).*mask"),
        ({"observation": NAN_AT_1_3.nan_to_num(INF)}, NumericError, r"observation: got inf.*\(1, 3\)"),
        ({"process_noise": -1e-9}, NumericError, r"process_noise: got -1e-09, expected \[0, inf\]; use"),
        ({"process_noise": math.nan}, NumericError, "process_noise: got nan"),
        ({"process_noise": NAN_AT_1_3}, NumericError, r"process_noise: got nan.*\(1, 3\)"),
        (
            {"observation_noise": 0.0},
            NumericError,
            "got 0.0.*use process_noise=inf to follow the observations",
        ),
        ({"observation_noise": -1.0}, NumericError, "observation_noise: got -1.0"),
        ({"observation_noise": math.nan}, NumericError, "observation_noise: got nan"),
        ({"observation_noise": 1 - torch.eye(5)[3:]}, NumericError, r"observation_noise: got 0.0.*\(0, 3\)"),
        ({"initial_variance": -0.1}, NumericError, "initial_variance: got -0.1"),
        ({"initial_variance": math.nan}, NumericError, "initial_variance: got nan"),
        ({"initial_mean": INF}, NumericError, "initial_mean: got inf"),
    ],
)
def test_bad_input_is_named(run, change, error, message):
    arguments = {**GOOD, **change}
    with pytest.raises(error, match=message) as caught:
        run(arguments.pop("observation"), arguments.pop("mask"), **arguments)
    assert re.match(WORDED, str(caught.value))


@pytest.mark.parametrize("function", [causal_filter, causal_filter_loop, causal_mean])
def test_no_mask_means_all_observed(function: Any) -> None:
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    noises = {"process_noise": 0.1, "observation_noise": 1.0}
    plain, masked = function(z, **noises), function(z, torch.ones(3, 5, dtype=torch.bool), **noises)
    assert str(plain) == str(masked)
