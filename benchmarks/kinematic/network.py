"""Many small networks at once: a first layer, a GRU over the tokens, three decisions (short, none, long)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kinematic.controls import CHANNELS, SIZE, TOKENS, Control

HIDDEN, BATCH, AVERSION = 12, 32, 2.0
RATES = (3e-3, 1e-2, 3e-2)
DECISIONS = (-1.0, 0.0, 1.0)


class Network(NamedTuple):
    """Parameters of S networks; ``layer`` (S, SIZE, D) comes first and is learned in some of them only."""

    layer: Tensor
    shown: Tensor  # (S, 3 HIDDEN, CHANNELS)
    kept: Tensor  # (S, 3 HIDDEN, HIDDEN)
    bias: Tensor  # (S, 3 HIDDEN)
    out: Tensor  # (S, 3, HIDDEN)
    out_bias: Tensor  # (S, 3)


def utility(move: Tensor, cost: float) -> Tensor:
    """``u(a move - cost |a|)`` for the three decisions (..., 3); a loss counts AVERSION times, none is 0."""
    payoff = move[..., None] * move.new_tensor(DECISIONS) - cost * move.new_tensor(DECISIONS).abs()
    return torch.where(payoff < 0, AVERSION * payoff, payoff)


def begun(
    controls: Sequence[Control], inputs: Tensor, generators: Sequence[torch.Generator]
) -> tuple[Network, Tensor]:
    """One network per control, and whether its layer is learned (S,).

    Each channel of the first layer's output is scaled to a root mean square of 1 on its inputs (S, N, D).
    """
    made, width = [], inputs.shape[-1]
    for control, generator, shown in zip(controls, generators, inputs):

        def draw(*size: int, fan: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*size, generator=generator) / math.sqrt(fan)

        layer = draw(SIZE, width, fan=width) if control.drawn else control.layer.float()
        channels = (shown @ layer.T).reshape(-1, TOKENS, CHANNELS)
        size = channels.square().mean((0, 1)).sqrt()
        scale = torch.where(size > 0, 1 / size, 0.0).repeat(TOKENS)
        made.append(
            Network(
                layer * scale[:, None],
                draw(3 * HIDDEN, CHANNELS, fan=CHANNELS),
                draw(3 * HIDDEN, HIDDEN, fan=HIDDEN),
                torch.zeros(3 * HIDDEN),
                draw(3, HIDDEN, fan=HIDDEN),
                torch.zeros(3),
            )
        )
    return Network(*(torch.stack(part) for part in zip(*made))), torch.tensor([c.learned for c in controls])


def policy(network: Network, inputs: Tensor) -> Tensor:
    """Probabilities (S, N, 3) of the decisions for inputs (S, N, D)."""
    tokens = (inputs @ network.layer.mT).reshape(*inputs.shape[:2], TOKENS, CHANNELS)
    shown = torch.einsum("sntc,shc->tsnh", tokens, network.shown) + network.bias[:, None]
    state = inputs.new_zeros(*inputs.shape[:2], HIDDEN)
    for now in shown:
        kept = state @ network.kept.mT
        reset, keep = (now + kept)[..., : 2 * HIDDEN].sigmoid().chunk(2, -1)
        new = (now[..., 2 * HIDDEN :] + reset * kept[..., 2 * HIDDEN :]).tanh()
        state = keep * state + (1 - keep) * new
    return (state @ network.out.mT + network.out_bias[:, None]).softmax(-1)


def trained(
    controls: Sequence[Control],
    inputs: Tensor,
    utilities: Tensor,
    seeds: Sequence[int],
    rates: Sequence[float],
    *,
    steps: int,
    every: int = 20,
) -> Network:
    """S networks, each on its own data; the best of its steps by the last quarter of its data, which it never saw.

    Args:
        inputs: (S, N, D). utilities: (S, N, 3) of the decisions. rates: S learning rates, of Adam.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    network, learned = begun(controls, inputs, generators)
    parts = [part.clone().requires_grad_() for part in network]
    speed = [_like(torch.tensor(rates), part) for part in parts]
    speed[0] = speed[0] * _like(learned.float(), parts[0])
    first, second = ([torch.zeros_like(part) for part in network] for _ in range(2))
    count = inputs.shape[1] * 3 // 4
    best, top = Network(*(part.detach().clone() for part in parts)), torch.full((len(seeds),), -math.inf)
    rows = torch.arange(len(seeds))[:, None]
    for step in range(1, steps + 1):
        batch = torch.stack([torch.randint(count, (BATCH,), generator=g) for g in generators])
        chosen = policy(Network(*parts), inputs[rows, batch])
        loss = -(chosen * utilities[rows, batch]).sum(-1).mean(1).sum()
        gradients = torch.autograd.grad(loss, parts)
        with torch.no_grad():
            for part, gradient, mean, square, rate in zip(parts, gradients, first, second, speed):
                mean.lerp_(gradient, 0.1)
                square.lerp_(gradient**2, 0.01)
                deviation = (square / (1 - 0.99**step)).sqrt() + 1e-8
                part -= rate * mean / (1 - 0.9**step) / deviation
        if step % every == 0:
            with torch.no_grad():
                held = policy(Network(*parts), inputs[:, count:])
                score = (held * utilities[:, count:]).sum(-1).mean(1)
                better = score > top
                top = torch.where(better, score, top)
                for old, new in zip(best, parts):
                    old[better] = new[better].detach()
    return best


def _like(values: Tensor, part: Tensor) -> Tensor:
    """(S,) for the axes of a parameter."""
    return values.reshape(-1, *[1] * (part.ndim - 1))


@torch.no_grad()
def decisions(network: Network, inputs: Tensor, chunk: int = 2048) -> Tensor:
    """The likeliest decision (S, N) in {-1, 0, 1}, how sure it is of acting, and on which side it would act (-1, 1)."""
    found = torch.cat([policy(network, part) for part in inputs.split(chunk, 1)], 1)
    short, long = found[..., 0], found[..., 2]
    side = torch.where(long >= short, 1.0, -1.0)
    return torch.stack((found.argmax(-1) - 1.0, torch.maximum(short, long), side))
