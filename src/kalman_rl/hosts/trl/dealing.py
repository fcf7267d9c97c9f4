"""Rows without trained tokens are spread over the optimizer steps of a generation batch.

A budget below the rows leaves some that only fill the batch up. TRL shuffles all rows over its micro-batches, so
that an optimizer step could get nothing but fillers; here rows are dealt anew after TRL's shuffle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kalman_rl.hosts.trl import rows as batches
from kalman_rl.hosts.trl.packed import pack, unpack


def deal(trained: Tensor, steps: Sequence[int], start: int = 0) -> list[list[int]]:
    """Which rows each micro-batch gets: trained rows go round the optimizer steps, the others fill up.

    Args:
        trained: (n,) bool, whether a row has trained tokens; n is a multiple of the number of micro-batches.
        steps: the optimizer step of each micro-batch.
        start: trained rows of earlier ranks; this rank goes on where they stopped.

    >>> deal(torch.tensor([True, True, True, False, False, False, False, False]), steps=[0, 0, 1, 1])
    [[0, 3], [2, 4], [1, 5], [6, 7]]
    """
    before: Counter[int] = Counter()
    place = []
    for micro, step in enumerate(steps):
        place.append((before[step], step, micro))
        before[step] += 1
    order = [micro for _, _, micro in sorted(place)]  # the first micro-batch of every step, then the second
    hands: list[list[int]] = [[] for _ in steps]
    for i, row in enumerate(trained.nonzero().flatten().tolist()):
        hands[order[(start + i) % len(order)]].append(row)
    fillers = iter((~trained).nonzero().flatten().tolist())
    size = len(trained) // len(steps)
    return [hand + [next(fillers) for _ in range(size - len(hand))] for hand in hands]


def spread_fillers(trainer: Any) -> None:
    """Deal the rows of the trainer's new micro-batches anew if one on any rank has no trained tokens.

    Without such rows TRL's order stays. All ranks call it together.
    """
    parts, accelerator = trainer._buffered_inputs, trainer.accelerator
    trained = torch.cat([trainer._loss_mask(part).any(dim=1) for part in parts])
    counts = accelerator.gather(trained.sum()[None])
    if (counts == len(trained)).all():
        return
    first, share = trainer._step, trainer.current_gradient_accumulation_steps
    steps = [(first + micro) // share for micro in range(len(parts))]
    start = int(counts[: accelerator.process_index].sum())
    whole = batches.join([unpack(part) for part in parts], trainer._tokenizer.pad_token_id)
    rest = {name: value for name, value in parts[0].items() if not batches.is_per_row(name, value)}
    trainer._buffered_inputs = [
        pack(batches.take(whole, torch.tensor(hand))) | rest for hand in deal(trained, steps, start)
    ]
