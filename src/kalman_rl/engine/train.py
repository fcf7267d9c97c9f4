"""The main job: a configuration becomes a trained model in a run directory, through TRL.

Read top to bottom: task, model, trainer, held-out evaluation before, training, evaluation after.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Collection
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # a trainer of TRL tells a host about itself, from a thread

import torch
import transformers

from kalman_rl.beliefs.by_source import Sources
from kalman_rl.engine.building import build_trainer
from kalman_rl.engine.callbacks import (
    Evaluate,
    NoSignal,
    Progress,
    StopOnSignal,
    TraceTokens,
    WriteBeliefs,
    WriteMetrics,
)
from kalman_rl.engine.collapse.callback import CollapseAlarm
from kalman_rl.engine.config import TrainConfig
from kalman_rl.engine.early import check_lora_targets, check_same_data, fit_prompts
from kalman_rl.engine.held_out import HeldOut
from kalman_rl.engine.method import chosen_method
from kalman_rl.engine.models.load import load_model
from kalman_rl.engine.prior import measure_prior, prior_rows
from kalman_rl.engine.quiet import no_telemetry, quiet_third_parties
from kalman_rl.engine.resume import (
    check_same_code,
    check_same_settings,
    check_same_weights,
    checkpoint_of,
    note_machine,
    plain_settings,
)
from kalman_rl.engine.runs.checkpoints import step_of
from kalman_rl.engine.runs.reading import read_metrics
from kalman_rl.engine.runs.run import Run
from kalman_rl.engine.saving import RunTrainer, check_room
from kalman_rl.engine.tasks import (
    Task,
    WeightedReward,
    load_task,
    parts_of,
    rows,
    supervised_reward,
)
from kalman_rl.engine.tasks.chat import AsChat, put_to_model
from kalman_rl.engine.trend import course, rewards_of
from kalman_rl.errors import ConfigError, NoSpaceError, quote
from kalman_rl.hosts.rewards import RewardRecord, SupervisedReward
from kalman_rl.hosts.trl import make_sinks
from kalman_rl.hosts.trl.prompts import note_sources
from kalman_rl.kernels.memory import keep_freed_memory
from kalman_rl.sampling.budget import Budget


def train(
    config: TrainConfig,
    run: Run,
    *,
    resume: bool = False,
    allow_change: Collection[str] = (),
    cache: Path | None = None,
    prefix: str = "",
    task: Task | None = None,
) -> int:
    """Train as configured into ``run``; returns the exit code: 0, 3 if an alarm stopped it, 130 after a signal.

    With ``resume`` it goes on from the newest checkpoint, or from the start where none was completed. At ``steps`` or
    beyond nothing is trained; the model is saved and evaluated.

    Settings, rows and weights must be those that the run began with, except for what ``allow_change`` names, see
    :mod:`kalman_rl.engine.resume`.

    Converted and warm-started weights are kept in ``cache``, by default ``.cache`` beside the run. ``task`` is what
    :func:`chosen_task` gives, where it was called before.

    Raises: ConfigError, RewardError, RunError and AdapterError with nothing written lost.
    """
    start = time.monotonic()
    progress = Progress(config.steps, quiet=config.quiet, prefix=prefix)
    stop = StopOnSignal(config.updates_per_generation * config.iterations)
    code, status = 1, "failed"
    with stop:
        try:
            with quiet_third_parties():
                code = _train(
                    config,
                    run,
                    stop,
                    progress,
                    resume=resume,
                    allow_change=allow_change,
                    cache=cache,
                    task=task,
                )
            status = "finished" if code == 0 else "interrupted"
        except KeyboardInterrupt:
            code, status = 130, "interrupted"
        except NoSpaceError as error:
            status = "stopped: disk"
            raise NoSpaceError(
                f"stopped: disk, at step {stop.step}: {error}; once there is room: kalman-rl resume {run.path}"
            ) from error
        except Exception:
            if not stop.at_once:
                raise
            code, status = 130, "interrupted"
        finally:
            stop.ended = True
            if run.manifest.get("status") == "running":
                with contextlib.suppress(*([NoSpaceError] if status == "stopped: disk" else [])):
                    run.finish(status, time.monotonic() - start)
            else:  # refused before it went on: as it was
                run.close()
    if code:
        progress.say(f"stopped at step {stop.step}; continue with: kalman-rl resume {run.path}")
    else:
        progress.say(f"finished {stop.step} steps in {time.monotonic() - start:.0f} s: {run.path}")
    return code


def _train(
    config: TrainConfig,
    run: Run,
    stop: StopOnSignal,
    progress: Progress,
    *,
    resume: bool,
    allow_change: Collection[str],
    cache: Path | None,
    task: Task | None,
) -> int:
    """What :func:`train` guards: everything from the weights to the last evaluation. Returns the exit code."""
    say = progress.say
    if resume:  # before a model is loaded in vain
        check_same_settings(run, config, allow_change)
    checkpoint = checkpoint_of(run, config) if resume else None
    stop.step = 0 if checkpoint is None else step_of(checkpoint)
    no_telemetry()
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task = task or chosen_task(config)
    source = f"task {quote(config.task)}" if config.data is None else str(config.data)
    data = check_same_data(run, task, source, resume=resume, allow_change=allow_change)
    code = check_same_code(run, config, task.reward, resume=resume, allow_change=allow_change)
    machine = {"device": "cuda" if torch.cuda.is_available() else "cpu", "threads": torch.get_num_threads()}
    cache = cache or run.path.parent / ".cache"
    loaded = load_model(config.model, cache=cache, dtype=config.dtype, task=task, seed=0, progress=say)
    for note in loaded.notes:
        say(note)
    weights = check_same_weights(run, loaded.model, config.model, resume=resume, allow_change=allow_change)
    machine["dtype"] = str(loaded.dtype).removeprefix("torch.")
    note_machine(run, machine, stop.step if resume else None, say)
    run.update_manifest(
        status="running",
        settings=plain_settings(config),
        data_sha256=data,
        code_sha256=code,
        model_sha256=weights,
    )
    task, said = put_to_model(
        task, loaded.tokenizer, config.chat, config.system, own_rows=config.data is not None
    )
    if said:
        say(said)
    run.update_manifest(chat=isinstance(task.ask, AsChat))
    method = chosen_method(
        config.method, config.method_options, config.advantage, config.belief, config.belief_options
    )
    max_tokens = config.max_completion_tokens or task.max_completion_tokens
    task = fit_prompts(task, loaded.tokenizer, loaded.model, config.max_prompt_tokens, max_tokens, say)
    _check_rows(task, config)
    if config.lora_rank:
        check_lora_targets(loaded.model, config.lora_target_modules, say)
    run.update_manifest(train_rows=len(task.train), test_rows=len(task.test))

    trainer = build_trainer(config, method, task, loaded, run, max_tokens)
    for part in parts_of(task.reward):
        if isinstance(reward := part.function, SupervisedReward):
            several = isinstance(task.reward, WeightedReward)
            name = f"rewards-{part.name}.jsonl" if several else "rewards.jsonl"
            reward.say, reward.record = say, RewardRecord(run.path / name, keep=resume)
            trainer.supervised.append(reward)
    answers = {str(row["prompt_id"]): str(row.get("answer") or "") for row in task.train}
    trainer.observers.append(TraceTokens(run, loaded.tokenizer, config.traces_per_step, answers=answers))
    if trainer.tracking is not None:
        trainer.tracking.observers.append(WriteBeliefs(run))

    check_room(trainer, config.save_every > 0, config.keep_best)
    measure = HeldOut(config, run, trainer, loaded, task, max_tokens, say)
    for callback in (
        WriteMetrics(run, progress),
        NoSignal(say),
        Evaluate(measure, config.eval_every),
        stop,
    ):
        trainer.add_callback(callback)
    alarm = None if config.collapse == "off" else CollapseAlarm(config.collapse, run.path, say=say)
    for callback in (*([alarm] if alarm else []), *make_sinks(config.report_to, say)):
        trainer.add_callback(callback)

    if resume:
        run.truncate(stop.step)
        say(f"continuing from step {stop.step}" + ("" if checkpoint else ", as no checkpoint was completed"))
    evaluated = {row["step"] for row in read_metrics(run.path) if row["kind"] == "eval"}
    if checkpoint is None and 0 not in evaluated:
        measure(0)
    if config.measure_prior and checkpoint is None and trainer.tracking is not None:
        numbers = measure_prior(
            config, trainer.tracking, trainer.model, loaded.tokenizer, task, max_tokens, loaded.stop_texts
        )
        if not any(row["kind"] == "prior" for row in read_metrics(run.path)):
            run.log("prior", 0, **numbers)
        say(
            f"before training: {int(numbers['prior/completions'])} completions of the start model were spent on what "
            f"the belief begins with, mean reward {numbers['prior/reward']:.3f}"
        )
    progress.begin()
    if stop.step < config.steps:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.step < config.steps:
            return 3 if alarm is not None and alarm.stopped and not stop.requested else 130
        if hint := trainer.few_kept.hint():
            say(f"note: {hint}")
        for reward in trainer.supervised:
            if lost := reward.summary():
                say(f"note: reward {lost}")
        if said := course(rewards_of(read_metrics(run.path))):
            say(said)
    else:  # trained already: what is left is to save and to evaluate
        trainer.state.global_step = stop.step
        trainer._load_from_checkpoint(str(checkpoint))
    trainer.save_trained("model", loaded.tokenizer)
    try:
        if stop.requested:
            raise KeyboardInterrupt
        if stop.step not in evaluated:
            measure(stop.step)
    except KeyboardInterrupt:
        _keep_last_step(trainer, run)
        raise
    return 0


def _keep_last_step(trainer: RunTrainer, run: Run) -> None:
    """Save a checkpoint of the step that was reached, unless there is one: the evaluation goes on from it."""
    if run.path / "checkpoints" / f"checkpoint-{trainer.state.global_step}" not in run.checkpoints():
        trainer._save_checkpoint(trainer.model, trial=None)


def chosen_task(config: TrainConfig) -> Task:
    """The task that a configuration names, with its own rows and reward.

    Raises: ConfigError, RewardError for rows, rewards or sizes that do not fit.
    """
    limits = {"seconds": config.reward_timeout, "memory": config.reward_memory}
    reward = (
        supervised_reward(*config.reward, weights=config.reward_weights, **limits) if config.reward else None
    )
    if config.data is not None:
        task = rows(config.data, reward=reward, test_share=config.test_share, stop=config.stop)
    else:
        task = load_task(config.task, train_size=config.train_size, test_size=config.test_size)
        if reward is not None:
            task = dataclasses.replace(task, reward=reward)
        if config.stop:
            task = dataclasses.replace(task, stop=config.stop)
    _check_rows(task, config)
    return task


def _check_rows(task: Task, config: TrainConfig) -> None:
    if len(task.train) < config.prompts:
        raise ConfigError(
            f"prompts_per_generation: got {config.prompts}, expected at most the "
            f"{len(task.train)} training rows of task {quote(task.name)}; lower it or add rows"
        )
    Budget.of(config).chooses_among(config.prompts, config.prompts * config.group_size, len(task.train))
    prior_rows(task.train, config.prior_column)
    if config.source_column is not None:
        note_sources(Sources("source_column"), config.source_column, task.train)
