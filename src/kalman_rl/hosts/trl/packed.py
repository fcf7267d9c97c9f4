"""Fields of TRL's batch that do not have one row per completion: several images per prompt, types of all tokens.

TRL packs the patches of all images into one tensor, or fills the images of every prompt up to the most that one of the
same call has. Before rows are moved they are split by completion, with TRL's own functions, and packed again
afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

Batch = dict[str, Any]
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Types of prompt and completion tokens side by side; prompts are padded on the left, completions on the right."""
PROMPT, COMPLETION = ":prompt", ":completion"
PIXELS = ("pixel_values", "pixel_attention_mask")


def unpack(batch: Batch) -> Batch:
    """The batch with one entry per completion in every field."""
    if _fills_up(batch):
        split = batch | {name: list(batch[name].split(1)) for name in PIXELS}
    else:
        split = dict(split_pixel_values_by_grid(batch))
    width = batch["prompt_ids"].shape[1]
    for name in TOKEN_TYPES:
        if name in split:
            types = split.pop(name)
            split[name + PROMPT], split[name + COMPLETION] = types[:, :width], types[:, width:]
    return split


def pack(batch: Batch) -> Batch:
    """Opposite of :func:`unpack`; rows of several calls may have been filled up to different sizes."""
    even = {name: _evened(batch[name]) for name in PIXELS if isinstance(batch.get(name), list)}
    packed: Batch = dict(unsplit_pixel_values_by_grid(batch | even))
    for name in TOKEN_TYPES:
        if name + PROMPT in packed:
            packed[name] = torch.cat([packed.pop(name + PROMPT), packed.pop(name + COMPLETION)], dim=1)
    return packed


def _fills_up(batch: Batch) -> bool:
    """Whether pixels have one row per completion (Idefics, SmolVLM), as TRL reads a mask of pixels without shapes.

    TRL's split takes them for one row per image where there are as many images as completions."""
    rows = len(batch["prompt_ids"])
    return (
        "spatial_shapes" not in batch
        and all(name in batch for name in PIXELS)
        and all(len(batch[name]) == rows for name in PIXELS)
    )


def _evened(parts: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that differ in their first size only: zeros fill the others up, which the models take for no image."""
    shapes = [part.shape[1:] for part in parts]
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    return [
        torch.nn.functional.pad(
            part, [n for have, most in zip(part.shape[:0:-1], largest[::-1]) for n in (0, most - have)]
        )
        for part in parts
    ]
