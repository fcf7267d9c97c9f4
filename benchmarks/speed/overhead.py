"""What a training step costs beyond TRL's own GRPO::

    python -m benchmarks.speed.overhead                   # tiny and SmolLM2-135M, some minutes
    python -m benchmarks.speed.overhead --models tiny --rounds 1
    python -m benchmarks.speed.overhead --models smollm2 --rounds 1 --device cuda

Runs TRL's GRPOTrainer and ours by turns, each in a process of its own, with the same model, prompts, seeds and
sizes. A difference of one per cent cannot be seen between two runs whose steps differ by ten, so the time of
our code (objective with filter and metrics, rollouts, advantages, learning, logging) is taken inside the run,
by stopwatches around it: an upper bound of what is added, because TRL's own loss would be there instead. On a CPU
it is processor time; on a GPU the clock on the wall, and the peak is that of the GPU's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "speed"
PROMPTS, COMPLETIONS, UPDATES, LENGTH, STEPS = 4, 4, 2, 24, 6


class Stopwatch:
    """Adds up time by a clock; calls inside calls count once."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds, self._depth = clock, 0.0, 0

    def around(self, owner: Any, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start, self._depth = self.clock(), self._depth + 1
            try:
                return inner(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += self.clock() - start

        setattr(owner, name, timed)


def one(kind: str, name: str, cache: Path, device: str) -> dict[str, Any]:
    """Train for a few steps; seconds per step, those in our code, and the peak of memory."""
    os.environ.update(
        {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    )
    import torch
    import transformers
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from kalman_rl.engine.models.load import load_model
    from kalman_rl.engine.tasks import guard_reward, load_task
    from kalman_rl.hosts.trl import KalmanGRPOConfig, KalmanGRPOTrainer, trainer

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    task = load_task("products" if name != "tiny" else "sort12")
    loaded = load_model(name, cache=cache, task=task, dtype="float32", progress=lambda text: None)
    marks: list[tuple[float, float]] = []
    on_cpu = device == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    watch = Stopwatch(clock)

    class Marks(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append((clock(), watch.seconds))

    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": PROMPTS * COMPLETIONS // UPDATES,
        "steps_per_generation": UPDATES,
        "gradient_accumulation_steps": 1,
        "num_generations": COMPLETIONS,
        "max_completion_length": LENGTH,
        "max_steps": STEPS,
        "logging_steps": 1,
        "use_cpu": on_cpu,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    if kind == "ours":
        watch.around(trainer, "policy_loss")
        watch.around(trainer, "sums_behind")
        for method in ("_record", "_rollouts", "_method_inputs", "_counted", "_totals"):
            watch.around(KalmanGRPOTrainer, method)
        for method in ("observe", "end_step"):
            watch.around(trainer.LearnedState, method)
    host, config = (KalmanGRPOTrainer, KalmanGRPOConfig) if kind == "ours" else (GRPOTrainer, GRPOConfig)
    extra = {"method": "kpo_diffuse"} if kind == "ours" else {}
    runner = host(
        model=loaded.model,
        reward_funcs=guard_reward(task.reward),
        args=config(**settings),
        train_dataset=Dataset.from_list(task.train[:64]),
        processing_class=loaded.tokenizer,
        callbacks=[Marks()],
        **extra,
    )
    with open(os.devnull, "w") as sink:
        out, sys.stdout = sys.stdout, sink
        try:
            runner.train()
        finally:
            sys.stdout = out
    # whole generation batches, without the first, which warms up
    steps = [b[0] - a[0] for a, b in zip(marks[UPDATES - 1 :: UPDATES], marks[2 * UPDATES - 1 :: UPDATES])]
    own = [b[1] - a[1] for a, b in zip(marks[UPDATES - 1 :: UPDATES], marks[2 * UPDATES - 1 :: UPDATES])]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if not on_cpu:
        peak = torch.cuda.max_memory_allocated() // 1024
    return {"cycle": median(steps), "own": median(own), "peak_kib": peak}


def spawn(kind: str, name: str, cache: Path, device: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.speed.overhead",
        "--one",
        kind,
        name,
        "--cache",
        str(cache),
        "--device",
        device,
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{kind} {name}: the run failed\n{run.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def compare(name: str, rounds: int, cache: Path, device: str) -> dict[str, Any]:
    spawn("trl", name, cache, device)  # converts or warm-starts the model
    pairs = []
    for round_ in range(rounds):
        order = ("trl", "ours") if round_ % 2 == 0 else ("ours", "trl")
        pairs.append({kind: spawn(kind, name, cache, device) for kind in order})
    return {
        "model": name,
        "device": device,
        "share of our code": median(pair["ours"]["own"] / pair["ours"]["cycle"] for pair in pairs),
        "step time, ours / TRL": median(pair["ours"]["cycle"] / pair["trl"]["cycle"] for pair in pairs),
        "peak memory, ours / TRL": median(
            pair["ours"]["peak_kib"] / pair["trl"]["peak_kib"] for pair in pairs
        ),
        "seconds per generation batch": median(pair["ours"]["cycle"] for pair in pairs),
        "peak MiB": median(pair["ours"]["peak_kib"] for pair in pairs) / 1024,
        "rounds": rounds,
        "load": os.getloadavg()[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.overhead")
    parser.add_argument("--models", nargs="+", default=["tiny", "smollm2"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "kalman-rl-overhead")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one, options.cache, options.device)))
        return 0
    rows = []
    for name in options.models:
        rows.append(compare(name, options.rounds, options.cache, options.device))
        print(json.dumps(rows[-1], indent=1), flush=True)
    size = f"{PROMPTS} prompts x {COMPLETIONS} completions of up to {LENGTH} tokens, {UPDATES} updates"
    results = {
        "command": "python -m benchmarks.speed.overhead " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "generation batch": size,
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = "overhead.json" if options.device == "cpu" else "overhead_gpu.json"
    (options.out / file).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
