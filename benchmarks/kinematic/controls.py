"""Seven ways to show a window to the same network, each a linear layer from it to TOKENS x CHANNELS numbers.

For a fixed q / R on a regular grid kinematic tokens are a linear map B of the window, so they add no information. What
a network gains from them is a prior, and the controls say how much of it another layer gives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl.kinematic import KinematicTokenizer

WINDOW = 16
TOKENS, CHANNELS = WINDOW - 1, 4
SIZE = TOKENS * CHANNELS


class Control(NamedTuple):
    """A first layer (SIZE, inputs): frozen, or learned from this start; ``drawn`` draws the start by chance instead."""

    title: str
    layer: Tensor
    learned: bool = False
    drawn: bool = False


def controls(noise_ratio: float) -> dict[str, Control]:
    """By letter, as the text of the benchmark names them."""
    tokens = flat(made(noise_ratio, lag=None).matrix(WINDOW))
    nothing = torch.zeros_like(tokens)
    return {
        "a": Control("raw window, layer learned", nothing, learned=True, drawn=True),
        "b": Control("kinematic tokens, frozen", tokens),
        "c": Control("layer begun at the tokens, learned", tokens, learned=True),
        "d": Control("finite differences", flat(differences())),
        "e": Control("moving averages", flat(averages())),
        "f": Control("causal filter (x, v)", flat(filtered(noise_ratio))),
        "g": Control("random projection, frozen", nothing, drawn=True),
    }


def made(noise_ratio: float, lag: int | None) -> KinematicTokenizer:
    """A tokenizer with everything given; the scale of the inputs is set on the training data."""
    names = ("x", "v") if lag == 0 else ("x", "v", "a", "j")
    return KinematicTokenizer(2, noise_ratio, lag, names, noise=1.0, normalise=False)


def flat(parts: Tensor) -> Tensor:
    """(TOKENS, <= CHANNELS, WINDOW) as a layer (SIZE, WINDOW); absent channels are 0."""
    out = torch.zeros(TOKENS, CHANNELS, WINDOW, dtype=torch.float64)
    out[:, : parts.shape[1]] = parts
    return out.reshape(SIZE, WINDOW)


def differences() -> Tensor:
    """The value and its first, second and third difference, those that the window has."""
    unit = torch.eye(WINDOW, dtype=torch.float64)
    parts = torch.zeros(TOKENS, CHANNELS, WINDOW, dtype=torch.float64)
    difference = unit
    for k in range(CHANNELS):
        ends = difference[max(1 - k, 0) :]  # the last TOKENS of them, or all
        parts[TOKENS - len(ends) :, k] = ends
        difference = difference.diff(dim=0)
    return parts


def averages() -> Tensor:
    """Means of the last 1, 2, 4 and 8 values."""
    parts = torch.zeros(TOKENS, CHANNELS, WINDOW, dtype=torch.float64)
    for token in range(TOKENS):
        for k in range(CHANNELS):
            first = max(token + 2 - 2**k, 0)
            parts[token, k, first : token + 2] = 1 / (token + 2 - first)
    return parts


def filtered(noise_ratio: float) -> Tensor:
    """Position and velocity that the filter knows at each time."""
    return made(noise_ratio, lag=0).matrix(WINDOW)[1:]
