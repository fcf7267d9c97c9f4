"""The order of prompts: a resumed run goes on with the order of the pass that it stopped in.

TRL's sampler draws a new order for every pass over the dataset from a generator of its own, which is in no checkpoint.
A run resumed in the third pass began it with the order of the first.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler


def begin_pass(sampler: RepeatSampler, number: int) -> None:
    """Let the next order that a sampler draws be that of pass ``number``, from 0: the one after ``number`` others."""
    if sampler.shuffle and sampler.seed is not None:
        sampler.generator.manual_seed(sampler.seed)
        for _ in range(number):
            torch.randperm(sampler.num_samples, generator=sampler.generator)


class OrderedTrainer(GRPOTrainer):
    """GRPOTrainer whose prompts have the same order with and without an interruption."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_BeginPass(self))
        self.train_sampler: Any = None

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self.train_sampler = super()._get_train_sampler(dataset)
        return self.train_sampler


class _BeginPass(TrainerCallback):
    """Before every pass: its number is the whole part of the epoch, in a resumed run that of the checkpoint."""

    def __init__(self, trainer: OrderedTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if isinstance(self.trainer.train_sampler, RepeatSampler):
            begin_pass(self.trainer.train_sampler, int(state.epoch or 0))
