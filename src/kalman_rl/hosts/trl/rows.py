"""Batches of generated completions as TRL passes them: joined, shared out over ranks, filled up.

A batch is a dictionary: tensors with one row per completion (prompts padded on the left, completions on the
right), lists with one entry per completion, and numbers about the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from kalman_rl.errors import ConfigError
from kalman_rl.hosts.trl.packed import PROMPT

Batch = dict[str, Any]
LEFT = ("prompt_ids", "prompt_mask")
MASKS = ("completion_mask", "tool_mask")
WHOLE = ("num_items_in_batch", "num_sequences_in_batch")
"""Numbers about all ranks' rows; they are counted anew after rows were moved."""


def is_per_row(name: str, value: Any) -> bool:
    """Whether a field has one entry per completion."""
    return name not in WHOLE and (isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0))


def is_left(name: str) -> bool:
    """Whether a field is padded on the left: it is about prompts."""
    return name in LEFT or name.endswith(PROMPT)


def _check_fields(fields: Sequence[list[str]]) -> None:
    """All batches have the same fields, which all ranks see alike."""
    for other in fields[1:]:
        if other != fields[0]:
            only = ", ".join(sorted(set(fields[0]) ^ set(other)))
            raise ConfigError(
                f"dataset: got completions with and without {only}, expected the same of all; prompts with images and "
                "prompts without cannot share a generation batch whose completions a belief divides; train on one "
                "kind, or set allocation='fixed'"
            )


def join(batches: Sequence[Batch], padding: int) -> Batch:
    """One batch with the rows of all, in order.

    Args:
        batches: one or more, all with the same fields.
        padding: token id that fills ``prompt_ids`` and ``completion_ids``.
    """
    _check_fields([sorted(batch) for batch in batches])
    joined: Batch = {}
    for name, first in batches[0].items():
        values = [batch[name] for batch in batches]
        if not is_per_row(name, first):
            continue
        if isinstance(first, list):
            joined[name] = [item for value in values for item in value]
            continue
        if first.dim() > 1:
            width = max(value.shape[1] for value in values)
            fill = padding if name in ("prompt_ids", "completion_ids") else 0
            values = [_padded(value, width, fill, left=is_left(name)) for value in values]
        joined[name] = torch.cat(values)
    return joined


def gather(batch: Batch, accelerator: Accelerator, padding: int) -> Batch:
    """The rows of all ranks on every rank, in the order of ranks; every rank brings as many."""
    if accelerator.num_processes == 1:
        return {name: value for name, value in batch.items() if is_per_row(name, value)}
    _check_fields(gather_object([sorted(batch)]))
    gathered: Batch = {}
    for name, value in sorted(batch.items()):
        if not is_per_row(name, value):
            continue
        if isinstance(value, list):
            everyone = gather_object(value)
            gathered[name] = [
                item.to(accelerator.device) if isinstance(item, Tensor) else item for item in everyone
            ]
            continue
        if value.dim() > 1:
            fill = padding if name in ("prompt_ids", "completion_ids") else 0
            value = accelerator.pad_across_processes(value, dim=1, pad_index=fill, pad_first=is_left(name))
        gathered[name] = accelerator.gather(value)
    return gathered


def take(batch: Batch, index: Tensor) -> Batch:
    """The rows at ``index`` (m,), in that order."""
    places = index.tolist()
    return {
        name: [value[i] for i in places] if isinstance(value, list) else value[index.to(value.device)]
        for name, value in batch.items()
    }


def fill(batch: Batch, rows: int) -> Batch:
    """The batch with ``rows`` rows: copies of its first row without any trained token are added."""
    have = len(batch["completion_ids"])
    index = torch.cat([torch.arange(have), torch.zeros(rows - have, dtype=torch.long)])
    filled = take(batch, index)
    for name in MASKS:
        if name in filled:
            filled[name] = filled[name].clone()
            filled[name][have:] = 0
    return filled


def _padded(value: Tensor, width: int, fill: int, *, left: bool) -> Tensor:
    missing = width - value.shape[1]
    if not missing:
        return value
    block = value.new_full((value.shape[0], missing, *value.shape[2:]), fill)
    return torch.cat([block, value] if left else [value, block], dim=1)
