"""Which prompts of a pool to draw: the stream and rules that take the best, at equal budget.

    python -m benchmarks.beliefs.selection         # 20 worlds, about two minutes; writes selection.json, selection.md

64 draws a step among 2048 prompts, 8 completions a draw, 96 steps, enough for three passes. Every logit is
N(center, 5^2) and walks; all rules read the same Beta belief. Rules that take the best, Thompson draws among them, are
our own short ones; the oracle knows every p.

- ``signal``: mean 4 p (1 - p) of what was drawn.
- ``cover``: share of the pool that was ever drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.beliefs.command import study
from benchmarks.intervals import over_seeds, stored, text
from kalman_rl.beliefs.beta import BetaBelief
from kalman_rl.sampling.learnability import read_signal
from kalman_rl.sampling.stream import PromptStream


@dataclass(frozen=True)
class Bank:
    """2048 prompts with logit ~ N(center, 5^2) that walk ``walk`` per pass over the pool (32 steps)."""

    walk: float = 0.3
    center: float = 0.0
    prompts: int = 2048
    count: int = 64
    group: int = 8
    steps: int = 96
    spread: float = 5.0

    @property
    def name(self) -> str:
        return f"mean logit {self.center:g}, walk {self.walk:g}"


BANKS = (Bank(), Bank(walk=1.0), Bank(center=-4.0))
STREAMS = {
    "uniform": {"power": 0.0},
    "stream": {},
    "stream, power 2": {"power": 2.0},
    "SAGE's score": {"score": "sage"},
}
RULES = (*STREAMS, "Thompson", "upper bound", "greedy", "oracle")


def play(rule: str, bank: Bank, seed: int) -> tuple[float, float]:
    """``signal`` and ``cover`` of one world."""
    rng = np.random.default_rng([seed, 9])
    logit = bank.center + bank.spread * rng.normal(size=bank.prompts)
    belief = BetaBelief(scale=False)
    stream = PromptStream(belief, range(bank.prompts), bank.count, seed=seed, **STREAMS.get(rule, {}))
    signal, seen = [], np.zeros(bank.prompts, dtype=bool)
    for step in range(bank.steps):
        logit = logit + bank.walk * np.sqrt(bank.count / bank.prompts) * rng.normal(size=bank.prompts)
        p = 1 / (1 + np.exp(-logit))
        if rule in STREAMS:
            ids = stream.draw(step=step).place.numpy()
        else:
            score = p * (1 - p) if rule == "oracle" else _scores(rule, belief, bank, step, rng)
            ids = np.argsort(-score, kind="stable")[: bank.count]
        reward = torch.from_numpy((rng.random((bank.count, bank.group)) < p[ids, None]).astype(float).ravel())
        belief.update(np.repeat(ids, bank.group).tolist(), reward, step=step)
        signal.append(float((4 * p[ids] * (1 - p[ids])).mean()))
        seen[ids] = True
    return float(np.mean(signal)), float(seen.mean())


def _scores(rule: str, belief: BetaBelief, bank: Bank, step: int, rng: np.random.Generator) -> np.ndarray:
    """p (1 - p): its mean, at a draw of p, or the largest that one standard deviation of p towards 1/2 allows."""
    read = read_signal(belief, range(bank.prompts), step=step)
    assert read.a is not None and read.b is not None
    a, b = read.a.numpy(), read.b.numpy()
    if rule == "greedy":
        return read.variance.numpy()
    if rule == "Thompson":
        p = rng.beta(a, b)
    else:
        mean = a / (a + b)
        width = np.sqrt(mean * (1 - mean) / (a + b + 1))
        p = np.clip(0.5, mean - width, mean + width)
    return p * (1 - p)


def measure(seeds: Sequence[int], banks: Sequence[Bank] = BANKS) -> list[dict[str, Any]]:
    """A row for each bank and rule: mean and half of the 95 % interval over worlds."""
    rows: list[dict[str, Any]] = []
    for bank in banks:
        for rule in RULES:
            signal, cover = zip(*(play(rule, bank, seed) for seed in seeds))
            found = {
                name: list(over_seeds(np.array(values)))
                for name, values in (("signal", signal), ("cover", cover))
            }
            rows.append({"bank": bank.name, "rule": rule, **found})
    return rows


def render(rows: Sequence[dict[str, Any]], command: str, worlds: int) -> str:
    """Tables as Markdown."""
    head = "\n\n".join((__doc__ or "").strip().split("\n\n")[2:])
    lines = ["# Which prompts to draw", "", head, ""]
    for bank in dict.fromkeys(row["bank"] for row in rows):
        lines += [f"## {bank}", "", "| rule | signal | cover |", "|---|---|---|"]
        lines += [
            f"| {row['rule']} | {text(stored(row['signal']), 3)} | {text(stored(row['cover']))} |"
            for row in rows
            if row["bank"] == bank
        ]
        lines.append("")
    return "\n".join([*lines, f"`{command}`, {worlds} worlds, 95 % intervals over worlds."]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return study("selection", measure, render, argv)


if __name__ == "__main__":
    sys.exit(main())
