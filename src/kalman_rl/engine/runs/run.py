"""The run directory: the only place that training writes to.

Files appear complete or not at all (written beside, synced, renamed); ``metrics.jsonl`` grows by whole
lines; a checkpoint counts once ``complete.json``, written last, holds the SHA-256 of every file in it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kalman_rl.engine.runs.checkpoints import CHECKPOINT, SEAL, seal_checkpoint, step_of, verify_checkpoint
from kalman_rl.engine.runs.files import append_row, explained, replacing, write_all, write_file
from kalman_rl.engine.runs.journals import drop_after
from kalman_rl.engine.runs.manifest import new_manifest, redacted, redacted_toml
from kalman_rl.engine.runs.reading import LOCK, metrics_rows, read_manifest, read_metrics
from kalman_rl.engine.runs.traces import trace_table
from kalman_rl.errors import PlaceError, RunError, quote
from kalman_rl.terminal import logger

STATUSES = ("running", "finished", "interrupted", "failed", "stopped: disk")


class Run:
    """A run directory opened for writing by this process, and by no other until :meth:`close`.

    As a context manager it closes the run; an exception marks a run that is still "running" as failed
    (KeyboardInterrupt: interrupted).
    """

    def __init__(self, path: Path, manifest: dict[str, Any], lock: Any) -> None:
        """Internal: use :meth:`create` or :meth:`open`."""
        self.path, self.manifest, self._lock = path, manifest, lock
        self._lost = 0  # rows that did not fit on the disk since the last one that did
        self._warned = False
        self._before = 0.0  # seconds on the run's clock when this process took over
        self._start = time.monotonic()
        self._metrics: int | None = None
        self._verified: set[Path] = set()  # checkpoints sealed by this process

    @classmethod
    def create(
        cls, path: Path, config_toml: str, labels: Mapping[str, Any], *, overwrite: bool = False
    ) -> Run:
        """Make a new run directory, with parents.

        Args:
            path: its last part has 1 to 100 of A-Z a-z 0-9 . _ - and does not start with a dot.
            config_toml: the resolved configuration, kept as ``config.toml``.
            labels: what the report groups by, e.g. method, seed; the seed also becomes a separate entry.
            overwrite: replace a run that is there; a directory that is no run is never replaced, one whose beginning
                was cut short always is.

        Raises: RunError if it exists, cannot be written, or another process writes it.
        """
        path = Path(path)
        if problem := name_problem(path):
            raise PlaceError(f"run: {problem}")
        _refuse_existing(path, overwrite)
        with explained(path, "create", kind=PlaceError):
            path.mkdir(parents=True, exist_ok=True)
        run = cls(path, new_manifest(labels), _acquire(path))
        try:
            _refuse_existing(path, overwrite)  # again: another process may have been quicker
            with explained(path, "create"):
                # The manifest goes last, so that what is left may still be replaced, and comes last: a folder that has
                # one is a run that resumes.
                (path / "config.toml").unlink(missing_ok=True)
                for old in sorted(path.iterdir(), key=lambda old: old.name == "manifest.json"):
                    if old.name != LOCK:
                        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
                (path / "checkpoints").mkdir()
                run._open_metrics()
                write_file(path / "config.toml", redacted_toml(config_toml).encode())
                run.update_manifest()
        except BaseException as error:
            run.__exit__(type(error) if (path / "manifest.json").is_file() else None)
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open a run to continue it.

        Raises: RunError if it is no run, of a newer format, or another process writes it.
        """
        path = Path(path)
        read_manifest(path)
        if not os.path.lexists(path / "config.toml"):
            raise RunError(
                f"{path}: got no config.toml, expected the settings of the run, whose beginning was cut short; begin "
                f"it again with `kalman-rl train --run {path} --overwrite`"
            )
        lock = _acquire(path)
        try:
            run = cls(path, read_manifest(path), lock)
            with explained(path, "open"):
                for leftover in path.rglob(".tmp-*"):  # of a process that was killed while writing
                    if leftover.is_file():
                        leftover.unlink()
                run._open_metrics()
            rows = read_metrics(path)
            run._before = float(rows[-1].get("time", 0)) if rows else 0.0
            run.update_manifest(pid=os.getpid())
        except BaseException:
            lock.release()
            raise
        return run

    def log(self, kind: str, step: int, **values: Any) -> None:
        """Append one row to ``metrics.jsonl``; what is not a finite number becomes null.

        A full disk does not stop the run: one warning, and a row of kind "gap" with the number of rows lost
        as soon as there is room again.

        Args: kind: of the row, e.g. "train", "eval". step: optimizer step. values: numbers by name.
        Raises: RunError after the run was closed.
        """
        stamp = {"step": int(step), "time": round(self._before + time.monotonic() - self._start, 3)}
        rows = [{"kind": kind, **stamp, **{name: _finite(value) for name, value in values.items()}}]
        if self._metrics is None:
            raise RunError(f"{self.path}: got a metric after the run was closed, expected it before finish()")
        if self._lost:
            rows.insert(0, {"kind": "gap", **stamp, "rows_lost": self._lost})
        end = os.fstat(self._metrics).st_size
        try:
            write_all(self._metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())
            self._lost = 0
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._metrics, end)  # no half line in front of the next row
            self._lost += 1
            self._warn_once(self.path / "metrics.jsonl", error)

    def write_traces(self, step: int, columns: Mapping[str, Sequence[Any]]) -> Path | None:
        """Write ``traces/step-000012.parquet``, one row per token, with the columns of ``TRACE_COLUMNS``.

        Args:
            columns: equally long lists; ``step`` and the nullable ones may be left out.

        Returns: the file, or None if it could not be written (one warning; the run goes on).
        Raises: ShapeError for missing, unknown, ragged or wrongly typed columns.
        """
        import pyarrow.parquet  # here, because it takes longer to import than all else in this file

        path = self.path / "traces" / f"step-{step:06d}.parquet"
        table = trace_table(step, columns)
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                pyarrow.parquet.write_table(table, temporary, compression="zstd")
        except OSError as error:
            self._warn_once(path, error)
            return None
        return path

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append a row to the JSON lines file ``name``; if that fails, one warning, and the run goes on."""
        path = self.path / name
        try:
            append_row(path, row)
        except OSError as error:
            self._warn_once(path, error)

    def update_manifest(self, **changes: Any) -> None:
        """Change entries of ``manifest.json``; a reader sees the old file or the new one."""
        manifest = redacted({**self.manifest, **changes})
        write_file(self.path / "manifest.json", (json.dumps(manifest, indent=2, default=str) + "\n").encode())
        self.manifest = manifest

    def finish(self, status: str, seconds: float | None = None) -> None:
        """Record how the run ended ("finished", "interrupted", "failed" or "stopped: disk") and close it.

        Args:
            status: how it ended.
            seconds: time spent by this process (default: since it opened the run); a resumed run adds up.

        Raises: RunError for another status, or a manifest that cannot be written; the files are closed all the same.
        """
        if status not in STATUSES[1:]:
            raise RunError(f"status: got {quote(status)}, expected one of {', '.join(STATUSES[1:])}")
        seconds = time.monotonic() - self._start if seconds is None else seconds
        try:
            self.update_manifest(status=status, seconds=round(self._before + seconds, 3))
        finally:
            self.close()

    def close(self) -> None:
        """Release the files and the lock; closing twice is harmless."""
        if self._metrics is not None:
            os.close(self._metrics)
            self._metrics = None
        self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is not None and self._metrics is not None and self.manifest.get("status") == "running":
                self.finish("interrupted" if issubclass(kind, KeyboardInterrupt) else "failed")
        finally:
            self.close()

    def seal_checkpoint(self, folder: Path) -> None:
        """Mark ``checkpoints/checkpoint-N`` as complete; see :func:`seal_checkpoint`."""
        seal_checkpoint(folder)
        self._verified.add(Path(folder))

    def retain(self, keep: int, newest: Path) -> None:
        """Delete checkpoints up to ``newest``, which was just sealed, but the last ``keep`` by step and the newest one
        that verifies. What a save that was cut short left behind goes too.

        By step, because clocks are set back and folders are copied; later ones are of a run that went further.
        """
        old = [each for each in self._folders() if step_of(each) <= step_of(newest)]
        kept = [each for each in old if (each / SEAL).is_file()][-keep:]
        if (good := self._newest_intact(old)) is not None:
            kept.append(good)
        for folder in old:
            if folder not in kept:
                with contextlib.suppress(OSError):
                    (folder / SEAL).unlink()  # first, so that half a folder never counts
                shutil.rmtree(folder, ignore_errors=True)

    def _newest_intact(self, folders: Sequence[Path]) -> Path | None:
        for folder in reversed(folders):
            if folder in self._verified:
                return folder
            with contextlib.suppress(RunError):
                verify_checkpoint(folder)
                return folder
        return None

    def checkpoints(self) -> list[Path]:
        """Checkpoints that were completely written, oldest first; contents are not verified."""
        return [folder for folder in self._folders() if (folder / SEAL).is_file()]

    def latest_checkpoint(self, serves: Callable[[int], bool] = lambda step: True) -> Path:
        """The newest checkpoint whose contents verify; reports which newer ones were skipped, and why.

        Args: serves: whether a checkpoint of a step is wanted.
        Raises: RunError if there is none.
        """
        for folder in [each for each in reversed(self._folders()) if serves(step_of(each))]:
            try:
                verify_checkpoint(folder)
                return folder
            except RunError as error:
                logger.warning("skipped a checkpoint: %s", error)
        raise RunError(
            f"{self.path}: got no intact checkpoint, expected at least one to continue from; begin again with "
            f"`kalman-rl train --config {self.path / 'config.toml'} --run {self.path} --overwrite`"
        )

    def truncate(self, step: int) -> int:
        """Drop what was written after ``step``, which a run resumed there writes again: rows, traces and lines that are
        no rows, such as one cut short by a kill. Returns how many rows of metrics.
        """
        rows, bad = metrics_rows(self.path)
        kept = [row for row in rows if row["step"] <= step]
        if bad:
            logger.warning("%s: dropped %d unreadable line(s)", self.path / "metrics.jsonl", bad)
        write_file(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept).encode())
        drop_after(self.path, step)
        with explained(self.path, "open"):
            self._open_metrics()
        self._before, self._start = float(kept[-1].get("time", 0)) if kept else 0.0, time.monotonic()
        return len(rows) - len(kept)

    def _folders(self) -> list[Path]:
        with explained(self.path, "read"):
            parent = self.path / "checkpoints"
            found = [path for path in parent.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
        return sorted(found, key=step_of)

    def _open_metrics(self) -> None:
        if self._metrics is not None:
            os.close(self._metrics)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._metrics = os.open(self.path / "metrics.jsonl", flags, 0o644)

    def _warn_once(self, path: Path, error: OSError) -> None:
        if not self._warned:
            logger.warning("cannot write %s (%s); the run goes on without it", path, error.strerror or error)
        self._warned = True


def name_problem(path: Path) -> str | None:
    """What is wrong with the last part of a run's path, or None.

    >>> name_problem(Path("runs/products-kpo")) is None
    True
    """
    name = Path(path).name
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name):
        return None
    return (
        f"got {quote(name, 120)} as a run's name, expected 1 to 100 of A-Z a-z 0-9 . _ - and no leading dot"
    )


def name_part(text: str) -> str:
    """A name of something else as a part of a run's name.

    >>> name_part("my_methods:soft")
    'my_methods-soft'
    """
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")[:40]


def _refuse_existing(path: Path, overwrite: bool) -> None:
    with explained(path, "create", kind=PlaceError):
        if path.exists() and not path.is_dir():
            raise PlaceError(f"{path}: exists and is no directory; choose another --run")
        there = _contents(path) if path.exists() else []
        is_run = (path / "manifest.json").is_file()
        empty = all(map(_is_beginning, there)) and [e.name for e in there] != ["config.toml"]
        began = (path / "config.toml").is_file() or any(path.glob("checkpoints/*"))
    if (is_run and not began) or (not is_run and empty):
        return
    if not overwrite:
        replace = ", replace it with --overwrite" if is_run else ""
        raise PlaceError(
            f"{path}: exists; continue it with `kalman-rl resume {path}`{replace}, or choose another --run"
            if is_run
            else f"{path}: exists and is no run; choose another --run"
        )
    if not is_run:
        raise PlaceError(f"{path}: exists and is no run, so it is not replaced; choose another --run")


def _is_beginning(entry: Path) -> bool:
    """Whether a beginning that was cut short may have left this, with nothing of a user in it."""
    if entry.name == "checkpoints":
        return entry.is_dir() and not any(entry.iterdir())
    return entry.name == "config.toml" or (entry.name == "metrics.jsonl" and not entry.stat().st_size)


def _contents(path: Path) -> list[Path]:
    """What lies in a run's folder, without the lock and without files that a killed process was writing."""
    return [e for e in path.iterdir() if e.name != LOCK and not e.name.startswith(".tmp-")]


def _acquire(path: Path) -> Any:
    from filelock import FileLock, Timeout

    lock = FileLock(path / LOCK)
    with explained(path, "lock", kind=PlaceError):
        try:
            lock.acquire(timeout=0.3, poll_interval=0.05)  # a reader may ask just now, see is_written
        except Timeout:
            try:
                who = f"process {read_manifest(path).get('pid')}"
            except RunError:
                who = "another process"
            raise RunError(f"{path}: {who} is writing this run; wait for it, or stop it") from None
    return lock


def _finite(value: Any) -> float | None:
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return value if math.isfinite(value) else None
