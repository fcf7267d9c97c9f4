"""The fused objective against the published eager loss and against our own parts one after another::

    python -m benchmarks.speed.fused [--quick]

One CPU thread; forward and backward from log-probabilities (see ``interleaved.py`` for how ratios are taken).
Ours returns its metrics and per-token outputs too. Gradients are compared before anything is timed. Writes
``fused.json`` to benchmarks/results. Exit code 1 if the target was missed in two of three attempts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.interleaved import ROUNDS, SAMPLE, Promise, Row, as_json, judge, table
from benchmarks.speed.published_loss import kpo_loss
from kalman_rl.methods import make_method
from kalman_rl.objectives.loss import Method, policy_loss
from kalman_rl.objectives.rollouts import Rollouts

SHAPES = ((64, 1024), (256, 4096), (512, 8192))
TARGET = 4.0
RESULTS = Path(__file__).parents[1] / "results" / "speed"


def batch(
    rows: int, length: int, holes: bool = False, device: str = "cpu", spread: float = 0.05
) -> tuple[Rollouts, Tensor, Tensor]:
    """Right padding (lengths from T/2 to T), with 20 % holes if asked; log-probabilities whose ratios have the
    standard deviation ``spread`` (nats); advantages (B,)."""
    g = torch.Generator().manual_seed(rows + length)
    old = -torch.rand(rows, length, generator=g)
    logp = old + spread * torch.randn(rows, length, generator=g)
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (rows, 1), generator=g)
    if holes:
        mask &= torch.rand(rows, length, generator=g) < 0.8
    old, logp, mask, advantage = (x.to(device) for x in (old, logp, mask, torch.randn(rows, generator=g)))
    return Rollouts(old, mask), logp, advantage


def ours(
    method: Method, rollouts: Rollouts, logp: Tensor, advantage: Tensor, fused: bool
) -> Callable[[], Tensor]:
    def call() -> Tensor:
        leaf = logp.detach().requires_grad_()
        loss = policy_loss(method, rollouts, leaf, advantage=advantage, fused=fused)
        loss.value.backward()
        return leaf.grad

    taken = policy_loss(method, rollouts, logp, advantage=advantage, fused=fused).metrics["objective/fused"]
    if bool(taken) != fused:
        raise SystemExit(
            f"{method.name}: got the composed path, expected the fused one; is a compiler missing?"
        )
    return call


def published(rollouts: Rollouts, logp: Tensor, advantage: Tensor) -> Callable[[], Tensor]:
    weight, per_token = rollouts.mask.to(logp.dtype), advantage[:, None].expand_as(logp)

    def call() -> Tensor:
        leaf = logp.detach().requires_grad_()
        kpo_loss(leaf, rollouts.logp_old, weight, per_token)[0].backward()
        return leaf.grad

    return call


def check(name: str, got: Tensor, expected: Tensor, share: float, rtol: float) -> None:
    """Stop before a wrong gradient is timed; a ``share`` of the tokens may lie on the other side of a bound."""
    same = (got == 0) == (expected == 0)
    error = ((got - expected).abs() / expected.abs().clamp(min=1e-30))[same & (expected != 0)].max().item()
    if (~same).float().mean() > share or not error <= rtol:
        raise SystemExit(f"{name}: got an error of {error:.1e}, {(~same).sum()} tokens differ; not timed")


def measure(rows: int, length: int, holes: bool, how: dict[str, Any], spread: float = 0.05) -> list[Row]:
    given = batch(rows, length, holes, spread=spread)
    kpo, grpo = make_method("kpo"), make_method("grpo")
    calls = {
        "fused KPO": ours(kpo, *given, True),
        "fused GRPO": ours(grpo, *given, True),
        "composed KPO": ours(kpo, *given, False),
        "published KPO": published(*given),
    }
    check("fused KPO", calls["fused KPO"](), calls["composed KPO"](), 1e-4, 1e-5)
    check("fused GRPO", calls["fused GRPO"](), ours(grpo, *given, False)(), 1e-4, 1e-5)
    if not holes and length <= 1024:  # the published arithmetic sees holes as zeros and drifts in long rows
        check("published KPO", calls["published KPO"](), calls["composed KPO"](), 0.03, 1e-3)
    promises = [
        Promise(
            "fused KPO", "published KPO", TARGET if spread == 0.05 and not holes else None, smaller=False
        ),
        Promise("fused GRPO", "published KPO", smaller=False),
        Promise("fused KPO", "composed KPO", smaller=False),
        Promise("composed KPO", "published KPO", smaller=False),
    ]
    case = f"({rows}, {length}), {'20 % holes' if holes else 'padding mask'}"
    case += "" if spread == 0.05 else f", log-ratios of {spread}"
    return judge(case, calls, promises, **how)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the small shape, two rounds, nothing written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    shapes = SHAPES[:1] if quick else SHAPES
    how = {"rounds": 2 if quick else ROUNDS, "least": 0.0 if quick else SAMPLE}
    rows = [row for shape in shapes for holes in (False, True) for row in measure(*shape, holes, how)]
    if not quick:  # far from 0 the exponential takes its long way
        rows += measure(*SHAPES[0], False, how, spread=0.5)
    print(table(rows))
    if not quick:
        (RESULTS / "fused.json").write_text(json.dumps(as_json(rows), indent=1) + "\n")
    return int(not quick and any(row.holds is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
