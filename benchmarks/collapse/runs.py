"""Record the runs that the collapse warning is calibrated on: settings that should hold, and some that should not.

    OMP_NUM_THREADS=1 python -m benchmarks.collapse.runs  # runs of about 20 s, one after another; resumes

Every run trains the tiny model on sort16: 32 prompts, 8 completions each, in 8 updates of 32 completions. Which runs
collapsed is not decided here but measured afterwards (``benchmarks.collapse``), by one rule for all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.collapse import reward as hacked_reward
from benchmarks.learning.adaptive import finished
from kalman_rl.engine.config import TrainConfig, labels, to_toml, validate
from kalman_rl.engine.runs.run import Run
from kalman_rl.engine.train import train

ROOT = Path("runs/collapse")
UNCLIPPED = {"low": 0.999, "high": 1e6}
SETTINGS: dict[str, dict[str, Any]] = {
    # meant to hold
    "grpo": {"method": "grpo"},
    "kpo_diffuse": {"method": "kpo_diffuse"},
    "kpo_robust": {"method": "kpo_robust"},
    "gspo": {"method": "gspo"},
    "kpo_diffuse_fast": {"method": "kpo_diffuse", "learning_rate": 3e-4},
    "grpo_epochs": {"method": "grpo", "iterations": 4},
    "kpo_diffuse_epochs": {"method": "kpo_diffuse", "iterations": 4},
    # meant to fail; where the learning rate rises to the end, stability is lost on the way and not at the start
    "no_ratio_ramp": {"method": "ratio_one", "learning_rate": 3e-4, "warmup_steps": 384},
    "unclipped_ramp": {
        "method": "grpo",
        "method_options": UNCLIPPED,
        "learning_rate": 6e-4,
        "warmup_steps": 384,
    },
    "too_fast_ramp": {"method": "grpo", "learning_rate": 3e-3, "warmup_steps": 384},
    "no_ratio_epochs": {"method": "ratio_one", "iterations": 4},  # fails within its first generation batch
    "length_hack": {
        "method": "kpo_diffuse",
        "learning_rate": 3e-4,
        "reward": ("benchmarks.collapse.reward:length",),
        "max_completion_tokens": hacked_reward.MAX_LENGTH,
    },
}


def plan(root: Path, seeds: int, steps: int) -> list[TrainConfig]:
    """One configuration per seed and setting, seeds outermost, so that an interrupted recording is balanced."""
    plans = []
    for seed in range(seeds):
        for name, changes in SETTINGS.items():
            given = {"iterations": 1, "learning_rate": 1e-4, "warmup_steps": 20} | changes
            config = TrainConfig(
                model="tiny",
                task="sort16",
                run=root / f"{name}-s{seed}",
                seed=seed,
                steps=steps,
                prompts_per_generation=32,
                completions_per_prompt=8,
                updates_per_generation=8,
                lora_rank=0,
                dtype="float32",
                eval_every=64,
                eval_prompts=64,
                eval_samples=1,
                save_every=0,
                traces_per_step=1,
                threads=1,
                quiet=True,
                **given,
            )
            validate(config)
            plans.append(config)
    return plans


def record(config: TrainConfig) -> int:
    """One run; the shares of exact replies behind a hacked reward go to ``exact.json`` beside the metrics."""
    assert config.run is not None
    hacked_reward.EXACT.clear()
    with Run.create(config.run, to_toml(config), labels(config), overwrite=True) as run:
        code = train(config, run, cache=config.run.parent / ".cache")
    (config.run / "exact.json").write_text(json.dumps(hacked_reward.EXACT))
    return code


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=384)
    given = parser.parse_args()
    for config in plan(given.root, given.seeds, given.steps):
        if finished(config):
            continue
        print(config.run, file=sys.stderr, flush=True)
        if code := record(config):
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
