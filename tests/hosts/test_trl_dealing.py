"""A budget below the rows leaves no optimizer step without trained tokens; without fillers TRL's order stays."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("trl")
from accelerate import Accelerator

from kalman_rl.hosts.trl import trainer as trainers
from kalman_rl.hosts.trl.dealing import deal, spread_fillers
from tests.hosts.test_trl import model_path
from tests.hosts.test_trl_beliefs import trained

__all__ = ["model_path"]  # a fixture


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_step_is_trained_where_there_are_rows_enough(data: st.DataObject) -> None:
    """Any ranks, rows, micro-batches and accumulation, also one that does not divide the micro-batches."""
    micros, size, ranks = (data.draw(st.integers(1, high)) for high in (8, 4, 3))
    share, first = data.draw(st.integers(1, 8)), data.draw(st.integers(0, 5))
    steps = [(first + micro) // share for micro in range(micros)]
    rows = micros * size
    masks = data.draw(
        st.lists(st.lists(st.booleans(), min_size=rows, max_size=rows), min_size=ranks, max_size=ranks)
    )
    start, per_step = 0, dict.fromkeys(steps, 0)
    for mask in masks:
        hands = deal(torch.tensor(mask), steps, start)
        assert [len(hand) for hand in hands] == [size] * micros
        assert sorted(row for hand in hands for row in hand) == list(range(rows)), "each row once"
        counts = [sum(mask[row] for row in hand) for hand in hands]
        assert max(counts) - min(counts) <= 1, "micro-batches of a rank share alike"
        for step, count in zip(steps, counts):
            per_step[step] += count
        start += sum(mask)
    assert sum(count > 0 for count in per_step.values()) == min(start, len(per_step))


@pytest.mark.parametrize("seed", [1, 7])
def test_half_the_rows_over_four_steps(seed: int, model_path: str, tmp_path: Path) -> None:
    sizes = {"per_device_train_batch_size": 2, "num_generations": 4, "steps_per_generation": 4}
    _, seen, _ = trained(
        tmp_path, model_path, max_steps=8, gradient_accumulation_steps=1, allocation="predictive", budget=2.0,
        completions_max=4, seed=seed, **sizes,
    )  # fmt: skip
    assert len(seen) == 8
    assert [int(batch.rollouts.mask.any(dim=1).sum()) for batch in seen] == [1] * 8


@pytest.mark.parametrize("allocation", ["fixed", "predictive"])
def test_without_fillers_the_order_is_trls(
    allocation: str, model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, dealt, _ = trained(tmp_path / "ours", model_path, max_steps=4, allocation=allocation)
    monkeypatch.setattr(trainers, "spread_fillers", lambda trainer: None)
    _, plain, _ = trained(tmp_path / "trl", model_path, max_steps=4, allocation=allocation)
    assert len(dealt) == len(plain) == 4
    for ours, theirs in zip(dealt, plain):
        assert ours.inputs["prompt_id"] == theirs.inputs["prompt_id"]
        assert torch.equal(ours.inputs["completion_ids"], theirs.inputs["completion_ids"])
        assert torch.equal(ours.loss.value, theirs.loss.value)


def test_rows_keep_their_images() -> None:
    def micro(rows: list[tuple[int, bool]]) -> dict[str, Any]:
        """A row's number stands in all that belongs to it; it has as many patches."""
        number = torch.tensor([n for n, _ in rows])
        return {
            "prompt_ids": number[:, None],
            "completion_ids": number[:, None],
            "completion_mask": torch.tensor([[int(full)] for _, full in rows]),
            "mm_token_type_ids": torch.stack([number, -number], dim=1),
            "pixel_values": torch.cat([torch.full((n, 3), float(n)) for n, _ in rows]),
            "image_grid_thw": torch.tensor([[1, 1, n] for n, _ in rows]),
            "num_images": [1] * len(rows),
            "num_items_in_batch": torch.tensor(2),
        }

    parts = [micro([(1, True), (2, True)]), micro([(3, False), (4, False)])]
    trainer = SimpleNamespace(
        _buffered_inputs=parts,
        accelerator=Accelerator(cpu=True),
        _step=0,
        current_gradient_accumulation_steps=1,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _loss_mask=lambda part: part["completion_mask"].bool(),
    )
    spread_fillers(trainer)
    for part, expected in zip(trainer._buffered_inputs, ([(1, True), (3, False)], [(2, True), (4, False)])):
        wanted = micro(expected)
        assert set(part) == set(wanted)
        for name, value in wanted.items():
            assert torch.equal(torch.as_tensor(part[name]), torch.as_tensor(value)), name
