"""What nobody gave: our defaults, and torch's default type and device, which change no number.

Types are our choice, the device is the input's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from inspect import Parameter, signature
from typing import Any

import pytest
import torch
from torch import Tensor

from kalman_rl.kernels import jit
from kalman_rl.numerics import kalman, likelihood, smoother, wiener
from kalman_rl.numerics.curve import smooth_curve
from kalman_rl.numerics.feature_filter import KalmanPreferenceTracker
from kalman_rl.numerics.hadamard import SRHT, hadamard_transform
from kalman_rl.numerics.log_bins import counted


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Z, PHI, Y = normal(2, 9), normal(9, 7, seed=1), normal(9, seed=2)
MASK, LATER = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)
MASK[0, 4] = LATER[:, 0] = False
TIMES = torch.arange(9, dtype=torch.float64) ** 1.5
NOISES: dict[str, Any] = {"process_noise": 0.1, "observation_noise": 1.3}
PRIOR: dict[str, Any] = {"initial_mean": 0.1, "initial_variance": 0.7}
LEARNED = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
SUMS = likelihood.pack(7, normal(5).square(), normal(5, seed=1))
PROJECT = SRHT(7, 4)
PLACES, PART = torch.tensor([0, 2, 0]), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)


def tracked() -> Any:
    """All that a tracker tells of wide features, after two batches."""
    tracker = KalmanPreferenceTracker(4, Q_val=0.1, R_val=0.7)
    seen = [tracker.update(PHI[:5], Y[:5], Y[:5] > -9)]
    tracker.predict(2.0)
    seen.append(tracker.update(PHI[5:], Y[5:]))
    told = (
        tracker.value(PHI),
        tracker.predictive(PHI),
        tracker.loo_residuals(PHI, Y),
        tracker.information(PHI),
    )
    return seen, told, tracker.information(), tracker.covariance


ON_ANY_DEVICE: dict[str, Callable[[], Any]] = {
    "causal_filter": lambda: kalman.causal_filter(Z, MASK, **NOISES, **PRIOR),
    "causal_filter, one row of variances": lambda: kalman.causal_filter(Z, **NOISES, **PRIOR),
    "causal_filter, learned noise": lambda: kalman.causal_filter(
        Z, MASK, **{**NOISES, "process_noise": LEARNED}
    ),
    "causal_mean": lambda: kalman.causal_mean(Z, MASK, **NOISES, **PRIOR),
    "causal_mean, learned noise": lambda: kalman.causal_mean(Z, MASK, **{**NOISES, "process_noise": LEARNED}),
    "causal_filter_loop": lambda: kalman.causal_filter_loop(Z, MASK, segment=MASK.long(), **NOISES),
    "wiener_smoother": lambda: smoother.wiener_smoother(Z, TIMES, MASK, **NOISES),
    "wiener_smoother, no times": lambda: smoother.wiener_smoother(Z, **NOISES, order=3),
    "wiener_smoother, integrals": lambda: smoother.wiener_smoother(Z, None, LATER, **NOISES, integral=True),
    "wiener_filter": lambda: smoother.wiener_filter(Z, TIMES, MASK, **NOISES),
    "smoothing_matrix": lambda: smoother.smoothing_matrix(TIMES, noise_ratio=0.3),
    "polynomial": lambda: wiener.polynomial(2, TIMES, integral=True),
    "hadamard_transform": lambda: hadamard_transform(PHI.T[:4].T),
    "SRHT": lambda: (PROJECT(PHI), PROJECT(PHI[:1])),
    "counted": lambda: counted(PLACES, PART, 4),
}
ON_THE_CPU: dict[str, Callable[[], Any]] = {
    "likely_noise": lambda: smoother.likely_noise(Z, TIMES, MASK, noise_ratio=0.3),
    "noise_sums": lambda: smoother.noise_sums(Z, TIMES, MASK),
    "peak": lambda: likelihood.peak(SUMS, [-math.inf, -1.0, 0.0, 1.0, math.inf], 1),
    "smooth_curve": lambda: smooth_curve(range(9), Y.tolist()),
    "new SRHT": lambda: SRHT(7, 4)(PHI),
    "tracker": tracked,
}


def tensors(value: Any) -> Iterator[Tensor]:
    """Every number inside a result, as tensors."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)
    else:
        yield value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def same(one: Any, other: Any) -> bool:
    """Whether two results agree to the last bit, in type and device too."""
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return all(
        (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in pairs
    )


@pytest.fixture
def default_type() -> Iterator[Callable[[torch.dtype], None]]:
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", [*ON_ANY_DEVICE, *ON_THE_CPU])
def test_the_default_type_changes_no_number(
    name: str, compiled: bool, default_type: Callable[[torch.dtype], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(jit.SWITCH, "" if compiled else "1")
    call = {**ON_ANY_DEVICE, **ON_THE_CPU}[name]
    want = call()
    for dtype in (torch.float16, torch.float64):
        wiener._unit_polynomial.cache_clear()
        default_type(dtype)
        assert same(call(), want), dtype


@pytest.mark.parametrize("name", ON_ANY_DEVICE)
def test_everything_lies_where_the_input_lies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor made on the default device, here one without memory, would not mix with the input."""
    monkeypatch.setenv(jit.SWITCH, "1")
    want = ON_ANY_DEVICE[name]()
    with torch.device("meta"):
        found = ON_ANY_DEVICE[name]()
    assert same(found, want)


FILTER = {"mask": None, "initial_mean": 0.0, "initial_variance": 0.0, "segment": None}
SERIES = {"times": None, "mask": None, "order": 2, "integral": False}
DEFAULTS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (kalman.causal_filter, FILTER),
    (kalman.causal_mean, FILTER),
    (kalman.causal_filter_loop, FILTER),
    (smoother.wiener_smoother, {**SERIES, "observation_noise": 1.0}),
    (smoother.wiener_filter, {**SERIES, "observation_noise": 1.0}),
    (smoother.smoothing_matrix, {"order": 2, "integral": False}),
    (smoother.likely_noise, {**SERIES, "relative_noise": 1.0, "noise_ratio": None}),
    (smoother.noise_sums, {**SERIES, "relative_noise": 1.0, "grid": smoother.LOG_RATIOS}),
    (wiener.transition, {"integral": False}),
    (wiener.diffusion, {"integral": False}),
    (wiener.polynomial, {"integral": False}),
    (hadamard_transform, {"orthonormal": True}),
    (SRHT, {"seed": 0}),
    (smooth_curve, {"most": 400}),
    (
        KalmanPreferenceTracker,
        {"dim": 128, "Q_val": 1e-5, "R_val": 1.0, "P_val": 1.0, "noise_strength": 4.0, "seed": 0}
        | {"dtype": torch.float64},
    ),
    (KalmanPreferenceTracker.predict, {"gap": 1.0}),
]


@pytest.mark.parametrize(("call", "want"), DEFAULTS, ids=[call.__qualname__ for call, _ in DEFAULTS])
def test_what_is_left_out(call: Callable[..., Any], want: dict[str, Any]) -> None:
    """A default that changes, changes every run that relied on it."""
    parameters = signature(call).parameters.items()
    assert {name: one.default for name, one in parameters if one.default is not Parameter.empty} == want
