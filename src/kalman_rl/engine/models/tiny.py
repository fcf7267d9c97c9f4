"""The tiny model: a character-level Llama of 113k parameters, taught a task's form before RL starts."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kalman_rl.engine.tasks.task import Row, Task
from kalman_rl.errors import ConfigError, quote

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz \n>+-*=(),:"
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
BATCH, PEAK_LEARNING_RATE, WARM_UP_STEPS = 128, 3e-3, 12


def character_tokenizer() -> Any:
    """Tokenizer with one token per character of `CHARACTERS`, and pad, eos and unk; it pads on the left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: index for index, symbol in enumerate([*SPECIAL.values(), *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", clean_up_tokenization_spaces=False, **SPECIAL
    )


def warm_start_steps(task: Task) -> int:
    """Supervised steps: the task's, or enough to teach the form while most of the skill is left to RL."""
    if task.warm_start is not None:
        return task.warm_start
    return min(max(100, 8 * task.max_completion_tokens), 200)


def warm_started(task: Task, seed: int) -> tuple[Any, Any]:
    """Tiny model and tokenizer after a few supervised steps on training rows of ``task``.

    The loss is the cross-entropy of the reply's tokens; the learning rate rises linearly, then falls linearly
    to zero. It runs on one thread, so that one seed gives one set of weights whatever the number of cores.

    Args:
        task: where the rows come from; fresh ones when it can draw them, else its training rows. No test row
            is seen.
        seed: initial weights and choice of rows.

    Raises:
        ConfigError: the task uses characters outside `CHARACTERS`, or has rows without an answer.
    """
    check_spelling(task)
    steps = warm_start_steps(task)
    tokenizer = character_tokenizer()
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = _model(tokenizer)
        _supervise(model, tokenizer, task, _batches(task, steps, seed), steps)
    return model.eval(), tokenizer


def check_spelling(task: Task) -> None:
    """Raises ConfigError when the tiny model cannot spell the task or has nothing to learn from it."""
    check_template(None, task, "tiny")
    texts = (row["prompt"] + task.target(row) for row in [*task.train, *task.test])
    foreign = sorted(set().union(*texts) - set(CHARACTERS))
    if foreign:
        shown = " ".join(repr(character) for character in foreign[:8])
        raise ConfigError(
            f"model: task {quote(task.name)} has {len(foreign)} characters that 'tiny' cannot spell ({shown}), "
            "expected only digits, lower-case letters and a few signs; choose another model, e.g. smollm2"
        )
    if not all(isinstance(row["answer"], str) and row["answer"] for row in task.train):
        raise ConfigError(
            f"model: task {quote(task.name)} has rows without an answer, expected one in every row for 'tiny' to "
            "learn from; choose another model, e.g. smollm2"
        )


def check_template(tokenizer: Any, task: Task, name: str) -> None:
    """Raises ConfigError when the task's prompts are chats and the model has no template for them."""
    if isinstance(task.train[0]["prompt"], list) and getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            f"model: got {quote(name)}, which has no chat template, expected one because the prompts of "
            f"{quote(task.name)} are lists of messages; choose a chat model, or write the prompts as texts"
        )


def cache_key(task: Task) -> str:
    """Hash of all that decides the warm-started weights beside task name and seed; part of the cache path."""
    numbers = [SHAPE, warm_start_steps(task), BATCH, PEAK_LEARNING_RATE, WARM_UP_STEPS]
    parts: list[Any] = [*numbers, CHARACTERS, task.lead, list(task.stop)]
    if task.fresh is None:
        parts.append(sorted(row["prompt"] + task.target(row) for row in task.train))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _model(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE, **tokens))


def _supervise(model: Any, tokenizer: Any, task: Task, batches: Iterator[list[Row]], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP_STEPS, (steps - step) / (steps - WARM_UP_STEPS))
    )
    model.train()
    for rows in batches:
        ids, labels = _encode(tokenizer, task, rows)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order whatever the number of cores; for so small a model more threads gain nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _batches(task: Task, steps: int, seed: int) -> Iterator[list[Row]]:
    rng = random.Random(f"warm start {seed}")
    count = steps * BATCH
    if task.fresh:
        rows = task.fresh(count, rng.getrandbits(32))
    else:  # a token per character; one row too long for the model would need memory of its length squared
        most = SHAPE["max_position_embeddings"] - 1
        fitting = [row for row in task.train if len(row["prompt"] + task.target(row)) <= most]
        if not fitting:
            raise ConfigError(
                f"model: got no row of task {quote(task.name)} with at most {most} characters, expected one "
                "for 'tiny' to learn from; choose another model, e.g. smollm2"
            )
        rows = rng.choices(fitting, k=count)
    for start in range(0, count, BATCH):
        yield rows[start : start + BATCH]


def _encode(tokenizer: Any, task: Task, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, where causal attention never looks; labels, -100 except on replies."""
    code = tokenizer.get_vocab()
    end = [] if task.stop else [tokenizer.eos_token_id]
    prompts = [[code[character] for character in row["prompt"]] for row in rows]
    replies = [[code[character] for character in task.target(row)] + end for row in rows]
    width = max(len(prompt) + len(reply) for prompt, reply in zip(prompts, replies, strict=True))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        stop = len(prompt) + len(reply)
        ids[row, :stop] = torch.tensor(prompt + reply)
        labels[row, len(prompt) : stop] = torch.tensor(reply)
    return ids, labels
