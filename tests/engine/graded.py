"""A reward with differences, so that weights move and bitwise equality says something; its worker imports no more."""

from __future__ import annotations

from typing import Any

GRADED: dict[str, Any] = {"reward": "tests.engine.graded:digits", "learning_rate": 1e-2}


def digits(completions: list[str], **columns: Any) -> list[float]:
    return [sum(letter.isdigit() for letter in text) / 5 for text in completions]


def length(completions: list[str], **columns: Any) -> list[float]:
    return [len(text) / 5 for text in completions]
