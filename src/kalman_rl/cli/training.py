"""The verbs that train: ``train`` and ``resume``."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Interval

from kalman_rl.engine.config import TrainConfig, labels, notes, to_toml, validate
from kalman_rl.engine.runs.run import name_part
from kalman_rl.engine.settings import Changeable
from kalman_rl.errors import ConfigError
from kalman_rl.terminal import tell

Switch = tyro.conf.FlagCreatePairsOff[bool]


@dataclass(frozen=True)
class Train:
    """Train a model on a task and write a run directory.

    Settings come from the defaults, then each --config file in order, then the flags: the last one wins.
    """

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    config: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """TOML file with settings, under the names of the flags with _ for -; may be given several times."""
    overwrite: Switch = False
    """Replace the run that is in the directory."""
    seeds: Annotated[int, Interval(ge=1, le=1_000)] = 1
    """Runs to train: seed, seed + 1, ... in folders below RUN, and one report of all. The same command goes on."""
    dry_run: Switch = False
    """Print the resolved settings as TOML, try your reward on three of your rows, and stop; 1 if it fails."""

    def __call__(self) -> int:
        _check_one_process()
        config = self.settings
        if config.run is None:
            config = dataclasses.replace(config, run=default_run(config))
        validate(config)
        if not config.quiet:
            for note in notes(config):
                tell(f"note: {note}", error=True)
        if self.dry_run:
            tell(to_toml(config), end="")
            return _tried(config)
        from kalman_rl.engine.models.load import check_available
        from kalman_rl.engine.runs.run import Run
        from kalman_rl.engine.train import train

        assert config.run is not None
        check_available(config.model, config.run.parent / ".cache")
        if self.seeds > 1:
            from kalman_rl.cli.sweep import sweep

            return sweep(config, self.seeds, overwrite=self.overwrite)
        task = None
        if config.data is not None or config.reward:
            from kalman_rl.engine.train import chosen_task

            task = chosen_task(config)  # bad rows or rewards leave no run behind
        with Run.create(config.run, to_toml(config), labels(config), overwrite=self.overwrite) as run:
            return train(config, run, task=task)


@dataclass(frozen=True)
class Resume:
    """Continue an interrupted run from its newest intact checkpoint, with its own settings."""

    run: tyro.conf.Positional[Path]
    """Directory of the run."""
    quiet: Switch = False
    """Print errors only."""
    allow_change: tuple[Changeable, ...] = ()
    """What may differ from the run's beginning: data (the rows and their split), model (its weights), code (the file of
    your own reward, method or belief), or a setting of config.toml: steps, threads, and what is watched, reported and
    kept. All other settings stay as they were."""

    def __call__(self) -> int:
        _check_one_process()
        from kalman_rl.cli.resume import resume

        return resume(self.run, quiet=self.quiet, allow_change=self.allow_change)


def _tried(config: TrainConfig) -> int:
    """Read the user's rows and score three of them, the findings on stderr; 1 if training would fail on them."""
    if config.data is None and not config.reward:
        return 0
    from kalman_rl.instruments.doctor.finding import PlannedRun
    from kalman_rl.instruments.doctor.reward import dry_run

    task = config.task if config.data is None else None
    findings = list(dry_run(PlannedRun(task=task, data=config.data, reward=config.reward, settings=config)))
    for finding in findings:
        tell(finding.text(), error=True)
    return int(any(finding.status == "problem" for finding in findings))


def _check_one_process() -> None:
    """Refuse torchrun and accelerate launch with several processes, all of which would write the same run."""
    size = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and size != "1":
        raise ConfigError(
            f"torchrun: got WORLD_SIZE={size}, expected one process; start kalman-rl without torchrun, or use "
            "KalmanGRPOTrainer in a script of your own for several"
        )


def default_run(config: TrainConfig, now: datetime | None = None) -> Path:
    """``runs/TASK-METHOD-TIME``: where a run goes that names no directory.

    >>> default_run(TrainConfig(), datetime(2026, 1, 2, 3, 4, 5)).as_posix()
    'runs/products-kpo_diffuse-20260102T030405Z'
    """
    source = config.task if config.data is None else config.data.stem
    source, method = name_part(source) or "task", name_part(config.method)
    return Path("runs") / f"{source}-{method}-{now or datetime.now(UTC):%Y%m%dT%H%M%SZ}"
