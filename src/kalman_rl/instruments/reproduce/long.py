"""A start policy that writes long replies: digits in order, then again without the first, until one is left."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from kalman_rl.engine.models.load import Progress, load_model
from kalman_rl.engine.tasks.sorting import exact_reply
from kalman_rl.engine.tasks.task import Row, Task, make_prompt_id
from kalman_rl.instruments.reproduce.policy import CausalPolicy
from kalman_rl.instruments.reproduce.pool import Limits, World

NAME, LENGTHS = "sort_peel", range(10, 17)
LONGEST = sum(range(1, LENGTHS[-1] + 1)) + LENGTHS[-1]
"""Tokens of the longest reply, separators and end included."""
WARM_START, BANK = 400, 3000


def long_world(cache: Path, progress: Progress) -> World:
    """The tiny model after its warm start, and a bank of questions it was not taught on."""
    loaded = load_model("tiny", cache=cache, task=peeling(), progress=progress)
    policy = CausalPolicy(loaded.model, loaded.tokenizer, end=loaded.tokenizer.eos_token_id, longest=LONGEST)
    bank = questions(BANK, "bank")
    success = torch.cat([policy.success(bank[i : i + 250]) for i in range(0, len(bank), 250)])
    return World(policy, policy.state(), bank, success, Limits(between=(0.05, 0.9)))


def peeling() -> Task:
    """Sorting 10 to 16 digits, and peeling the sorted row: ``"3120"`` to ``"0123 123 23 3"``."""
    return Task(
        name=NAME,
        train=questions(64, "train"),
        test=questions(64, "test"),
        reward=exact_reply,
        max_completion_tokens=LONGEST,
        fresh=lambda count, seed: questions(count, f"train {seed}"),
        warm_start=WARM_START,
    )


def peeled(question: str) -> str:
    """The whole reply.

    >>> peeled("3120")
    '0123 123 23 3'
    """
    row = "".join(sorted(question))
    return " ".join(row[i:] for i in range(len(row)))


def questions(count: int, stream: str) -> list[Row]:
    """``count`` different questions, every length equally often."""
    rng = random.Random(f"{NAME} {stream}")
    found: dict[str, Row] = {}
    while len(found) < count:
        question = "".join(rng.choices("0123456789", k=rng.choice(LENGTHS)))
        found[question] = {
            "prompt": f"{question}>",
            "prompt_id": make_prompt_id(NAME, question),
            "answer": peeled(question),
        }
    return list(found.values())
