"""Which filter is closest to the true log-ratio? A simulation, and what learning the noises costs.

Token log-ratios are a smooth latent (a start and a slow random walk), plus noise that grows with 1 - p, plus
spikes on some tokens. The error is the root mean square distance of the filtered log-ratio to the latent, so
this is the world that the filters assume; it says nothing about training. Two ratios of Q to R, with and
without spikes. Filters that learn have seen ten other batches of the same kind. The start P0 = R of
kpo_robust was chosen on seeds 0 to 23; the numbers are from seeds 100 to 123.

    python -m benchmarks.learning.ratio_filters          # about 20 seconds on one core

Writes benchmarks/results/learning/ratio_filters.json.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from kalman_rl.methods import make_method
from kalman_rl.objectives.protocol import Learns
from kalman_rl.objectives.ratio.learned import AutoFiltered
from kalman_rl.objectives.ratio.robust import RobustFiltered
from kalman_rl.objectives.ratio.token_noise import NoiseFiltered, NoiseModel
from kalman_rl.objectives.ratio.transforms import KalmanFiltered
from kalman_rl.objectives.rollouts import Rollouts

SEEDS, ROWS, LENGTH, PAST = range(100, 124), 32, 128, 10
FLOOR, SCALE, START = 4e-4, 0.04, 0.1  # nats^2, nats^2, standard deviation of the first log-ratio
WORLDS = {
    "slow": {"step": 1e-3, "spikes": 0.0},
    "slow, spikes": {"step": 1e-3, "spikes": 0.02},
    "fast": {"step": 2e-2, "spikes": 0.0},
    "fast, spikes": {"step": 2e-2, "spikes": 0.02},
}


def simulate(seed: int, step: float, spikes: float) -> tuple[Tensor, Tensor, Rollouts]:
    """Latent, log-probabilities and rollouts (ROWS, LENGTH), ragged from a quarter of the length."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    latent = START * normal(ROWS, 1) + step * normal(ROWS, LENGTH).cumsum(1)
    old = torch.log(torch.rand(ROWS, LENGTH, generator=g, dtype=torch.float64).clamp(min=1e-3) ** 0.5)
    noise = NoiseModel(FLOOR, SCALE).variance(old).sqrt() * normal(ROWS, LENGTH)
    hit = torch.rand(ROWS, LENGTH, generator=g) < spikes
    length = torch.randint(LENGTH // 4, LENGTH + 1, (ROWS, 1), generator=g)
    mask = torch.arange(LENGTH)[None] < length
    return latent, old + latent + noise + hit * 2.0 * normal(ROWS, LENGTH), Rollouts(old, mask)


def filters(world: dict[str, float]) -> dict[str, Any]:
    """The methods' own ratios, and controls that know what a user cannot: Q, the noise model, the mean R."""
    mean = FLOOR + SCALE * float(((1 - np.sqrt(np.linspace(1e-3, 1, 10_000))) ** 2).mean())
    q = world["step"] ** 2
    return {
        **{n: make_method(n).ratio for n in ("grpo", "gspo", "kpo", "kpo_diffuse", "kpo_auto")},
        "kpo_noise": make_method("kpo_noise").ratio,
        "kpo_robust": make_method("kpo_robust").ratio,
        "kpo_robust, diffuse": RobustFiltered(initial_variance=math.inf),
        "kpo_robust, Q/R = 1e-2": RobustFiltered(1e-2, 1.0),
        "P0 = R without the gate": KalmanFiltered(1e-6, 1.0, 1.0),
        "told: Q and mean R": KalmanFiltered(q, mean, math.inf),
        "told: Q and R_t": NoiseFiltered(FLOOR, SCALE, q),
    }


def learned(part: Any, world: dict[str, float], seed: int) -> Any:
    """The transform after PAST batches of the same world, none of them the one to be judged."""
    if not isinstance(part, Learns):
        return part
    state = part.initial()
    for past in range(PAST):
        _, logp, rollouts = simulate(10_000 + seed * PAST + past, **world)
        state = part.memory * state + part.statistics(logp, rollouts)
    return part.fitted(state)


def errors(name: str, world: dict[str, float]) -> list[float]:
    """RMSE in nats for every seed."""
    part, out = filters(world)[name], []
    for seed in SEEDS:
        latent, logp, rollouts = simulate(seed, **world)
        weight = learned(part, world, seed)(logp, rollouts).log_weight
        out.append((weight - latent)[rollouts.mask].square().mean().sqrt().item())
    return out


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval over seeds."""
    mean, half = float(np.mean(values)), scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, len(values) - 1)
    return mean, float(mean - half), float(mean + half)


def milliseconds(call: Callable[[], Any], repeats: int = 9) -> float:
    """Median wall time."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[repeats // 2]


def costs(rows: int, length: int) -> dict[str, float]:
    """Milliseconds on one thread; the unit of comparison is one plain filter, diffuse start, no holes."""
    g = torch.Generator().manual_seed(0)
    old = torch.rand(rows, length, generator=g).clamp(min=1e-3).log()
    mask = torch.arange(length)[None] < torch.randint(length // 4, length + 1, (rows, 1), generator=g)
    spikes = 3.0 * (torch.rand(rows, length, generator=g) < 0.02)
    logp, rollouts = old + 0.1 * torch.randn(rows, length, generator=g) + spikes, Rollouts(old, mask)
    parts = {
        "kpo_diffuse": KalmanFiltered(1e-4, 0.01, math.inf),
        "kpo_noise": NoiseFiltered(4e-4, 0.04, 1e-4),
        "kpo_robust": RobustFiltered(1e-4, 0.01, 0.01),
    }
    row = {name: milliseconds(lambda part=part: part(logp, rollouts)) for name, part in parts.items()}
    for name, part in (("auto", AutoFiltered()), ("robust", RobustFiltered())):
        row[f"kpo_{name} statistics"] = milliseconds(lambda part=part: part.statistics(logp, rollouts))
    state = AutoFiltered().statistics(logp, rollouts)
    row["kpo_auto settle"] = milliseconds(lambda: AutoFiltered().fitted(state))
    return row


def main() -> None:
    torch.set_num_threads(1)
    result: dict[str, Any] = {"seeds": len(SEEDS), "rmse": {}, "learned": {}}
    print(f"RMSE to the latent log-ratio, 1e-3 nats: mean and 95 % interval over {len(SEEDS)} seeds")
    print(f"{'':28}" + "".join(f"{name:>22}" for name in WORLDS))
    for name in filters(WORLDS["slow"]):
        line = f"{name:28}"
        for world, values in WORLDS.items():
            mean, low, high = interval(errors(name, values))
            result["rmse"].setdefault(world, {})[name] = {"mean": mean, "low": low, "high": high}
            line += f"{1e3 * mean:8.1f} ({1e3 * low:5.1f}-{1e3 * high:5.1f})"
        print(line)
    for world, values in WORLDS.items():
        parts = filters(values)
        auto, robust = (learned(parts[name], values, 0) for name in ("kpo_auto", "kpo_robust"))
        result["learned"][world] = {
            "auto Q/R": auto.process_noise / auto.observation_noise,
            "auto R": auto.observation_noise,
            "robust R": robust.observation_noise,
        }
    result["milliseconds, one thread"] = {f"64 x {t}": costs(64, t) for t in (256, 1024)}
    print(json.dumps({k: result[k] for k in ("learned", "milliseconds, one thread")}, indent=1))
    path = Path(__file__).parents[1] / "results" / "learning" / "ratio_filters.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
