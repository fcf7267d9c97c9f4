"""Fields of TRL's batch that do not have one row per completion: several images per prompt, types of all tokens.

TRL packs the patches of all images into one tensor. Before rows are moved they are split by completion, with TRL's
own functions, and packed again afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

Batch = dict[str, Any]
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Types of prompt and completion tokens side by side; prompts are padded on the left, completions on the right."""
PROMPT, COMPLETION = ":prompt", ":completion"


def unpack(batch: Batch) -> Batch:
    """The batch with one entry per completion in every field."""
    split: Batch = dict(split_pixel_values_by_grid(batch))
    width = batch["prompt_ids"].shape[1]
    for name in TOKEN_TYPES:
        if name in split:
            types = split.pop(name)
            split[name + PROMPT], split[name + COMPLETION] = types[:, :width], types[:, width:]
    return split


def pack(batch: Batch) -> Batch:
    """Opposite of :func:`unpack`."""
    packed: Batch = dict(unsplit_pixel_values_by_grid(batch))
    for name in TOKEN_TYPES:
        if name + PROMPT in packed:
            packed[name] = torch.cat([packed.pop(name + PROMPT), packed.pop(name + COMPLETION)], dim=1)
    return packed
