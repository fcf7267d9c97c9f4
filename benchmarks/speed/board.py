"""What a board that is looked at costs the training beside it::

    python -m benchmarks.speed.board                 # about two minutes
    python -m benchmarks.speed.board --pairs 20

Steps of matrix products on every processor, each of which writes a row of metrics, are timed while a browser's part
is played: a listener to the events, which fetches the page at every change. In every pair of blocks the board runs
in one and is stopped (SIGSTOP) in the other, in random order. Reported: median ratio of the wall times, quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from statistics import median, quantiles

import torch

STEPS = 20
"""Steps of a block."""
SIZE = 900
EVERY = 0.5
"""Seconds between the board's looks at the run's files."""
ROWS = 2000
"""Of metrics that the run has already: the page takes longer, the longer the run."""
HISTORY = {f"metric/{i}": 0.5 for i in range(40)}


def watch(address: str, pages: list[int]) -> None:
    """What a browser does, until the board is gone."""
    try:
        with urllib.request.urlopen(address + "events") as events:
            for line in events:
                if line.startswith(b"event: changed"):
                    with urllib.request.urlopen(address + "page") as page:
                        pages.append(len(page.read()))
    except OSError:
        return


def block(metrics: Path, first: int) -> float:
    """Wall time of a block of steps."""
    one = torch.rand(SIZE, SIZE)
    start = time.perf_counter()
    with metrics.open("a") as file:
        for step in range(first, first + STEPS):
            one = one @ one / SIZE
            row = {"kind": "train", "step": step, "time": float(step), "reward": 0.5, "loss": 0.0, **HISTORY}
            file.write(json.dumps(row) + "\n")
            file.flush()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    order = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        run.mkdir()
        (run / "manifest.json").write_text(json.dumps({"format": 1, "status": "running", "labels": {}}))
        rows = [{"kind": "train", "step": i, "time": float(i), "reward": 0.5, **HISTORY} for i in range(ROWS)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [sys.executable, "-m", "kalman_rl.cli.main", "board", str(run), "--every", str(EVERY)]
        pages: list[int] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as board:
            assert board.stdout is not None
            address = board.stdout.readline().split()[0]
            threading.Thread(target=watch, args=(address, pages), daemon=True).start()
            while not pages:
                time.sleep(0.1)
            step, ratios, times = ROWS, [], []
            for _ in range(options.pairs):
                seconds = {}
                for running in order.sample([True, False], 2):
                    os.kill(board.pid, signal.SIGCONT if running else signal.SIGSTOP)
                    seconds[running] = block(run / "metrics.jsonl", step)
                    step += STEPS
                ratios.append(seconds[True] / seconds[False])
                times.append(seconds[False])
            os.kill(board.pid, signal.SIGCONT)
            board.terminate()
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    print(f"seed {options.seed}, {options.pairs} pairs of blocks of {STEPS} steps, {len(pages)} pages made")
    print(f"a block without the board: {median(times):.3f} s; load {os.getloadavg()[0]:.1f}")
    print(f"time with the board over time without: {middle:.3f} [{low:.3f} {high:.3f}]")


if __name__ == "__main__":
    main()
