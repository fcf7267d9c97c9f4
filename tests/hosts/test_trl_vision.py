"""A real vision-language model, one image or two per prompt, under every way to choose prompts and completions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("PIL")
from datasets import Dataset
from PIL import Image
from trl.trainer.utils import split_pixel_values_by_grid

from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer, TokenBatch
from tests.hosts import tiny_vision

CHOICES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "predictive": {"allocation": "predictive", "budget": 1.5, "completions_min": 1},
    "rounds": {"allocation": "rounds", "rounds": [1, 2], "completions_min": 1},
    "candidates": {"allocation": "rounds", "rounds": [1], "max_rounds": 3, "candidates": 6},
    "stream": {"select": "stream"},
}
SIZES = [(8, 8), (16, 8), (16, 16)]
"""Images of one, two and four tokens."""


def rows(images: str) -> list[dict[str, Any]]:
    """Eight prompts, no two images of the same colour; with ``either`` every second prompt has one image."""
    found = []
    for i in range(8):
        count = {"one": 1, "two": 2, "either": 1 + i % 2}[images]
        pictures = [Image.new("RGB", SIZES[(i + k) % 3], (30 * i, 120 * k, 10)) for k in range(count)]
        prompt = [{"role": "user", "content": str(i)}]
        found.append({"prompt": prompt, "images": pictures, "prompt_id": f"p{i}"})
    return found


def inputs_of(row: dict[str, Any]) -> Any:
    """What the processor makes of one prompt."""
    parts = [{"type": "image", "image": image} for image in row["images"]]
    content = [*parts, {"type": "text", "text": row["prompt"][0]["content"]}]
    return tiny_vision.processor().apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def odd_digits(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(completion[0]["content"]) % 2) for completion in completions]


@pytest.mark.parametrize("images", ["one", "two", "either"])
@pytest.mark.parametrize("choice", CHOICES)
def test_rows_are_trained_on_with_the_images_of_their_prompts(
    choice: str, images: str, tmp_path: Path
) -> None:
    dataset, seen = rows(images), []
    arguments = KalmanGRPOConfig(
        str(tmp_path),
        method="kpo",
        belief="auto",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        steps_per_generation=2,
        num_generations=2,
        max_steps=4,
        learning_rate=1e-2,
        max_completion_length=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        seed=7,
        logging_steps=1,
        **CHOICES[choice],
    )

    def observe(batch: TokenBatch) -> None:
        seen.append(batch)

    trainer = KalmanGRPOTrainer(
        tiny_vision.model(),
        odd_digits,
        arguments,
        Dataset.from_list(dataset),
        processing_class=tiny_vision.processor(),
        observers=[observe],
    )
    trainer.train()
    before, after = tiny_vision.model(), trainer.model
    moved = Counter()
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert new.isfinite().all()
        moved["visual" if "visual" in name else "text"] += not torch.equal(old, new)
    assert moved["visual"] and moved["text"]
    assert len(seen) == 4 and all(batch.loss.value.isfinite() for batch in seen)

    expected = {row["prompt_id"]: inputs_of(row) for row in dataset}
    for batch in seen:
        split = split_pixel_values_by_grid(batch.inputs)
        for place, name in enumerate(batch.inputs["prompt_id"]):
            own = expected[name]
            torch.testing.assert_close(split["pixel_values"][place], own["pixel_values"], rtol=0, atol=0)
            assert torch.equal(split["image_grid_thw"][place], own["image_grid_thw"])
            asked = batch.inputs["prompt_mask"][place].bool()
            assert batch.inputs["prompt_ids"][place][asked].tolist() == own["input_ids"][0].tolist()
            used = batch.rollouts.mask[place]
            if batch.step == 0 and used.any():
                said = batch.inputs["completion_ids"][place][used][None]
                ids = torch.cat([own["input_ids"], said], dim=1)
                types = torch.cat([own["mm_token_type_ids"], torch.zeros_like(said)], dim=1)
                grid, pixels = own["image_grid_thw"], own["pixel_values"]
                with torch.no_grad():
                    logits = before(
                        input_ids=ids, mm_token_type_ids=types, pixel_values=pixels, image_grid_thw=grid
                    ).logits
                alone = logits[0, -said.shape[1] - 1 : -1].log_softmax(-1).gather(1, said.T)[:, 0]
                torch.testing.assert_close(batch.logp[place][used], alone, rtol=1e-4, atol=1e-5)
