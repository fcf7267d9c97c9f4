"""What beliefs and sampling rules are worth, in simulation::

    python -m benchmarks.beliefs                      # everything, 20 worlds a cell
    python -m benchmarks.beliefs --quick              # a smoke test with two worlds and few cells
    python -m benchmarks.beliefs --tables 6 --jobs 2  # one table, two processes
    python -m benchmarks.beliefs --render             # tables and figures again, from the stored numbers

Writes ``beliefs.json`` (numbers, command, versions, seeds, date), ``beliefs.md`` (tables, targets, what the
claims come to) and one figure per claim, and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "beliefs"
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beliefs", description=__doc__.split("::")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two worlds, few cells, about a minute")
    size.add_argument("--full", action="store_true", help="every cell (the default)")
    parser.add_argument("--tables", type=int, nargs="+", choices=(4, 5, 6), default=[4, 5, 6])
    parser.add_argument("--seeds", type=int, help="worlds per cell; default 20, with --quick 2")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--out", type=Path, help="directory; default benchmarks/results, with --quick a printout only"
    )
    parser.add_argument("--render", action="store_true", help="measure nothing, render what is stored")
    options = parser.parse_args(argv)
    out = options.out or (None if options.quick else RESULTS)
    if options.render:
        results = json.loads(((out or RESULTS) / "beliefs.json").read_text(encoding="utf-8"))
    else:
        seeds = options.seeds or (2 if options.quick else 20)
        if seeds < 2:
            parser.error(f"--seeds: got {seeds}, expected at least 2 (intervals are over worlds)")
        command = "python -m benchmarks.beliefs " + " ".join(argv if argv is not None else sys.argv[1:])
        results = measure(
            options.tables, quick=options.quick, seeds=seeds, jobs=options.jobs, command=command.strip()
        )
    from benchmarks.beliefs.report import render

    text = render(results)
    print(text)
    if out is not None:
        from benchmarks.beliefs.figures import draw

        out.mkdir(parents=True, exist_ok=True)
        if not options.render:
            (out / "beliefs.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (out / "beliefs.md").write_text(text, encoding="utf-8")
        for path in draw(results, out):
            print(f"wrote {path}", file=sys.stderr)
    return 0


def measure(tables: Sequence[int], *, quick: bool, seeds: int, jobs: int = 1, command: str = "") -> Row:
    """Run the tasks and return everything as plain JSON types."""
    from benchmarks.beliefs.tasks import tasks

    began, todo = time.perf_counter(), tasks(tables, quick=quick, seeds=seeds)
    done = []
    for answer in _answers(todo, jobs):
        done.append(answer)
        note = f"{len(done)}/{len(todo)} {answer['kind']} {answer['cell']} {answer['seconds']} s"
        print(note, file=sys.stderr, flush=True)
    results = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seeds": list(range(seeds)),
        "seconds": round(time.perf_counter() - began, 1),
        "jobs": jobs,
        "versions": _versions(),
        "tasks": sorted(done, key=lambda a: (a["table"], a["kind"], json.dumps(a["cell"]))),
    }
    return json.loads(json.dumps(results))


def _answers(todo: Sequence[Any], jobs: int) -> Iterator[Row]:
    if jobs == 1:
        _one_thread()
        from benchmarks.beliefs.tasks import perform

        yield from map(perform, todo)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    from benchmarks.beliefs.tasks import perform

    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        for future in as_completed([pool.submit(perform, task) for task in todo]):
            yield future.result()


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _versions() -> dict[str, str]:
    names = ("kalman-rl", "torch", "numpy", "scipy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
