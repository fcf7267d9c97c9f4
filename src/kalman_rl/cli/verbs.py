"""Every verb of the command: one dataclass each, its fields are its flags.

Nothing here computes. Heavy modules are imported by the verb that needs them, so that ``--help`` is instant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from kalman_rl.cli.training import Resume, Switch, Train
from kalman_rl.engine.config import DemoConfig, StressConfig, validate
from kalman_rl.engine.strict import Number, Text
from kalman_rl.errors import ConfigError
from kalman_rl.terminal import tell


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
    """Names of experiments, as --list shows them. Unset: all, or with --quick those behind the headlines."""
    list: Switch = False
    """Print every experiment with its claims and acceptance, and stop."""
    quick: Switch = False
    """Few seeds, and learning rates as chosen before: at most 15 minutes on two cores without names."""
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
