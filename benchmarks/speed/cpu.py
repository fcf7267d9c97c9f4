"""Speed on one CPU thread, as ratios::

    python -m benchmarks.speed.cpu            # everything, one or two minutes; what `make bench` runs
    python -m benchmarks.speed.cpu --quick    # a smoke test of a few seconds, nothing is written

Every result is checked before it is timed. Writes ``cpu.json``, ``cpu.md`` and ``cpu.png``
to benchmarks/results. Exit code 1 if a target was missed by median and better quartile in two of three
attempts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.oracles.gram import prefix_predictions
from torch import Tensor

from benchmarks.speed import fused
from benchmarks.speed.cpu_report import cold_start, cpu_name, draw, render, where_it_breaks
from benchmarks.speed.interleaved import Promise, Row, as_json, judge, table
from benchmarks.speed.peers import Peer, peers
from benchmarks.speed.published import KGrpoUpdate, kpo_filter
from benchmarks.speed.recursion import Q, R, batch, reference
from kalman_rl import KalmanPreferenceTracker
from kalman_rl.kernels import jit
from kalman_rl.numerics.hadamard import SRHT
from kalman_rl.numerics.kalman import causal_filter, causal_mean

RESULTS = Path(__file__).parents[1] / "results" / "speed"
SHAPES = ((64, 1024), (256, 4096), (512, 16384))
SIZES = ((1024, 256), (4096, 256), (8192, 256), (1024, 64), (4096, 64))
DIMENSIONS = ((128, 25.0), (256, 50.0), (512, 180.0))
PARTS = ("filters", "libraries", "objectives", "projections", "trackers")
Options = dict[str, Any]


def check(name: str, got: Any, expected: Any, limit: float) -> None:
    """Stop before a wrong result is timed."""
    error = float(np.abs(np.asarray(got, dtype=float) - np.asarray(expected, dtype=float)).max())
    if not error <= limit:
        raise SystemExit(f"{name}: got an error of {error:.2e}, expected at most {limit:.0e}; not timed")


def both_ways(run: Callable[[Tensor], Tensor], z: Tensor) -> Callable[[], None]:
    leaf, gradient = z.clone().requires_grad_(), torch.ones_like(z)

    def call() -> None:
        leaf.grad = None
        run(leaf).backward(gradient)

    return call


def filters(rows: int, length: int, **how: Any) -> list[Row]:
    """The filter against the memory's anchors and the published arithmetic."""
    z, mask, holes = batch(rows, length)
    noise = {"process_noise": Q, "observation_noise": R}
    per_token = {**noise, "observation_noise": torch.full_like(z, R, dtype=torch.float64)}
    clean, target = torch.where(mask, z, 0.0), torch.empty_like(z)
    expected = reference(z[:8], mask[:8], Q, R)
    check("filter", causal_mean(z, mask, **noise)[:8], expected, 3e-7)
    check("holes", causal_mean(z, holes, **noise)[:8], reference(z[:8], holes[:8], Q, R), 3e-7)
    early = mask[:8, :1024].numpy() * expected[:, :1024]
    check("published KPO, first 1024 tokens", kpo_filter(clean, mask, Q, R)[:8, :1024], early, 1e-3)
    calls = {
        "filter, padding mask": lambda: causal_mean(z, mask, **noise),
        "filter, 30 % holes": lambda: causal_mean(z, holes, **noise),
        "filter, Q and R per token": lambda: causal_mean(z, holes, **per_token),
        "all six fields": lambda: causal_filter(z, mask, **noise),
        "torch.cumsum": lambda: clean.cumsum(-1),
        "preallocated copy": lambda: target.copy_(clean),
        "clone": clean.clone,
        "published KPO filter": lambda: kpo_filter(clean, mask, Q, R),
        "filter, forward + backward": both_ways(lambda x: causal_mean(x, mask, **noise), clean),
        "torch.cumsum, forward + backward": both_ways(lambda x: x.cumsum(-1), clean),
        "published KPO, forward + backward": both_ways(lambda x: kpo_filter(x, mask, Q, R), clean),
    }
    promises = [
        Promise("filter, padding mask", "torch.cumsum", 0.95),
        Promise("filter, 30 % holes", "torch.cumsum", 2.0),
        Promise("filter, forward + backward", "torch.cumsum, forward + backward", 0.9),
        Promise("filter, padding mask", "published KPO filter", 5.0, smaller=False),
        Promise("filter, forward + backward", "published KPO, forward + backward", smaller=False),
        Promise("filter, 30 % holes", "published KPO filter", smaller=False),
        Promise("filter, padding mask", "preallocated copy"),
        Promise("filter, padding mask", "clone"),
        Promise("filter, Q and R per token", "torch.cumsum"),
        Promise("all six fields", "torch.cumsum"),
    ]
    return judge(f"{rows} x {length}", calls, promises, **how)


def libraries(skipped: list[str], **how: Any) -> Iterator[list[Row]]:
    """General Kalman libraries, 64 rows of 1024 tokens; 20 % holes for those that know missing values."""
    z = batch(64, 1024)[0].nan_to_num(0.5)
    full = torch.ones_like(z, dtype=torch.bool)
    holes = torch.rand(z.shape, generator=torch.Generator().manual_seed(1)) < 0.8
    holes[:, [0, -1]] = True  # to them every NaN is a hole, to us not those at the ends
    for peer in peers(z, holes, Q, R, skipped):
        yield _library(peer, z, holes if peer.missing else full, **{**how, "rounds": 5})


def _library(peer: Peer, z: Tensor, mask: Tensor, **how: Any) -> list[Row]:
    noise = {"process_noise": Q, "observation_noise": R}
    check(peer.name, peer.call(), reference(z, mask, Q, R)[: peer.rows], 1e-4)
    calls = {"filter": lambda: causal_mean(z, mask, **noise), peer.name: peer.call}
    promises = [Promise("filter", peer.name, peer.target, smaller=False)]
    case = "64 x 1024" + (", 20 % holes" if peer.missing else "")
    return judge(case, calls, promises, scale={peer.name: 64 / peer.rows}, **how)


def objectives(quick: bool, **how: Any) -> Iterator[list[Row]]:
    """The whole loss with its gradient; ``benchmarks.speed.fused`` alone has more cases."""
    for shape in fused.SHAPES[: 1 if quick else None]:
        for holes in (False, True):
            yield fused.measure(*shape, holes, how)


def projections(width: int, kept: int, **how: Any) -> list[Row]:
    """SRHT of 256 vectors against a dense Gaussian matrix."""
    g = torch.Generator().manual_seed(width)
    x, gaussian = torch.randn(256, width, generator=g), torch.randn(width, kept, generator=g) / kept**0.5
    project = SRHT(width, kept)
    check("SRHT", project(x), project(x.double()), 1e-4)
    calls = {"SRHT": lambda: project(x), "x @ Gaussian": lambda: x @ gaussian}
    promise = Promise("SRHT", "x @ Gaussian", 2.0 if kept == 256 else None, smaller=False)
    return judge(f"D = {width}, d = {kept}", calls, [promise], **how)


def trackers(dim: int, target: float, **how: Any) -> list[Row]:
    """One observation at a time, and groups of 16 at once, against the published K-GRPO update."""
    g = torch.Generator().manual_seed(dim)
    h, y = torch.randn(16, dim, generator=g) / dim**0.5, torch.randn(16, generator=g)
    options: Options = {"Q_val": 0.0, "R_val": 0.01, "noise_strength": None, "dtype": torch.float32}
    ours, published = KalmanPreferenceTracker(dim, **options), KGrpoUpdate(dim)
    for i in range(16):
        ours.update(h[i : i + 1], y[i : i + 1])
        published(h[i], y[i])
    check("tracker mean", ours.mean, published.mean, 1e-3)
    check("tracker covariance", ours.covariance, published.covariance, 1e-3)
    phi, rewards = h.expand(128, 16, dim).contiguous(), y.expand(128, 16).contiguous()
    seen = torch.ones(128, 16, dtype=torch.bool)
    prior = {"prior_variance": 1.0, "process_noise": 0.0, "observation_noise": 0.01}
    one, value = h[:1].contiguous(), y[:1].contiguous()
    peer = "published K-GRPO update"
    calls = {
        "tracker.update, one reward": lambda: ours.update(one, value),
        "tracker.update, 16 rewards": lambda: ours.update(h, y),
        "prefix predictions, 128 prompts of 16": lambda: prefix_predictions(phi, rewards, seen, **prior),
        peer: lambda: published(h[0], y[0]),
    }
    promises = [
        Promise("tracker.update, one reward", peer, target, smaller=False),
        Promise("tracker.update, 16 rewards", peer, smaller=False),
        Promise("prefix predictions, 128 prompts of 16", peer, 800.0, smaller=False),
    ]
    scale = {"tracker.update, 16 rewards": 1 / 16, "prefix predictions, 128 prompts of 16": 1 / 2048}
    return judge(f"d = {dim}, per reward", calls, promises, scale=scale, **how)


def measured(parts: Sequence[str], quick: bool, skipped: list[str], **how: Any) -> Iterator[list[Row]]:
    """Rows as they come."""
    few = slice(1) if quick else slice(None)
    for part in parts:
        if part == "filters":
            yield from (filters(*shape, **how) for shape in SHAPES[few])
        elif part == "libraries":
            yield from libraries(skipped, **how)
        elif part == "objectives":
            yield from objectives(quick, **how)
        elif part == "projections":
            yield from (projections(*size, **how) for size in SIZES[few])
        else:
            yield from (trackers(*dimension, **how) for dimension in DIMENSIONS[few])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.cpu", description=__doc__.split("::")[0]
    )
    parser.add_argument("--quick", action="store_true", help="small cases, three rounds, writes nothing")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, help="directory; default benchmarks/results, --quick: none")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not jit.usable():
        print("numba is not installed or switched off: this times plain torch", file=sys.stderr)
    how: Options = {"rounds": 3, "least": 0.002} if options.quick else {}
    began, load, skipped = time.time(), os.getloadavg()[0], []
    rows: list[Row] = []
    for some in measured(options.only or PARTS, options.quick, skipped, **how):
        print("\n".join(table(some).splitlines()[2 if rows else 0 :]), flush=True)
        rows += some
    results = {
        "command": " ".join(["python -m benchmarks.speed.cpu", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - began),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "load": [load, os.getloadavg()[0]]},
        "versions": {name: version(name) for name in ("torch", "numpy", "numba") if _installed(name)},
        "rows": as_json(rows),
        "skipped": skipped,
        "breaks": [] if options.quick else where_it_breaks(),
        "cold": "not measured" if options.quick else cold_start(),
    }
    text = render(results)
    print("\n".join(["", *skipped, "", *results["breaks"], results["cold"]]))
    out = options.out or (None if options.quick else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "cpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (out / "cpu.md").write_text(text, encoding="utf-8")
        draw(rows, out / "cpu.png")
    missed = [row for row in rows if row.holds is False]
    for row in missed:
        print(f"missed: {row.name}, {row.case}: {row.ratio:.2f}, target {row.target:g}", file=sys.stderr)
    return 1 if missed and not options.quick else 0


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ImportError:
        return False


if __name__ == "__main__":
    sys.exit(main())
