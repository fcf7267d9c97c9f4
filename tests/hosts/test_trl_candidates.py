"""Candidates apart from the batch: an allocation chooses among more prompts than there are groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from trl.trainer.utils import RepeatSampler

from kalman_rl.errors import ConfigError
from kalman_rl.sampling.tracking import Tracking
from tests.hosts.test_trl import ROWS, model_path, two_ranks
from tests.hosts.test_trl_beliefs import flat, trained

__all__ = ["model_path"]  # a fixture

ALLOCATIONS: dict[str, dict[str, Any]] = {
    "predictive": {"allocation": "predictive"},
    "rounds": {"allocation": "rounds", "rounds": [1], "max_rounds": 3},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[list[Any], int]]]:
    """The candidates of every generation batch, and the completions to be divided among them."""
    seen: list[tuple[list[Any], int]] = []
    plan = Tracking.plan

    def noting(self: Tracking, ids: Any, *, step: int, total: int) -> Any:
        seen.append((list(ids), total))
        return plan(self, ids, step=step, total=total)

    monkeypatch.setattr(Tracking, "plan", noting)
    yield seen


def sampled(seen: list[Any]) -> list[Counter[str]]:
    """Completions of each prompt that were trained on, per generation batch of two optimizer steps."""
    found = []
    for pair in zip(seen[::2], seen[1::2], strict=True):
        rows = [
            (name, used) for b in pair for name, used in zip(b.inputs["prompt_id"], b.rollouts.mask.any(1))
        ]
        found.append(Counter(name for name, used in rows if used))
    return found


@pytest.mark.parametrize("case", ALLOCATIONS)
def test_completions_go_to_some_of_the_candidates(
    case: str, model_path: str, tmp_path: Path, asked: list[Any]
) -> None:
    """4 completions among 5 candidates: all are used, some candidates get none, and they come in the order of TRL's
    sampler, pass after pass."""
    _, seen, history = trained(
        tmp_path, model_path, candidates=5, budget=1.0, max_steps=16, **ALLOCATIONS[case]
    )
    assert [total for _, total in asked] == [4] * 8
    batches = sampled(seen)
    for (names, _), batch in zip(asked, batches, strict=True):
        assert len(set(names)) == 5 and sum(batch.values()) == 4 and set(batch) <= set(names)
    logged = [log["budget/prompts"] for log in history.logs if "budget/prompts" in log]
    assert logged == [len(batch) for batch in batches]

    sampler = RepeatSampler(range(16), 1, 5, seed=7)
    order = [ROWS[i]["prompt_id"] for _ in range(3) for i in sampler][: 8 * 5]
    assert [name for names, _ in asked for name in names] == order
    passed = {name for (names, _), batch in zip(asked[:3], batches) for name in names if name not in batch}
    later = {name for names, _ in asked[3:] for name in names}
    assert passed and passed <= later, "who was passed over is a candidate again in the next passes"


def test_as_many_candidates_as_completions_unless_told(
    model_path: str, tmp_path: Path, asked: list[Any]
) -> None:
    """And as the dataset has prompts. Where nothing is known each gets one."""
    _, seen, _ = trained(tmp_path / "a", model_path, allocation="predictive", max_steps=2)
    _, few, _ = trained(tmp_path / "b", model_path, allocation="predictive", rows=ROWS[:9], max_steps=2)
    least = {"allocation": "predictive", "completions_min": 1}
    _, fixed, _ = trained(tmp_path / "c", model_path, max_steps=2, **least)
    assert [(len(names), total) for names, total in asked] == [(16, 16), (9, 16), (4, 16)]
    assert set(sampled(seen)[0].values()) == {1} and len(sampled(seen)[0]) == 16
    assert len(sampled(few)[0]) == 9 and len(sampled(fixed)[0]) == 4


def test_a_budget_is_per_prompt_of_the_batch(model_path: str, tmp_path: Path, asked: list[Any]) -> None:
    _, seen, history = trained(tmp_path, model_path, allocation="predictive", budget=2.5)
    assert [total for _, total in asked] == [10, 10] and [sum(batch.values()) for batch in sampled(seen)] == [
        10,
        10,
    ]
    assert [log["budget/saved"] for log in history.logs if "budget/saved" in log] == [6, 6]


@pytest.mark.parametrize("case", ALLOCATIONS)
def test_resume_equals_the_uninterrupted_run(case: str, model_path: str, tmp_path: Path) -> None:
    """From the second pass over the dataset, whose order differs from the first."""
    options = ALLOCATIONS[case] | {"candidates": 7, "max_steps": 8}
    whole, _, _ = trained(tmp_path / "a", model_path, **options)
    trained(tmp_path / "b", model_path, save_strategy="steps", save_steps=6, **options)
    point = str(tmp_path / "b" / "checkpoint-6")
    resumed, seen, _ = trained(tmp_path / "b", model_path, resume=point, **options)
    assert [batch.step for batch in seen] == [6, 7]
    assert flat(whole.tracking.state_dict()) == flat(resumed.tracking.state_dict())
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.timeout(300)
def test_two_ranks_choose_alike(model_path: str, tmp_path: Path) -> None:
    """Of 5 candidates, which no two ranks can share out evenly: the batches are those of one process."""
    body = """
    import tests.hosts.test_trl_beliefs as b
    options = dict(allocation="rounds", rounds=[1], candidates=5, max_steps=8, per_device_train_batch_size=4)
    trainer, seen, history = b.trained(out / "run", model_path, **options)
    results["state"] = b.flat(trainer.tracking.state_dict())
    results["rows"] = [sum(batch.rollouts.mask.any(1).tolist()) for batch in seen]
    results["visits"] = [trainer.tracking.coverage.state_dict()["ids"], len(trainer.train_sampler)]
    """
    first, second = two_ranks(body, model_path, tmp_path)
    assert first["state"] == second["state"] and len(first["state"]) > 50
    assert [a + b for a, b in zip(first["rows"], second["rows"], strict=True)] == [8] * 8
    assert first["visits"] == second["visits"]
    assert first["visits"][1] == 3 * 5 * 2 * 2, "3 batches of 5, a copy for each rank, in 2 optimizer steps"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": 3}, "candidates: got 3, expected at least 4, the prompts of a batch"),
        ({"candidates": 17}, "candidates: got 17, expected at most 16, the prompts of the dataset"),
        ({"candidates": 0}, "candidates: got 0, expected a number of prompts >= 1"),
        ({"candidates": 8, "allocation": "fixed"}, "candidates: got 8 with allocation='fixed'"),
        ({"candidates": 8, "completions_min": 1}, "completions_min: got 1 with candidates=8, expected 0"),
    ],
)
def test_bad_settings_have_a_sentence(
    changes: dict[str, Any], message: str, model_path: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        trained(tmp_path, model_path, **({"allocation": "predictive"} | changes))
