"""What every belief must do: unbiased advantages, merged groups, time, refusals, state."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.beliefs import (
    BELIEFS,
    Belief,
    BetaBelief,
    GaussianBelief,
    RegressionBelief,
    SPOBelief,
    make_belief,
)
from kalman_rl.beliefs.base import SAME_FEATURES, prompt_features
from kalman_rl.beliefs.groups import sum_of_others
from kalman_rl.errors import ConfigError, NumericError, ShapeError

NAN = math.nan
MAKERS: dict[str, Callable[..., Any]] = {
    **{name: (lambda name=name, **o: make_belief(name, **o)) for name in BELIEFS},
    "gaussian-fixed": lambda **o: GaussianBelief(observation_noise=0.3, process_noise=0.01, **o),
    "auto-features": lambda **o: RegressionBelief(dimension=4, **o),
    "auto-expected-noise": lambda **o: RegressionBelief(expected_noise=True, **o),
    "by-source": lambda **o: make_belief("auto", source=lambda name: str(name)[0], **o),
}
each = pytest.mark.parametrize("name", list(MAKERS))
FEATURES = torch.randn(40, 9, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
IDS: list[Any] = [f"a{i}" for i in range(30)] + [("b", i) for i in range(5)] + list(range(5))


def features_of(name: str, ids: list[Any]) -> dict[str, Tensor]:
    return {"features": FEATURES[[IDS.index(i) for i in ids]]} if name == "auto-features" else {}


def batch(seed: int, size: int = 24, real: bool = False) -> tuple[list[Any], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(IDS), (size // 3,), generator=generator).repeat(3)
    rate = torch.linspace(0.05, 0.95, len(IDS), dtype=torch.float64)[rows]
    reward = torch.bernoulli(rate, generator=generator)
    if real:
        reward = reward + 0.5 * torch.randn(len(rows), generator=generator, dtype=torch.float64)
    return [IDS[row] for row in rows.tolist()], reward


def takes_any(name: str) -> bool:
    """Whether a belief takes rewards outside [0, 1], as it says itself."""
    belief, far = MAKERS[name](), torch.tensor([-7.7e5, 1.5], dtype=torch.float64)
    try:
        belief.advantages(IDS[:2], far, step=0, **features_of(name, IDS[:2]))
    except NumericError:
        return False
    return True


def test_which_beliefs_take_any_reward() -> None:
    assert [name for name in ("auto", "beta", "gaussian", "spo") if takes_any(name)] == ["auto", "gaussian"]


def trained(name: str, steps: int, real: bool = False, **options: Any) -> Any:
    """A belief after some batches with irregular gaps; real rewards where the belief takes them."""
    belief = MAKERS[name](**options)
    for step in range(steps):
        ids, reward = batch(step, real=real and takes_any(name))
        belief.update(ids, reward, step=step * 3 + step % 2, **features_of(name, ids))
    return belief


def snapshot(belief: Any) -> str:
    return repr(belief.state_dict())


# ---- unbiasedness


@each
@pytest.mark.parametrize("steps", [0, 1, 2, 12])
@pytest.mark.parametrize("real", [False, True])
def test_gradient_is_unbiased_by_enumeration(name: str, steps: int, real: bool) -> None:
    """Two prompts with softmax policies, every outcome of their groups: E[sum A grad log pi] = G grad J."""
    belief = trained(name, steps, real)
    ids = ["a1"] * 3 + ["a7"]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    worth = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.25]], dtype=torch.float64)
    policy, prompt = torch.softmax(logits, 1), torch.tensor([0, 0, 0, 1])
    score = torch.eye(3, dtype=torch.float64) - policy[:, None, :]  # (prompt, action, logit)
    total = torch.zeros(2, 3, dtype=torch.float64)
    scale = None
    for actions in itertools.product(range(3), repeat=4):
        chosen = torch.tensor(actions)
        result = belief.advantages(ids, worth[prompt, chosen], step=50, **features_of(name, ids))
        scale = result.scale if scale is None else scale
        assert torch.equal(result.scale, scale)
        weight = policy[prompt, chosen].prod() * result.advantage * result.scale
        total.index_add_(0, prompt, weight[:, None] * score[prompt, chosen])
    gradient = policy * (worth - (policy * worth).sum(1, keepdim=True))
    expected = gradient * torch.tensor([[3.0], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)


def test_the_enumeration_catches_a_baseline_that_saw_its_own_reward() -> None:
    """The control of the test above: centring by the full group mean fails it."""
    policy = torch.tensor([0.3, 0.7], dtype=torch.float64)
    total = torch.zeros(2, dtype=torch.float64)
    for actions in itertools.product(range(2), repeat=2):
        reward = torch.tensor(actions, dtype=torch.float64)
        for j in range(2):
            score = torch.eye(2, dtype=torch.float64)[actions[j]] - policy
            total += policy[list(actions)].prod() * (reward[j] - reward.mean()) * score
    gradient = policy * (torch.tensor([0.0, 1.0]) - 0.7)
    assert (total - 2 * gradient).abs().max() > 0.1


@each
@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("real", [False, True])
def test_own_reward_moves_own_baseline_by_exactly_nothing(name: str, steps: int, real: bool) -> None:
    belief = trained(name, steps, real)
    ids, reward = batch(100, real=real and takes_any(name))
    given = features_of(name, ids)
    before = belief.advantages(ids, reward, step=60, **given)
    moved = False
    for j in range(len(ids)):
        for value in (0.0, 1.0, 0.123, -7.7e5) if takes_any(name) else (0.0, 1.0, 0.123):
            changed = reward.clone()
            changed[j] = value
            after = belief.advantages(ids, changed, step=60, **given)
            assert after.baseline[j] == before.baseline[j] and torch.equal(after.scale, before.scale)
            moved |= not torch.equal(after.baseline, before.baseline)
    assert moved or name == "spo"  # the others of the group do see it


def test_clipping_of_heavy_tails_keeps_own_reward_out_too() -> None:
    belief = RegressionBelief()
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        noise = torch.randn(2, 60, generator=generator, dtype=torch.float64)
        belief.update([i % 15 for i in range(60)], noise[0] / noise[1].abs(), step=step)
    assert belief.reward_noise.robust
    ids, reward = [0, 0, 0, 1, 1], torch.tensor([0.3, -0.5, 90.0, 0.1, -4.0], dtype=torch.float64)
    before = belief.advantages(ids, reward, step=12)
    assert abs(before.baseline[0]) < 10  # the 90 was clipped
    for j in range(5):
        for value in (0.0, 1e3, -1e6):
            changed = reward.clone()
            changed[j] = value
            assert belief.advantages(ids, changed, step=12).baseline[j] == before.baseline[j]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 3)), min_size=1, max_size=20))
def test_sum_of_others(entries: list[tuple[float, int]]) -> None:
    values = torch.tensor([v for v, _ in entries], dtype=torch.float64)
    index = torch.tensor([i for _, i in entries])
    naive = [
        math.fsum(v for k, (v, g) in enumerate(entries) if g == own and k != j)
        for j, (_, own) in enumerate(entries)
    ]
    ours = sum_of_others(values, index)
    torch.testing.assert_close(ours, torch.tensor(naive, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    for j in range(len(entries)):
        changed = values.clone()
        changed[j] = 1e9
        assert sum_of_others(changed, index)[j] == ours[j]


# ---- what the methods promise


@each
def test_reading_changes_nothing_and_the_protocol_is_met(name: str) -> None:
    belief = trained(name, 3)
    assert isinstance(belief, Belief)
    ids, reward = batch(50)
    given, before = features_of(name, ids), snapshot(belief)
    value = belief.predict(ids, step=20, **given)
    reward_belief = belief.predictive(ids, step=20, **given)
    result = belief.advantages(ids, reward, step=20, **given)
    assert snapshot(belief) == before
    for t in (*value, *reward_belief, *result[:2]):
        assert t.shape == (24,) and t.dtype == torch.float64 and torch.isfinite(t).all()
    assert torch.equal(value.mean, reward_belief.mean) and (reward_belief.variance > value.variance).all()
    torch.testing.assert_close(result.advantage * result.scale, reward - result.baseline)


@each
def test_certainty_fades_and_unseen_prompts_are_uncertain(name: str) -> None:
    belief = trained(name, 10)
    given = features_of(name, ["a3"])
    now, later = (belief.predict(["a3"], step=s, **given).variance for s in (30, 3000))
    assert later >= now if name == "spo" else later > now


@each
@pytest.mark.parametrize("real", [False, True])
def test_groups_in_any_order_and_as_one_or_interleaved(name: str, real: bool) -> None:
    ids, reward = batch(5, real=real and takes_any(name))
    reward[4] = NAN
    one, two = trained(name, 4, real), trained(name, 4, real)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [ids[i] for i in order]
    a = one.advantages(ids, reward, step=40, **features_of(name, ids)).advantage
    b = two.advantages(shuffled, reward[order], step=40, **features_of(name, shuffled)).advantage
    torch.testing.assert_close(a[order], b, rtol=0, atol=1e-12)
    one.update(ids, reward, step=40, **features_of(name, ids))
    two.update(shuffled, reward[order], step=40, **features_of(name, shuffled))
    given = features_of(name, IDS)
    stored = 1e-6 if name.startswith(("auto", "by")) else 1e-12  # rows in float32, or float64
    left, right = one.predict(IDS, step=41, **given), two.predict(IDS, step=41, **given)
    torch.testing.assert_close(left.mean, right.mean, rtol=0, atol=stored)
    torch.testing.assert_close(left.variance, right.variance, rtol=0, atol=stored)


@each
def test_missing_rewards_are_as_if_never_sampled(name: str) -> None:
    one, two = trained(name, 4), trained(name, 4)
    ids, reward = ["a1", "a2", "a1", "a9", "a1"], torch.tensor([1.0, NAN, 0.0, NAN, NAN])
    kept = [0, 2]
    full = one.advantages(ids, reward, step=30, **features_of(name, ids))
    some = two.advantages(["a1", "a1"], reward[kept], step=30, **features_of(name, ["a1", "a1"]))
    torch.testing.assert_close(full.advantage[kept], some.advantage)
    assert (full.advantage[[1, 3, 4]] == 0).all() and torch.isfinite(full.baseline).all()
    seen = one.update(ids, reward, step=30, **features_of(name, ids))
    two.update(["a1", "a1"], reward[kept], step=30, **features_of(name, ["a1", "a1"]))
    assert seen.ids == ["a1"] and seen.size.tolist() == [2.0] and seen.mean.tolist() == [0.5]
    assert snapshot(one) == snapshot(two)
    before = snapshot(one)
    assert one.update(["zz"], torch.tensor([NAN]), step=31).ids == [] and snapshot(one) == before


@each
def test_group_of_one_gets_the_prediction_as_baseline(name: str) -> None:
    belief = trained(name, 6)
    given = features_of(name, ["a4"])
    result = belief.advantages(["a4"], torch.tensor([1.0]), step=30, **given)
    torch.testing.assert_close(result.baseline, belief.predict(["a4"], step=30, **given).mean)


@each
def test_scale_is_the_lagged_pooled_deviation(name: str) -> None:
    ids, reward = batch(0)
    belief, off = MAKERS[name](), MAKERS[name](scale=False)
    given = features_of(name, ids)
    first = belief.advantages(ids, reward, step=0, **given)
    assert (first.scale == 1).all()
    belief.update(ids, reward, step=0, **given)
    off.update(ids, reward, step=0, **given)
    scale = belief.advantages(ids, reward, step=1, **given).scale
    if name != "by-source":
        torch.testing.assert_close(scale, first.advantage.square().mean().sqrt())
    assert (off.advantages(ids, reward, step=1, **given).scale == 1).all()


# ---- time: repeats, parts, late rewards


@each
def test_the_same_batch_twice_is_refused_whole(name: str) -> None:
    belief = trained(name, 2)
    reward = torch.tensor([1.0, 0.0])
    belief.update(["a1", "a2"], reward, step=10, **features_of(name, ["a1", "a2"]))
    before = snapshot(belief)
    with pytest.raises(ConfigError, match=r"^step, part: got step 10, part 0 for prompt 'a2' a second time"):
        belief.update(["a3", "a2"], reward, step=10, **features_of(name, ["a3", "a2"]))
    assert snapshot(belief) == before
    belief.update(["a3", "a2"], reward, step=10, part=1, **features_of(name, ["a3", "a2"]))
    assert snapshot(belief) != before


@each
def test_late_rewards_teach_less_than_fresh_ones(name: str) -> None:
    if name == "spo":
        return  # its counts fade per visit, not per step
    fresh, late = trained(name, 12), trained(name, 12)
    ids = ["a2"] * 6
    given, before = features_of(name, ids), fresh.predict(["a2"], step=900, **features_of(name, ["a2"])).mean
    for belief in (fresh, late):
        belief.update(ids, torch.ones(6), step=900, **given)
    start = fresh.predict(["a2"], step=900, **features_of(name, ["a2"])).mean
    fresh.update(ids, torch.zeros(6), step=900, part=1, **given)
    late.update(ids, torch.zeros(6), step=850, **given)
    moved = [start - b.predict(["a2"], step=900, **features_of(name, ["a2"])).mean for b in (fresh, late)]
    assert 0 < moved[1] < moved[0] and before < start


# ---- state


@each
@pytest.mark.parametrize("real", [False, True])
def test_state_continues_bit_for_bit(name: str, real: bool, tmp_path: Any) -> None:
    belief, restored = trained(name, 5, real), MAKERS[name]()
    torch.save(belief.state_dict(), tmp_path / "belief.pt")
    restored.load_state_dict(torch.load(tmp_path / "belief.pt", weights_only=True))
    ids, reward = batch(77)
    for one in (belief, restored):
        one.update(ids, reward, step=50, **features_of(name, ids))
    assert snapshot(belief) == snapshot(restored)


def types(value: Any, path: str = "") -> dict[str, torch.dtype]:
    """Type of every tensor inside a state, by its place."""
    if isinstance(value, Tensor):
        return {path: value.dtype}
    pairs = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    return {at: kind for key, part in pairs for at, kind in types(part, f"{path}/{key}").items()}


@each
def test_a_new_state_has_the_types_of_a_trained_one(name: str) -> None:
    new, later = types(MAKERS[name]().state_dict()), types(trained(name, 5, False).state_dict())
    assert new.items() <= later.items()
    assert torch.float64 in new.values() or name == "by-source"  # a source begins with its first prompt


@each
def test_a_stranger_state_is_refused_and_changes_nothing(name: str) -> None:
    belief = trained(name, 3)
    before, state = snapshot(belief), belief.state_dict()
    changes: list[dict[str, Any]] = [{"format": 99}, {"kind": "Other"}]
    if name != "by-source":
        changes += [{"options": {}}, {"noise": {}}, {"scale": None}, {"table": {}}]
        table = copy.deepcopy(state["table"])
        table["clock"] = table["clock"][:-1]
        changes.append({"table": table})
    if name in ("beta", "auto"):
        changes.append({"evidence": {"log_likelihood": torch.zeros(2), "last_step": 0}})
    for change in changes:
        with pytest.raises(ConfigError, match="belief state|options"):
            belief.load_state_dict({**state, **change})
        assert snapshot(belief) == before


def test_a_state_with_nan_is_refused() -> None:
    belief = trained("gaussian", 3)
    state = copy.deepcopy(belief.state_dict())
    state["table"]["columns"]["mean"][0] = NAN
    with pytest.raises(NumericError, match=r"got NaN in table\.columns\.mean"):
        belief.load_state_dict(state)


def same(one: Any, other: Any) -> bool:
    """Whether two states or results hold equal numbers of equal types."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(part, other[key]) for key, part in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) and type(one) is type(other)


@each
@pytest.mark.parametrize("real", [False, True])
def test_torchs_default_type_changes_no_number(name: str, real: bool) -> None:
    ids, reward = batch(50)
    given, found = features_of(name, ids), []
    asking = {"step": 20, **given}
    for dtype in (torch.float32, torch.float16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            new, belief = MAKERS[name](), trained(name, 4, real)
            asked = [
                (
                    one.predict(ids, **asking),
                    one.predictive(ids, **asking),
                    one.advantages(ids, reward, **asking),
                )
                for one in (new, belief)
            ]
            late = belief.update(ids, reward, step=2, part=1, **given)
            restored = MAKERS[name]()
            restored.load_state_dict(copy.deepcopy(belief.state_dict()))
            found.append((asked, late, belief.state_dict(), restored.state_dict()))
        finally:
            torch.set_default_dtype(torch.float32)
    assert same(found[0], found[1]) and same(found[0], found[2]) and same(found[0][2], found[0][3])


# ---- bad input


@each
@pytest.mark.parametrize(
    ("ids", "reward", "options", "error", "message"),
    [
        ([], torch.zeros(0), {}, ShapeError, "ids: got"),
        ("ab", torch.zeros(2), {}, ShapeError, "ids: got"),
        (torch.tensor([1, 2]), torch.zeros(2), {}, ShapeError, "ids: got"),
        (["a1", ["x"]], torch.zeros(2), {}, (ShapeError, TypeError), ""),
        (["a1", "a2"], torch.zeros(3), {}, ShapeError, r"reward: got \(3,\)"),
        (["a1", "a2"], torch.tensor([0.0, math.inf]), {}, NumericError, "reward: got inf at row "),
        (["a1"], torch.zeros(1), {"step": -1}, ConfigError, "step: got -1, expected an integer from 0"),
        (["a1"], torch.zeros(1), {"step": 1.5}, ConfigError, "step: got 1.5"),
        (["a1"], torch.zeros(1), {"step": True}, ConfigError, "step: got True"),
    ],
)
def test_bad_batches_change_nothing(name, ids, reward, options, error, message) -> None:
    belief = trained(name, 2)
    before = snapshot(belief)
    for call in (belief.advantages, belief.update):
        with pytest.raises(error, match=f"^{message}" if name != "by-source" else ""):
            call(ids, reward, **{"step": 20, **options})
    assert snapshot(belief) == before


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.zeros(2, 8), ShapeError, "features: got width 8, expected 9"),
        (torch.zeros(3, 9), ShapeError, r"features: got .*\(3, 9\), expected floating \(2, F\)"),
        (torch.zeros(9), ShapeError, "features: got"),
        (torch.zeros(2, 9).long(), ShapeError, "features: got torch.int64"),
        (torch.full((2, 9), NAN), NumericError, "features: got nan at row 0, column 0"),
        (torch.eye(2, 9), NumericError, "features: got row 1 different from an earlier row of the same id"),
    ],
)
def test_bad_features_change_nothing(features: Tensor, error: type[Exception], message: str) -> None:
    belief = trained("auto-features", 3)
    before = snapshot(belief)
    for call in (belief.advantages, belief.update):
        with pytest.raises(error, match=f"^{message}"):
            call(["a1", "a1"], torch.zeros(2), step=20, features=features)
    assert snapshot(belief) == before


def test_features_of_a_prompt_are_its_first_row() -> None:
    """Rows of one prompt may differ by the rounding of bfloat16; they come out as float32 at least."""
    rows = 1 + torch.rand(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index = torch.tensor([1, 0, 1, 2, 0, 1])
    rows = rows[index] * torch.tensor([1.0, 1.0, 1.01, 1.0, 0.99, 1.0], dtype=torch.float64)[:, None]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        given = rows.to(dtype).requires_grad_()
        found = prompt_features(given, index, 3)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(found, given.detach()[[1, 0, 3]].to(found.dtype)) and not found.requires_grad
    for factor, legal in ((1 + 0.99 * SAME_FEATURES, True), (1 + 1.01 * SAME_FEATURES, False)):
        pair = torch.stack((rows[0], factor * rows[0]))
        if legal:
            prompt_features(pair, torch.zeros(2, dtype=torch.long), 1)
        else:
            with pytest.raises(NumericError, match="^features: got row 1 different"):
                prompt_features(pair, torch.zeros(2, dtype=torch.long), 1)


def test_names_and_options() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gaussian'"):
        make_belief("gausian")
    with pytest.raises(ConfigError, match="belief option: got 'process_noise' for beta"):
        make_belief("beta", process_noise=1.0)
    for name, options in (
        ("gaussian", {"process_noise": -1.0}),
        ("gaussian", {"observation_noise": "x"}),
        ("gaussian", {"observation_noise": 0.0}),
        ("gaussian", {"variance": NAN}),
        ("beta", {"forgetting": 1.1}),
        ("beta", {"prior": (0.0, 1.0)}),
        ("spo", {"low": 0.97}),
        ("auto", {"process_noise": ()}),
        ("auto", {"prior_variance": (0.0,)}),
        ("auto", {"forgetting": 0.0}),
        ("auto", {"dimension": 0}),
    ):
        with pytest.raises((ConfigError, NumericError), match=f"{next(iter(options))}.*got"):
            make_belief(name, **options)


DEFAULTS: list[tuple[type, dict[str, Any]]] = [
    (
        GaussianBelief,
        {"process_noise": 1e-3, "observation_noise": "auto", "mean": 0.5, "variance": 0.25, "scale": True},
    ),
    (
        BetaBelief,
        {"forgetting": (1.0, 0.998, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8), "prior": None, "scale": True},
    ),
    (SPOBelief, {"rho": None, "half": 0.06, "low": 0.875, "high": 0.96, "scale": True}),
    (
        RegressionBelief,
        {
            "dimension": 64,
            "process_noise": (0.0, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
            "prior_variance": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.25, 0.5, 1.0),
            "forgetting": 0.98,
            "scale": True,
            "seed": 0,
            "expected_noise": False,
        },
    ),
]


@pytest.mark.parametrize(("kind", "want"), DEFAULTS)
def test_what_is_left_out(kind: type, want: dict[str, Any]) -> None:
    """A default that changes, changes every run that relied on it."""
    assert {name: one.default for name, one in signature(kind).parameters.items()} == want


GIVEN: list[tuple[type, dict[str, Any]]] = [
    (GaussianBelief, {"process_noise": 0.3, "observation_noise": 0.7, "mean": 0.1, "variance": 0.9}),
    (BetaBelief, {"forgetting": [0.7, 0.3], "prior": (0.3, 0.7)}),
    (SPOBelief, {"rho": 0.3, "half": 0.1, "low": 0.3, "high": 0.9}),
    (
        RegressionBelief,
        {"dimension": 3, "process_noise": [0.1, 0.3], "prior_variance": [0.1, 0.7, 0.9], "forgetting": 0.7}
        | {"seed": 5, "expected_noise": True},
    ),
]


@pytest.mark.parametrize(("kind", "given"), GIVEN)
def test_settings_are_kept_to_the_last_digit(kind: type, given: dict[str, Any]) -> None:
    """A saved state names them all, and a belief with any other setting refuses it."""
    belief = kind(**given)
    state = belief.state_dict()
    assert state["options"] == given
    assert repr(belief).endswith(
        f"({', '.join(f'{name}={given[name]!r}' for name in state['options'])}), prompts: 0>"
    )
    for name in given:
        default = signature(kind).parameters[name].default
        other = kind(**{**given, name: default})
        with pytest.raises(ConfigError, match="^belief state: got options .*build the belief with"):
            other.load_state_dict(state)


# ---- scales


@pytest.mark.parametrize("value", [0.1, 0.3, 1.0, 3000.1, -7.7])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_constant_rewards_teach_nothing(value: float, size: int) -> None:
    """Rounding residue over a scale learned from rounding residue was up to 7."""
    belief, ids = make_belief("auto"), [i for i in range(16) for _ in range(size)]
    reward = torch.full((len(ids),), value)
    for step in range(200):
        assert (belief.advantages(ids, reward, step=step).advantage == 0).all()
        belief.update(ids, reward, step=step)


@pytest.mark.parametrize("name", ["auto", "gaussian"])
@pytest.mark.parametrize("value", [0.0, 0.1, 5.0])
def test_rewards_that_become_constant_teach_nothing_in_the_end(name: str, value: float) -> None:
    """By then the scale has shrunk to the size of what float32 rows round away."""
    belief, ids = make_belief(name), [i for i in range(16) for _ in range(4)]
    for step in range(900):
        noise = torch.randn(64, generator=torch.Generator().manual_seed(step)).double()
        reward = 3 + noise if step < 3 else torch.full((64,), value, dtype=torch.float64)
        found = belief.advantages(ids, reward, step=step).advantage
        assert step < 800 or (found == 0).all()
        belief.update(ids, reward, step=step)


@each
def test_a_belief_shows_its_options_and_its_size(name: str) -> None:
    text = repr(trained(name, 2))
    assert f"prompts: {len(trained(name, 2))}>" in text and type(MAKERS[name]()).__name__ in text
    assert "object at" not in text
