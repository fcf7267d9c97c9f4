"""The command ``kalman-rl``: reads the flags of a verb, runs it, and says errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kalman_rl.cli.interrupts import Interrupts
from kalman_rl.cli.training import Train
from kalman_rl.cli.verbs import VERBS, Demo, Doctor, Methods, Reproduce, Stress
from kalman_rl.cli.words import changed, parse
from kalman_rl.engine.config import TrainConfig, build, load_toml
from kalman_rl.engine.strict import read
from kalman_rl.errors import KalmanRLError, exit_code, one_line
from kalman_rl.terminal import tell

DESCRIPTION = "Noise-aware estimators for reinforcement learning of language models."
LONGEST = 3000
"""Characters of an error; a path may have 4096."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (failed), 2 (wrong usage, settings, data or paths), 3 (a fallen
    reward stopped the run), 130 (Ctrl-C or SIGTERM).

    Errors are one line on stderr; the environment variable KALMAN_RL_TRACEBACK=1 lets them through.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debugging = os.environ.get("KALMAN_RL_TRACEBACK") == "1"
    interrupts = Interrupts()
    try:
        with interrupts:
            return _main(arguments)
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        tell("interrupted", error=True)
        return 130
    except BrokenPipeError:  # the reader of a pipe went away, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if interrupts.came:
            tell("interrupted", error=True)
            return 130
        if debugging:
            raise
        expected = isinstance(error, KalmanRLError)
        text = (
            str(error) if expected else f"{type(error).__name__}: {error} (KALMAN_RL_TRACEBACK=1 shows where)"
        )
        tell("kalman-rl: " + one_line(text, LONGEST), error=True)
        return exit_code(error)


def _main(arguments: list[str]) -> int:
    if not arguments:
        with contextlib.suppress(SystemExit):
            _parse(["--help"], TrainConfig())
        return 2
    if arguments == ["--version"]:
        from kalman_rl import __version__

        tell(f"kalman-rl {__version__}")
        return 0
    layers = [load_toml(path) for path in _config_files(arguments)]
    base = build(TrainConfig, *layers) if layers else TrainConfig()
    verb = _parse(arguments, base)
    if isinstance(verb, Train):
        flags = changed(base, verb.settings)
        verb = dataclasses.replace(verb, settings=build(TrainConfig, *layers, flags))
    code: int = read(type(verb), vars(verb))()
    return code


def _parse(arguments: list[str], base: TrainConfig) -> Any:
    defaults: dict[str, Any] = {
        verb.__name__.lower(): verb() for verb in (Stress, Reproduce, Demo, Methods, Doctor)
    }
    defaults["train"] = Train(base)
    about = DESCRIPTION + " `kalman-rl --version` prints the version."
    return parse(arguments, {verb.__name__.lower(): verb for verb in VERBS}, defaults, about)


def _config_files(arguments: list[str]) -> list[Path]:
    """Files named by --config, which must be read before the other flags can be."""
    follows = itertools.pairwise(arguments)
    spaced = [(i, word) for i, (flag, word) in enumerate(follows) if flag == "--config"]
    joined = [(i, word.partition("=")[2]) for i, word in enumerate(arguments) if word.startswith("--config=")]
    return [Path(word) for _, word in sorted(spaced + joined)] if arguments[0] == "train" else []


if __name__ == "__main__":
    sys.exit(main())
