"""The TRL trainer of a run: our settings in TRL's words, nothing else."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback

from kalman_rl.engine.config import TrainConfig
from kalman_rl.engine.models.load import LoadedModel
from kalman_rl.engine.prior import prior_rows
from kalman_rl.engine.runs.run import Run
from kalman_rl.engine.saving import RunTrainer
from kalman_rl.engine.stale import StaleRunTrainer
from kalman_rl.engine.tasks import Task, by_row, guard_reward, parts_of, trainer_rows, with_noise
from kalman_rl.engine.tasks.weighted import Part
from kalman_rl.hosts.trl import KalmanGRPOConfig
from kalman_rl.objectives.loss import Method
from kalman_rl.sampling.budget import Budget


def build_trainer(
    config: TrainConfig, method: Method, task: Task, loaded: LoadedModel, run: Run, max_tokens: int
) -> RunTrainer:
    """The TRL trainer for a configuration: our words to TRL's, nothing else."""
    parts = parts_of(task.reward)
    micro_batches = config.updates_per_generation * config.gradient_accumulation
    rollouts = config.prompts * config.group_size
    cycle = config.updates_per_generation * config.iterations
    save_every = -(-config.save_every // cycle) * cycle  # only between generation batches
    bf16 = loaded.dtype == torch.bfloat16
    budget = {spec.name: getattr(config, spec.name) for spec in dataclasses.fields(Budget)}
    budget["rounds"] = list(config.rounds)
    if config.reward_noise:
        budget["reward_range"] = "real"
        budget["reward_noise_variance"] = config.reward_noise_variance + config.reward_noise**2
    args = KalmanGRPOConfig(
        **budget,
        output_dir=str(run.path / "checkpoints"),
        method=config.method,
        method_options=config.method_options,
        per_device_train_batch_size=rollouts // micro_batches,
        gradient_accumulation_steps=config.gradient_accumulation,
        steps_per_generation=micro_batches,
        num_iterations=config.iterations,
        num_generations=config.group_size,
        belief=config.belief if config.advantage == "tracked" else None,
        belief_options=config.belief_options,
        prompt_features=config.prompt_features,
        source_column=config.source_column,
        prior_column=config.prior_column,
        max_completion_length=max_tokens,
        temperature=config.temperature,
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        nonfinite=config.nonfinite,
        beta=config.kl,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        save_strategy="steps" if config.save_every else "no",
        save_steps=max(save_every, 1),
        save_total_limit=None,  # the run drops older ones by step, once the new one is sealed
        logging_steps=config.log_every,
        reward_weights=[part.weight for part in parts],
        report_to="none",  # trackers come as guarded callbacks
        disable_tqdm=True,
    )
    peft_config = None
    if config.lora_rank:
        from peft import LoraConfig

        targets = list(config.lora_target_modules)
        peft_config = LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            lora_dropout=config.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            task_type="CAUSAL_LM",
        )
    plain = trainer_rows(task.train, *filter(None, [config.source_column]), ask=task.ask)
    dataset = [row | more for row, more in zip(plain, prior_rows(task.train, config.prior_column))]
    kind: Any = RunTrainer
    if config.sampler_lag or config.sampler_bits:
        kind = functools.partial(StaleRunTrainer, lag=config.sampler_lag, bits=config.sampler_bits)
    trainer: RunTrainer = kind(
        run=run,
        keep=config.save_total_limit,
        model=loaded.model,
        stop_texts=loaded.stop_texts,
        reward_funcs=[_scorer(part, task, config.reward_noise) for part in parts],
        args=args,
        train_dataset=Dataset.from_list(dataset),
        processing_class=loaded.tokenizer,
        peft_config=peft_config,
        method=method,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _scorer(part: Part, task: Task, noise: float) -> Any:
    scored = with_noise(by_row(guard_reward(part.function), task.train), noise)
    scored.__name__ = part.name
    return scored
