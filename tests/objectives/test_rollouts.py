"""Rollouts: what is stored, what is refused, and which sequence a token belongs to."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kalman_rl.errors import KalmanRLError, NumericError, ShapeError, unknown_name
from kalman_rl.objectives.rollouts import Rollouts, masked_logp


def make(**changes: Any) -> Rollouts:
    values: dict[str, Any] = {"logp_old": torch.full((3, 4), -1.0), "mask": torch.ones(3, 4)}
    return Rollouts(**(values | changes))


# ---- what is stored


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_mask_may_be_zeros_and_ones_of_any_type(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    stored = Rollouts(torch.zeros(2, 3), mask.to(dtype)).mask
    assert stored.dtype == torch.bool and torch.equal(stored, mask.bool())


@pytest.mark.parametrize(
    "given, stored",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_logps_are_float32_at_least(given: torch.dtype, stored: torch.dtype) -> None:
    logp = torch.full((3, 4), -1.0, dtype=given)
    rollouts = make(logp_old=logp, logp_behaviour=logp, logp_reference=logp)
    assert rollouts.logp_old.dtype == stored
    assert rollouts.logp_behaviour is not None and rollouts.logp_behaviour.dtype == stored
    assert rollouts.logp_reference is not None and rollouts.logp_reference.dtype == stored
    assert masked_logp("logp", logp, rollouts.mask).dtype == stored


def test_nothing_under_the_mask_is_stored_and_nothing_carries_gradient() -> None:
    logp = torch.full((2, 3), -1.0)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    logp[~mask.bool()] = math.nan
    logp.requires_grad_()
    rollouts = Rollouts(
        logp,
        mask,
        reward=torch.zeros(2, requires_grad=True),
        logp_behaviour=logp,
        logp_reference=logp,
    )
    expected = torch.where(mask.bool(), -1.0, 0.0)
    for value in (rollouts.logp_old, rollouts.logp_behaviour, rollouts.logp_reference):
        assert value is not None and torch.equal(value, expected) and not value.requires_grad
    assert rollouts.reward is not None and not rollouts.reward.requires_grad


def test_the_callers_tensors_are_left_alone() -> None:
    logp, mask = torch.full((1, 3), math.nan), torch.tensor([[0, 1, 0]])
    logp[0, 1] = -2.0
    before = logp.clone()
    Rollouts(logp, mask)
    torch.testing.assert_close(logp, before, equal_nan=True)
    assert mask.tolist() == [[0, 1, 0]]


def test_frozen_and_picklable() -> None:
    rollouts = make(reward=torch.zeros(3), prompt_id=["a", "b", "c"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        rollouts.mask = torch.zeros(3, 4)  # type: ignore[misc]
    back = pickle.loads(pickle.dumps(rollouts))
    assert torch.equal(back.logp_old, rollouts.logp_old) and back.prompt_id == ["a", "b", "c"]


def test_nan_rewards_are_missing_not_wrong() -> None:
    assert make(reward=torch.tensor([1.0, math.nan, 0.0])).reward is not None


# ---- which sequence


def test_a_row_is_a_sequence_without_segments() -> None:
    rollouts = Rollouts(torch.zeros(2, 3), torch.tensor([[1, 0, 1], [0, 1, 0]]))
    assert rollouts.sequence_index.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert rollouts.lengths.tolist() == [[2, 2, 2], [1, 1, 1]]
    assert rollouts.sequence_count == 2


def test_a_change_of_segment_starts_a_sequence() -> None:
    """Numbers may return (7, 7, 3, 7) and go on into the next row; neither joins sequences."""
    segment = torch.tensor([[7, 7, 3, 7], [7, 7, 7, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
    rollouts = Rollouts(torch.zeros(2, 4), mask, segment=segment)
    assert rollouts.sequence_index.tolist() == [[0, 0, 1, 2], [3, 3, 3, 4]]
    assert rollouts.lengths.tolist() == [[2, 2, 1, 1], [2, 2, 2, 0]]
    assert rollouts.sequence_count == 4  # the last one has no trained token
    values = torch.tensor([[1.0, 2, 4, 8], [math.nan, 16, 32, math.inf]])
    assert rollouts.per_sequence_sum(values).tolist() == [[3, 3, 4, 8], [48, 48, 48, 0]]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 4), length=st.integers(1, 9), packed=st.booleans())
def test_per_sequence_sums_against_a_loop(seed: int, rows: int, length: int, packed: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=g) < 0.6
    segment = torch.randint(3, (rows, length), generator=g) if packed else None
    values = torch.randn(rows, length, generator=g, dtype=torch.float64)
    rollouts = Rollouts(torch.zeros(rows, length), mask, segment=segment, allow_empty=True)
    sums, lengths = rollouts.per_sequence_sum(values), rollouts.lengths
    nonempty = 0
    for i in range(rows):
        edges = [0, length]
        if segment is not None:
            edges[1:1] = [t for t in range(1, length) if segment[i, t] != segment[i, t - 1]]
        for a, b in itertools.pairwise(edges):
            inside = mask[i, a:b]
            torch.testing.assert_close(sums[i, a:b], values[i, a:b][inside].sum().expand(b - a))
            assert (lengths[i, a:b] == inside.sum()).all()
            nonempty += bool(inside.any())
    assert rollouts.sequence_count == nonempty


# ---- what is refused: the argument, what came, what is expected

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one dimension": (
        {"logp_old": torch.zeros(4)},
        ShapeError,
        r"^logp_old: got shape \(4,\), expected \(B, T\)",
    ),
    "three dimensions": (
        {"logp_old": torch.zeros(3, 4, 5)},
        ShapeError,
        r"^logp_old: got shape \(3, 4, 5\), expected \(B, T\)",
    ),
    "no tokens": (
        {"logp_old": torch.zeros(3, 0)},
        ShapeError,
        r"^logp_old: got shape \(3, 0\), expected .*T >= 1",
    ),
    "mask shape": (
        {"mask": torch.ones(3, 5)},
        ShapeError,
        r"^mask: got shape \(3, 5\), expected \(3, 4\) like logp_old",
    ),
    "mask values": (
        {"mask": torch.full((3, 4), 2)},
        ShapeError,
        r"^mask: got values .*expected .*zeros and ones",
    ),
    "mask NaN": ({"mask": torch.full((3, 4), math.nan)}, ShapeError, r"^mask: got values .*expected a bool"),
    "empty rows": (
        {"mask": torch.tensor([[1.0], [0], [0]]).expand(3, 4)},
        ShapeError,
        r"^mask: row 1 has no trained token \(2 such rows\), expected .*; drop .*, or pass allow_empty=True",
    ),
    "behaviour shape": (
        {"logp_behaviour": torch.zeros(3, 3)},
        ShapeError,
        r"^logp_behaviour: got shape \(3, 3\), expected \(3, 4\) like the mask",
    ),
    "reference shape": (
        {"logp_reference": torch.zeros(4, 3)},
        ShapeError,
        r"^logp_reference: got shape \(4, 3\), expected \(3, 4\) like the mask",
    ),
    "reward shape": (
        {"reward": torch.zeros(3, 4)},
        ShapeError,
        r"^reward: got shape \(3, 4\), expected \(3,\): one per completion",
    ),
    "group shape": (
        {"group": torch.zeros(2)},
        ShapeError,
        r"^group: got shape \(2,\), expected \(3,\): one per",
    ),
    "segment shape": (
        {"segment": torch.zeros(3)},
        ShapeError,
        r"^segment: got shape \(3,\), expected \(3, 4\)",
    ),
    "prompt names": ({"prompt_id": ["a"]}, ShapeError, r"^prompt_id: got 1 names, expected 3"),
} | {
    f"{name} {bad}": (
        {name: torch.tensor([[-1.0] * 4, [-1.0, -1.0, bad, bad], [-1.0] * 4])},
        NumericError,
        rf"^{name}: got {bad} at row 1, token 2 \(2 such tokens\), expected finite .*; mask the token out",
    )
    for name in ("logp_old", "logp_behaviour", "logp_reference")
    for bad in (math.nan, math.inf, -math.inf)
}


@pytest.mark.parametrize("case", list(WRONG))
def test_refused(case: str) -> None:
    changes, error, message = WRONG[case]
    with pytest.raises(error, match=message) as caught:
        make(**changes)
    assert isinstance(caught.value, KalmanRLError)
    assert len(caught.traceback) <= 6, "say it where it came in"


def test_empty_rows_on_request() -> None:
    rollouts = Rollouts(torch.zeros(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), allow_empty=True)
    assert rollouts.sequence_count == 1
    assert rollouts.lengths.tolist() == [[3, 3, 3], [0, 0, 0]]
    nothing = Rollouts(torch.zeros(2, 3), torch.zeros(2, 3), allow_empty=True)
    assert nothing.sequence_count == 0


def test_unknown_names_point_at_the_nearest() -> None:
    assert "did you mean 'kpo'?" in str(unknown_name("method", "kop", ["kpo", "grpo"]))
    assert "did you mean" not in str(unknown_name("method", "zzzzzz", ["kpo", "grpo"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_whose_sum_is_beyond_the_type_are_finite_numbers(dtype: torch.dtype) -> None:
    values, mask = (
        torch.full((2, 3), torch.finfo(dtype).min, dtype=dtype),
        torch.tensor([[1, 1, 0], [1, 1, 1]]),
    )
    assert torch.equal(masked_logp("logp", values, mask.bool()), torch.where(mask.bool(), values, 0.0))


def test_no_mask_means_all_trained() -> None:
    assert Rollouts(torch.zeros(2, 3)).mask.tolist() == [[True] * 3] * 2
