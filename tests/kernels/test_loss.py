"""The fused objective against the composed one, which is the definition."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.errors import ConfigError, NumericError, ShapeError
from kalman_rl.instruments.verify import golden
from kalman_rl.instruments.verify.record import records
from kalman_rl.kernels import jit
from kalman_rl.kernels.loss import dispatch as fast
from kalman_rl.methods import METHODS
from kalman_rl.objectives import aggregate, ratio, trust
from kalman_rl.objectives import fused as fusing
from kalman_rl.objectives.aggregate import SequenceSum, sequence_mean, token_mean, totals_of
from kalman_rl.objectives.correction import Truncated
from kalman_rl.objectives.loss import Loss, policy_loss
from kalman_rl.objectives.rollouts import Current, Rollouts
from tests.kernels.loss_cases import AGGREGATES, RATIOS, TRUSTS, Case, compare, composition, draw
from tests.oracles.batches import CASES, TABLE, make_batch

pytest.importorskip("numba")
pytestmark = pytest.mark.timeout(600)  # the first test of a type compiles, 8 s of CPU time
INF = math.inf
COMPOSED = {
    "minpro", "minpro_clipped", "kpo_noise", "kpo_robust", "gmpo", "sapo", "dppo_tv", "dppo_kl", "dppo_topk_tv",
    "dppo_topk_kl", "vespo", "bapo", "bapo_published", "capo", "pnpo", "a3po", "vaco", "cppo", "drpo", "cfpo", "m2po",
}  # fmt: skip
every = pytest.mark.parametrize("name", list(CASES))
some = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
few = settings(some, max_examples=4)


# ---- equal to the composed objective


@some
@given(
    seed=st.integers(0, 100_000),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 40)),
    parts=st.tuples(*map(st.sampled_from, (RATIOS, TRUSTS, AGGREGATES))),
    scale=st.sampled_from([0.0, 1e-4, 0.1, 3.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    packed=st.booleans(),
    per_token=st.booleans(),
)
def test_equal_on_drawn_batches(seed, shape, parts, scale, dtype, packed, per_token) -> None:
    compare(composition(*parts), draw(seed, *shape, dtype, scale, packed, per_token))


@pytest.mark.parametrize("transform", RATIOS)
@pytest.mark.parametrize("length", [63, 65, 1023, 1024, 1025, 2200])
def test_equal_across_chunks(transform, length: int) -> None:
    """Rows longer than the kernel's buffers, whole and with holes, and packed."""
    method = composition(transform, trust.Clip(0.02, 0.03), sequence_mean)
    for packed in (False, True):
        compare(method, draw(length, 5, length, packed=packed))
    whole = draw(length + 1, 3, length)
    rollouts = Rollouts(whole.logp.nan_to_num(0, 0, 0) - 0.1, torch.ones(3, length, dtype=torch.bool))
    compare(
        method, Case(rollouts, rollouts.logp_old + 0.1 * torch.randn(3, length).double(), whole.advantage)
    )


@every
@few
@given(seed=st.integers(0, 10_000), shape=st.tuples(st.integers(1, 6), st.integers(1, 12)))
def test_on_and_off_are_equal_for_every_method(name: str, seed: int, shape: tuple[int, int]) -> None:
    """Also those that never take the fused path, whose answers are then the same to the bit."""
    method, batch = CASES[name], make_batch(seed, *shape)
    results = []
    for fused in (True, False):
        logp = batch.logp.clone().requires_grad_()
        loss = policy_loss(method, batch.rollouts(), batch.current(logp), fused=fused)
        loss.value.backward()
        results.append((loss, logp.grad))
    (a, gradient), (b, expected) = results
    known = a.metrics.pop("objective/fused") == 1
    assert b.metrics.pop("objective/fused") == 0
    assert known == (method.name not in COMPOSED and method.correction is None)
    tolerance = {"rtol": 1e-11, "atol": 1e-14} if known else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(gradient, expected, **tolerance)
    torch.testing.assert_close(
        a.value, b.value, **(tolerance if not known else {"rtol": 1e-11, "atol": 1e-13})
    )
    assert torch.equal(a.tokens.kept, b.tokens.kept)
    assert {k: v.item() for k, v in a.metrics.items()} == pytest.approx(
        {k: v.item() for k, v in b.metrics.items()}, rel=2e-5 if known else 0, abs=1e-6 if known else 0
    )


def test_every_method_is_sorted() -> None:
    fused = {n for n, m in TABLE.items() if fusing.plan_of(m.ratio, m.trust, m.aggregate) is not None}
    assert fused == set(METHODS) - COMPOSED


@pytest.mark.parametrize("size", [20.0, 80.0, 89.0, 800.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transform", RATIOS)
def test_extreme_ratios(transform, dtype: torch.dtype, size: float) -> None:
    case = draw(3, 6, 30, dtype)
    mask = case.rollouts.mask
    old = torch.where(mask, torch.tensor([0.0, -size, -0.5]).repeat(10), -1.0).to(dtype)
    logp = torch.where(mask, torch.tensor([-size, 0.0, -0.5, -0.4]).repeat(8)[:30], math.nan).to(dtype)
    for region in (trust.Clip(0.2, 0.2, 3.0), trust.Cap(5.0), trust.unclipped):
        extreme = Case(Rollouts(old, mask, allow_empty=True), logp, case.advantage)
        compare(composition(transform, region, token_mean), extreme)


@pytest.mark.parametrize(
    ("dtype", "lowest", "limit"), [(torch.float64, -708, 4.5e-16), (torch.float32, -87, 2e-7)]
)
@pytest.mark.parametrize("near", [False, True])
def test_exponential_is_right_to_the_last_digits(
    dtype: torch.dtype, lowest: int, limit: float, near: bool
) -> None:
    """The unclipped gradient is -w / n: its weights against libm over the whole range. ``near``: where a whole
    chunk is close to 0, the kernel takes a shorter way."""
    log_ratio = torch.cat((torch.linspace(lowest, 20, 20011), torch.linspace(-1, 1, 9001) ** 3))[None]
    if near:
        log_ratio = torch.cat((torch.linspace(-0.339, 0.339, 20011), 0.3 * torch.linspace(-1, 1, 9001) ** 5))[
            None
        ]
    log_ratio = log_ratio.to(dtype)
    rollouts = Rollouts(torch.zeros_like(log_ratio), torch.ones_like(log_ratio, dtype=torch.bool))
    method = composition(ratio.token, trust.unclipped, SequenceSum(1.0))
    loss, gradient = Case(rollouts, log_ratio, torch.full((1,), -1.0, dtype=dtype)).loss(method, True)
    numbers = log_ratio[0].tolist()
    expected = torch.tensor([math.exp(x) for x in numbers], dtype=torch.float64)
    assert ((gradient[0] - expected) / expected).abs().max() <= limit
    kl = math.fsum(math.expm1(x) - x for x in numbers) / len(numbers)
    assert loss.metrics["policy/kl_old"].item() == pytest.approx(kl, rel=2e-6)


@pytest.mark.parametrize("transform", RATIOS)
def test_the_shorter_way_gives_the_same_numbers(transform) -> None:
    """A token with a large ratio sends its chunk the long way; what other tokens get does not change."""
    case = draw(21, 3, 700, torch.float32, 0.05)
    far = case.logp.clone()
    row, token = case.rollouts.mask.nonzero()[0].tolist()
    far[row, token] += 3.0
    method = composition(transform, trust.unclipped, SequenceSum(1.0))
    for other in (far, case.logp):
        compare(method, Case(case.rollouts, other, case.advantage))
    if transform is ratio.token:
        (_, a), (_, b) = (
            Case(case.rollouts, logp, case.advantage).loss(method, True) for logp in (far, case.logp)
        )
        a[row, token] = b[row, token] = 0
        assert torch.equal(a, b)


def test_small_movements_keep_their_digits() -> None:
    """KL and variance of log-ratios of 1e-6 around 1e-3, against sums of exact fractions of floats."""
    log_ratio = 1e-3 + 1e-6 * torch.randn(1, 3000, dtype=torch.float64)
    case = Case(Rollouts(torch.zeros_like(log_ratio), log_ratio != 0), log_ratio, torch.ones(1).double())
    loss, _ = case.loss(TABLE["grpo"], True)
    numbers = log_ratio[0].tolist()
    mean = math.fsum(numbers) / len(numbers)
    variance = math.fsum((x - mean) ** 2 for x in numbers) / len(numbers)
    kl = math.fsum(x * x / 2 + x**3 / 6 + x**4 / 24 for x in numbers) / len(numbers)
    assert loss.metrics["ratio/raw_log_variance"].item() == pytest.approx(variance, rel=1e-6)
    assert loss.metrics["policy/kl_old"].item() == pytest.approx(kl, rel=1e-6)


@pytest.mark.parametrize("record", records()["policy_losses"], ids=lambda r: r["method"])
def test_golden_records_through_the_fused_path(
    record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def note(*args: Any, **options: Any) -> Loss:
        loss = policy_loss(*args, **options, fused=True)
        seen.append(bool(loss.metrics["objective/fused"]))
        return loss

    monkeypatch.setattr(golden, "policy_loss", note)
    result = golden.compare_loss(record)
    assert result.error <= result.tolerance
    assert seen == [record["method"] in ("ppo_clip", "gspo", "cispo", "kpo", "gpg", "dro")]


# ---- batches in parts, types, layouts


@pytest.mark.parametrize("transform", RATIOS)
@pytest.mark.parametrize("reduce", AGGREGATES)
def test_micro_batches_sum_to_the_batch(transform, reduce) -> None:
    method, case = composition(transform, trust.Clip(0.05, 0.05), reduce), draw(11, 7, 20)
    totals = totals_of(case.rollouts)
    whole, gradient = case.loss(method, True)
    parts = []
    for a, b in itertools.pairwise((0, 2, 3, 7)):
        rollouts = Rollouts(case.rollouts.logp_old[a:b], case.rollouts.mask[a:b], allow_empty=True)
        parts.append(Case(rollouts, case.logp[a:b], case.advantage[a:b], totals).loss(method, True))
    torch.testing.assert_close(torch.cat([g for _, g in parts]), gradient, rtol=1e-13, atol=0)
    total = torch.stack([loss.value for loss, _ in parts]).sum()
    torch.testing.assert_close(total, whole.value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_widened(dtype: torch.dtype) -> None:
    case = draw(5, 4, 30, torch.float32)
    narrow = Case(case.rollouts, case.logp.to(dtype), case.advantage)
    wide = Case(case.rollouts, case.logp.to(dtype).float(), case.advantage)
    (a, gradient), (b, expected) = (c.loss(TABLE["kpo"], True) for c in (narrow, wide))
    assert a.value.dtype == torch.float32 and gradient.dtype == dtype
    assert a.value == b.value and torch.equal(gradient, expected.to(dtype))


def test_other_layouts_give_the_same_bits() -> None:
    case = draw(6, 5, 33, per_token=True)
    plain, gradient = case.loss(TABLE["kpo"], True)
    strided = torch.stack((case.logp, case.logp), -1)[..., 0]
    turned = case.advantage.T.contiguous().T
    old = case.rollouts.logp_old.T.contiguous().T
    rollouts = Rollouts(old, case.rollouts.mask.T.contiguous().T, allow_empty=True)
    other, same = Case(rollouts, strided, turned).loss(TABLE["kpo"], True)
    assert other.value == plain.value and torch.equal(same, gradient)
    spread = case.advantage[:, 0].nan_to_num(0.5, 0.5, 0.5)
    one, _ = Case(case.rollouts, case.logp, spread).loss(TABLE["kpo"], True)
    two, _ = Case(case.rollouts, case.logp, spread[:, None].expand(5, 33)).loss(TABLE["kpo"], True)
    assert one.value == two.value


def test_no_input_is_changed_and_nothing_is_shared() -> None:
    case = draw(7, 5, 20, per_token=True)
    inputs = (case.logp, case.advantage, case.rollouts.logp_old, case.rollouts.mask)
    before = [x.clone() for x in inputs]
    loss, gradient = case.loss(TABLE["kpo"], True)
    for x, y in zip(inputs, before):
        assert torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0))
    again, _ = case.loss(TABLE["kpo"], True)
    gradient.fill_(math.nan)
    assert loss.value == again.value and loss.tokens.coefficient.isfinite().all()


# ---- autograd


def test_gradient_is_scaled_by_what_comes_after() -> None:
    case = draw(8, 4, 20)
    logp = case.logp.clone().requires_grad_()
    loss = policy_loss(TABLE["kpo"], case.rollouts, logp, advantage=case.advantage, fused=True)
    once = torch.autograd.grad(loss.value, logp, retain_graph=True)[0]
    thrice = torch.autograd.grad(3 * loss.value + 1, logp, retain_graph=True)[0]
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-15, atol=0)
    loss.value.backward()
    assert logp.grad is not None and torch.equal(logp.grad, once)
    (2 * logp.nan_to_num(0).sum()).backward()  # accumulates on top
    assert torch.equal(logp.grad, once + 2 * (logp.isfinite()))


@pytest.mark.parametrize("fused", [True, False])
def test_second_derivatives_are_those_of_constants(fused: bool) -> None:
    """Weights are constants, so the gradient moves with what multiplies the loss and not with logp."""
    case = draw(9, 4, 20)
    logp, scale = (
        case.logp.clone().requires_grad_(),
        torch.tensor(2.0, dtype=torch.float64, requires_grad=True),
    )
    loss = policy_loss(TABLE["kpo"], case.rollouts, logp, advantage=case.advantage, fused=fused)
    (gradient,) = torch.autograd.grad(scale * loss.value, logp, create_graph=True)
    by_scale, by_logp = torch.autograd.grad(gradient.sum(), (scale, logp), allow_unused=True)
    torch.testing.assert_close(by_scale, gradient.detach().sum() / 2)
    assert by_logp is None or not by_logp.any()


def test_no_gradient_is_asked_for() -> None:
    case = draw(10, 4, 20)
    loss = policy_loss(TABLE["kpo"], case.rollouts, case.logp, advantage=case.advantage, fused=True)
    assert not loss.value.requires_grad and loss.metrics["objective/fused"] == 1


# ---- when it is not taken


class OtherClip(trust.Clip):
    """Same name of the base, another meaning."""

    def __call__(self, *args: Any) -> trust.Trust:
        return super().__call__(*args)._replace(keep=torch.zeros_like(args[0].log_ratio, dtype=torch.bool))


class OtherFilter(ratio.KalmanFiltered):
    def __call__(self, logp: Tensor, rollouts: Rollouts) -> ratio.Ratio:
        return ratio.one(logp, rollouts)


class OtherSum(SequenceSum):
    pass


@pytest.mark.parametrize(
    "change",
    [
        {"trust": OtherClip(0.2, 0.2)},
        {"ratio": OtherFilter()},
        {"aggregate": OtherSum(3.0)},
        {"aggregate": lambda rollouts, totals: aggregate.token_mean(rollouts, totals)},
        {"ratio": lambda logp, rollouts: ratio.token(logp, rollouts)},
        {"correction": Truncated(1.5)},
    ],
)
def test_parts_that_only_look_alike_are_composed(change: dict[str, Any]) -> None:
    method, batch = dataclasses.replace(TABLE["grpo"], **change), make_batch(1)
    results = [
        policy_loss(method, batch.rollouts(), Current(batch.logp), fused=fused).value
        for fused in (True, False)
    ]
    loss = policy_loss(method, batch.rollouts(), Current(batch.logp), fused=True)
    assert loss.metrics["objective/fused"] == 0 and results[0] == results[1]


def test_mixed_types_are_composed() -> None:
    case = draw(12, 3, 9)
    rollouts = dataclasses.replace(case.rollouts, logp_old=case.rollouts.logp_old.float())
    compare(TABLE["grpo"], Case(rollouts, case.logp, case.advantage), expect=False)


@pytest.mark.parametrize(("value", "fused"), [("0", 0), ("1", 1), (None, 1)])
def test_the_environment_decides(value: str | None, fused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv(fast.SWITCH, raising=False)
    else:
        monkeypatch.setenv(fast.SWITCH, value)
    loss, _ = draw(13, 3, 9).loss(TABLE["grpo"], None)
    assert loss.metrics["objective/fused"] == fused


def test_another_value_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fast.SWITCH, "yes")
    with pytest.raises(ConfigError, match=r"^KALMAN_RL_FUSED: got 'yes', expected 0 \(off\) or 1 \(on\)"):
        draw(13, 3, 9).loss(TABLE["grpo"], None)


def test_without_a_compiler_it_is_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "_numba", lambda: None)
    loss, _ = draw(14, 3, 9).loss(TABLE["grpo"], True)
    assert loss.metrics["objective/fused"] == 0


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("name", ["grpo", "kpo", "cispo", "rloo", "gpg"])
def test_bad_numbers_have_the_same_errors(name: str, bad: float) -> None:
    batch = make_batch(0)
    row, token = batch.mask.nonzero()[3].tolist()
    for field, text in (("logp", "log-prob"), ("advantage", "numbers")):
        values = {"logp": batch.logp.clone(), "advantage": torch.zeros(6, 9, dtype=torch.float64)}
        values[field][row, token] = bad
        where = rf"^{field}: got {bad} at row {row}, token {token} \(1 such tokens\), expected finite {text}"
        with pytest.raises(NumericError, match=where):
            policy_loss(
                TABLE[name], batch.rollouts(), values["logp"], advantage=values["advantage"], fused=True
            )


def test_bad_shapes_have_the_same_errors() -> None:
    batch = make_batch(0)
    with pytest.raises(ShapeError, match=r"^logp: got shape \(6, 8\), expected \(6, 9\)"):
        policy_loss(TABLE["grpo"], batch.rollouts(), batch.logp[:, :8], fused=True)
    with pytest.raises(ShapeError, match=r"^advantage: got shape \(6, 1\)"):
        policy_loss(TABLE["grpo"], batch.rollouts(), batch.logp, advantage=torch.zeros(6, 1), fused=True)
