"""May a stream draw one prompt several times in a batch? A logistic policy, exact success rates, paired seeds.

Prompt i has features x_i in R^49 and succeeds with p_i = sigmoid(base_i + x_i w + u_i): w is shared (what is learned of
one prompt helps others), u_i its own. Each step draws a batch by ``0.9 v / sum v + 0.1 / N``, v = E[p (1 - p)] under
``make_belief("auto")``, samples one completion a draw, and follows the policy gradient with tracked advantages. The
table gives mean accuracy over the run, up to 32 draws of a prompt minus one, with 95 % intervals over the seeds. One
learning rate for all: 1.0, chosen on seeds 0 to 7 because accuracy then ends below 1 in every pool (of 6.0 and 1.0).

Run ``python -m benchmarks.learning.concentrate``; a few minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from scipy.stats import t
from torch import Tensor

from kalman_rl.beliefs import make_belief
from kalman_rl.sampling.stream import PromptStream

RESULTS = Path(__file__).parents[1] / "results" / "learning" / "concentrate.json"
POOLS = {"40 / 30 / 30": (102, 77, 77), "60 / 10 / 30": (154, 25, 77), "85 / 5 / 10": (218, 12, 26)}
"""Hopeless, teaching and solved prompts of 256."""
COMPLETIONS, WIDTH, RATE = 8192, 48, 1.0


def start(pool: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits (N,) at the start and features (N, WIDTH + 1); the last feature is common to all."""
    hopeless, between, solved = (torch.rand(n, generator=generator, dtype=torch.float64) for n in pool)
    base = torch.cat((-4.5 - 2 * hopeless, torch.logit(0.03 + 0.92 * between), 4 + solved))
    x = torch.randn(len(base), WIDTH, generator=generator, dtype=torch.float64) / math.sqrt(WIDTH)
    return base, torch.cat((x, torch.full((len(base), 1), 0.5, dtype=torch.float64)), 1)


def run(pool: tuple[int, int, int], batch: int, most: int, seed: int) -> float:
    """Mean accuracy over the run."""
    generator = torch.Generator().manual_seed(seed)
    base, x = start(pool, generator)
    shared, own = torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros_like(base)
    belief = make_belief("auto")
    stream = PromptStream(belief, range(len(base)), batch, most=most, seed=seed)
    accuracy = []
    for step in range(COMPLETIONS // batch):
        p = torch.sigmoid(base + x @ shared + own)
        accuracy.append(p.mean().item())
        place = stream.draw(step=step).place
        reward = (torch.rand(batch, generator=generator, dtype=torch.float64) < p[place]).double()
        names = place.tolist()
        advantage = belief.advantages(names, reward, step=step).advantage
        belief.update(names, reward, step=step)
        gradient = RATE * advantage * (reward - p[place]) / 64
        shared = shared + gradient @ x[place]
        own = own.index_add(0, place, 0.5 * gradient)
    return sum(accuracy) / len(accuracy)


def compare(seeds: range) -> list[dict[str, object]]:
    """One row per pool and batch size: accuracy with one draw, the gain of up to 32, half its interval."""
    rows: list[dict[str, object]] = []
    for name, pool in POOLS.items():
        for batch in (64, 128):
            pairs = torch.tensor([[run(pool, batch, most, seed) for most in (1, 32)] for seed in seeds])
            gain = pairs[:, 1] - pairs[:, 0]
            half = float(t.ppf(0.975, len(seeds) - 1)) * gain.std().item() / math.sqrt(len(seeds))
            rows.append(
                {
                    "pool": name,
                    "batch": batch,
                    "one": round(pairs[:, 0].mean().item(), 4),
                    "gain": round(gain.mean().item(), 4),
                    "interval": round(half, 4),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = compare(range(args.first_seed, args.first_seed + args.seeds))
    RESULTS.write_text(json.dumps({"seeds": [args.first_seed, args.seeds], "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
