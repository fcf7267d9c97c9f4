"""Our compositions against the recorded outputs of published implementations."""

from __future__ import annotations

import json
import lzma
from collections import Counter
from importlib import resources
from typing import Any

import pytest
import torch
from torch import Tensor

from kalman_rl.instruments.verify import golden
from kalman_rl.instruments.verify.record import FILE, TOLERANCE, packed, precision, records
from kalman_rl.objectives import trust

RECORDS = records()


def _named(records: list[dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(r, id=f"{n:02d}-{r['method']}-{r.get('aggregation', 'advantage')}")
        for n, r in enumerate(records)
    ]


def test_every_recorded_method_is_compared() -> None:
    assert {r["method"] for r in RECORDS["policy_losses"]} == set(golden.PARTS)
    assert {r["method"] for r in RECORDS["advantages"]} == set(golden.ADVANTAGE)


def test_the_records_cover_what_they_should() -> None:
    losses = RECORDS["policy_losses"]
    count = Counter((r["method"], r["holes"]) for r in losses)
    for method in ("ppo_clip", "gspo", "cispo"):
        assert count[method, True] and count[method, False]
    assert {r["aggregation"] for r in losses if r["method"] == "ppo_clip"} == set(golden.AGGREGATE)
    assert {r["config"]["is_clip"] for r in losses if r["method"] == "kpo"} == {True, False}


def test_the_file_is_what_its_own_table_gives() -> None:
    data = resources.files("kalman_rl.instruments.verify").joinpath(FILE).read_bytes()
    again = packed(RECORDS)
    assert lzma.decompress(again) == lzma.decompress(data)
    assert again == packed(RECORDS)
    assert len(again) <= 65_000


def test_what_is_rounded_away_is_a_hundredth_of_the_tolerance_at_most() -> None:
    table = {"policy_losses": [dict(RECORDS["policy_losses"][n]) for n in (0, 8, 26)], "advantages": []}
    for entry in table["policy_losses"]:
        entry["grad_log_prob"] = [
            [value * 1.1234567890123 for value in row] for row in entry["grad_log_prob"]
        ]
    stored = json.loads(lzma.decompress(packed(table)))["policy_losses"]
    for entry, short in zip(table["policy_losses"], stored):
        exact = torch.tensor(entry["grad_log_prob"], dtype=torch.float64)
        kept = torch.tensor(short["grad_log_prob"], dtype=torch.float64)
        bound = TOLERANCE[precision(entry)] / 100
        error = (exact[torch.tensor(entry["mask"]).bool()] - kept).abs().max() / exact.abs().max()
        assert 0 < error <= bound


@pytest.mark.parametrize("record", _named(RECORDS["policy_losses"]))
def test_value_and_gradient(record: dict[str, Any]) -> None:
    result = golden.compare_loss(record)
    assert result.same_zeros, "another set of tokens lost its gradient"
    assert result.value <= result.tolerance
    assert result.gradient <= result.tolerance


@pytest.mark.parametrize("record", _named(RECORDS["advantages"]))
def test_advantage(record: dict[str, Any]) -> None:
    sizes = {record["group"].count(number) for number in record["group"]}
    assert 1 in sizes and len(sizes) > 1
    assert golden.compare_advantage(record) <= golden.ADVANTAGE_TOLERANCE


@pytest.mark.parametrize("record", [r for r in RECORDS["policy_losses"] if r["method"] == "bapo"])
def test_bapo_ends_with_the_recorded_bounds(record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[trust.Clip] = []
    fitted = trust.Balance.fitted

    def note(self: trust.Balance, statistics: Tensor) -> trust.Clip:
        found.append(fitted(self, statistics))
        return found[-1]

    monkeypatch.setattr(trust.Balance, "fitted", note)
    golden.compare_loss(record)
    bounds = record["chosen_bounds"]
    assert 1 - found[0].low == pytest.approx(bounds["clip_low"], rel=1e-12)
    assert 1 + found[0].high == pytest.approx(bounds["clip_high"], rel=1e-12)


@pytest.mark.parametrize("key", ["grad_log_prob", "loss"])
def test_a_wrong_number_is_noticed(key: str) -> None:
    record = RECORDS["policy_losses"][0]
    wrong = torch.tensor(record[key], dtype=torch.float64) * (1 + 1e-5)
    result = golden.compare_loss({**record, key: wrong.tolist()})
    assert result.error > result.tolerance
