"""Generation with beliefs: TRL samples and scores, the belief decides how often and what is expected.

A round is one call of TRL's own ``_generate_and_score_completions`` on as many rows as the round asks for. The
rows of all rounds are joined, shared out evenly over ranks, and filled up to the number TRL counts on.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from kalman_rl.beliefs.advantage import Tracked
from kalman_rl.beliefs.by_source import Sources
from kalman_rl.errors import ConfigError
from kalman_rl.hosts.trl import rows as batches
from kalman_rl.hosts.trl.missing import judge
from kalman_rl.hosts.trl.packed import pack, unpack
from kalman_rl.hosts.trl.prompts import note_sources, prompts_by_id
from kalman_rl.sampling.budget import Budget
from kalman_rl.sampling.records import belief_record
from kalman_rl.sampling.rounds import Sampled
from kalman_rl.sampling.tracking import Tracking, fixed_groups, outcome_metrics

OF_REWARDS = ("reward", "reward_std", "frac_reward_zero_std")
"""TRL's numbers about the rewards of one call of its generation."""

Generate = Callable[[list[dict[str, Any]]], dict[str, Any]]


def make_tracking(part: Tracked, args: Any) -> Tracking:
    """An empty belief with its books, by source where ``args.source_column`` names a column."""
    sources = Sources("source_column") if getattr(args, "source_column", None) is not None else None
    return Tracking(part.make(sources), Budget.of(args), sources)


def tracked_generation(
    trainer: Any, tracking: Tracking, inputs: list[dict[str, Any]], generate: Generate
) -> dict[str, Any]:
    """One generation batch: who is sampled, how it went, what each completion's advantage is.

    Args:
        trainer: the KalmanGRPOTrainer.
        tracking: belief and budget; updated.
        inputs: this rank's rows of the dataset, a prompt as often as TRL would sample it, or candidates; with a stream
            others are drawn in their place.
        generate: TRL's generation of given rows, scored; the trainer notes rewards of all ranks.

    Returns:
        TRL's batch with this rank's share of the rows, ``advantages``, ``rewards`` and the dataset's ``prompt`` and
        ``prompt_id``. Rows without trained tokens fill up what the budget leaves.
    """
    accelerator, padding = trainer.accelerator, trainer._tokenizer.pad_token_id
    step = tracking.tick(trainer.state.global_step)
    drawn: Tensor | float = 1.0
    if tracking.stream is not None:
        features = functools.partial(candidate_features, trainer, tracking)
        inputs, drawn = trainer.prompt_pool.draw(trainer, tracking.stream, inputs, step, features)
    everyone = gather_object(inputs) if accelerator.num_processes > 1 else inputs
    by_id = prompts_by_id(everyone)
    ids = list(by_id)
    rows: int = trainer.args.generation_batch_size
    total = tracking.budget.total(rows // trainer.num_generations, rows, len(ids))
    if tracking.sources is not None:
        note_sources(tracking.sources, trainer.args.source_column, by_id.values())
    note_features(trainer, tracking, by_id)
    predicted = tracking.before(ids, step)
    told: list[list[Hashable]] = []
    rewards: list[Tensor] = []
    parts: list[dict[str, Any]] = []

    def sample(names: list[Hashable]) -> Tensor:
        """Sample one completion for each name, on all ranks together; its rewards."""
        share = -(-len(names) // accelerator.num_processes)
        padded = names + names[:1] * (share * accelerator.num_processes - len(names))
        start = accelerator.process_index * share
        local = unpack(generate([by_id[name] for name in padded[start : start + share]]))
        parts.append(batches.take(batches.gather(local, accelerator, padding), torch.arange(len(names))))
        told.append(names)
        rewards.append(trainer._last_rewards[: len(names)].double().cpu())
        return rewards[-1]

    with one_completion_per_row(trainer):
        if tracking.budget.allocation == "fixed":
            # Nothing moves: a rank keeps the rows it sampled, and only rewards were gathered.
            local = generate(inputs)
            told.append([row["prompt_id"] for row in everyone])
            rewards.append(trainer._last_rewards.double().cpu())
            sampled = fixed_groups(tracking, told[0], rewards[0], step)
            sampled = sampled._replace(weight=sampled.weight * drawn)
        else:
            plan = tracking.plan(ids, step=step, total=total)
            while (request := plan.next_round()) is not None:
                names = [name for name, count in request for _ in range(count)]
                plan.tell(names, sample(names))
            sampled = plan.result()

    judge(trainer, sampled.reward)
    metrics = outcome_metrics(sampled, (told[0], rewards[0]), predicted, tracking, rows)
    tracking.note(sampled)
    if tracking.observers and accelerator.is_main_process:
        texts = {name: str(row.get("prompt", "")) for name, row in by_id.items()}
        record = belief_record(
            tracking, sampled, (told[0], rewards[0]), predicted, texts, step=step, rows=rows
        )
        for observe in tracking.observers:
            observe(record)
    _log(trainer, metrics, sampled.reward)
    values = (sampled.advantage * sampled.weight).split([len(names) for names in told])
    spare = [-len(names) % accelerator.num_processes for names in told]  # sampled to fill ranks, not trained
    note_advantages(trainer, [x for v, n in zip(values, spare) for x in (*v.tolist(), *[math.nan] * n)])
    rank, size = accelerator.process_index, rows // accelerator.num_processes
    if not parts:
        mine = batches.join([local], padding)
        _note_outcome(mine, sampled, by_id, slice(rank * size, (rank + 1) * size), accelerator.device)
    else:
        whole = batches.join(parts, padding)
        _note_outcome(whole, sampled, by_id, slice(None), accelerator.device)
        # Every rank takes each n-th row, so that what a budget leaves empty is spread over ranks like the rest.
        index = torch.arange(size) * accelerator.num_processes + rank
        mine = pack(batches.take(batches.fill(whole, rows), index))
    trained = (mine["completion_mask"] * mine.get("tool_mask", 1)).sum()
    return mine | {"num_items_in_batch": accelerator.gather(trained).sum()}


def note_advantages(trainer: Any, values: list[float]) -> None:
    """Put the advantages that are trained on where TRL noted its own, for ``log_completions``; the last of the list
    belong to the completions that came last. Of an advantage per token it is the mean; NaN is not trained on."""
    logged = trainer._logs["advantages"]
    for i in range(1, min(len(values), len(logged)) + 1):
        logged[-i] = values[-i]


@contextlib.contextmanager
def one_completion_per_row(trainer: Any) -> Iterator[None]:
    """While it lasts, TRL takes every row for a separate prompt and forms no groups."""
    size, metrics = trainer.num_generations, trainer._metrics["train"]
    before = {name: list(metrics.get(name, [])) for name in OF_REWARDS}
    trainer.num_generations = 1
    try:
        yield
    finally:
        trainer.num_generations = size
        for name, values in before.items():  # those of single rounds are dropped
            metrics.pop(name, None)
            if values:
                metrics[name] = values


def _note_outcome(
    batch: dict[str, Any], sampled: Sampled, by_id: dict[Hashable, dict[str, Any]], rows: slice, device: Any
) -> None:
    """Write what became of the sampled completions ``rows`` into the batch that holds them."""
    batch["advantages"] = (sampled.advantage * sampled.weight)[rows].float().to(device)
    batch["rewards"] = sampled.reward[rows].float().to(device)
    batch["prompt_id"] = sampled.ids[rows]
    batch["prompt"] = [by_id[name].get("prompt") for name in batch["prompt_id"]]


def _log(trainer: Any, metrics: dict[str, float], reward: Tensor) -> None:
    """Log the numbers of one generation batch, with TRL's own reward statistics of the whole batch."""
    known = reward[~reward.isnan()]
    if len(known):
        metrics = metrics | {"reward": known.mean().item(), "reward_std": known.std(correction=0).item()}
    if "groups/informative" in metrics:
        metrics = metrics | {"frac_reward_zero_std": 1 - metrics["groups/informative"]}
    for name, value in metrics.items():
        trainer._metrics["train"][name].append(value)


def candidate_features(trainer: Any, tracking: Tracking, ids: Sequence[Hashable]) -> Tensor | None:
    """(n, F) features of prompts that may be drawn, noted first where they are new; None where none are asked for."""
    if trainer.prompt_features:
        new = [name for name in ids if name not in tracking.features]
        note_features(trainer, tracking, {name: trainer.prompt_pool.row(name) for name in new})
    return tracking.known_features(ids)


def note_features(trainer: Any, tracking: Tracking, by_id: dict[Hashable, dict[str, Any]]) -> None:
    """Features of prompts that come up for the first time: the mean of the last hidden state over the prompt.

    Adapters are switched off for it, and a feature is kept once it is known, so that it does not drift with the
    policy and is paid for once.
    """
    if not trainer.prompt_features:
        return
    new = [name for name in by_id if name not in tracking.features]
    if not new:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    without_adapter = getattr(model, "disable_adapter", contextlib.nullcontext)
    if any("prompt" not in by_id[name] for name in new):
        raise ConfigError(
            "prompt_features: got rows without a prompt, expected one in every row of the dataset because it is read "
            "before an environment starts; set prompt_features=False"
        )
    tokens = trainer._tokenize_prompts([by_id[name]["prompt"] for name in new])[0]
    size = trainer.args.per_device_train_batch_size
    with torch.no_grad(), without_adapter():
        for start in range(0, len(new), size):
            part = [torch.tensor(ids) for ids in tokens[start : start + size]]
            ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(trainer.accelerator.device)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(part):
                mask[i, : len(row)] = 1
            out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            weight = mask[..., None].float()
            mean = (out.hidden_states[-1].float() * weight).sum(1) / weight.sum(1)
            for name, feature in zip(new[start : start + size], mean.cpu()):
                tracking.features[name] = feature.clone()
