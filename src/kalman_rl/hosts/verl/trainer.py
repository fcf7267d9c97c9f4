"""verl's synchronous trainer with beliefs about prompts.

Select it with ``trainer.v1.trainer_mode=kalman_rl``; the plugin tells verl's command line where it is. The belief lives
in the driver, the one process that sees all rewards; workers know nothing of it.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from torch import Tensor
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
from verl.utils import tensordict_utils as tu

from kalman_rl.errors import ConfigError, quote
from kalman_rl.hooks import check
from kalman_rl.hosts.state import load_state, save_state
from kalman_rl.hosts.verl import plugin
from kalman_rl.hosts.verl.estimators import TRACKER, options_in
from kalman_rl.hosts.verl.hooks import TRAINER
from kalman_rl.hosts.verl.metrics import divided
from kalman_rl.hosts.verl.preflight import check_trainer
from kalman_rl.hosts.verl.stream import NamedPrompts
from kalman_rl.hosts.verl.tracker import (
    PromptNames,
    Rows,
    candidates_of,
    chosen_counts,
    make_tracking,
    planned_counts,
    read_settings,
    rows_of,
    tracked_advantages,
)
from kalman_rl.terminal import logger

check(TRAINER)
plugin.register()  # where entry points are switched off


@register_trainer("kalman_rl")
class KalmanPPOTrainer(PPOTrainerSync):
    """PPOTrainerSync whose advantages come from a belief about every prompt, kept from step to step.

    With ``algorithm.adv_estimator`` one of kalman_rl/tracked, kalman_rl/k_grpo, kalman_rl/spo. With
    ``algorithm.kalman_rl.allocation=predictive`` the belief also decides how many completions each prompt of a batch
    gets, ``rollout.n`` on average, and which of ``candidates`` are in the batch at all. The belief is saved beside
    verl's checkpoints and loaded with them.

    Raises: ConfigError for settings that do not go together, before anything starts.
    """

    def __init__(self, config: Any) -> None:
        estimator = check_trainer(config)
        self.tracker_settings = read_settings(options_in(config.algorithm))
        self.tracking = make_tracking(estimator, self.tracker_settings)
        self.prompt_names = PromptNames(self.tracker_settings.prompt_key)
        self.chosen: int | None = None
        """Prompts of the batch that is being sampled, where that is for the belief to say."""
        self.pool: NamedPrompts | None = None
        super().__init__(config)

    @property
    def trainer_mode(self) -> str:
        """verl compares this with "sync" to choose the replay buffer, refills and checkpoints."""
        return "sync"

    @trainer_mode.setter
    def trainer_mode(self, name: str) -> None:
        """verl assigns the registered name; it stays in the configuration."""

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        settings = self.tracker_settings
        if settings.select != "passes" or settings.prior_key is not None:
            self.pool = NamedPrompts(
                self.tracking,
                settings,
                self.train_dataset,
                count=int(self.config.data.train_batch_size),
                group=int(self.config.actor_rollout_ref.rollout.n),
                seed=int(self.config.data.get("seed", None) or 0),
            )

    def _next_train_batch(self, num_prompts: int | None = None) -> Any:
        # with a number, prompts that failed are replaced
        among = self._candidates() if num_prompts is None else None
        step = self.tracking.next_step(self.global_steps)
        if self.pool is not None and self.tracking.stream is not None:
            count = int(num_prompts or self.config.data.train_batch_size)
            batch = self.pool.draw(self.tracking, count, step)
            tu.assign_non_tensor_data(batch, "global_steps", self.global_steps)
        else:
            batch = super()._next_train_batch(among or num_prompts)
        names = self._names(batch)
        self.prompt_names.check(names, plain(batch["raw_prompt"]))
        if self.tracking.budget.allocation == "fixed":
            return batch
        n = int(self.config.actor_rollout_ref.rollout.n)
        if among is None:
            counts = planned_counts(self.tracking, names, step=step, n=n)
        else:
            total = n * int(self.config.data.train_batch_size)
            counts = chosen_counts(self.tracking, names, step=step, total=total)
            batch = tu.index_select_tensor_dict(batch, [i for i, count in enumerate(counts) if count])
            counts = [count for count in counts if count]
            self.chosen = len(counts)
        tu.assign_non_tensor_stack(batch, "__rollout_n__", counts)
        return batch

    def _candidates(self) -> int | None:
        data = self.config.data
        prompts = int(data.train_batch_size)
        return candidates_of(
            self.tracking.budget,
            prompts=prompts,
            n=int(self.config.actor_rollout_ref.rollout.n),
            fetch=int(data.get("gen_batch_size", None) or prompts),
            pool=len(self.train_dataset),
        )

    def _step_once(self, metrics: dict[str, Any], timing_raw: dict[str, Any], sample_batch_size: int) -> Any:
        return super()._step_once(metrics, timing_raw, self.chosen or sample_batch_size)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=self._wanted())
        rows = rows_of(batch.keys, batch.tags, self._names(data))
        token = TRACKER.set(functools.partial(self._tracked, rows, metrics))
        try:
            return super()._compute_advantage(batch, metrics)
        finally:
            TRACKER.reset(token)

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        of_step: dict[str, Any] = {}
        batch = super()._update_actor(batch, of_step)
        metrics.update(divided(of_step))
        return batch

    def _tracked(self, rows: Rows, metrics: dict[str, Any], reward: Tensor) -> Tensor:
        """What the estimator asks for while verl computes advantages."""
        found, numbers = tracked_advantages(
            self.tracking,
            rows,
            reward,
            global_step=self.global_steps,
            n=int(self.config.actor_rollout_ref.rollout.n),
            prompts=None if self.chosen is None else int(self.config.data.train_batch_size),
            weight=None if self.pool is None or self.tracking.stream is None else self.pool.weight,
        )
        metrics.update(numbers)
        return found

    def _names(self, data: Any) -> list[Hashable]:
        """The name of each row's prompt, whose source is noted."""
        missing = [name for name in self._wanted() if name not in data.keys()]  # noqa: SIM118
        if missing:
            raise ConfigError(
                f"algorithm.kalman_rl: got prompt_key {list(self.prompt_names.key)} and source_key "
                f"{quote(self.tracker_settings.source_key)}, expected columns of the dataset, which has no "
                f"{', '.join(missing)}"
            )
        columns = {name: plain(data[name]) for name in self._wanted()}
        names = self.prompt_names.of(columns)
        source = self.tracker_settings.source_key
        if self.tracking.sources is not None and source is not None:
            self.tracking.sources.note(names, columns[source])
        return names

    def _wanted(self) -> list[str]:
        """Columns of the dataset that are read here, once each."""
        source = self.tracker_settings.source_key
        more = [] if self.tracking.sources is None or source is None else [source]
        return list(dict.fromkeys([*self.prompt_names.key, *more]))

    def _save_checkpoint(self) -> None:
        # First the belief: verl names a checkpoint the latest when all else is written, so a crash in between leaves
        # a folder that nothing points to.
        save_state(self._folder(), {"tracking": self.tracking.state_dict()})
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if not self.global_steps:
            return
        state = load_state(self._folder())
        if state is None:
            logger.warning(
                "%s: got a checkpoint without beliefs, expected those of the run; every prompt starts unknown, which "
                "costs variance, not correctness",
                self._folder(),
            )
        else:
            self.tracking.load_state_dict(state["tracking"])

    def _folder(self) -> Path:
        """The checkpoint of the current step: the one to resume from while loading, else the one to write."""
        trainer = self.config.trainer
        name = f"global_step_{self.global_steps}"
        if trainer.resume_mode == "resume_path" and str(trainer.resume_from_path).rstrip("/").endswith(name):
            return Path(trainer.resume_from_path)
        return Path(trainer.default_local_dir) / name


def plain(values: Any) -> list[Any]:
    """A column of verl's as a list: it may be a tensor, an array or a stack of wrapped objects."""
    if isinstance(values, torch.Tensor):
        return list(values.tolist())
    return [
        getattr(value, "data", value) if not hasattr(value, "dtype") else value.item() for value in values
    ]
