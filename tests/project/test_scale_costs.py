"""The measuring script on a tiny size: its numbers are what they are called, and its multiplication is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("trl")
from benchmarks.speed import scale_costs


def test_costs_of_a_small_table() -> None:
    belief = scale_costs.belief_costs(600, 1)
    own = scale_costs.make_belief("auto")
    own.update(["a"], scale_costs.torch.zeros(1).double(), step=0)
    assert belief["tensor_bytes_per_prompt"] >= own._table.bytes_per_prompt
    assert 0 < belief["advantage_and_update_us_per_completion"] < 1e5 and belief["division_us_per_prompt"] > 0
    file = scale_costs.checkpoint_costs(600, 1)
    assert file["bytes_per_prompt"] > own._table.bytes_per_prompt and file["write_s_per_1e5"] > 0
    tokens = scale_costs.token_costs(2, 64, 1)
    assert tokens["filter_ns_per_token"] > 0


def test_multiplication() -> None:
    costs = {
        "belief": [
            {
                "tensor_bytes_per_prompt": 100.0,
                "table_bytes_per_prompt": 50.0,
                "id_bytes_per_prompt": 50.0,
                "advantage_and_update_us_per_completion": 1.0,
                "division_us_per_prompt": 10.0,
            }
        ],
        "tokens": [{"filter_ns_per_token": 2.0}],
        "checkpoint": {"bytes_per_prompt": 200.0, "write_s_per_1e5": 1.0, "read_s_per_1e5": 2.0},
        "gather": [{"pickled_bytes_per_row": 1000.0}],
    }
    found = scale_costs.at_scale(costs)
    assert found["state_GB_per_rank"] == pytest.approx(20) and found["checkpoint_GB"] == pytest.approx(20)
    assert found["checkpoint_write_s"] == pytest.approx(1000)
    assert found["checkpoint_read_s"] == pytest.approx(2000)
    assert found["belief_s_per_batch"] == pytest.approx(0.016384)
    assert found["division_s_per_batch"] == pytest.approx(0.02048)
    assert found["tokens_per_rank_and_batch"] == pytest.approx(16384 * 1e5 / 1000)
    assert found["filter_cpu_s_per_rank_and_batch"] == pytest.approx(2e-9 * 1638400)
    assert found["completions_received_GB_per_rank"] == pytest.approx(16384 * 24e5 / 1e9)
    assert found["dataset_rows_received_MB_per_rank"] == pytest.approx(16.384)


def test_the_page_quotes_the_measurement() -> None:
    root = Path(__file__).parents[2]
    costs = json.loads((root / "benchmarks" / "results" / "speed" / "scale_costs.json").read_text())
    page = " ".join((root / "docs" / "scale.md").read_text(encoding="utf-8").split())
    belief, file, short, long = costs["belief"][-1], costs["checkpoint"], *costs["tokens"]
    assert costs["at_scale"] == pytest.approx(scale_costs.at_scale(costs))
    scale = costs["at_scale"]
    for text in (
        f"{belief['tensor_bytes_per_prompt']:.0f} bytes",
        f"{belief['table_bytes_per_prompt']:.0f} + {belief['id_bytes_per_prompt']:.0f} bytes",
        f"{belief['advantage_and_update_us_per_completion']:.1f} µs",
        f"{belief['division_us_per_prompt']:.0f} µs",
        f"{file['bytes_per_prompt']:.0f} bytes per prompt; {file['write_s_per_1e5']:.3f} s to write, "
        f"{file['read_s_per_1e5']:.3f} s to read",
        f"{short['filter_ns_per_token']:.0f} ns at 1,024 tokens, {long['filter_ns_per_token']:.0f} ns at 100,000",
        f"{long['grpo_ns_per_token']:.0f} ns for `grpo`, {long['kpo_diffuse_ns_per_token']:.0f} ns for `kpo_diffuse`",
        f"{1e3 * costs['gather'][1]['all_gather_s']:.1f} ms",
        f"{scale['state_GB_per_rank']:.1f} GB a process at 1e8",
        f"{scale['belief_s_per_batch']:.2f} s a batch",
        f"{scale['division_s_per_batch']:.2f} s a batch",
        f"{scale['checkpoint_GB']:.1f} GB; {scale['checkpoint_write_s']:.0f} s of CPU",
        f"{scale['filter_cpu_s_per_rank_and_batch']:.2f} s of one CPU core a batch",
        f"| {scale['dataset_rows_received_MB_per_rank']:.1f} MB |",
        f"| {scale['completions_received_GB_per_rank']:.0f} GB |",
    ):
        assert text in page, text
