"""Candidates: more prompts than the batch has groups for, among which an allocation chooses.

They come in the order of TRL's sampler, each once in a pass over the dataset. One that gets no completion comes up
again in the next pass, in that pass's order.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset

from kalman_rl.errors import ConfigError
from kalman_rl.hosts.trl.order import OrderedTrainer


class CandidatesTrainer(OrderedTrainer):
    """GRPOTrainer whose loader brings ``candidates`` different prompts for every generation batch; None as TRL."""

    candidates: int | None = None

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        if self.candidates is not None:  # a copy for each rank, so that any number can be shared out
            sampler.batch_size, sampler.mini_repeat_count = self.candidates, self.accelerator.num_processes
        return sampler

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        **more: Any,
    ) -> Any:
        size = self.candidates if is_training and self.candidates is not None else batch_size
        return super()._get_dataloader(
            dataset, description, size, sampler_fn=sampler_fn, is_training=is_training, **more
        )


def candidates_of(trainer: Any) -> int | None:
    """How many candidates a tracked trainer's budget asks for; None where every prompt is sampled.

    Raises: ConfigError where the dataset has fewer, or is a stream that no order can be taken from.
    """
    budget, rows = trainer.tracking.budget, trainer.args.generation_batch_size
    if budget.allocation == "fixed" or budget.completions_min:
        return None
    prompts = rows // trainer.num_generations
    if not isinstance(trainer.train_dataset, IterableDataset) and hasattr(trainer.train_dataset, "__len__"):
        among: int = budget.chooses_among(prompts, rows, len(trainer.train_dataset))
        return among
    if budget.candidates is not None:
        raise ConfigError(
            f"candidates: got {budget.candidates} with a dataset that is read as a stream, expected None; load it whole"
        )
    return None
