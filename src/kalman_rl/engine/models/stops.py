"""How replies end: at the model's own end, at tokens that hold a stop text, at stop texts of several tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from kalman_rl.errors import ConfigError

ENDING = 4
"""Tokens that a character may take, at most."""


@dataclass(frozen=True)
class StopTexts:
    """Texts of more than one character at which a reply ends, wherever its tokens begin.

    Args: texts: one or more. tokenizer: reads tokens as text.
    """

    texts: tuple[str, ...]
    tokenizer: Any

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the last tokens of a reply hold a stop text."""
        reach = ENDING * (1 + max(map(len, self.texts)))
        text = self.tokenizer.decode(list(tokens[-reach:]))
        return any(stop in text for stop in self.texts)

    def cut(self, tokens: list[int]) -> list[int]:
        """A reply up to and with the token that completes the first stop text in it."""
        whole = self.tokenizer.decode(tokens)
        if not any(stop in whole for stop in self.texts):
            return tokens
        return next(
            (tokens[:n] for n in range(1, len(tokens) + 1) if self.ends(tokens[:n])),
            tokens,
        )

    def watch(self, model: Any) -> None:
        """Let ``model.generate`` end a reply there; what follows in its row is padding, for :meth:`cut`."""
        generate = model.generate

        def stopping(*args: Any, input_ids: Tensor, stopping_criteria: Any = None, **options: Any) -> Any:
            criteria = [*(stopping_criteria or []), _AtStop(self, input_ids.shape[1])]
            return generate(*args, input_ids=input_ids, stopping_criteria=criteria, **options)

        model.generate = stopping


class _AtStop(StoppingCriteria):
    """Replies that begin at a place of their rows and end in a stop text."""

    def __init__(self, stops: StopTexts, start: int) -> None:
        self.stops, self.start = stops, start

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        ended = [self.stops.ends(row) for row in input_ids[:, self.start :].tolist()]
        return torch.tensor(ended, device=input_ids.device)


def end_replies(model: Any, tokenizer: Any, stop: Sequence[str]) -> tuple[list[int], StopTexts | None]:
    """Makes every way a reply may end known to the model, and pads on the left.

    A stop text of one character ends a reply at any token that holds it. Longer ones are watched for.

    Returns: the tokens, and the longer texts.
    Raises: ConfigError without an end-of-sequence token.
    """
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is None:
        if not ends:
            raise ConfigError(
                "tokenizer: got no end-of-sequence token, expected one; set eos_token in its config"
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    stops = [token for text in stop if len(text) == 1 for token in stop_tokens(tokenizer, text)]
    set_ends(model, tokenizer, [tokenizer.eos_token_id, *ends, *stops])
    longer = tuple(text for text in stop if len(text) > 1)
    watched = StopTexts(longer, tokenizer) if longer else None
    if watched is not None:
        watched.watch(model)
    return stops, watched


def set_ends(model: Any, tokenizer: Any, ends: list[int]) -> None:
    """Write the tokens that end a reply, and the tokenizer's special tokens, into the model's settings."""
    model.generation_config.eos_token_id = list(dict.fromkeys(ends))
    model.generation_config.bos_token_id = model.config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id


def stop_tokens(tokenizer: Any, stop: str) -> list[int]:
    """Ids of all ordinary tokens whose text contains ``stop``.

    A vocabulary has many tokens with a newline (two newlines, a newline with an indent), and each of them
    ends a line.
    """
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    special = set(tokenizer.all_special_ids)
    return [index for index, text in enumerate(texts) if stop in text and index not in special]
