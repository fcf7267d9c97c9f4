"""A stream of prompts inside the TRL trainer: what is drawn, weights, resume, ranks, refusals."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

pytest.importorskip("trl")
from transformers import LlamaForCausalLM

from kalman_rl.beliefs import make_belief
from kalman_rl.errors import ConfigError
from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer, TokenBatch
from kalman_rl.sampling.stream import PromptStream
from tests.hosts.test_trl import ROWS, model_path, settings, two_ranks
from tests.hosts.test_trl_beliefs import flat, odd_first, trained

__all__ = ["model_path"]  # a fixture

STREAM: dict[str, Any] = {
    "select": "stream",
    "num_generations": 1,
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "max_steps": 8,
}
"""Batches of 8 prompts out of 16, trained on in two steps each."""


def batches(seen: list[TokenBatch]) -> dict[int, tuple[list[Hashable], list[float]]]:
    """Prompts and rewards of every generation batch, by the step it was sampled at."""
    found: dict[int, tuple[list[Hashable], list[float]]] = {}
    for batch in seen:
        names, rewards = found.setdefault(batch.step // 2 * 2, ([], []))
        names += batch.inputs["prompt_id"]
        rewards += batch.inputs["rewards"].tolist()
    return found


@pytest.mark.parametrize(("select", "group", "workers"), [("stream", 1, 0), ("stream", 2, 1), ("sage", 1, 0)])
def test_each_batch_is_drawn_from_the_belief_after_the_last_one(
    select: str, group: int, workers: int, model_path: str, tmp_path: Path
) -> None:
    """Replayed by hand: the rewards of a batch decide the next, though the loader fetches ahead."""
    changes = STREAM | {"select": select, "num_generations": group, "dataloader_num_workers": workers}
    if workers:
        changes["dataloader_prefetch_factor"] = 4
    trainer, seen, _ = trained(tmp_path, model_path, **changes)
    belief = make_belief("auto")
    stream = PromptStream(
        belief, [row["prompt_id"] for row in ROWS], 8 // group, score=select, most=32, seed=7
    )
    found = batches(seen)
    assert list(found) == [0, 2, 4, 6]
    for step, (names, rewards) in found.items():
        drawn = [stream.pool[i] for i in stream.draw(step=step).place.tolist()]
        assert sorted(map(str, names)) == sorted(map(str, drawn * group))  # TRL shuffled the rows
        belief.update(names, torch.tensor(rewards), step=step)
    assert trainer.tracking is not None and trainer.tracking.stream is not None
    assert flat(trainer.tracking.stream.state_dict()) == flat(stream.state_dict())


def test_unbiased_weights_multiply_the_advantages(model_path: str, tmp_path: Path) -> None:
    drawn: list[tuple[list[Hashable], Tensor]] = []
    plain = PromptStream.draw

    def noted(self: PromptStream, **options: Any) -> Any:
        found = plain(self, **options)
        drawn.append(([self.pool[i] for i in found.place.tolist()], found.weight))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptStream, "draw", noted)
        changes = STREAM | {"select_weights": "unbiased", "completions_max": 1, "select_floor": 0.5}
        _, seen, _ = trained(tmp_path, model_path, **changes)
    belief, different = make_belief("auto"), 0
    for (step, (names, rewards)), (told, weight) in zip(batches(seen).items(), drawn, strict=True):
        reward = torch.tensor(rewards, dtype=torch.float64)
        advantage = belief.advantages(names, reward, step=step).advantage
        given = torch.cat([batch.inputs["advantages"] for batch in seen if batch.step // 2 * 2 == step])
        of_prompt = dict(zip(told, weight.tolist(), strict=True))  # completions_max=1: each comes once
        expected = advantage * torch.tensor([of_prompt[name] for name in names], dtype=torch.float64)
        torch.testing.assert_close(given.double(), expected, rtol=1e-6, atol=1e-7)
        different += len({round(w, 6) for w in of_prompt.values()})
        belief.update(names, reward, step=step)
    assert different > len(drawn)


@pytest.mark.parametrize("case", ["single", "features and sources"])
def test_resume_equals_the_uninterrupted_run(case: str, model_path: str, tmp_path: Path) -> None:
    """Over the end of a pass as well: 16 prompts are two batches, saved in the middle of the second pass."""
    options = STREAM | {"max_steps": 12}
    if case != "single":
        options |= {"prompt_features": True, "source_column": "data_source", "completions_max": 2}
    whole, all_seen, _ = trained(tmp_path / "a", model_path, **options)
    trained(tmp_path / "b", model_path, save_strategy="steps", save_steps=6, **options)
    point = str(tmp_path / "b" / "checkpoint-6")
    resumed, seen, _ = trained(tmp_path / "b", model_path, resume=point, **options)
    assert [batch.inputs["prompt_id"] for batch in all_seen if batch.step >= 6] == [
        batch.inputs["prompt_id"] for batch in seen
    ]
    assert whole.tracking is not None and resumed.tracking is not None
    assert flat(whole.tracking.state_dict()) == flat(resumed.tracking.state_dict())
    for (name, left), right in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right), name
    if case == "single":
        with pytest.raises(
            ConfigError, match=r"^pool: got 15 prompts that are not the 16 the run began with"
        ):
            trained(tmp_path / "b", model_path, resume=point, rows=ROWS[1:], **options)
        with pytest.raises(ConfigError, match=r"^select: got a checkpoint of a stream"):
            trained(tmp_path / "b", model_path, resume=point, **(options | {"select": "passes"}))


@pytest.mark.timeout(300)
def test_two_ranks_draw_one_batch(model_path: str, tmp_path: Path) -> None:
    body = """
    import tests.hosts.test_trl_beliefs as b
    from tests.hosts.test_trl_stream import STREAM
    for name, options in (
        ("single", {}),
        ("groups", dict(num_generations=4, prompt_features=True, source_column="data_source")),
    ):
        sizes = STREAM | dict(per_device_train_batch_size=2, max_steps=6) | options
        trainer, seen, _ = b.trained(out / name, model_path, **sizes)
        results[name] = {
            "state": b.flat(trainer.tracking.state_dict()),
            "weights": sum(p.double().abs().sum().item() for p in trainer.model.parameters()),
            "rows": [[batch.step // 2, name] for batch in seen for name in batch.inputs["prompt_id"]],
        }
    """
    ranks = two_ranks(body, model_path, tmp_path)
    for name, group in (("single", 1), ("groups", 4)):
        first, second = ranks[0][name], ranks[1][name]
        assert first["state"] == second["state"] and len(first["state"]) > 50
        assert first["weights"] == second["weights"]
        for batch in range(3):
            rows = [prompt for rank in (first, second) for step, prompt in rank["rows"] if step == batch]
            # 8 rows in all; a prompt has its completions on whichever rank, as often as it was drawn
            assert len(rows) == 8 and all(rows.count(prompt) % group == 0 for prompt in rows)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, "pool: got no prompts, expected at least one to draw from"),
        (ROWS[:7], {}, "count: got 8 prompts per batch, expected 1 to the pool's 7; add prompts"),
        ([{"prompt": "1>"}] * 9, {}, "prompt_id: got a dataset without this column"),
        (
            ROWS,
            {"belief": None},
            "select: got 'stream' for method 'grpo', expected passes because only a belief",
        ),
        (
            ROWS,
            {"allocation": "rounds"},
            "select: got 'stream' with allocation='rounds', expected allocation fixed",
        ),
        (ROWS, {"select": "steam"}, "select: got 'steam'"),
        (ROWS, {"select_floor": 0.0}, "select_floor: got 0.0"),
        (ROWS, {"select": "sage", "reward_range": "real"}, "select: got 'sage' with real-valued rewards"),
        ("stream", {}, "select='stream': got a IterableDataset, expected a dataset with a length"),
    ],
)
def test_bad_input_is_one_sentence(
    rows: Any, changes: dict[str, Any], message: str, model_path: str, tmp_path: Path
) -> None:
    changes = STREAM | {"belief": "auto", "num_generations": 1 if changes.get("belief", 1) else 4} | changes
    data = IterableDataset.from_generator(lambda: iter(ROWS)) if rows == "stream" else Dataset.from_list(rows)
    with pytest.raises(ConfigError) as caught:
        KalmanGRPOTrainer(
            model=model_path,
            reward_funcs=len,
            args=KalmanGRPOConfig(**settings(tmp_path, method="grpo", **changes)),
            train_dataset=data,
        )
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


PRIORS = [
    row | {"prior": {"rate": 0.5 if i % 2 else 0.0, "count": 64} if i else None} for i, row in enumerate(ROWS)
]
"""Half of the prompts are known to be hopeless; nothing is known of the first."""


def test_the_first_batch_is_drawn_from_the_priors(model_path: str, tmp_path: Path) -> None:
    options = STREAM | {
        "prior_column": "prior",
        "source_column": "data_source",
        "per_device_train_batch_size": 2,
    }
    trainer, seen, _ = trained(tmp_path / "a", model_path, rows=PRIORS, **(options | {"max_steps": 6}))
    first = batches(seen)[0][0]
    assert sum(int(str(name)[-1]) % 2 for name in first) >= 3  # of 4; names end in the digit that is i % 2
    # Resume: the saved belief has the priors once, not twice.
    trained(tmp_path / "b", model_path, rows=PRIORS, save_strategy="steps", save_steps=2, **options)
    point = str(tmp_path / "b" / "checkpoint-2")
    resumed, _, _ = trained(
        tmp_path / "b", model_path, rows=PRIORS, resume=point, **(options | {"max_steps": 6})
    )
    assert trainer.tracking is not None and resumed.tracking is not None
    assert flat(trainer.tracking.state_dict()) == flat(resumed.tracking.state_dict())


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            PRIORS,
            {"prior_column": "rate"},
            "prior_column: got 'rate', expected a column of the dataset, which has",
        ),
        (
            [row | {"prior": {"rate": 1.5, "count": 8}} for row in ROWS],
            {},
            "prior: got {'rate': 1.5, 'count': 8} for",
        ),
        (
            [row | {"prior": {"rate": 0.5}} for row in ROWS],
            {},
            "prior: got {'rate': 0.5} for prompt 'p00', expected",
        ),
        (
            PRIORS,
            {"belief": None, "num_generations": 4},
            "prior_column: got 'prior' for method 'grpo', expected it",
        ),
        (
            PRIORS,
            {"prompt_features": True},
            "prompt_features: got True with solve rates from before training",
        ),
    ],
)
def test_bad_priors_are_one_sentence(
    rows: Any, changes: dict[str, Any], message: str, model_path: str, tmp_path: Path
) -> None:
    changes = {"belief": "auto", "num_generations": 1, "prior_column": "prior"} | changes
    with pytest.raises(ConfigError) as caught:
        KalmanGRPOTrainer(
            model=model_path,
            reward_funcs=len,
            args=KalmanGRPOConfig(**settings(tmp_path, method="grpo", **changes)),
            train_dataset=Dataset.from_list(rows),
        )
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_the_example_of_the_page_trains(model_path: str, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "beliefs.md").read_text(encoding="utf-8")
    (example,) = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.S) if 'select="stream"' in block
    ]
    example = example.replace('output_dir="out",', f"output_dir={str(tmp_path)!r}, use_cpu=True, bf16=False,")
    rows = [{"prompt": f"{i // 10}{i % 10}>", "prompt_id": i} for i in range(40)]
    names: dict[str, Any] = {
        "model": LlamaForCausalLM.from_pretrained(model_path),
        "reward": odd_first,
        "dataset": Dataset.from_list(rows),
    }
    exec(compile(example, "docs/beliefs.md", "exec"), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 4 and 16 <= len(trainer.tracking.belief) <= 32
    assert trainer.tracking.stream.count == 32  # 4 optimizer steps of 8
