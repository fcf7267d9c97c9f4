"""Sorting random digits: a task small enough for a character model on one CPU core.

``sort12`` and ``sort16`` ask for one length, so all their questions are about as hard. ``sort_mixed`` asks for
4 to 24 digits: after the warm start short ones are mostly right and long ones hardly ever, as in the pools of
real training data. ``sort_spread`` goes further: its warm start hardly ever sees more than 7 digits, so that short
questions are solved, long ones hopeless, and few in between. ``sort_peel`` has long replies: 10 to 16 digits in order,
and again without the first, until one is left.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kalman_rl.checks import is_whole
from kalman_rl.engine.tasks.task import Row, Task, held_out, make_prompt_id
from kalman_rl.errors import ConfigError, quote

TEST_SHARE = 1 / 16
DEFAULT_TRAIN, DEFAULT_TEST = 4096, 256
EASY, RARER = 7, 0.1
WARM_START, PEEL_WARM_START = 350, 400


def sorting(
    digits: int, *, seed: int = 0, train_size: int | None = None, test_size: int | None = None
) -> Task:
    """Digits in, the same digits in ascending order out: ``"730184962503>"`` to ``"001233456789"``.

    Args:
        digits: how many digits to sort; there are ``10**digits`` questions.
        seed: which questions are drawn; the split does not depend on it.
        train_size: training rows, 4096 when None.
        test_size: test rows, 256 when None.

    Raises: ConfigError for fewer than 8 digits or a size below 1.
    """
    if not is_whole(digits, 8):
        raise ConfigError(
            f"digits: got {quote(digits)}, expected at least 8; with fewer the questions soon run out"
        )
    return _sorting(f"sort{digits}", range(digits, digits + 1), seed, train_size, test_size)


def sorting_mixed(*, seed: int = 0, train_size: int | None = None, test_size: int | None = None) -> Task:
    """Sorting of 4 to 24 digits, every length equally often: a pool with a wide spread of difficulty.

    Args: as in :func:`sorting`.
    """
    return _sorting("sort_mixed", range(4, 25), seed, train_size, test_size)


def sorting_spread(*, seed: int = 0, train_size: int | None = None, test_size: int | None = None) -> Task:
    """Sorting of 4 to 14 digits, every length equally often: a pool of solved and hopeless questions.

    In the warm start each digit beyond the seventh is ten times rarer. After it the tiny model is right about 0.95 of
    the time up to 8 digits, 0.6 with 9 and 10, 0.06 with more.

    Args: as in :func:`sorting`.
    """
    lengths = range(4, 15)
    weights = [RARER ** max(digits - EASY, 0) for digits in lengths]
    task = _sorting("sort_spread", lengths, seed, train_size, test_size, weights)
    return replace(task, warm_start=WARM_START)


def sorting_peeled(*, seed: int = 0, train_size: int | None = None, test_size: int | None = None) -> Task:
    """Sorting of 10 to 16 digits with long replies, 65 to 152 tokens: ``"3120>"`` would be ``"0123 123 23 3"``.

    Args: as in :func:`sorting`.
    """
    lengths = range(10, 17)
    task = _sorting("sort_peel", lengths, seed, train_size, test_size, reply=peeled)
    longest = len(peeled("0" * lengths[-1])) + 1
    return replace(task, warm_start=PEEL_WARM_START, max_completion_tokens=longest)


def in_order(question: str) -> str:
    """The digits in ascending order."""
    return "".join(sorted(question))


def peeled(question: str) -> str:
    """The digits in ascending order, and again without the first, until one is left.

    >>> peeled("3120")
    '0123 123 23 3'
    """
    row = in_order(question)
    return " ".join(row[i:] for i in range(len(row)))


def _sorting(
    name: str,
    lengths: range,
    seed: int,
    train_size: int | None,
    test_size: int | None,
    weights: list[float] | None = None,
    reply: Callable[[str], str] = in_order,
) -> Task:
    for argument, size in {"train_size": train_size, "test_size": test_size}.items():
        if size is not None and not is_whole(size, 1):
            raise ConfigError(f"{argument}: got {quote(size)}, expected at least 1; task {quote(name)}")

    def fresh(count: int, seed: int) -> list[Row]:
        return _draw(name, lengths, count, f"train {seed}", test=False, reply=reply, weights=weights)

    return Task(
        name=name,
        train=_draw(name, lengths, train_size or DEFAULT_TRAIN, f"train {seed}", test=False, reply=reply),
        test=_draw(name, lengths, test_size or DEFAULT_TEST, f"test {seed}", test=True, reply=reply),
        reward=exact_reply,
        max_completion_tokens=lengths[-1] + 1,
        fresh=fresh,
    )


def exact_reply(completions: list[str], answer: list[str], **columns: Any) -> list[float | None]:
    """Reward 1 when the whole reply equals the answer, else 0."""
    return [float(reply == right) for reply, right in zip(completions, answer, strict=True)]


def _draw(
    name: str,
    lengths: range,
    count: int,
    stream: str,
    *,
    test: bool,
    reply: Callable[[str], str],
    weights: list[float] | None = None,
) -> list[Row]:
    rng = random.Random(f"{name} {stream}")
    questions: dict[str, None] = {}
    while len(questions) < count:
        if weights is not None:
            digits = rng.choices(lengths, weights)[0]
        else:
            digits = lengths[0] if len(lengths) == 1 else rng.choice(lengths)
        question = "".join(rng.choices("0123456789", k=digits))
        if held_out(question, TEST_SHARE) is test:
            questions[question] = None
    return [
        {
            "prompt": f"{question}>",
            "prompt_id": make_prompt_id(name, question),
            "answer": reply(question),
        }
        for question in questions
    ]
