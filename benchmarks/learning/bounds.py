"""What two published trust regions do to tokens and to completions: DRPO's bound, VESPO's weight and the length.

DRPO's coefficient on ``A grad pi / mu`` is ``1 - sign(A) (pi - mu) / bound``; a negative one pulls a token back.
VESPO weighs a completion by a function of the product of its ratios, whose logarithm spreads as the root of its length;
the effective share of the completions is ``(sum phi)^2 / (n sum phi^2)``.

    python -m benchmarks.learning.bounds        # a second; writes benchmarks/results/learning/bounds.json
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from kalman_rl.methods import make_method
from kalman_rl.objectives.diagnostics import effective_sample_size, sums_of
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.rollouts import Rollouts

RESULTS = Path(__file__).parents[1] / "results" / "learning" / "bounds.json"
BOUNDS = (12.5, 0.2)
TOKENS, VOCABULARY, DRIFT = 20_000, 50, 0.7
LENGTHS = (16, 64, 256, 1024, 4096)
COMPLETIONS, SPREAD = 20_000, 0.1
"""Ratios of a token: log-normal with mean 1 and this deviation, nats."""


def drpo(bound: float) -> dict[str, float]:
    """Ends of the coefficient, and the share of tokens pulled back, over tokens of a policy that drifted."""
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(TOKENS, VOCABULARY, generator=g, dtype=torch.float64)
    moved = logits + DRIFT * torch.randn(TOKENS, VOCABULARY, generator=g, dtype=torch.float64)
    mu = logits.log_softmax(-1)
    token = mu.exp().multinomial(1, generator=g)
    old, new = (values.gather(-1, token).T for values in (mu, moved.log_softmax(-1)))
    advantage = torch.randint(2, (1, TOKENS), generator=g).double() * 2 - 1
    rollouts = Rollouts(old, torch.ones(1, TOKENS), logp_behaviour=old)
    tokens = policy_loss(make_method("drpo", bound=bound), rollouts, new, advantage=advantage).tokens
    share = tokens.coefficient / tokens.log_weight.exp()
    return {
        "bound": bound,
        "least": share.min().item(),
        "most": share.max().item(),
        "pulled_back": (share < 0).double().mean().item(),
    }


def vespo(length: int) -> dict[str, float]:
    """Mean weight and effective share of completions of one length, half of them with a positive advantage."""
    g = torch.Generator().manual_seed(length)
    centre = -length * SPREAD**2 / 2
    whole = centre + SPREAD * math.sqrt(length) * torch.randn(
        COMPLETIONS, 1, generator=g, dtype=torch.float64
    )
    mask = torch.ones(COMPLETIONS, 1)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(COMPLETIONS // 2)
    # one token that moved as far as the whole completion stands for its product
    loss = policy_loss(make_method("vespo"), Rollouts(torch.zeros_like(whole), mask), whole, advantage=sign)
    phi = loss.tokens.coefficient
    size = effective_sample_size(sums_of(phi, mask.bool()))
    return {"length": length, "mean_weight": phi.mean().item(), "effective_share": size.item()}


def measured() -> dict[str, list[dict[str, float]]]:
    """Both tables."""
    return {"drpo": [drpo(bound) for bound in BOUNDS], "vespo": [vespo(length) for length in LENGTHS]}


def main() -> None:
    """Print the tables and write them down."""
    found = measured()
    for name, rows in found.items():
        print(f"{name}: {', '.join(rows[0])}")
        for row in rows:
            print("  " + "  ".join(f"{value:10.4g}" for value in row.values()))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
