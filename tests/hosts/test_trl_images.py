"""Several images per prompt with a belief's allocation: every completion keeps the patches of its own prompt."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from accelerate import Accelerator
from trl.trainer.utils import split_pixel_values_by_grid

from kalman_rl.beliefs import make_belief
from kalman_rl.errors import ConfigError
from kalman_rl.hosts.trl.generation import tracked_generation
from kalman_rl.hosts.trl.missing import MissingRewards
from kalman_rl.sampling.budget import Allocation, Budget
from kalman_rl.sampling.tracking import Tracking

IMAGES = {"a": [2, 3], "b": [1], "c": [4, 1, 2], "d": []}
"""Patches of each image of a prompt."""


class Trainer:
    """What generation asks of a trainer, on one process."""

    def __init__(self) -> None:
        self.accelerator = Accelerator(cpu=True)
        self._tokenizer = SimpleNamespace(pad_token_id=0)
        self.state = SimpleNamespace(global_step=0)
        self.args = SimpleNamespace(
            generation_batch_size=12, per_device_train_batch_size=12, source_column=None
        )
        self.prompt_features = False
        self._metrics: Any = {"train": defaultdict(list)}
        self._logs: Any = {"advantages": []}
        self._last_rewards = torch.zeros(0)
        self.missing, self.reward_func_names = MissingRewards(), ["made"]
        self.supervised: list[Any] = []
        self.as_trl, self.failed_calls = False, 0
        self.calls, self.num_generations = 0, 4

    def generate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch as TRL packs it; all that belongs to a prompt holds its number, tokens of images have type 1."""
        self.calls += 1
        number = [1 + ord(row["prompt_id"]) - ord("a") for row in rows]
        self._last_rewards = torch.tensor([float((n + i) % 2) for i, n in enumerate(number)])
        asked, said = max(number), 1 + self.calls
        completion = torch.ones(len(rows), said, dtype=torch.long)
        lengths = torch.arange(asked)
        prompts = torch.stack([torch.where(lengths >= asked - n, n, 0) for n in number])
        batch = {
            "prompt_ids": prompts,
            "prompt_mask": (prompts > 0).long(),
            "completion_ids": 9 * completion,
            "completion_mask": completion.clone(),
        }
        images = [IMAGES[row["prompt_id"]] for row in rows]
        if not any(images):
            return batch
        patches = [n for n, sizes in zip(number, images) for _ in range(sum(sizes))]
        grid = [[1, 1, size] for sizes in images for size in sizes]
        return batch | {
            "pixel_values": torch.tensor(patches, dtype=torch.float32)[:, None].expand(-1, 3),
            "image_grid_thw": torch.tensor(grid),
            "num_images": [len(sizes) for sizes in images],
            "mm_token_type_ids": torch.cat([(prompts > 0).long(), torch.zeros_like(completion)], dim=1),
        }


@pytest.mark.parametrize("allocation", ["predictive", "rounds"])
def test_completions_keep_their_images(allocation: Allocation) -> None:
    trainer = Trainer()
    tracking = Tracking(make_belief("auto"), Budget(allocation, budget=3.0, rounds=(1, 2), completions_max=8))
    rows = [{"prompt": name, "prompt_id": name} for name in "abc" for _ in range(4)]
    batch = tracked_generation(trainer, tracking, rows, trainer.generate)
    assert trainer.calls == (1 if allocation == "predictive" else 2)
    names = batch["prompt_id"]
    assert len(batch["completion_ids"]) == len(names) == 12
    assert batch["completion_mask"].any(1).tolist() == [True] * 9 + [False] * 3  # three fill the batch up
    split = split_pixel_values_by_grid(batch)  # as TRL does with what it gets
    for place, name in enumerate(names):
        number = 1 + ord(name) - ord("a")
        assert split["pixel_values"][place].tolist() == [[number] * 3] * sum(IMAGES[name]), name
        assert split["image_grid_thw"][place].tolist() == [[1, 1, size] for size in IMAGES[name]]
        assert batch["num_images"][place] == len(IMAGES[name])
    asked = batch["prompt_ids"].shape[1]
    types = batch["mm_token_type_ids"]
    assert torch.equal(types[:, :asked], batch["prompt_mask"]), "types stand where the prompt's tokens stand"
    assert types.shape[1] == asked + batch["completion_ids"].shape[1] and not types[:, asked:].any()


def test_prompts_with_and_without_images_are_refused_by_name() -> None:
    trainer = Trainer()
    tracking = Tracking(make_belief("auto"), Budget("rounds", rounds=(1, 2), completions_max=8))
    seen: list[int] = []

    def generate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.append(len(rows))
        return trainer.generate(rows if len(seen) == 1 else [row | {"prompt_id": "d"} for row in rows])

    rows = [{"prompt": name, "prompt_id": name} for name in "ab" for _ in range(4)]
    with pytest.raises(
        ConfigError, match="with and without image_grid_thw, mm_token_type_ids.*allocation='fixed'"
    ):
        tracked_generation(trainer, tracking, rows, generate)
