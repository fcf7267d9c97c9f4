"""Reading runs: directories with a ``manifest.json`` become :class:`Run` values, whatever is broken in them.

The reader is tolerant on purpose: a report is most wanted when something went wrong. Whatever had to be
left out is said in ``Run.notes``.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kalman_rl.errors import ConfigError, RunError

Row = dict[str, float]
UNFINISHED = frozenset({"running", "interrupted", "failed"})
SKIPPED_FOLDERS = frozenset({"checkpoints", "traces"})
LARGEST = 1e100
"""Beyond it a number is as good as infinite, and differences of such numbers would be."""
LARGEST_STEP = 2**52
"""Beyond it the next step is the same float."""
SHOWN_BREAKS = {"\n": "\n", "\t": "\t"}


@dataclass(frozen=True)
class Run:
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
    kept = SHOWN_BREAKS if breaks else {}
    shown = "".join(kept.get(char) or _visible(char) for char in cut)
    return shown + ("…" if len(text) > limit else "")


def _visible(char: str) -> str:
    hidden = unicodedata.category(char)[0] == "C" or char in "\u2028\u2029"
    return f"\\u{{{ord(char):x}}}" if hidden else char


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Every run below the given directories, once each, in the order of their paths.

    Raises: ConfigError for no path at all; RunError for a path that is not a directory or holds no run.
    """
    if isinstance(paths, str | Path):
        raise ConfigError(f"report: got {str(paths)!r}, expected a list of run directories")
    if not paths:
        raise ConfigError("report: got no run directory, expected at least one")
    found: dict[Path, Run] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            what = "a file" if path.exists() else "nothing there"
            raise RunError(f"run directory: got {what}, expected a directory; {path}; check the path")
        folders = list(_run_folders(path))
        if not folders:
            raise RunError(
                f"run directory: got no manifest.json in {path} or below, expected a run; "
                "give the directory that training wrote"
            )
        for folder in folders:
            name = folder.relative_to(path).as_posix()
            key = folder.resolve()
            if key not in found:
                found[key] = read_run(folder, path.resolve().name if name == "." else name)
    return list(found.values())


def _run_folders(root: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(name for name in inner if name not in SKIPPED_FOLDERS and name[:1] != ".")
        if "manifest.json" in files:
            yield Path(folder)


def read_run(path: Path, name: str | None = None) -> Run:
    """Read one run directory; problems are collected in ``notes``, never raised."""
    notes: list[str] = []
    manifest = _read_manifest(path, notes)
    labels = _scalars(manifest.get("labels"))
    if "seed" not in labels and manifest.get("seed") is not None:
        labels["seed"] = clean(manifest["seed"], 20)
    train, evals = _read_metrics(path, notes)
    git = _scalars(manifest.get("git"))
    facts = {key: text for key, text in _scalars(manifest).items() if key not in ("format", "status")}
    facts |= {f"git {key}": text for key, text in git.items()}
    return Run(
        path=path,
        name=clean(name or path.name, 120),
        labels=labels,
        status=clean(manifest.get("status", "unknown"), 20),
        seconds=number(manifest.get("seconds")),
        facts=facts,
        versions=_scalars(manifest.get("versions")),
        config=_read_config(path, notes),
        train=train,
        evals=evals,
        notes=notes,
    )


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


def _read_manifest(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(
            f"manifest.json could not be read ({type(error).__name__}); labels and versions are missing"
        )
        return {}
    if not isinstance(manifest, dict):
        notes.append("manifest.json is not a table; labels and versions are missing")
        return {}
    return manifest


def _read_config(path: Path, notes: list[str]) -> str:
    try:
        text = (path / "config.toml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        notes.append("config.toml is missing")
        return ""
    return clean(text, 20_000, breaks=True)


def _read_metrics(path: Path, notes: list[str]) -> tuple[list[Row], list[Row]]:
    """Train and eval rows by step; a step that was logged twice (after a resume) keeps the later values."""
    tables: dict[str, dict[int, Row]] = {"train": {}, "eval": {}}
    torn = holes = lost = 0
    try:
        with (path / "metrics.jsonl").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    continue
                parsed = _parse(line)
                if parsed is None:
                    torn += 1
                    continue
                kind, row, bad = parsed
                holes += bad
                if kind == "gap":
                    lost += int(number(row.get("rows_lost")) or 0)
                if kind in tables:
                    tables[kind].setdefault(int(row["step"]), {}).update(row)
    except OSError:
        notes.append("metrics.jsonl is missing, so there is nothing to draw")
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
    return tuple([rows[step] for step in sorted(rows)] for rows in tables.values())  # type: ignore[return-value]


def _was(count: int) -> str:
    return "was" if count == 1 else "were"


def _parse(line: str) -> tuple[str, Row, int] | None:
    """``(kind, numbers, how many of them are not finite)`` of one line, or None if it is not a row."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict):
        return None
    step = number(event.get("step"))
    if step is None or abs(step) > LARGEST_STEP or not isinstance(event.get("kind"), str):
        return None
    row: Row = {"step": step}
    for key, value in event.items():
        if key not in ("kind", "step") and (value is None or isinstance(value, (int, float))):
            finite = number(value)
            row[key] = math.nan if finite is None else finite
    return event["kind"], row, sum(math.isnan(value) for value in row.values())
