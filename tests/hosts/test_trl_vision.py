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
CASES = [
    *(("qwen2_vl", choice, "either") for choice in CHOICES),
    ("qwen2_vl", "rounds", "one"),
    ("idefics3", "predictive", "either"),
    ("idefics3", "rounds", "two"),
    ("idefics3", "candidates", "one"),  # rounds whose images are split into different numbers of parts
    ("llava", "rounds", "either"),
    ("llava", "stream", "two"),
]
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


def inputs_of(processor: Any, row: dict[str, Any]) -> Any:
    """What the processor makes of one prompt alone."""
    parts = [{"type": "image", "image": image} for image in row["images"]]
    content = [*parts, {"type": "text", "text": row["prompt"][0]["content"]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[row["images"]], text=[text], return_tensors="pt")


def odd_lengths(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(completion[0]["content"]) % 2) for completion in completions]


def run(family: str, choice: str, images: str, folder: Path) -> tuple[KalmanGRPOTrainer, list[TokenBatch]]:
    """Four optimizer steps, two on each generation batch of eight rows."""
    seen: list[TokenBatch] = []
    arguments = KalmanGRPOConfig(
        str(folder),
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
    trainer = KalmanGRPOTrainer(
        tiny_vision.model(family),
        odd_lengths,
        arguments,
        Dataset.from_list(rows(images)),
        processing_class=tiny_vision.processor(family),
        observers=[seen.append],
    )
    trainer.train()
    return trainer, seen


@pytest.mark.parametrize(("family", "choice", "images"), CASES)
def test_rows_are_trained_on_with_the_images_of_their_prompts(
    family: str, choice: str, images: str, tmp_path: Path
) -> None:
    trainer, seen = run(family, choice, images, tmp_path)
    before: Any = tiny_vision.model(family)
    moved: Counter[str] = Counter()
    for (name, old), new in zip(before.named_parameters(), trainer.model.parameters(), strict=True):
        assert new.isfinite().all()
        moved["vision" if "vis" in name else "text"] += not torch.equal(old, new)
    assert moved["vision"] and moved["text"]
    assert len(seen) == 4 and all(batch.loss.value.isfinite() for batch in seen)

    processor = tiny_vision.processor(family)
    expected = {row["prompt_id"]: inputs_of(processor, row) for row in rows(images)}
    for batch in seen:
        split = split_pixel_values_by_grid(batch.inputs)
        for place, name in enumerate(batch.inputs["prompt_id"]):
            own = dict(expected[name])
            asked, ids = batch.inputs["prompt_mask"][place].bool(), own.pop("input_ids")
            assert batch.inputs["prompt_ids"][place][asked].tolist() == ids[0].tolist()
            pixels, here = split["pixel_values"][place].flatten(), own["pixel_values"].flatten()
            assert torch.equal(pixels[: len(here)], here) and not pixels[len(here) :].any()
            used = batch.rollouts.mask[place]
            if batch.step == 0 and used.any():  # the model is that of the beginning
                said = batch.inputs["completion_ids"][place][used][None]
                more = {
                    key: torch.cat([own.pop(key), fill(said)], dim=1)
                    for key, fill in (
                        ("attention_mask", torch.ones_like),
                        ("mm_token_type_ids", torch.zeros_like),
                    )
                    if key in own
                }
                with torch.no_grad():
                    logits = before(input_ids=torch.cat([ids, said], dim=1), **more, **own).logits
                alone = logits[0, -said.shape[1] - 1 : -1].log_softmax(-1).gather(1, said.T)[:, 0]
                torch.testing.assert_close(batch.logp[place][used], alone, rtol=1e-4, atol=1e-5)
