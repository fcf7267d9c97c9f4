"""The Triton kernels in Triton's interpreter, against the definitions. ``test_triton.py`` runs this file in a
process of its own, because the interpreter is chosen when Triton is imported:

    TRITON_INTERPRET=1 KALMAN_RL_NO_NUMBA=1 python -m pytest tests/kernels/triton_interpreted.py
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from kalman_rl.errors import NumericError
from kalman_rl.kernels import jit, triton_support
from kalman_rl.kernels.filter import cuda as filter_cuda
from kalman_rl.kernels.loss import cuda as loss_cuda
from kalman_rl.methods import make_method
from kalman_rl.numerics.kalman import causal_filter_loop, causal_mean
from kalman_rl.objectives import trust
from kalman_rl.objectives.aggregate import Totals
from kalman_rl.objectives.loss import policy_loss
from tests.kernels.loss_cases import AGGREGATES, RATIOS, TRUSTS, compare, composition, draw

assert os.environ["TRITON_INTERPRET"] == "1" and not jit.usable()
INF = math.inf
MODELS = [
    {"process_noise": 1e-6, "observation_noise": 1.0, "initial_mean": 0.0, "initial_variance": 0.0},
    {"process_noise": 0.3, "observation_noise": 2.0, "initial_mean": 0.5, "initial_variance": INF},
    {"process_noise": INF, "observation_noise": 1.0, "initial_mean": -0.3, "initial_variance": 0.2},
    {"process_noise": 0.0, "observation_noise": 0.5, "initial_mean": 0.1, "initial_variance": 3.0},
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in a short row: the interpreter takes seconds for long ones."""
    for module in (filter_cuda, loss_cuda):
        monkeypatch.setattr(module, "BLOCK", 8)


def batch(seed: int, dtype: torch.dtype, holes: bool, packed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(27) < torch.tensor([[27], [19], [0]])
    mask &= torch.arange(27) >= torch.tensor([[0], [3], [0]])
    if holes:
        mask &= torch.rand(3, 27, generator=g) < 0.7
    z = torch.randn(3, 27, generator=g, dtype=torch.float64).to(dtype)
    segment = (torch.rand(3, 27, generator=g) < 0.15).cumsum(1) if packed else None
    return torch.where(mask, z, [math.nan, INF, -INF][seed % 3]), mask, segment


@pytest.mark.parametrize(("holes", "packed"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("number", range(4))
def test_means_and_gradient_are_the_definitions(
    number: int, holes: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole rows and rows in chunks; right and left padding, an empty row, holes, packed sequences."""
    split = number in (0, 3)
    monkeypatch.setattr(filter_cuda, "ROWS", 9 if split else 1)
    monkeypatch.setattr(filter_cuda, "LONG", 1)
    dtype = [torch.float64, torch.float32][number % 2]
    z, mask, segment = batch(number, dtype, holes, packed)
    given = z.clone().requires_grad_()
    mean = filter_cuda.CudaMeans.apply(given, mask, segment, *MODELS[number].values())
    wide = torch.where(mask, z, 0.0).double().requires_grad_()
    expected = causal_filter_loop(wide, mask, segment=segment, **MODELS[number]).state.mean
    weight = torch.randn(3, 27, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (mean.double() * weight).sum().backward()
    (expected * weight).sum().backward()
    plan = filter_cuda._plan(z, mask, segment, *MODELS[number].values())
    assert (plan.chunks > 1) == split and plan.holes == (holes or packed)
    tolerance = {"rtol": 0, "atol": 1e-14 if dtype == torch.float64 else 2e-6}
    torch.testing.assert_close(mean.double(), expected, **tolerance)
    torch.testing.assert_close(given.grad.double(), wide.grad, **tolerance)


def test_causal_mean_uses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = filter_cuda._forward
    monkeypatch.setattr(filter_cuda, "_forward", lambda *a, **k: calls.append(1) or run(*a, **k))
    z, mask, _ = batch(0, torch.float32, True, False)
    mean = causal_mean(z, mask, **MODELS[1])
    expected = causal_filter_loop(z.double(), mask, **MODELS[1]).state.mean
    torch.testing.assert_close(mean.double(), expected, rtol=0, atol=2e-6)
    assert mean.dtype == torch.float32 and calls == [1]
    monkeypatch.setenv(triton_support.SWITCH, "1")
    causal_mean(z, mask, **MODELS[1])
    assert calls == [1]


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_bad_observations_are_refused(bad: float) -> None:
    z, mask, _ = batch(0, torch.float32, False, False)
    z[1, 5] = bad
    with pytest.raises(NumericError, match=r"^observation: got (nan|inf), .*\(1, 5\)"):
        causal_mean(z, mask, **MODELS[0])


@pytest.mark.parametrize("q", [1e-8, 1e-2])
def test_accuracy_in_float32(q: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit data, with and without holes."""
    monkeypatch.setattr(filter_cuda, "BLOCK", 256)
    g = torch.Generator().manual_seed(2)
    z, mask = torch.randn(1, 1024, generator=g) + 0.5, torch.rand(1, 1024, generator=g) < 0.7
    model = {"process_noise": q, "observation_noise": 1.0, "initial_mean": 0.0, "initial_variance": 1.0}
    for seen in (mask, torch.ones_like(mask)):
        found = filter_cuda.means(z, seen, None, *model.values())
        expected = causal_mean(z.double(), seen, **model)
        assert (found.double() - expected).abs().max() <= 5e-6


@pytest.mark.parametrize("number", range(14))
def test_fused_is_the_composed_objective(number: int) -> None:
    """Every ratio, trust region and aggregation, both types, advantages of rows and of tokens."""
    parts = RATIOS[number % 7], TRUSTS[(number * 3 + number // 7) % 7], AGGREGATES[number % 3]
    dtype = [torch.float64, torch.float32][number // 7]
    compare(composition(*parts), draw(number, 4, 21, dtype, per_token=bool(number % 2)), state=1e-7)


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("field", ["logp", "advantage"])
def test_bad_numbers_have_the_same_errors(field: str, bad: float) -> None:
    case = draw(4, 3, 10)
    row, token = case.rollouts.mask.nonzero()[1].tolist()
    values = {"logp": case.logp.clone(), "advantage": torch.ones(3, 10, dtype=torch.float64)}
    values[field][row, token] = bad
    with pytest.raises(NumericError, match=rf"^{field}: got {bad} at row {row}, token {token}"):
        policy_loss(make_method("kpo"), case.rollouts, values["logp"], advantage=values["advantage"])


def test_extreme_ratios() -> None:
    case = draw(5, 4, 19, torch.float32, scale=60.0)
    compare(composition(RATIOS[1], trust.Clip(0.2, 0.2, 3.0), AGGREGATES[0]), case)


def test_counts_of_the_whole_step_can_be_given() -> None:
    case = draw(8, 4, 11)
    case.totals = Totals(100.0, 9.0)
    for reduce in AGGREGATES:
        compare(composition(RATIOS[1], TRUSTS[2], reduce), case)


def test_packed_rows_are_composed() -> None:
    compare(make_method("kpo"), draw(6, 3, 12, packed=True), expect=False)


def test_a_result_repeats_to_the_bit() -> None:
    case, method = draw(7, 4, 20, torch.float32), make_method("kpo")
    (a, gradient), (b, same) = case.loss(method, True), case.loss(method, True)
    assert a.value == b.value and torch.equal(gradient, same)
