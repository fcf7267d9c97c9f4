"""Two processes train one model, and one of them is killed at a random moment.

Survived: the other one ends by itself within ``SECONDS``, and the checkpoint that is taken for good can be read.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from benchmarks.chaos.made import ended, forked, load, tiny_model
from benchmarks.chaos.trial import Outcome, Plan

WHOLE = 12
SECONDS = 60.0


def run(plan: Plan) -> Outcome:
    outcome, choose = Outcome("one of two ranks killed"), plan.random("ranks")
    load()
    from kalman_rl.hosts.state import load_state
    from kalman_rl.hosts.trl import last_good_checkpoint

    model = tiny_model(plan.folder / "model")
    start = time.monotonic()
    codes = [ended(pid) for pid in both(model, plan.folder / "whole", plan.folder / "log")]
    length = time.monotonic() - start
    if codes != [0, 0]:
        outcome.tried += 1
        outcome.lost.append(
            f"undisturbed ranks ended with {codes}: {(plan.folder / 'log-0').read_text()[-300:]}"
        )
        return outcome
    for number in range(plan.count(WHOLE)):
        path, log = plan.folder / f"run-{number}", plan.folder / f"log{number}"
        with outcome.trial(f"ranks {number} of seed {plan.seed}"):
            pids = both(model, path, log)
            time.sleep(choose.uniform(0.1, 0.9) * length)
            dead = choose.randrange(2)
            os.kill(pids[dead], signal.SIGKILL)
            ended(pids[dead])
            outcome.seen[f"the other one ended with {ended(pids[1 - dead], SECONDS)}"] += 1
            if (good := last_good_checkpoint(path)) is not None:
                load_state(good)
                outcome.seen["with a good checkpoint"] += 1
    return outcome


def both(model: Path, path: Path, log: Path) -> list[int]:
    """Process ids of two forked ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    pids = []
    for rank in ("0", "1"):

        def work(rank: str = rank) -> int:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            os.environ.update(names, MASTER_PORT=port)
            return train(model, path)

        pids.append(forked(work, log.with_name(f"{log.name}-{rank}")))
    return pids


def train(model: Path, path: Path) -> int:
    """One rank's part."""
    from datasets import Dataset

    from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer

    settings: dict[str, Any] = {
        "output_dir": str(path),
        "method": "kpo",
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 6,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    rows = Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(16)])

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text) % 3) for text in completions]

    arguments = KalmanGRPOConfig(**settings)
    KalmanGRPOTrainer(model=str(model), reward_funcs=reward, args=arguments, train_dataset=rows).train()
    return 0
