"""Finding and reading runs: directories with a ``manifest.json``.

:func:`read_manifest` and :func:`read_metrics` raise where a file is damaged. :func:`read_run` never does, because a
report is most wanted when something went wrong: ``RunRecord.notes`` lists what was left out.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kalman_rl.engine.runs.files import FORMAT, explained
from kalman_rl.engine.runs.received import (
    MANIFEST,
    MAX_JSON,
    MAX_TOML,
    opened,
    parse_json,
    read_bytes,
    read_json,
    read_lines,
    run_folders,
)
from kalman_rl.errors import ConfigError, PlaceError, RunError, quote
from kalman_rl.terminal import logger

Row = dict[str, float]
UNFINISHED = frozenset({"running", "interrupted", "failed", "stopped: disk", "killed"})
LOCK = ".lock"
"""Held by the process that writes a run."""
LARGEST = 1e100
"""Beyond it a number is as good as infinite, and differences of such numbers would be."""
LARGEST_STEP = 2**52
"""Beyond it the next step is the same float."""
KEPT_BREAKS = {"\n": "\n", "\t": "\t"}


@dataclass(frozen=True)
class RunRecord:
    """One run directory as far as it could be read; texts are already safe to show (see :func:`clean`)."""

    path: Path
    name: str
    labels: dict[str, str] = field(default_factory=dict)
    status: str = "unknown"
    seconds: float | None = None
    facts: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    config: str = ""
    train: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.status not in UNFINISHED

    @property
    def steps(self) -> int:
        return int(self.train[-1]["step"]) if self.train else 0


def clean(value: object, limit: int = 80, *, breaks: bool = False) -> str:
    """Text that cannot disturb a page or a terminal: invisible characters become visible escapes.

    Control, bidirectional, zero-width, private and unpaired surrogate characters are written as ``\\u{..}``;
    with ``breaks`` newlines and tabs stay. Longer texts are cut at ``limit`` characters.

    >>> clean("a\\x1b[31mb")
    'a\\\\u{1b}[31mb'
    """
    text = str(value)
    cut = text[:limit]
    kept = KEPT_BREAKS if breaks else {}
    shown = "".join(kept.get(char) or _visible(char) for char in cut)
    return shown + ("…" if len(text) > limit else "")


def _visible(char: str) -> str:
    hidden = unicodedata.category(char)[0] == "C" or char in "\u2028\u2029"
    return f"\\u{{{ord(char):x}}}" if hidden else char


def read_manifest(path: Path) -> dict[str, Any]:
    """The run's ``manifest.json``. Raises: RunError if there is none, or it is of a newer format."""
    path = Path(path)
    with explained(path, "read", kind=PlaceError):
        there = path.is_dir()
    if not there:
        raise PlaceError(f"{path}: no such run directory")
    if not os.path.lexists(path / MANIFEST):
        raise PlaceError(
            f"{path}: got no manifest.json, expected a run; give the directory that training wrote"
        )
    manifest = read_json(path, MANIFEST)
    if manifest.get("format") != FORMAT:
        raise RunError(
            f"{path}: got a run of format {quote(manifest.get('format'))}, expected {FORMAT}; use the "
            "version of kalman-rl that wrote it"
        )
    return manifest


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of the run's ``metrics.jsonl``; lines that are no rows (a torn last one) are skipped with a warning.

    Raises: RunError if there is no such file.
    """
    rows, bad = metrics_rows(path)
    if bad:
        logger.warning("%s: skipped %d unreadable line(s)", Path(path) / "metrics.jsonl", bad)
    return rows


def metrics_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows of the run's ``metrics.jsonl`` as written, and how many lines are no rows; NaN and infinity are None.

    A row has a ``kind``, a whole ``step`` and, if any, a ``time`` of at least 0. Raises: RunError if there is no
    such file.
    """
    rows, bad = [], 0
    for line in read_lines(path, "metrics.jsonl"):
        try:
            row = parse_json(line, finite=True)
            valid = isinstance(row["kind"], str) and type(row["step"]) is int and row.get("time", 0) >= 0
            valid = valid and abs(row["step"]) <= LARGEST_STEP
        except (ValueError, KeyError, TypeError, AttributeError):
            valid = False
        if valid:
            rows.append(row)
        else:
            bad += bool(line.strip())
    return rows, bad


def find_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Every run in and below the given directories, once each, in the order of their paths.

    Raises: ConfigError for no path at all; RunError for a path that is not a directory or holds no run.
    """
    if isinstance(paths, str | Path):
        raise ConfigError(f"runs: got {quote(str(paths))}, expected a list of run directories")
    if not paths:
        raise ConfigError("runs: got no run directory, expected at least one")
    found: dict[Path, RunRecord] = {}
    for path in map(Path, paths):
        with explained(path, "read", kind=PlaceError):
            there, is_folder = path.exists(), path.is_dir()
        if not is_folder:
            what = "a file" if there else "nothing there"
            raise PlaceError(f"run directory: got {what}, expected a directory; {path}; check the path")
        folders = list(run_folders(path))
        if not folders:
            raise PlaceError(
                f"run directory: got no manifest.json in {path} or below, expected a run; "
                "give the directory that training wrote"
            )
        for folder in folders:
            if (key := folder.resolve()) not in found:
                name = path.resolve().name if folder == path else folder.relative_to(path).as_posix()
                found[key] = read_run(folder, name)
    return list(found.values())


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """Read one run directory; problems are collected in ``notes``, never raised."""
    notes: list[str] = []
    manifest = _manifest_of(path, notes)
    labels = _scalars(manifest.get("labels"))
    if "seed" not in labels and manifest.get("seed") is not None:
        labels["seed"] = clean(manifest["seed"], 20)
    train, evals = _metrics_of(path, notes)
    git = _scalars(manifest.get("git"))
    facts = {
        key: text for key, text in _scalars(manifest).items() if key not in ("format", "status", "folder")
    }
    facts |= {f"git {key}": text for key, text in git.items()}
    return RunRecord(
        path=path,
        name=clean(name or path.name, 120),
        labels=labels,
        status=_status(path, manifest),
        seconds=number(manifest.get("seconds")),
        facts=facts,
        versions=_scalars(manifest.get("versions")),
        config=_config_of(path, notes),
        train=train,
        evals=evals,
        notes=notes,
    )


def _status(path: Path, manifest: dict[str, Any]) -> str:
    """As the manifest says; a process that was killed could not write down that the run no longer goes on."""
    status = clean(manifest.get("status", "unknown"), 20)
    return "killed" if status == "running" and not is_written(path) else status


def is_written(path: Path) -> bool:
    """Whether a process holds the lock of a run. Asked with a shared lock, given back at once."""
    with contextlib.suppress(RunError), opened(path, LOCK, MAX_JSON) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def number(value: object) -> float | None:
    """A finite float of at most ``LARGEST``, or None for anything else."""
    if not isinstance(value, (int, float)):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if abs(result) <= LARGEST else None


def _scalars(table: object) -> dict[str, str]:
    if not isinstance(table, dict):
        return {}
    return {clean(k, 40): clean(v) for k, v in table.items() if isinstance(v, (str, int, float)) and v != ""}


def _manifest_of(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return read_json(path, MANIFEST)
    except RunError:
        notes.append("manifest.json could not be read; labels and versions are missing")
        return {}


def _config_of(path: Path, notes: list[str]) -> str:
    try:
        text = read_bytes(path, "config.toml", MAX_TOML).decode(errors="replace")
    except RunError as error:
        notes.append(left_out(path, "config.toml", error))
        return ""
    return clean(text, 20_000, breaks=True)


def left_out(path: Path, name: str, error: RunError) -> str:
    """Why a file of a run is not shown, without its place on this machine."""
    if not os.path.lexists(path / name):
        return f"{name} is missing"
    return f"{name} could not be read: {clean(str(error).removeprefix(f'{path / name}: '), 120)}"


def _metrics_of(path: Path, notes: list[str]) -> tuple[list[Row], list[Row]]:
    """Train and eval rows by step; a step that was logged twice (after a resume) keeps the later values."""
    train: dict[int, Row] = {}
    evals: dict[int, Row] = {}
    rows: list[dict[str, Any]] = []
    torn = holes = lost = 0
    try:
        rows, torn = metrics_rows(path)
    except RunError as error:
        notes.append(left_out(path, "metrics.jsonl", error) + ", so there is nothing to draw")
    for event in rows:
        row = _numbers(event)
        holes += sum(map(math.isnan, row.values()))
        if event["kind"] == "gap":
            lost += int(number(event.get("rows_lost")) or 0)
        table = {"train": train, "eval": evals}.get(event["kind"])
        if table is not None:
            table.setdefault(event["step"], {}).update(row)
    if lost:
        notes.append(
            f"{lost} {'row' if lost == 1 else 'rows'} of metrics could not be written during the run"
        )
    if torn:
        lines_word = "line" if torn == 1 else "lines"
        notes.append(f"{torn} {lines_word} of metrics.jsonl could not be read and {_was(torn)} left out")
    if holes:
        notes.append(
            f"{holes} {'value' if holes == 1 else 'values'} of metrics.jsonl {_was(holes)} not finite"
        )
    return [train[step] for step in sorted(train)], [evals[step] for step in sorted(evals)]


def _was(count: int) -> str:
    return "was" if count == 1 else "were"


def _numbers(event: dict[str, Any]) -> Row:
    """The numbers of a row of metrics; NaN for those that are not finite."""
    row: Row = {}
    for key, value in event.items():
        if key != "kind" and (value is None or isinstance(value, (int, float))):
            finite = number(value)
            row[key] = math.nan if finite is None else finite
    return row
