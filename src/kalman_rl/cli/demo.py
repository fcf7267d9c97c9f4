"""The demo: a real language model learns, five objectives are stressed, one page shows both."""

from __future__ import annotations

import shutil
import sys
import time

from kalman_rl.engine.config import DemoConfig, StressConfig, TrainConfig, labels, to_toml, validate


def demo(config: DemoConfig) -> int:
    """(a) Train SmolLM2-135M, (b) run the stress study, (c) write ``report.html``; returns the exit code.

    Shorter than the defaults (10 steps of 20, 96 of 192) to fit into six minutes on two cores.
    """
    from kalman_rl.cli.stress import stress
    from kalman_rl.engine.runs.run import Run
    from kalman_rl.engine.train import train
    from kalman_rl.instruments.report import write_figure, write_report

    start = time.monotonic()
    if config.overwrite and (config.run / "main" / "manifest.json").is_file():
        for part in ("main", "stress"):
            shutil.rmtree(config.run / part, ignore_errors=True)
    cache = config.run.parent / ".cache"
    _say(
        config, "1/3  SmolLM2-135M learns single-digit products (reinforcement learning, 8 replies a prompt)"
    )
    main = TrainConfig(
        run=config.run / "main", seed=config.seed, quiet=config.quiet, steps=10, eval_every=5, eval_samples=2
    )
    validate(main)
    with Run.create(config.run / "main", to_toml(main), labels(main)) as run:
        code = train(main, run, cache=cache)
    if code:
        return code
    _say(config, "2/3  five objectives under off-policy stress (tiny model, sort16, conditions A and C)")
    study = StressConfig(
        conditions=("A", "C"),
        run=config.run / "stress",
        first_seed=config.seed,
        steps=96,
        quiet=config.quiet,
    )
    validate(study)
    code = stress(study)
    if code:
        return code
    _say(config, "3/3  report")
    page = write_report([config.run], config.run / "report.html")
    write_figure([config.run], config.run / "figure.png")
    _say(config, f"open {page} in a browser ({time.monotonic() - start:.0f} s in all)")
    return 0


def _say(config: DemoConfig, text: str) -> None:
    if not config.quiet:
        print(text, file=sys.stderr, flush=True)
