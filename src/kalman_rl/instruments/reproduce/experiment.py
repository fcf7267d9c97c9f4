"""Experiments: named sets of arms and claims, run one trial at a time and kept as they finish."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from kalman_rl.engine.runs.files import append_row, explained
from kalman_rl.errors import ConfigError, RunError
from kalman_rl.instruments.reproduce.claim import Claim, Records
from kalman_rl.instruments.reproduce.pool import World
from kalman_rl.terminal import tell

TUNING_SEEDS = (900, 901)
FIRST_SEED = 1000
"""Seeds from here on are for tests; those below chose settings."""
Worlds = Callable[[], World]


class Trial(Protocol):
    """One arm, a frozen dataclass: its ``repr`` is what a finished run is found again by."""

    def run(self, worlds: Worlds, seed: int) -> dict[str, Any]:
        """What it finds for a seed, as JSON can hold it."""
        ...

    def variants(self) -> Mapping[str, Trial]:
        """Itself with each setting that is to be chosen on tuning seeds by ``mean``, by name; none if nothing is."""
        ...


@dataclass(frozen=True)
class Experiment:
    """A question with its arms and claims.

    Args:
        name: on the command line. question: in one sentence. pool: what is trained on, and how much.
        arms: by name. claims: with their acceptance.
        seeds: test seeds of a full run. quick_seeds: of a quick one, which tunes nothing; 0 leaves it out unless it is
            named, and then two are taken.
        tuning_seeds: that its settings are chosen on. model: that it is about.
    """

    name: str
    question: str
    pool: str
    arms: Mapping[str, Trial]
    claims: tuple[Claim, ...]
    seeds: int = 5
    quick_seeds: int = 2
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    model: str = "tiny"


class Job(NamedTuple):
    """A trial with a seed, and the experiment and arm that asked for it first."""

    trial: Trial
    seed: int
    label: str


class Ledger:
    """Finished trials in a file of JSON lines; a second call goes on where the first one stopped.

    Args: path: of the file. model: name of what is trained; its runs are its own.
    Raises: RunError for a damaged line that is not the last one, which an interruption may have cut.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.path, self.model = path, model
        self.rows: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        with explained(path, "read"):
            lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
                self.rows[row["key"]] = row["found"]
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines) - 1:
                    raise RunError(
                        f"{path}: got a damaged line {number + 1}, expected a finished run; delete that line"
                    ) from error
                with explained(path, "write"):
                    path.write_text("".join(kept + "\n" for kept in lines[:-1]), encoding="utf-8")

    def key(self, trial: Trial, seed: int) -> str:
        """Hash of all that decides a run's result."""
        return hashlib.sha256(" ".join((self.model, repr(trial), str(seed))).encode()).hexdigest()[:16]

    def find(self, trial: Trial, seed: int) -> dict[str, Any] | None:
        """What a finished run found; None if it is not there."""
        return self.rows.get(self.key(trial, seed))

    def add(self, job: Job, found: dict[str, Any]) -> None:
        """Keep a finished run."""
        key = self.key(job.trial, job.seed)
        row = {"key": key, "label": job.label, "seed": job.seed, "trial": repr(job.trial), "found": found}
        with explained(self.path, "write"):
            append_row(self.path, row)
        self.rows[key] = found


@dataclass(frozen=True)
class Tuned:
    """The trial chosen among an arm's variants, its name, and the mean of each over the tuning seeds."""

    trial: Trial
    name: str
    means: dict[str, float]


def run_all(
    experiments: Sequence[Experiment],
    ledger: Ledger,
    make_world: Worlds,
    *,
    quick: bool,
    seeds: Sequence[int] | None,
    jobs: int,
    say: Callable[[str], None],
) -> dict[str, tuple[Records, dict[str, Tuned]]]:
    """Tune, run what is not there yet, and return each experiment's records and choices by name.

    Args: make_world: importable function of this package, called once in every process that needs one.
    """
    chosen: dict[Trial, Tuned] = {}
    if not quick:
        open_ = [(e, arm, trial) for e in experiments for arm, trial in e.arms.items() if trial.variants()]
        tuning = [
            Job(variant, seed, f"{e.name} {arm}, tuning")
            for e, arm, trial in open_
            for seed in e.tuning_seeds
            for variant in trial.variants().values()
        ]
        _run(tuning, ledger, make_world, jobs, say)
        chosen = {trial: _best(trial, ledger, e.tuning_seeds) for e, _, trial in open_}

    def settled(trial: Trial) -> Trial:
        return chosen[trial].trial if trial in chosen else trial

    wanted: list[Job] = []
    for experiment in experiments:
        for seed in _seeds(experiment, quick, seeds):
            wanted += [
                Job(settled(trial), seed, f"{experiment.name} {arm}")
                for arm, trial in experiment.arms.items()
            ]
    _run(wanted, ledger, make_world, jobs, say)
    results: dict[str, tuple[Records, dict[str, Tuned]]] = {}
    for experiment in experiments:
        records = {
            arm: {
                seed: found
                for seed in _seeds(experiment, quick, seeds)
                if (found := ledger.find(settled(trial), seed)) is not None
            }
            for arm, trial in experiment.arms.items()
        }
        choices = {arm: chosen[trial] for arm, trial in experiment.arms.items() if trial in chosen}
        results[experiment.name] = (records, choices)
    return results


def check_seeds(seeds: Iterable[int]) -> None:
    """Refuse seeds that settings were chosen on, and repeated ones. Raises: ConfigError."""
    given = list(seeds)
    used = [seed for seed in given if seed < FIRST_SEED]
    if used:
        raise ConfigError(
            f"seeds: got {used[0]}, expected {FIRST_SEED} or more; those below chose the settings"
        )
    if len(set(given)) < len(given):
        raise ConfigError(f"seeds: got {given}, expected different ones; a repeated seed is no new evidence")


def _seeds(experiment: Experiment, quick: bool, seeds: Sequence[int] | None) -> list[int]:
    count = (experiment.quick_seeds or 2) if quick else experiment.seeds
    return list(seeds) if seeds else list(range(FIRST_SEED, FIRST_SEED + count))


def _best(trial: Trial, ledger: Ledger, seeds: Sequence[int]) -> Tuned:
    means: dict[str, float] = {}
    for name, variant in trial.variants().items():
        runs = [ledger.rows[ledger.key(variant, seed)]["mean"] for seed in seeds]
        means[name] = sum(runs) / len(runs)
    best = max(means, key=lambda name: means[name])
    return Tuned(trial.variants()[best], best, means)


def _run(
    wanted: Sequence[Job], ledger: Ledger, make_world: Worlds, jobs: int, say: Callable[[str], None]
) -> None:
    """Run every job that the ledger lacks, equal ones once, with a line for each."""
    todo = {ledger.key(job.trial, job.seed): job for job in reversed(wanted)}
    ordered = [
        job
        for job in dict.fromkeys(todo[ledger.key(job.trial, job.seed)] for job in wanted)
        if ledger.find(job.trial, job.seed) is None
    ]
    if not ordered:
        return
    start = time.monotonic()
    for number, (job, found) in enumerate(_results(ordered, make_world, jobs), 1):
        ledger.add(job, found)
        left = (time.monotonic() - start) / number * (len(ordered) - number)
        mean = f"mean {found['mean']:.3f}, " if "mean" in found else ""
        say(f"[{number}/{len(ordered)}] {job.label}, seed {job.seed}: {mean}about {left / 60:.0f} min left")


def _results(ordered: Sequence[Job], make_world: Worlds, jobs: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    if jobs == 1:
        worlds = _Once(make_world)
        for job in ordered:
            yield job, _one(job, worlds)
        return
    spawn = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_begin, initargs=(make_world,)) as pool:
        running = {pool.submit(_in_process, job): job for job in ordered}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _Once:
    """Makes a world at the first call and keeps it."""

    def __init__(self, make: Worlds) -> None:
        self.make = make
        self.world: World | None = None

    def __call__(self) -> World:
        if self.world is None:
            self.world = self.make()
        return self.world


_WORLDS: list[_Once] = []
"""Of this process, where it is a worker."""


def _begin(make_world: Worlds) -> None:
    _WORLDS.append(_Once(make_world))


def _in_process(job: Job) -> dict[str, Any]:
    return _one(job, _WORLDS[-1])


def _one(job: Job, worlds: Worlds) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one seed gives one result, whatever the number of cores
    try:
        return rounded(job.trial.run(worlds, job.seed))
    finally:
        torch.set_num_threads(threads)


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Numbers to six digits, so that lines stay short."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        return [short(item) for item in value] if isinstance(value, list) else value

    return {key: short(entry) for key, entry in found.items()}


def progress(text: str) -> None:
    """A line on stderr, at once."""
    tell(text, error=True)
