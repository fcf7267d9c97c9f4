"""The compiled filter against the definition, statsmodels and SciPy; and that it leaves everything else alone."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.tsa.statespace.kalman_filter import KalmanFilter
from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError
from kalman_rl.kernels import jit
from kalman_rl.kernels.filter import cpu as filter_cpu
from kalman_rl.numerics.kalman import causal_filter, causal_filter_loop, causal_mean

pytestmark = pytest.mark.skipif(not jit.usable(), reason="numba is not installed or switched off")
INF = math.inf
quick = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(jit.SWITCH, "1")
    assert not jit.usable()


def torch_only(*args: Any, run: Any = causal_filter, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(jit.SWITCH, "1")
        return run(*args, **options)


def flat(result: Any) -> tuple[Tensor, ...]:
    return (*result.state, *result.info)


@st.composite
def cases(draw: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Any shape, mask, layout, type, noise, start and packing."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, length = draw(st.integers(0, 11)), draw(st.integers(1, 70))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64)

    z = (4 * uniform(rows, length) - 2).to(draw(st.sampled_from([torch.float32, torch.float64])))
    right = torch.arange(length) < (uniform(rows, 1) * (length + 1)).long()
    mask = {
        "all": right | True,
        "none": right & False,
        "right": right,
        "left": right.flip(-1),
        "holes": uniform(rows, length) < uniform(rows, 1),
        "both": right & (uniform(rows, length) < 0.8),
    }[draw(st.sampled_from(["all", "none", "right", "left", "holes", "both"]))]
    z[~mask] = draw(st.sampled_from([0.0, math.nan, INF, 1e30]))
    shape = draw(st.sampled_from([(), (1,), (1, 1), (length,), (rows, 1), (rows, length)]))
    scale = 10.0 ** draw(st.integers(-3, 3))
    q = scale * 10 ** (10 * uniform(*shape) - 8)
    r = scale * 10 ** (2 * uniform(*shape) - 1)
    if shape and draw(st.booleans()):
        q = torch.where(uniform(*shape) < 0.2, draw(st.sampled_from([0.0, INF])), q)
        r = torch.where(uniform(*shape) < 0.2, INF, r)
    options = {
        "process_noise": draw(st.sampled_from([0.0, q.item(), INF])) if shape == () else q,
        "observation_noise": r.item() if shape == () else r,
        "initial_mean": draw(st.sampled_from([0.0, -0.7])),
        "initial_variance": draw(st.sampled_from([0.0, 0.5 * scale, INF])),
        "segment": (uniform(rows, length) < 0.15).cumsum(-1) if draw(st.booleans()) else None,
    }
    if draw(st.booleans()):
        z, mask = z.T.contiguous().T, torch.stack((mask, mask), -1)[..., 0]
    return z, mask, options


@given(cases())
@quick
def test_every_case_equals_the_definition(case) -> None:
    z, mask, options = case
    copies = z.clone(), mask.clone()
    given_noises = [v.clone() for v in options.values() if isinstance(v, Tensor)]
    got = causal_filter(z, mask, **options)
    expected = causal_filter_loop(z, mask, **options)
    scans = torch_only(z, mask, **options)
    mean = causal_mean(z, mask, **options)
    unit = {torch.float32: 2e-7, torch.float64: 1e-12}[z.dtype]  # one step of the type, on numbers of size 1
    for a, b, c in zip(flat(got), flat(expected), flat(scans), strict=True):
        assert a.dtype == b.dtype and a.is_contiguous()
        torch.testing.assert_close(a, b, atol=unit, rtol=2 * unit)
        torch.testing.assert_close(a, c, atol=unit, rtol=10 * unit)
    torch.testing.assert_close(mean, got.state.mean, atol=unit, rtol=2 * unit)
    torch.testing.assert_close((z, mask), copies, atol=0, rtol=0, equal_nan=True)
    for before, after in zip(given_noises, (v for v in options.values() if isinstance(v, Tensor))):
        assert torch.equal(before, after)


@given(cases())
@quick
def test_gradients_equal_those_of_the_definition(case) -> None:
    z, mask, options = case
    z = torch.where(mask, z, 0.0)
    weight = torch.linspace(-1, 2, z.numel(), dtype=z.dtype).reshape(z.shape)
    got, again, expected = (z.clone().requires_grad_() for _ in range(3))
    (causal_mean(got, mask, **options) * weight).sum().backward()
    (causal_filter(again, mask, **options).state.mean * weight).sum().backward()
    (causal_filter_loop(expected, mask, **options).state.mean * weight).sum().backward()
    unit = {torch.float32: 3e-6, torch.float64: 1e-11}[z.dtype]
    for leaf in (got, again):
        torch.testing.assert_close(leaf.grad, expected.grad, atol=unit, rtol=unit)


@pytest.mark.parametrize("noises", [(0.3, 0.7), (0.0, 1.0), (INF, 1.0), (500.0, 1.0), (None, None)])
@pytest.mark.parametrize("p0", [0.0, 0.5, INF])
def test_gradcheck_of_first_and_second_order(noises, p0) -> None:
    g = torch.Generator().manual_seed(1)
    z = torch.randn(3, 7, generator=g, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1, 1]]).bool()
    q, r = ((torch.rand(3, 7, generator=g) + 0.1) if n is None else n for n in noises)
    segment = torch.tensor([[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]])
    options = {"process_noise": q, "observation_noise": r, "initial_variance": p0, "segment": segment}

    def mean(z: Tensor) -> Tensor:
        return causal_mean(z, mask, **options)

    assert torch.autograd.gradcheck(mean, (z,))
    assert torch.autograd.gradgradcheck(mean, (z,))


def test_statsmodels_agrees() -> None:
    rng = np.random.default_rng(0)
    z, mask = rng.normal(0.5, 1.0, (6, 90)), rng.random((6, 90)) < 0.7
    mask[0] = True
    mask[:, [0, -1]] = True
    ours = causal_filter(
        torch.from_numpy(z), torch.from_numpy(mask), process_noise=1e-3, observation_noise=0.4
    )
    for row in range(6):
        model = KalmanFilter(k_endog=1, k_states=1, k_posdef=1, tolerance=0)
        model["design", 0, 0] = model["transition", 0, 0] = model["selection", 0, 0] = 1.0
        model["state_cov", 0, 0], model["obs_cov", 0, 0] = 1e-3, 0.4
        model.bind(np.where(mask[row], z[row], np.nan))
        model.initialize_known(np.zeros(1), np.array([[1e-3]]))  # it starts from the prediction
        theirs = model.filter()
        np.testing.assert_allclose(ours.state.mean[row], theirs.filtered_state[0], atol=1e-13)
        np.testing.assert_allclose(ours.info.log_likelihood[row], theirs.llf_obs, atol=1e-12)


def test_scipys_recursive_filter_agrees_in_the_steady_state() -> None:
    q = 0.02
    steady = (q + math.sqrt(q * q + 4 * q)) / 2  # the prediction variance that reproduces itself, R = 1
    gain = steady / (1 + steady)
    z = np.random.default_rng(1).normal(size=(5, 4000))
    expected = scipy.signal.lfilter([gain], [1, gain - 1], z, axis=-1)
    mask = torch.ones(5, 4000, dtype=torch.bool)
    start = {"process_noise": q, "observation_noise": 1.0, "initial_variance": steady - q}
    np.testing.assert_allclose(causal_mean(torch.from_numpy(z), mask, **start), expected, atol=1e-13)


def means_in_float64(z: np.ndarray, mask: np.ndarray, q: float) -> np.ndarray:
    mean, variance, out = np.zeros(len(z)), np.zeros(len(z)), np.empty(z.shape)
    for t in range(z.shape[1]):
        variance = variance + q
        gain = np.where(mask[:, t], variance / (variance + 1.0), 0.0)
        mean = mean + gain * (z[:, t] - mean)
        variance = np.where(mask[:, t], gain, variance)
        out[:, t] = mean
    return out


@pytest.mark.parametrize("q", [1e-8, 1e-6, 1e-4, 1e-2, 1.0, 100.0])
def test_error_at_every_noise_ratio_in_float32(q: float) -> None:
    """Unit data, 6 rows (not a multiple of 4), 20001 tokens (of no block): at most 2.4e-7."""
    rng = np.random.default_rng(0)
    z = rng.normal(0.5, 1.0, (6, 20_001)).astype(np.float32)
    mask = rng.random(z.shape) < 0.7
    mask[:3] = np.arange(20_001) < np.array([[20_001], [12_000], [7]])
    mask[3:, [0, -1]] = True
    got = causal_mean(torch.from_numpy(z), torch.from_numpy(mask), process_noise=q, observation_noise=1.0)
    expected = means_in_float64(z.astype(float), mask, q)
    assert np.abs(got.numpy() - expected).max() <= 2.4e-7


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("noise", [1.0, torch.ones(5, 40)])
def test_a_bad_observation_is_found_and_named(bad, holes, noise) -> None:
    z, mask = torch.zeros(5, 40), torch.ones(5, 40, dtype=torch.bool)
    z[3, 17] = bad
    mask[:, 11] = not holes
    for run in (causal_filter, causal_mean):
        with pytest.raises(NumericError, match=r"observation: got .*\(row, token\) = \(3, 17\)"):
            run(z, mask, process_noise=0.1, observation_noise=noise)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"process_noise": -1.0}, NumericError),
        ({"observation_noise": 0.0}, NumericError),
        ({"observation_noise": torch.zeros(2, 3)}, NumericError),
        ({"process_noise": torch.ones(4)}, ShapeError),
        ({"initial_variance": math.nan}, NumericError),
        ({"segment": torch.zeros(2, 3)}, ShapeError),
    ],
)
def test_bad_arguments_of_the_means(change, error) -> None:
    options = {"process_noise": 0.1, "observation_noise": 1.0, **change}
    with pytest.raises(error):
        causal_mean(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), **options)


# ---- when it is used, and what it leaves alone


def example(rows: int = 5, length: int = 60) -> tuple[Tensor, Tensor, dict[str, Any]]:
    g = torch.Generator().manual_seed(3)
    z, mask = torch.randn(rows, length, generator=g), torch.rand(rows, length, generator=g) < 0.8
    return z, mask, {"process_noise": 0.1, "observation_noise": 1.0}


def test_it_is_used_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(filter_cpu, "compiled", lambda f: calls.append(f) or jit.compiled(f))
    z, mask, options = example()
    causal_mean(z, mask, **options)
    assert calls
    calls.clear()
    monkeypatch.setenv(jit.SWITCH, "1")
    causal_mean(z, mask, **options)
    causal_filter(z.requires_grad_(), mask, **options)
    assert not calls


def test_without_numba_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    z, mask, options = example()
    expected = causal_mean(z, mask, **options)
    monkeypatch.setattr(jit, "_numba", lambda: None)
    torch.testing.assert_close(causal_mean(z, mask, **options), expected, atol=2e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_exactly(dtype: torch.dtype) -> None:
    z, mask, options = example()
    z = z.to(dtype)
    assert torch.equal(causal_mean(z, mask, **options), causal_mean(z.float(), mask, **options))
    leaf = z.clone().requires_grad_()
    causal_mean(leaf, mask, **options).sum().backward()
    assert leaf.grad.dtype == dtype


def test_autocast_does_not_touch_it() -> None:
    z, mask, options = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = causal_mean(z, mask, **options)
    assert torch.equal(inside, causal_mean(z, mask, **options))


def test_forward_derivatives_and_function_transforms_use_torch() -> None:
    z, mask, options = example()
    z, direction = z.double(), torch.ones_like(z).double()
    _, tangent = torch.func.jvp(lambda z: causal_mean(z, mask, **options), (z,), (direction,))
    expected = causal_mean(direction, mask, **options)  # the map is linear
    torch.testing.assert_close(tangent, expected)
    gradient = torch.func.grad(lambda z: causal_mean(z, mask, **options).sum())(z)
    leaf = z.clone().requires_grad_()
    causal_mean(leaf, mask, **options).sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


def test_gradient_through_noises_is_kept() -> None:
    z, mask, options = example()
    noise = torch.tensor(1.0, requires_grad=True)
    causal_mean(z, mask, **{**options, "observation_noise": noise}).sum().backward()
    assert noise.grad is not None and noise.grad != 0


def test_expanded_gradient_and_changed_mask() -> None:
    z, mask, options = example()
    leaf = z.clone().requires_grad_()
    causal_mean(leaf, mask, **options)[:, :1].expand(-1, 60).sum().backward()
    assert leaf.grad[:, 1:].abs().max() == 0
    out = causal_mean(leaf, mask, **options).sum()
    mask[0, 0] = ~mask[0, 0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_two_threads() -> None:
    """The lock is released while a kernel runs; results do not mix."""
    inputs = [example(8, 3000 + i)[:2] for i in range(2)]
    options = example()[2]
    expected = [causal_mean(*part, **options) for part in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(100):
            if not torch.equal(causal_mean(*inputs[i], **options), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_large_outputs_and_a_start_of_their_own() -> None:
    """From 32 MiB on the output lies on large pages; the numbers do not."""
    z = torch.randn(9, 1 << 20)
    mask = torch.arange(1 << 20) < torch.arange(9)[:, None] * 100_000
    got = causal_mean(z, mask, process_noise=1e-4, observation_noise=1.0, initial_variance=INF)
    part = causal_mean(
        z[:, :1000], mask[:, :1000], process_noise=1e-4, observation_noise=1.0, initial_variance=INF
    )
    assert torch.equal(got[:, :1000], part) and torch.isfinite(got).all()


@pytest.mark.slow
def test_no_directory_for_the_machine_code(tmp_path: Path) -> None:
    """Nowhere to write: compiled again in every process, but it runs."""
    source = Path(jit.__file__).parent.parent
    copy = tmp_path / "kalman_rl"
    subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    code = (
        "from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import torch; from kalman_rl.numerics.kalman import causal_mean\n"
        "z = torch.ones(2, 3)\n"
        "print(causal_mean(z, z > 0, process_noise=1.0, observation_noise=1.0)[0, 0].item())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "0.5", run.stderr
