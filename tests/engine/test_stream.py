"""``kalman-rl train --select stream | sage`` and what the belief begins with: real runs of the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from kalman_rl.engine.config import TrainConfig, build, labels, validate
from kalman_rl.engine.runs.reading import read_metrics
from kalman_rl.engine.runs.run import Run
from kalman_rl.engine.train import train
from kalman_rl.errors import ConfigError
from tests.engine.test_train import SMALL, rewards_module, start, weights

__all__ = ["rewards_module"]  # a fixture

STREAM: dict[str, Any] = {
    "advantage": "tracked",
    "select": "stream",
    "completions_per_prompt": 1,
    "prompts_per_generation": 8,
    "eval_every": 0,
    "reward": "my_rewards:digits",
}


def drawn(path: Path) -> list[list[str]]:
    """The prompts of every batch, as the run wrote them down."""
    return [json.loads(line)["id"] for line in (path / "beliefs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("select", ["stream", "sage"])
def test_a_run_draws_from_its_belief_and_resumes(select: str, model_path: str, rewards_module: Path) -> None:
    """Trained for real: the weights move, the drawn prompts are those of the uninterrupted run."""
    changes = STREAM | {"select": select, "steps": 8}
    config, code = start(model_path, rewards_module / "whole", **changes)
    assert code == 0 and labels(config)["method"] == f"{config.method}+auto+{select}"
    batches = drawn(rewards_module / "whole")
    assert len(batches) == 4 and all(len(set(batch)) > 1 for batch in batches)
    losses = [row["loss"] for row in read_metrics(rewards_module / "whole") if row["kind"] == "train"]
    assert any(abs(loss) > 0 for loss in losses)
    path = rewards_module / "half"
    _, code = start(model_path, path, **(changes | {"steps": 4}))
    assert code == 0
    longer = build(TrainConfig, SMALL | {"model": model_path, "run": path} | changes)
    validate(longer)
    with Run.open(path) as run:
        assert train(longer, run, resume=True, allow_change=["steps"]) == 0
    assert drawn(path) == batches
    whole, resumed = weights(rewards_module / "whole"), weights(path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_measured_prior_is_spent_and_logged(model_path: str, rewards_module: Path) -> None:
    path = rewards_module / "run"
    _, code = start(model_path, path, measure_prior=3, steps=2, **STREAM)
    assert code == 0
    (row,) = [row for row in read_metrics(path) if row["kind"] == "prior"]
    assert row["prior/completions"] == 3 * 32 and 0 < row["prior/reward"] < 1
    first = json.loads((path / "beliefs.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1  # step 0 is before training


def test_a_prior_column_of_the_rows(model_path: str, rewards_module: Path) -> None:
    rows = rewards_module / "rows.jsonl"
    content = [
        {
            "prompt": f"{i}>",
            "prompt_id": i,
            "split": "train",
            "prior": {"rate": 0.5 if i < 8 else 0.0, "count": 200},
        }
        for i in range(32)
    ]
    del content[31]["prior"]
    rows.write_text("".join(json.dumps(row) + "\n" for row in content))
    changes = STREAM | {"data": rows, "steps": 2, "eval_prompts": 1, "prior_column": "prior"}
    _, code = start(model_path, rewards_module / "run", **changes)
    assert code == 0
    (batch,) = drawn(rewards_module / "run")
    assert sum(int(name) < 8 or int(name) == 31 for name in batch) >= len(batch) - 2
    with pytest.raises(
        ConfigError, match=r"^prior_column: got 'solved', expected a column of the rows, which have"
    ):
        start(model_path, rewards_module / "other", **(changes | {"prior_column": "solved"}))
    rows.write_text(json.dumps(content[0] | {"prior": {"rate": 0.5}}) + "\n")
    with pytest.raises(ConfigError, match=r"^prior: got \{'rate': 0.5\} for prompt"):
        start(
            model_path,
            rewards_module / "bad",
            **(changes | {"prompts_per_generation": 1, "updates_per_generation": 1}),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage": "batch_mean"}, "select: got 'stream' with advantage='batch_mean', expected passes"),
        ({"select": "sage", "reward_noise": 0.5}, "select: got 'sage' with real-valued rewards"),
        ({"allocation": "rounds"}, "select: got 'stream' with allocation='rounds'"),
        ({"candidates": 64}, "candidates: got 64 with select='stream', expected it unset because the draw"),
        ({"prior_column": "prior", "measure_prior": 4}, "prior_column, measure_prior: got 'prior' and 4"),
        ({"measure_prior": 4, "prompt_features": True}, "prompt_features: got True with solve rates"),
        (
            {"advantage": "batch_mean", "select": "passes", "measure_prior": 4},
            "measure_prior: got 4 with advantage=",
        ),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(build(TrainConfig, STREAM | {"reward": []} | changes))
    assert str(caught.value).startswith(message)
