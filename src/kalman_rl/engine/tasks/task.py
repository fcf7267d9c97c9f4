"""A task: questions to train on, questions kept aside, and a reward for the replies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kalman_rl.checks import is_whole
from kalman_rl.errors import ConfigError, quote

Row = dict[str, Any]
Prompt = str | list[dict[str, Any]]
Reward = Callable[..., list[float | None]]


def plain_prompt(prompt: Prompt) -> Prompt:
    """A prompt without what a table filled in: the messages of a chat have a role and a content."""
    if isinstance(prompt, str):
        return prompt
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


@dataclass(frozen=True)
class Task:
    """Questions with a reward, in the form TRL's trainers take them.

    Args:
        name: short name, used in labels, metrics and cache directories.
        train: rows to sample replies for; each has at least ``prompt`` (a text, or a chat: messages with
            ``role`` and ``content``), ``prompt_id`` (a hash of task and question, so it survives shuffling
            and resuming, or the user's own) and ``answer`` (str), and every other column the reward reads.
        test: rows of the same form; no question of ``train`` occurs here.
        reward: TRL's signature, ``reward(completions, **columns) -> list[float | None]``; every column is a
            list as long as ``completions``; ``None`` is a missing observation, which is not zero.
        max_completion_tokens: longest reply to sample, in tokens, the stop token included.
        stop: texts at which a reply ends; without one only the end-of-sequence token ends it. A perfect reply ends in
            the first of them.
        lead: text between the prompt and the answer in a solved example, e.g. the blank of ``"5 * 9 = 45"``.
        fresh: ``fresh(count, seed)`` draws that many further training rows, for tasks with unlimited
            questions.
        notes: what a reader of the run should know about the data, e.g. merged duplicates.
        ask: how a prompt is put to the model: as it is, or as a chat. The reward sees the row either way.
        warm_start: supervised steps that the tiny model starts with; None = as many as teach the form of the replies.
    """

    name: str
    train: list[Row]
    test: list[Row]
    reward: Reward
    max_completion_tokens: int
    stop: tuple[str, ...] = ()
    lead: str = ""
    fresh: Callable[[int, int], list[Row]] | None = None
    notes: tuple[str, ...] = ()
    ask: Callable[[Prompt], Prompt] = plain_prompt
    warm_start: int | None = None

    @staticmethod
    def correct(reward: float | None) -> bool:
        """Whether a reply with this reward counts as correct: its reward is exactly 1.

        >>> [Task.correct(reward) for reward in (1.0, 0.99, None)]
        [True, False, False]
        """
        return reward == 1.0

    def digest(self) -> str:
        """SHA-256 of all rows, in order, and of the side of the split that each is on."""
        found = hashlib.sha256()
        for side, rows in (("train", self.train), ("test", self.test)):
            for row in rows:
                found.update(f"{side} {spell(row)}\n".encode())
        return found.hexdigest()

    def target(self, row: Row) -> str:
        """Text that a perfect reply to ``row`` consists of, up to and including the stop text."""
        return f"{self.lead}{row['answer']}{''.join(self.stop[:1])}"


def make_prompt_id(task: str, question: str) -> str:
    """Stable key of a question: a hash of its content, never its position.

    >>> make_prompt_id("products", "5 * 9") == make_prompt_id("products", "5 * 9")
    True
    """
    return _digest(f"{task}\0{question}").hex()[:16]


def spell(content: Any) -> str:
    """Content as one text, the same for the same content."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, default=repr)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a person reads it; a chat has one message per line.

    >>> prompt_text([{"role": "user", "content": "2 * 3?"}])
    'user: 2 * 3?'
    """
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def held_out(key: str, share: float) -> bool:
    """Whether a question belongs to the test side, decided by its content alone.

    The same questions are kept aside for every seed, so a warm-started model never saw a test question of any
    run.

    Args:
        key: the question, in one spelling for all questions that give each other's answer away.
        share: part of all questions to keep aside, 0 to 1.
    """
    return int.from_bytes(_digest(key)[:8], "big") < share * 2**64


def first_line(completion: str) -> str:
    """First line of a reply without surrounding blanks: the part that is scored.

    >>> first_line(" 45\\n1 * 6 = 6")
    '45'
    """
    return completion.split("\n", 1)[0].strip()


def take(rows: Sequence[Row], size: int | None, default: int | None, argument: str, task: str) -> list[Row]:
    """First ``size`` rows; with size None at most ``default`` of them (None = all).

    Args: argument, task: how the size and the task are called in errors.

    Raises:
        ConfigError: ``size`` is below 1 or above the number of different questions there are.
    """
    if size is None:
        return list(rows[:default])
    if not is_whole(size, 1, len(rows)):
        raise ConfigError(
            f"{argument}: got {quote(size)}, expected 1 to {len(rows)}; task {quote(task)} has {len(rows)} different "
            "questions on this side of the split; choose fewer"
        )
    return list(rows[:size])


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
