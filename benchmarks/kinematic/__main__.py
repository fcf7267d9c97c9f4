"""What kinematic tokens are worth, on known paths, a decision with a known best rule, and shipped series.

    python -m benchmarks.kinematic                  # what is not stored yet; writes kinematic.json, .md, .png
    python -m benchmarks.kinematic --only decision  # one part: truth, decision or series
    python -m benchmarks.kinematic --render         # tables and figure again, from the stored numbers
    python -m benchmarks.kinematic --quick          # a smoke test, a printout only

statsmodels is in the extra `test`; daily series come with `pip install --no-deps arch` (the group `bench`),
without which their rows are missing. Five test seeds from 1000 on; learning rates were chosen per control, among the
same three, on seeds 1 and 2. Written down before the first run of a test seed:

1. Truth. On the model's own paths the smoother's velocity has a smaller error than finite differences and Savitzky-
   Golay, both with the stride or window that the truth prefers; its 95 % bands hold 93 to 97 %; innovations squared
   average 0.95 to 1.05. On the other paths numbers are shown and nothing is expected.
2. A prior for small samples: with 64 windows the regret of b (tokens, frozen) is below that of a (the same layer,
   learned), paired interval without 0; and with 4096 the difference is less than half of that.
3. It is the prior, not the freezing: with 64 windows the regrets of c and b differ by an interval with 0.
4. Acceleration and jerk say more than (x, v): with 4096 windows the regret of b is below that of f, interval
   without 0.
5. Raw windows collapse and tokens do not (the paper's claim): with 64 windows the share of seeds that act in less
   than 1 % of cases is larger for a than for b, and 0 for b.
6. Profit: net of costs b beats holding on a daily price (sp500, nasdaq, wti), interval over stretches of time above
   0. Not expected. Where a null gains as much, a gain on the series itself means nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.kinematic import decision, network, series, truth
from benchmarks.kinematic.controls import controls
from benchmarks.kinematic.report import picture, report

RESULTS = Path(__file__).parents[1] / "results" / "kinematic"
SEEDS = [1000, 1001, 1002, 1003, 1004]
PARTS = {"truth": "truth", "tuning": "decision", "decision": "decision", "series": "series"}
STEPS, SERIES_STEPS = 240, 60


def cells(
    stored: dict[str, Any], *, quick: bool, names: list[str]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and measurement of everything; later ones read the rates that an earlier one chose."""
    seeds = [1, 2] if quick else SEEDS
    steps, sizes = (20, [(64, False), (64, True)]) if quick else (STEPS, decision.CELLS)
    for kind in truth.KINDS:
        yield f"truth {kind}", lambda kind=kind: [truth.cell(kind, seed) for seed in seeds]
    size, own = (64, [1]) if quick else decision.TUNED_ON
    every = {letter: list(network.RATES) for letter in controls(decision.INTENSITY)}
    yield "tuning", lambda: decision.cell(size, own, every, irregular=False, steps=steps)
    for size, irregular in sizes:
        name = f"decision {size}{' irregular' if irregular else ''}"
        yield (
            name,
            lambda size=size, irregular=irregular: decision.cell(
                size, seeds, decision.tuned(stored["tuning"]), irregular=irregular, steps=steps
            ),
        )
    for name in ["realgdp"] if quick else names:
        yield (
            f"series {name}",
            lambda name=name: series.cell(
                name, seeds, decision.tuned(stored["tuning"]), steps=steps if quick else SERIES_STEPS
            ),
        )


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kinematic")
    parser.add_argument("--quick", action="store_true", help="few seeds and steps, a printout only")
    parser.add_argument("--render", action="store_true", help="measure nothing, render what is stored")
    parser.add_argument("--only", choices=("truth", "decision", "series"), help="measure one part")
    parser.add_argument("--series", nargs="+", default=list(series.SHIPPED), choices=list(series.SHIPPED))
    parser.add_argument("--out", type=Path, help="folder; default benchmarks/results/kinematic")
    options = parser.parse_args(argv)
    out = options.out or (None if options.quick else RESULTS)
    file = None if out is None else out / "kinematic.json"
    stored = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.exists() else {}
    torch.set_num_threads(1)
    for name, measure in () if options.render else cells(stored, quick=options.quick, names=options.series):
        if name in stored or (options.only and PARTS[name.split()[0]] != options.only):
            continue
        found = measure()
        if found is None:
            print(f"{name}: not installed, left out", file=sys.stderr)
            continue
        stored[name] = json.loads(json.dumps(found))
        print(f"{name}: done", file=sys.stderr, flush=True)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    text = report(stored)
    print(text)
    if out is not None:
        (out / "kinematic.md").write_text(text, encoding="utf-8")
        picture(stored, out / "kinematic.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
