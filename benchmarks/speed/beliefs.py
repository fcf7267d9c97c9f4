"""Time and memory of beliefs over many prompts: `python -m benchmarks.speed.beliefs --prompts 1000000`.

One thread. Every belief is filled with the given number of prompts, then batches of 512 x 8 completions are
timed (median): advantages, update. Bytes per prompt: tensor data as allocated; the id -> row table apart,
with the id objects it keeps alive.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from kalman_rl.beliefs import make_belief

BATCH, GROUP = 512, 8


def fill(belief, ids: list, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(ids), 5_000):
        part = ids[start : start + 5_000]
        features = torch.randn(500, width, generator=generator).repeat(len(part) // 500 + 1, 1)[: len(part)]
        features = features if width else None
        reward = torch.randint(2, (len(part),), generator=generator).double()
        belief.update(part, reward, step=0, features=features)


def timed(belief, ids: list, width: int, repeats: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(1)
    advantage, update = [], []
    for step in range(1, repeats + 1):
        rows = torch.randint(len(ids), (BATCH,), generator=generator).tolist()
        batch = [ids[row] for row in rows] * GROUP
        reward = torch.randint(2, (len(batch),), generator=generator).double()
        features = torch.randn(BATCH, width, generator=generator) if width else None
        if width:  # a prompt drawn twice has one feature vector
            place = {name: i for i, name in enumerate(batch[:BATCH])}
            features = features[[place[name] for name in batch]]
        start = time.perf_counter()
        belief.advantages(batch, reward, step=step, features=features)
        middle = time.perf_counter()
        belief.update(batch, reward, step=step, features=features)
        advantage.append(1e3 * (middle - start))
        update.append(1e3 * (time.perf_counter() - middle))
    return statistics.median(advantage), statistics.median(update)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parents[1] / "results" / "speed" / "beliefs.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ids = [f"prompt-{i:07d}" for i in range(arguments.prompts)]
    table = {name: row for row, name in enumerate(ids)}
    rows = sum(sys.getsizeof(row) for row in table.values())
    print(f"{arguments.prompts} prompts; batches of {BATCH} x {GROUP}; torch {torch.__version__}, one thread")
    print(
        f"id -> row, per prompt: dictionary {sys.getsizeof(table) / len(ids):.0f} bytes, row numbers "
        f"{rows / len(ids):.0f}, str ids {sum(map(sys.getsizeof, ids)) / len(ids):.0f} (the caller's)"
    )
    dictionary = (sys.getsizeof(table) + rows) / len(ids)
    del table
    measured = []
    print(f"{'belief':<22}{'tensor bytes/prompt':>20}{'advantages ms':>15}{'update ms':>11}{'fill s':>8}")
    for name, width in (("gaussian", 0), ("beta", 0), ("spo", 0), ("auto", 0), ("auto", 896)):
        belief = make_belief(name)
        start = time.perf_counter()
        fill(belief, ids, width)
        filled = time.perf_counter() - start
        advantage, update = timed(belief, ids, width, arguments.repeats)
        label = f"{name}, {width} features" if width else name
        used = belief.allocated_bytes / len(belief)
        print(f"{label:<22}{used:>20.0f}{advantage:>15.1f}{update:>11.1f}{filled:>8.1f}", flush=True)
        measured.append({"belief": label, "bytes": used, "advantages_ms": advantage, "update_ms": update})
    report = {
        "prompts": len(ids),
        "batch": [BATCH, GROUP],
        "torch": torch.__version__,
        "threads": 1,
        "load_average": os.getloadavg(),
        "id_table_bytes": dictionary,
        "rows": measured,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
