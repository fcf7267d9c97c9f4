"""Continue a run in its own directory, from wherever the command is called."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from kalman_rl.engine.config import TrainConfig, build, settings_of, validate
from kalman_rl.engine.settings import Changeable
from kalman_rl.terminal import tell


def resume(run: Path, *, quiet: bool = False, allow_change: Sequence[Changeable] = ()) -> int:
    """Go on from the newest intact checkpoint.

    Args: run: directory. quiet: print errors only, whatever its settings say. allow_change: what may differ.
    Raises: what the run, its settings and its training raise. Returns: the exit code.
    """
    from kalman_rl.engine.resume import began_elsewhere, changed_settings
    from kalman_rl.engine.runs.run import Run
    from kalman_rl.engine.train import train

    folder = began_elsewhere(run)
    path = run if folder is None else Path(os.path.abspath(run))
    with contextlib.chdir(folder or "."), Run.open(path) as opened:
        config = build(TrainConfig, settings_of(path))
        config = dataclasses.replace(config, run=path, quiet=config.quiet or quiet)
        if opened.manifest.get("status") == "finished" and not changed_settings(opened, config):
            tell(f"{run}: this run is finished; there is nothing to continue", error=True)
            return 0
        validate(config)
        return train(config, opened, resume=True, allow_change=tuple(allow_change))
