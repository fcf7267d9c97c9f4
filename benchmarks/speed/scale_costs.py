"""What one prompt, token, completion and checkpoint costs here, and what that comes to at large scale.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.scale_costs          # a few minutes on one core

Measures on one thread, as medians of CPU time so that other work on the machine hardly counts: memory and time of
beliefs, division of a budget, files of checkpoints, filter and loss per token. By the clock on the wall: collectives of
two gloo processes on this machine. Then multiplies (docs/scale.md has the formulas).
Writes benchmarks/results/speed/scale_costs.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kalman_rl.beliefs import make_belief
from kalman_rl.hosts.state import STATE_FILE, load_state, save_state
from kalman_rl.methods import make_method
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.sampling.coverage import Coverage
from kalman_rl.sampling.rounds import RoundPlan

BATCH, GROUP = 512, 8
SCENARIO = {
    "prompts": 1e8,
    "tokens": 1e5,
    "ranks": 1000,
    "batch_prompts": 1024,
    "completions": 16,
    "rounds": 2,
}
ROW_BYTES_PER_TOKEN = {
    "completion_ids": 8,
    "completion_mask": 8,
    "old_per_token_logps": 4,
    "sampling_logps": 4,
}
"""Fields of TRL's batch with an entry per token, as gathered for predictive and rounds allocation."""


def median_seconds(
    action: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.process_time
) -> float:
    """Median time of an action, after one call that does not count: of this process's CPU, or by another clock."""
    action()
    times = []
    for _ in range(repeats):
        start = clock()
        action()
        times.append(clock() - start)
    return statistics.median(times)


def filled(prompts: int) -> tuple[Any, list[str]]:
    """The default belief with so many prompts, each visited once, and their names."""
    belief, ids = make_belief("auto"), [f"prompt-{i:09d}" for i in range(prompts)]
    generator = torch.Generator().manual_seed(0)
    for start in range(0, prompts, 5_000):
        part = ids[start : start + 5_000]
        belief.update(part, torch.randint(2, (len(part),), generator=generator).double(), step=0)
    return belief, ids


def belief_costs(prompts: int, repeats: int) -> dict[str, float]:
    """Memory per prompt, and time per completion and per prompt of a batch, with a table of a given size."""
    belief, ids = filled(prompts)
    generator = torch.Generator().manual_seed(1)
    step = 0

    def batch() -> None:
        nonlocal step
        step += 1
        names = [ids[i] for i in torch.randint(prompts, (BATCH,), generator=generator).tolist()] * GROUP
        reward = torch.randint(2, (len(names),), generator=generator).double()
        belief.advantages(names, reward, step=step)
        belief.update(names, reward, step=step)

    def divide() -> None:
        names = list(dict.fromkeys(ids[:BATCH]))
        plan = RoundPlan(
            belief, names, step=step, total=BATCH * GROUP, rounds=(GROUP,), max_rounds=None, n_max=32,
            coverage=Coverage(256),
        )  # fmt: skip
        plan.next_round()

    table = {name: i for i, name in enumerate(ids)}
    return {
        "prompts": prompts,
        "tensor_bytes_per_prompt": belief.allocated_bytes / prompts,
        "table_bytes_per_prompt": (sys.getsizeof(table) + sum(map(sys.getsizeof, table.values()))) / prompts,
        "id_bytes_per_prompt": sum(map(sys.getsizeof, ids)) / prompts,
        "advantage_and_update_us_per_completion": 1e6 * median_seconds(batch, repeats) / (BATCH * GROUP),
        "division_us_per_prompt": 1e6 * median_seconds(divide, repeats) / BATCH,
    }


def checkpoint_costs(prompts: int, repeats: int) -> dict[str, float]:
    """Time and size of a checkpoint's belief, written and read as the trainer does."""
    belief, _ = filled(prompts)
    with tempfile.TemporaryDirectory() as folder:
        write = median_seconds(lambda: save_state(folder, {"belief": belief.state_dict()}), repeats)
        size = (Path(folder) / STATE_FILE).stat().st_size
        other = make_belief("auto")
        read = median_seconds(lambda: other.load_state_dict(load_state(folder)["belief"]), repeats)  # type: ignore[index]
    return {
        "prompts": prompts,
        "bytes_per_prompt": size / prompts,
        "write_s_per_1e5": write * 1e5 / prompts,
        "read_s_per_1e5": read * 1e5 / prompts,
    }


def token_costs(rows: int, length: int, repeats: int) -> dict[str, float]:
    """Nanoseconds per token of the filter alone, and of loss and gradient, with and without the filter."""
    generator = torch.Generator().manual_seed(2)
    old = -torch.rand(rows, length, generator=generator)
    logp = (old + 0.05 * torch.randn(rows, length, generator=generator)).requires_grad_()
    rollouts = Rollouts(old, torch.ones(rows, length, dtype=torch.bool))
    advantage = torch.randn(rows, generator=generator)
    result: dict[str, float] = {"rows": rows, "tokens": length}
    for name in ("grpo", "kpo_diffuse"):
        method = make_method(name)

        def step(method: Any = method) -> None:
            policy_loss(method, rollouts, logp, advantage=advantage).value.backward()

        result[f"{name}_ns_per_token"] = 1e9 * median_seconds(step, repeats) / (rows * length)
    ratio = make_method("kpo_diffuse").ratio
    seconds = median_seconds(lambda: ratio(logp.detach(), rollouts), repeats)
    return result | {"filter_ns_per_token": 1e9 * seconds / (rows * length)}


def _rank(rank: int, port: int, sizes: list[int], repeats: int, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    wall = time.perf_counter
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for size in sizes:
        values, parts = torch.rand(size), [torch.empty(size) for _ in range(2)]
        seconds = median_seconds(
            lambda values=values, parts=parts: dist.all_gather(parts, values), repeats, wall
        )
        rows = [{"prompt": f"{i:010d}" * 50, "prompt_id": f"prompt-{i:09d}"} for i in range(size // 256)]
        objects = 0.0
        if rows:
            found: list[Any] = [None, None]
            objects = median_seconds(
                lambda rows=rows, found=found: dist.all_gather_object(found, rows), repeats, wall
            )
        if rank == 0:
            results.put((size, seconds, len(rows), objects, len(pickle.dumps(rows)) / max(len(rows), 1)))
    dist.barrier()
    dist.destroy_process_group()


def gather_costs(repeats: int) -> list[dict[str, float]]:
    """Time of gathering float32 numbers, and rows of a data set, from two gloo processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context, sizes = multiprocessing.get_context("spawn"), [16, 4_096, 65_536, 4_194_304]
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, port, sizes, repeats, results)) for r in range(2)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=300) for _ in sizes]
    for process in ranks:
        process.join()
    names = (
        "numbers_per_rank",
        "all_gather_s",
        "rows_per_rank",
        "all_gather_object_s",
        "pickled_bytes_per_row",
    )
    return [dict(zip(names, values, strict=True)) for values in found]


def at_scale(costs: dict[str, Any]) -> dict[str, float]:
    """The scenario's memory, traffic and time, by multiplication alone."""
    belief, token, file, s = costs["belief"][-1], costs["tokens"][-1], costs["checkpoint"], SCENARIO
    per_prompt = sum(belief[f"{name}_bytes_per_prompt"] for name in ("tensor", "table", "id"))
    completions = s["batch_prompts"] * s["completions"]
    tokens_per_rank = completions * s["tokens"] / s["ranks"]
    row_bytes = sum(ROW_BYTES_PER_TOKEN.values()) * s["tokens"]
    return {
        "state_GB_per_rank": per_prompt * s["prompts"] / 1e9,
        "state_GB_all_ranks": per_prompt * s["prompts"] * s["ranks"] / 1e9,
        "steps_until_every_prompt_was_visited": s["prompts"] / s["batch_prompts"],
        "belief_s_per_batch": belief["advantage_and_update_us_per_completion"] * completions / 1e6,
        "division_s_per_batch": belief["division_us_per_prompt"] * s["batch_prompts"] * s["rounds"] / 1e6,
        "checkpoint_GB": file["bytes_per_prompt"] * s["prompts"] / 1e9,
        "checkpoint_write_s": file["write_s_per_1e5"] * s["prompts"] / 1e5,
        "checkpoint_read_s": file["read_s_per_1e5"] * s["prompts"] / 1e5,
        "tokens_per_rank_and_batch": tokens_per_rank,
        "filter_cpu_s_per_rank_and_batch": token["filter_ns_per_token"] * tokens_per_rank / 1e9,
        "rewards_received_MB_per_rank": completions * 4 / 1e6,
        "dataset_rows_received_MB_per_rank": completions * costs["gather"][-1]["pickled_bytes_per_row"] / 1e6,
        "completions_received_GB_per_rank": completions * row_bytes / 1e9,
    }


def main() -> None:
    """Measure, multiply, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed/scale_costs.json"))
    parser.add_argument("--prompts", type=int, nargs="+", default=[10_000, 100_000, 400_000])
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    costs: dict[str, Any] = {
        "machine": {"torch": torch.__version__, "platform": platform.platform(), "load": os.getloadavg()[0]},
        "scenario": SCENARIO,
        "belief": [belief_costs(count, given.repeats) for count in given.prompts],
        "checkpoint": checkpoint_costs(min(100_000, given.prompts[-1]), 3),
        "tokens": [token_costs(64, 1_024, given.repeats), token_costs(4, 100_000, given.repeats)],
        "gather": gather_costs(given.repeats),
    }
    costs["at_scale"] = at_scale(costs)
    given.output.write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(costs, indent=1))


if __name__ == "__main__":
    main()
