"""The order of prompts over several passes: a resumed run trains on the prompts of the unbroken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from trl.trainer.utils import RepeatSampler

from kalman_rl.hosts.trl.order import begin_pass
from tests.hosts.test_trl import ROWS, model_path, two_ranks
from tests.hosts.test_trl_beliefs import flat, trained

__all__ = ["model_path"]  # a fixture

NINE = ROWS[
    :9
]  # two generation batches of four prompts per pass, that is four optimizer steps; one prompt is left out
OPTIONS: dict[str, Any] = {"max_steps": 12, "rows": NINE, "save_strategy": "steps", "save_steps": 2}
METHODS: dict[str, dict[str, Any]] = {
    "TRL's": {"belief": None, "method": None},
    "kpo": {"belief": None, "method": "kpo_diffuse"},
    "belief": {},
    "rounds": {"allocation": "rounds", "rounds": [1, 2], "max_rounds": 3},
}


def prompts(seen: list[Any]) -> list[tuple[int, list[str]]]:
    return [(batch.step, batch.inputs["prompt_id"]) for batch in seen]


@pytest.mark.parametrize("case", METHODS)
def test_a_run_resumed_in_a_later_pass_equals_the_unbroken_one(
    case: str, model_path: str, tmp_path: Path
) -> None:
    """Stopped in the second pass, at its end and in the third: prompts, weights and beliefs are those of one run."""
    options = OPTIONS | METHODS[case]
    whole, seen, _ = trained(tmp_path, model_path, **options)
    first, second, third = ([names for _, names in prompts(seen)[4 * i : 4 * i + 4]] for i in range(3))
    assert first != second != third != first, "the case needs another order in every pass"
    for step in (6, 8, 10):
        point = str(tmp_path / f"checkpoint-{step}")
        resumed, rest, _ = trained(tmp_path / str(step), model_path, resume=point, **options)
        assert prompts(rest) == [row for row in prompts(seen) if row[0] >= step]
        for (name, left), right in zip(
            whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
        ):
            assert torch.equal(left, right), (step, name)
        if whole.tracking is not None:
            assert flat(whole.tracking.state_dict()) == flat(resumed.tracking.state_dict())


def test_a_pass_has_the_order_that_trl_gives_it() -> None:
    unbroken, later = (RepeatSampler(range(50), 2, 4, seed=3) for _ in range(2))
    orders = [list(unbroken) for _ in range(4)]
    for number in (2, 0, 3):
        begin_pass(later, number)
        assert list(later) == orders[number]


@pytest.mark.timeout(300)
def test_two_ranks_resume_in_a_later_pass(model_path: str, tmp_path: Path) -> None:
    """Stopped within the second pass, where accelerate wraps the sampler once more than on one rank."""
    body = """
    import tests.hosts.test_trl_beliefs as b
    def run(resume):
        options = dict(belief=None, method="rloo", rows=b.ROWS[:9], max_steps=12, num_generations=4)
        options |= dict(per_device_train_batch_size=4, save_strategy="steps", save_steps=2)
        trainer, seen, _ = b.trained(out / "run", model_path, resume=resume, **options)
        rows = [[batch.step, batch.inputs["prompt_id"]] for batch in seen if batch.step >= 6]
        return trainer, [rows, [p.double().sum().item() for p in trainer.model.parameters()]]
    _, results["whole"] = run(None)
    trainer, results["resumed"] = run(str(out / "run" / "checkpoint-6"))
    """
    for rank in two_ranks(body, model_path, tmp_path):
        assert rank["whole"] == rank["resumed"] and len(rank["whole"][0]) == 6
