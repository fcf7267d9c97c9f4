"""The demo: a real language model learns, two ways to spend completions are compared, five objectives are stressed."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from kalman_rl.engine.config import DemoConfig, StressConfig, TrainConfig, labels, to_toml, validate
from kalman_rl.terminal import tell

PARTS = ("main", "pool", "stress")
COMPLETIONS, POOL, POINTS = 8192, 256, 8
"""Completions of each run on the pool, its prompts, and the evaluations after the start."""
SPENDING: dict[str, dict[str, Any]] = {
    "grpo": {"prompts_per_generation": 16, "completions_per_prompt": 8, "learning_rate": 1e-4},
    "stream": {
        "advantage": "tracked",
        "select": "stream",
        "prompts_per_generation": 64,
        "completions_per_prompt": 1,
        "learning_rate": 2e-4,
    },
}
"""Groups of 8 in passes over the pool, and single completions drawn from the belief; each at a rate tuned before."""


def demo(config: DemoConfig) -> int:
    """(a) Train SmolLM2-135M, (b) compare two ways to spend completions, (c) run the stress study, (d) write
    ``report.html``; returns the exit code.

    Shorter than the defaults (10 steps of 20, 96 of 192) to fit into seven minutes on two cores.
    """
    from kalman_rl.cli.stress import stress
    from kalman_rl.instruments.report import write_figure, write_report

    start = time.monotonic()
    if config.overwrite and (config.run / "main" / "manifest.json").is_file():
        for part in PARTS[1:]:  # as long as main is there, they are those of a demo
            shutil.rmtree(config.run / part, ignore_errors=True)
    cache = config.run.parent / ".cache"
    _say(
        config, "1/4  SmolLM2-135M learns single-digit products (reinforcement learning, 8 replies a prompt)"
    )
    main = TrainConfig(
        run=config.run / "main", seed=config.seed, quiet=config.quiet, steps=10, eval_every=5, eval_samples=2
    )
    validate(main)
    if code := run_one(main, cache, overwrite=config.overwrite):
        return code
    _say(
        config,
        f"2/4  {COMPLETIONS:,} completions on a pool of solved and hopeless prompts (tiny model, sort_spread): "
        "groups of 8, and single ones where the belief expects to learn",
    )
    if code := _spend(spending(config), cache, overwrite=config.overwrite):
        return code
    _say(config, "3/4  five objectives under off-policy stress (tiny model, sort16, conditions A and C)")
    study = StressConfig(
        conditions=("A", "C"),
        run=config.run / "stress",
        first_seed=config.seed,
        steps=96,
        quiet=config.quiet,
    )
    validate(study)
    if code := stress(study):
        return code
    _say(config, "4/4  report")
    page = write_report([config.run], config.run / "report.html")
    write_figure([config.run], config.run / "figure.png")
    _say(config, f"open {page} in a browser ({time.monotonic() - start:.0f} s in all)")
    return 0


def spending(config: DemoConfig, completions: int = COMPLETIONS) -> list[TrainConfig]:
    """The runs on the pool: as many completions and optimizer steps per batch each, evaluated at the same numbers."""
    plans = []
    for name, settings in SPENDING.items():
        batch = settings["prompts_per_generation"] * settings["completions_per_prompt"]
        steps = completions // batch * 4
        plans.append(
            TrainConfig(
                method="grpo",
                model="tiny",
                task="sort_spread",
                run=config.run / "pool" / name,
                seed=config.seed,
                steps=steps,
                updates_per_generation=4,
                warmup_steps=20,
                lora_rank=0,
                dtype="float32",  # the same runs on every machine
                train_size=POOL,
                pool_prompts=POOL,
                eval_prompts=128,
                eval_samples=2,
                eval_every=steps // POINTS,
                save_every=0,
                traces_per_step=0,
                threads=1,
                quiet=config.quiet,
                **settings,
            )
        )
        validate(plans[-1])
    return plans


def run_one(config: TrainConfig, cache: Path, prefix: str = "", *, overwrite: bool = False) -> int:
    """One run; returns its exit code."""
    from kalman_rl.engine.runs.run import Run
    from kalman_rl.engine.train import train

    assert config.run is not None
    with Run.create(config.run, to_toml(config), labels(config), overwrite=overwrite) as run:
        return train(config, run, cache=cache, prefix=prefix)


def _spend(plans: list[TrainConfig], cache: Path, *, overwrite: bool) -> int:
    """The runs side by side, one thread each; returns the highest exit code."""
    from kalman_rl.cli.stress import warm_start

    warm_start(plans[0].task, cache, quiet=plans[0].quiet)
    with ProcessPoolExecutor(len(plans), mp_context=get_context("spawn")) as pool:
        running = [
            pool.submit(run_one, plan, cache, f"{plan.run.name:<7} ", overwrite=overwrite)
            for plan in plans
            if plan.run
        ]
        try:
            return max(done.result() for done in running)
        except KeyboardInterrupt:
            return 130


def _say(config: DemoConfig, text: str) -> None:
    if not config.quiet:
        tell(text, error=True)
