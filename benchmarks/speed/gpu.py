"""Speed on a CUDA device, as ratios to a copy of the same tensor and to the published eager code::

    python -m benchmarks.speed.gpu            # what `make bench-gpu` runs; some minutes
    python -m benchmarks.speed.gpu --quick    # small shapes, nothing is written

Time is between two CUDA events around a call, so it includes waiting for the host where a call has to ask it.
A round runs every candidate once in an order that rotates, a ratio is formed within its round, and inputs
rotate through buffers larger than the second-level cache. Every result is checked before it is timed, in
memory that held NaN before. Writes ``gpu.json`` to benchmarks/results. Then every method is compared with its
definition on the device, and SmolLM2-135M is trained by our trainer and by TRL's (time and memory of a step). Exit
code 1 if a target was missed by median and better quartile, or a check failed. Without a CUDA device it says so and
exits with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.speed.fused import batch as loss_batch
from benchmarks.speed.fused import check, ours, published
from benchmarks.speed.interleaved import Promise, Row, as_json, missed, table
from benchmarks.speed.recursion import batch, reference
from kalman_rl.kernels import triton_support
from kalman_rl.methods import make_method
from kalman_rl.numerics.kalman import causal_mean

Q, R = 1e-4, 1.0
RESULTS = Path(__file__).parents[1] / "results" / "speed"
CACHE = 64 << 20  # bytes, more than the second-level cache of an H100 or H200
ROUNDS = 25
FILTERS = ((4096, 16384), (64, 131072))
LOSSES = ((1024, 4096), (512, 16384))
AFTER = (
    ("-m", "kalman_rl", "methods", "--verify", "--device", "cuda"),
    ("-m", "benchmarks.speed.overhead", "--models", "smollm2", "--rounds", "1", "--device", "cuda"),
)
"""Commands of this Python once the kernels were timed."""
Call = Callable[[], object]


def poison(size: int) -> None:
    """Fill memory that the next outputs of this size will get with NaN."""
    blocks = [torch.full((size,), float("nan"), device="cuda") for _ in range(4)]
    del blocks


def check_filter(rows: int, length: int) -> None:
    z, mask, holes = batch(rows, length)
    for name, seen in (("filter", mask), ("filter with holes", holes)):
        poison(z.numel())
        mean = causal_mean(z.cuda(), seen.cuda(), process_noise=Q, observation_noise=R).cpu()
        error = (mean.double() - torch.from_numpy(reference(z, seen, Q, R)))[seen].abs().max().item()
        if not error <= 5e-6:
            raise SystemExit(f"{name}: got an error of {error:.1e}, expected at most 5e-6; not timed")


def sample(calls: dict[str, Callable[[int], object]], copies: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate, one number a round; a candidate gets the number of its input."""
    names, out = list(calls), {name: [] for name in calls}
    for call in calls.values():
        for copy in range(copies):
            call(copy)
    torch.cuda.synchronize()
    for round_ in range(rounds):
        for i in range(len(names)):
            name = names[(i + round_) % len(names)]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[name](round_ % copies)
            end.record()
            end.synchronize()
            out[name].append(start.elapsed_time(end) / 1e3)
    return out


def rows_of(case: str, times: dict[str, list[float]], promises: list[Promise]) -> list[Row]:
    found = []
    for promise in promises:
        ratio = promise.ratio(times)
        holds = None if promise.target is None else not missed(ratio, promise.target, promise.smaller)
        numbers = (*ratio, promise.target, promise.smaller, holds, 1)
        found.append(
            Row(promise.name, case, promise.peer, *numbers, median(times[promise.name]), os.getloadavg()[0])
        )
    return found


def filters(rows: int, length: int, rounds: int) -> list[Row]:
    copies = max(1, -(-CACHE // (4 * rows * length)) + 1)
    place = torch.arange(length, device="cuda")
    mask = place < torch.randint(length // 2, length + 1, (rows, 1), device="cuda")
    holes = mask & (torch.rand(rows, length, device="cuda") < 0.7)
    inputs = [torch.randn(rows, length, device="cuda") for _ in range(copies)]
    leaves = [z.clone().requires_grad_() for z in inputs]
    gradient = torch.randn(rows, length, device="cuda")
    noise = {"process_noise": Q, "observation_noise": R}

    def both(seen: Tensor) -> Callable[[int], object]:
        def call(copy: int) -> None:
            leaves[copy].grad = None
            causal_mean(leaves[copy], seen, **noise).backward(gradient)

        return call

    calls: dict[str, Callable[[int], object]] = {
        "clone": lambda copy: inputs[copy].clone(),
        "torch.cumsum": lambda copy: inputs[copy].cumsum(-1),
        "filter": lambda copy: causal_mean(inputs[copy], mask, **noise),
        "filter with holes": lambda copy: causal_mean(inputs[copy], holes, **noise),
        "filter, forward and backward": both(mask),
        "filter with holes, forward and backward": both(holes),
    }
    many = rows >= 264
    promises = [
        Promise("filter", "clone", 1.35 if many else 2.2),
        Promise("filter with holes", "clone", 2.8 if many else None),
        Promise("filter", "torch.cumsum"),
        Promise("filter, forward and backward", "filter"),
        Promise("filter with holes, forward and backward", "clone"),
    ]
    return rows_of(f"({rows}, {length})", sample(calls, copies, rounds), promises)


def losses(rows: int, length: int, holes: bool, rounds: int) -> list[Row]:
    given = loss_batch(rows, length, holes, "cuda")
    poison(rows * length)
    for name in ("kpo", "grpo", "gspo", "cispo"):
        method = make_method(name)
        check(f"fused {name}", ours(method, *given, True)(), ours(method, *given, False)(), 1e-3, 1e-5)
    kpo, logp = make_method("kpo"), given[1]
    single: dict[str, Call] = {
        "clone": logp.clone,
        "fused KPO": ours(kpo, *given, True),
        "fused GRPO": ours(make_method("grpo"), *given, True),
        "composed KPO": ours(kpo, *given, False),
        "published KPO": published(*given),
    }
    calls = {name: (lambda copy, call=call: call()) for name, call in single.items()}
    promises = [
        Promise("fused KPO", "clone", 2.8),
        Promise("fused KPO", "published KPO", 8.0, smaller=False),
        Promise("fused GRPO", "clone"),
        Promise("fused KPO", "composed KPO", smaller=False),
    ]
    case = f"loss ({rows}, {length}), {'20 % holes' if holes else 'padding mask'}"
    return rows_of(case, sample(calls, 1, rounds), promises)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked or timed; run this on a machine with one")
        return 0
    if not triton_support.usable(torch.zeros(1, device="cuda")):
        print("a CUDA device but no Triton: the kernels cannot run; install triton")
        return 1
    torch.manual_seed(0)
    rounds = 3 if quick else ROUNDS
    for shape in ((7, 1000), (300, 2500), (3, 70000)):
        check_filter(*shape)
    rows: list[Row] = []
    for shape in ((300, 2048),) if quick else FILTERS:
        rows += filters(*shape, rounds)
    for shape in ((64, 1024),) if quick else LOSSES:
        rows += losses(*shape, False, rounds) + losses(*shape, True, rounds)
    print(torch.cuda.get_device_name(), torch.__version__)
    print(table(rows))
    if not quick:
        context = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        text = json.dumps({"context": context, "rows": as_json(rows)}, indent=1)
        (RESULTS / "gpu.json").write_text(text + "\n")
    failed = [] if quick else [command for command in AFTER if subprocess.call([sys.executable, *command])]
    for command in failed:
        print(f"failed: {' '.join(command)}")
    return int(bool(failed) or (not quick and any(row.holds is False for row in rows)))


if __name__ == "__main__":
    sys.exit(main())
