"""Time of the fused objective against the published eager loss and against our own composed one.

    python -m benchmarks.fused [--rounds 15] [--json FILE]

One round runs every candidate once, in an order that rotates; a ratio is taken within its round, and its
median and quartiles over the rounds are shown. The clock is the process's CPU time, since other work on the
machine would stop it anywhere. Every candidate does forward and backward from log-probabilities
(one thread); ours returns its metrics and per-token outputs too. Numbers are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import published_kpo
from kalman_rl.methods import make_method
from kalman_rl.objective import Method, policy_loss
from kalman_rl.rollouts import Rollouts

SHAPES = ((64, 1024), (256, 4096), (512, 8192))
TARGET = 4.0  # times faster than the published loss
Run = Callable[[], Any]


def batch(rows: int, length: int, holes: bool = False) -> tuple[Rollouts, Tensor, Tensor]:
    """Right padding (lengths from T/2 to T), with 20 % holes if asked; log-probabilities; advantages."""
    g = torch.Generator().manual_seed(rows + length)
    old = -torch.rand(rows, length, generator=g)
    logp = old + 0.05 * torch.randn(rows, length, generator=g)
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (rows, 1), generator=g)
    if holes:
        mask &= torch.rand(rows, length, generator=g) < 0.8
    return Rollouts(old, mask), logp, torch.randn(rows, generator=g)


def ours(method: Method, rollouts: Rollouts, logp: Tensor, advantage: Tensor, fused: bool) -> Run:
    def call() -> Tensor:
        leaf = logp.detach().requires_grad_()
        loss = policy_loss(method, rollouts, leaf, advantage=advantage, fused=fused)
        assert loss.metrics["objective/fused"] == fused
        loss.value.backward()
        return leaf.grad

    return call


def published(rollouts: Rollouts, logp: Tensor, advantage: Tensor) -> Run:
    per_token = advantage[:, None].expand_as(logp)

    def call() -> Tensor:
        leaf = logp.detach().requires_grad_()
        value, _ = published_kpo.loss(leaf, rollouts.logp_old, rollouts.mask, per_token)
        value.backward()
        return leaf.grad

    return call


def interleaved(candidates: dict[str, Run], anchor: str, rounds: int, least: float = 0.02) -> dict[str, Any]:
    """Median and quartiles of ``time / time of the anchor`` by candidate, and the anchor's median seconds."""
    repeats = {}
    for name, call in candidates.items():
        call()
        start = time.process_time()
        call()
        repeats[name] = max(1, int(least / (time.process_time() - start)))
    names, ratios, seconds = list(candidates), {name: [] for name in candidates}, []
    for number in range(rounds):
        spent = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.process_time()
            for _ in range(repeats[name]):
                candidates[name]()
            spent[name] = (time.process_time() - start) / repeats[name]
        seconds.append(spent[anchor])
        for name in names:
            ratios[name].append(spent[name] / spent[anchor])
    found = {name: statistics.quantiles(values, n=4, method="inclusive") for name, values in ratios.items()}
    return {"quartiles": found, "anchor_seconds": statistics.median(seconds), "rounds": rounds}


def check(method: Method, rollouts: Rollouts, logp: Tensor, advantage: Tensor) -> None:
    """The fused gradient is the composed one, but for tokens within rounding of a clip bound."""
    fused, composed = (ours(method, rollouts, logp, advantage, f)() for f in (True, False))
    same = (fused == 0) == (composed == 0)
    assert same.float().mean() > 0.999, "another set of tokens lost its gradient"
    torch.testing.assert_close(fused[same], composed[same], rtol=1e-5, atol=1e-12)


def measure(rows: int, length: int, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"rows": rows, "length": length}
    for label, holes in (("padding", False), ("holes", True)):
        rollouts, logp, advantage = batch(rows, length, holes)
        methods = {"kpo": make_method("kpo"), "grpo": make_method("grpo")}
        for method in methods.values():
            check(method, rollouts, logp, advantage)
        candidates = {"published": published(rollouts, logp, advantage)}
        for name, method in methods.items():
            candidates[f"{name} fused"] = ours(method, rollouts, logp, advantage, True)
        if rows * length <= 2**20:
            candidates["kpo composed"] = ours(methods["kpo"], rollouts, logp, advantage, False)
        found[label] = interleaved(candidates, "published", rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(*shape, args.rounds) for shape in SHAPES]
    print("published eager KPO loss / candidate, forward + backward (larger is faster); median [quartiles]")
    for row in rows:
        for label in ("padding", "holes"):
            part = row[label]
            nanoseconds = part["anchor_seconds"] / (row["rows"] * row["length"]) * 1e9
            print(f"({row['rows']}, {row['length']}) {label}: published {nanoseconds:.1f} ns/token")
            for name, (low, median, high) in part["quartiles"].items():
                if name != "published":
                    print(f"    {name:14s} {1 / median:6.2f}x [{1 / high:.2f} {1 / low:.2f}]")
    if args.json:
        context = {"machine": platform.machine(), "load": os.getloadavg(), "torch": torch.__version__}
        args.json.write_text(json.dumps({"context": context, "target": TARGET, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
