"""Sums and how a metric is read from them, against numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch

from kalman_rl.objectives.diagnostics import READ, divergence, joined, metric, metrics_of, sums_of, switches

SEEN = torch.tensor([4.0, 6.0, 14.0, 3.0], dtype=torch.float64)  # 0, 1, 2, 3
ZEROS = torch.tensor([4.0, 0.0, 0.0, 0.0], dtype=torch.float64)
NOTHING = torch.zeros(4, dtype=torch.float64)
BY_HAND = {
    "trust/kept": (1.5, 0.0, 0.0),  # a mean
    "ratio/raw_log_variance": (1.25, 0.0, 0.0),
    "ratio/filtered_log_variance": (1.25, 0.0, 0.0),
    "ratio/effective_sample_size": (36 / 56, 1.0, 1.0),
    "correction/effective_sample_size": (36 / 56, 1.0, 1.0),
    "effective_sample_size/tokens_raw": (36 / 56, 0.0, 1.0),
    "effective_sample_size/tokens": (36 / 56, 0.0, 1.0),
    "effective_sample_size/sequences_raw": (36 / 56, 0.0, 1.0),
    "effective_sample_size/sequences": (36 / 56, 0.0, 1.0),
    "ratio/max_abs_log_ratio": (3.0, 0.0, 0.0),
    "ratio/noop": (0.0, 1.0, 1.0),
    "clip_ratio/low_min": (-3.0, 0.0, 0.0),
    "clip_ratio/high_max": (3.0, 0.0, 0.0),
}


def test_every_metric_alone_and_together() -> None:
    assert set(BY_HAND) == {*READ, "trust/kept"}
    for place, sums in enumerate((SEEN, ZEROS, NOTHING)):
        expected = {name: values[place] for name, values in BY_HAND.items()}
        assert {name: metric(name, sums).item() for name in BY_HAND} == pytest.approx(expected)
        together = metrics_of(dict.fromkeys(BY_HAND, sums))
        assert list(together) == list(BY_HAND), "in the order given"
        assert {name: value.item() for name, value in together.items()} == pytest.approx(expected)


def test_one_token_and_weights_that_are_tiny_or_huge() -> None:
    one = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert metric("effective_sample_size/tokens", one).item() == 0
    for weight in (1e-150, 1.0, 1e150):
        sums = sums_of(torch.full((1, 3), weight, dtype=torch.float64), torch.tensor([[True, False, False]]))
        assert metric("ratio/effective_sample_size", sums).item() == pytest.approx(1.0)
        assert metric("trust/kept", sums).item() == weight
        assert metric("ratio/raw_log_variance", sums).item() <= 1e-15 * weight**2


def test_the_largest_may_be_negative_and_empty_parts_do_not_count() -> None:
    mask = torch.tensor([[True, True, False]])
    some = sums_of(torch.tensor([[-2.0, -3.0, math.nan]]), mask)
    assert some.tolist() == [2.0, -5.0, 13.0, -2.0] and some.dtype == torch.float64
    nothing = sums_of(torch.full((1, 3), math.nan), ~mask & mask)
    assert nothing.tolist() == sums_of(torch.zeros(0, 3), torch.zeros(0, 3).bool()).tolist() == [0.0] * 4
    assert joined(torch.stack([nothing, some, nothing])).tolist() == some.tolist()
    assert joined(torch.stack([nothing, nothing])).tolist() == [0.0] * 4


def test_switches_are_changes_of_sign_between_neighbours_of_a_sequence() -> None:
    log_ratio = torch.tensor([[1.0, -1.0, -2.0, 0.0, 1e-30, -1e-30, 5.0, -5.0]])
    trained = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 1]]).bool()
    one = torch.zeros(1, 8).long()
    assert switches(log_ratio, trained, one).tolist() == [5.0, 2.0, 2.0, 1.0]
    assert switches(log_ratio, trained, (torch.arange(8) > 0).long()[None]).tolist() == [4.0, 1.0, 1.0, 1.0]
    assert switches(log_ratio[:, :1], trained[:, :1], one[:, :1]).tolist() == [0.0] * 4


def test_divergence() -> None:
    log_ratio = torch.tensor([0.0, 1.0, -1.0, 20.0, 1e3], dtype=torch.float64)
    expected = [0.0, math.e - 2, 1 / math.e, math.expm1(20) - 20, math.expm1(20) - 1e3]
    assert divergence(log_ratio).tolist() == pytest.approx(expected)
