"""The command ``kalman-rl``: one dataclass per verb, its fields are its flags.

Nothing here computes. Heavy modules are imported by the verb that needs them, so that ``--help`` is instant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Interval

from kalman_rl.cli.interrupts import Interrupts
from kalman_rl.cli.words import changed, parse
from kalman_rl.engine.config import (
    DemoConfig,
    StressConfig,
    TrainConfig,
    build,
    labels,
    load_toml,
    notes,
    to_toml,
    validate,
)
from kalman_rl.engine.runs.run import name_part
from kalman_rl.engine.settings import Changeable
from kalman_rl.engine.strict import Number, Text, read
from kalman_rl.errors import ConfigError, KalmanRLError, PlaceError, one_line
from kalman_rl.terminal import tell

DESCRIPTION = "Noise-aware estimators for reinforcement learning of language models."
LONGEST = 3000
"""Characters of an error; a path may have 4096."""

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


@dataclass(frozen=True)
class Export:
    """Write a run's trained model as a Hugging Face folder: adapters merged, with a model card."""

    run: tyro.conf.Positional[Path]
    """Directory of the run."""
    output: Path | None = None
    """Folder to write. Unset: export in the run's directory."""
    best: Switch = False
    """The weights of the best held-out mean reward, which a run has that was told to keep_best."""
    overwrite: Switch = False
    """Replace the folder, where it is an earlier export."""

    def __call__(self) -> int:
        from kalman_rl.engine.export import export

        tell(export(self.run, self.output, best=self.best, overwrite=self.overwrite))
        return 0


@dataclass(frozen=True)
class Stress:
    """Compare methods under harsher and harsher conditions, with many tiny runs."""

    settings: Annotated[StressConfig, tyro.conf.arg(name="")] = field(default_factory=StressConfig)

    def __call__(self) -> int:
        validate(self.settings)
        from kalman_rl.cli.stress import stress

        return stress(self.settings)


@dataclass(frozen=True)
class Demo:
    """Train, evaluate and report a small run on this machine, in minutes and without a download."""

    settings: Annotated[DemoConfig, tyro.conf.arg(name="")] = field(default_factory=DemoConfig)

    def __call__(self) -> int:
        validate(self.settings)
        from kalman_rl.cli.demo import demo
        from kalman_rl.engine.models.load import check_available

        check_available("smollm2", self.settings.run.parent / ".cache")

        return demo(self.settings)


@dataclass(frozen=True)
class Report:
    """Write a page that shows one run or compares several; it opens in a browser, offline."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs, or of a stress study."""
    output: Path | None = None
    """File to write. Unset: report.html in the first directory."""

    def __call__(self) -> int:
        if not self.runs:
            raise ConfigError("RUNS: got none, expected the directory of at least one run")
        from kalman_rl.instruments.report import write_report

        tell(write_report(list(self.runs), self.output))
        return 0


@dataclass(frozen=True)
class Methods:
    """List the methods, or show one: equation, factors, options, inputs, deviations, when to use it."""

    name: tyro.conf.Positional[str] = ""
    """Method to show, by name or as MODULE:FUNCTION. Unset: all of them in a table."""
    cite: Switch = False
    """Print BibTeX."""
    verify: Switch = False
    """Run its checks against published code and definitions here and now; exit code 1 if one fails."""
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    """Device on which --verify runs."""
    json: Switch = False
    """Print JSON, with every method's options and defaults."""

    def __call__(self) -> int:
        from kalman_rl.cli.methods import show_methods

        return show_methods(
            self.name, cite=self.cite, verify=self.verify, device=self.device, as_json=self.json
        )


@dataclass(frozen=True)
class Replay:
    """Recompute any method on the stored tokens of a run, without model or GPU, and compare two."""

    run: tyro.conf.Positional[Path]
    """Directory of the run."""
    method: str
    """Method to compute, by name or as MODULE:FUNCTION."""
    options: dict[Text, Number] = field(default_factory=dict)
    """Options of the method, such as low=0.05."""
    against: str = ""
    """Second method, with its defaults. Unset: what the run recorded."""
    steps: str = ""
    """First and last optimizer step, as 3-20, or one step. Unset: all that were stored."""
    top: int = 20
    """How many tokens to list on which the two disagree most."""
    json: Switch = False
    """Print JSON."""

    def __call__(self) -> int:
        from kalman_rl.cli.replay import show_replay

        return show_replay(self.run, self.method, self.options, self.against, self.steps, self.top, self.json)


@dataclass(frozen=True)
class Board:
    """Serve the report of a run on this machine, live while the run goes on; Ctrl-C ends it.

    The address holds a random token and only this machine can reach it.
    """

    run: tyro.conf.Positional[Path]
    """Directory of a run, or of a study."""
    port: int = 0
    """Port on 127.0.0.1; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Loopback address to listen on: 127.0.0.1, localhost or ::1."""
    every: float = 2.0
    """Seconds between looks at the run's files."""
    open: Switch = False
    """Open the page in the browser."""

    def __call__(self) -> int:
        from kalman_rl.instruments.board import serve

        return serve(self.run, host=self.host, port=self.port, every=self.every, browser=self.open)


@dataclass(frozen=True)
class Inspect:
    """Show a file of another trainer as a page: prime-rl's token export (JSONL), TRL's completions (Parquet)."""

    file: tyro.conf.Positional[Path]
    """File to show, as token_exports/step_5/rank_0.jsonl or completions/completions_00010.parquet."""
    output: Path | None = None
    """Page to write. Unset: beside the file, with its name."""
    tokenizer: str | None = None
    """Folder or name of the tokenizer, where a file has tokens by number only."""

    def __call__(self) -> int:
        from kalman_rl.instruments.foreign import inspect_file

        tell(inspect_file(self.file, self.output, tokenizer=self.tokenizer))
        return 0


@dataclass(frozen=True)
class Doctor:
    """Look at versions, hooks of the hosts, disk and your reward before a run; exit code 1 if something will fail."""

    task: str | None = None
    """Built-in task whose reward to try on three rows."""
    data: Path | None = None
    """JSONL, Parquet or CSV file with your rows; replaces the task."""
    reward: tuple[str, ...] = ()
    """Your reward functions as MODULE:FUNCTION, tried on three rows. Naming one runs its code."""
    config: Path | None = None
    """TOML file of the run you plan: every value is checked."""
    run: Path = Path("runs")
    """Folder that runs go to: is there room?"""
    json: Switch = False
    """Print JSON."""

    def __call__(self) -> int:
        from kalman_rl.instruments.doctor import PlannedRun, doctor

        plan = PlannedRun(
            task=self.task, data=self.data, reward=self.reward, config=self.config, run=self.run
        )
        return doctor(plan, as_json=self.json)


@dataclass(frozen=True)
class Contract:
    """Check your reward, method, belief or trust region against what the trainers rely on; exit code 1 if one fails."""

    name: tyro.conf.Positional[str]
    """MODULE:FUNCTION, or a method or belief by name. Its code is run."""
    data: Path | None = None
    """JSONL, Parquet or CSV file with rows for a reward. Unset: three made-up products."""
    json: Switch = False
    """Print JSON."""

    def __call__(self) -> int:
        from kalman_rl.cli.contract import show_contract

        return show_contract(self.name, self.data, self.json)


@dataclass(frozen=True)
class Reproduce:
    """Run the experiments behind the claims and write verdicts, figures and a table; a second call goes on.

    Each has its acceptance written before the run. Results go to OUTPUT, the table beside it to OUTPUT.md.
    """

    claims: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of experiments, as --list shows them. Unset: all."""
    list: Switch = False
    """Print every experiment with its claims and acceptance, and stop."""
    quick: Switch = False
    """Few seeds, and learning rates as chosen before: at most 15 minutes on two cores for all of them."""
    model: str = "tiny"
    """What is trained: tiny, tiny-long (replies of 65 to 152 tokens) or smollm2, each with experiments of its own."""
    output: Path = Path("runs/reproduce")
    """Folder of the results."""
    seeds: tuple[int, ...] = ()
    """Test seeds, 1000 or more. Unset: each experiment's own."""
    jobs: int = 0
    """Runs at a time; 0 is one per core."""

    def __call__(self) -> int:
        from kalman_rl.instruments.reproduce import listing, reproduce

        if self.list:
            tell(listing())
            return 0
        words = ["kalman-rl reproduce", *self.claims, *(["--quick"] if self.quick else [])]
        words += ["--model", self.model] if self.model != "tiny" else []
        words += ["--seeds", *map(str, self.seeds)] if self.seeds else []
        page = reproduce(
            self.claims,
            output=self.output,
            model=self.model,
            quick=self.quick,
            seeds=self.seeds,
            jobs=self.jobs,
            command=" ".join(words),
        )
        tell(page)
        return 0


VERBS: tuple[type, ...] = (
    Train,
    Resume,
    Export,
    Stress,
    Reproduce,
    Demo,
    Report,
    Board,
    Replay,
    Inspect,
    Methods,
    Contract,
    Doctor,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (failed), 2 (wrong usage, settings, data or paths), 3 (a fallen
    reward stopped the run), 130 (Ctrl-C).

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
        return 2 if isinstance(error, ConfigError | PlaceError) else 1


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
