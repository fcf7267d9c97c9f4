"""What the board shows: the report of a run, made anew when the run's files have changed."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kalman_rl.engine.runs.reading import is_written
from kalman_rl.engine.runs.received import run_folders
from kalman_rl.errors import KalmanRLError
from kalman_rl.instruments.board.page import notice
from kalman_rl.instruments.board.progress import progress_of
from kalman_rl.instruments.report import write_report

WATCHED_FILES = ("manifest.json", "metrics.jsonl", "alarms.jsonl", "config.toml")
MAX_RUNS = 100
"""Of a study whose progress is read; the others are counted."""
SHARE = 0.1
"""Of one processor's time that making pages may take while a run goes on."""


@dataclass(frozen=True)
class Seen:
    """State of the run's files at one look: ``version`` changes when they do; empty = the run is gone. ``share`` is
    the part of it that is done."""

    version: str
    text: str
    share: float = 0.0


class Source:
    """Reads a run's folder and never writes to it; keeps no lock, so that training does not wait for it.

    Args:
        run: directory of a run, or of a study.
        least: seconds between two makings of the page, or more, so that they take ``SHARE`` of one processor at most.
    """

    def __init__(self, run: Path, least: float = 2.0) -> None:
        self.run, self.least = Path(run), least
        self._making = threading.Lock()
        self._made: tuple[str, bytes] = ("", b"")
        self._next = 0.0

    def look(self) -> Seen:
        """What the run's files are like now; cheap."""
        stamps = list(self._stamps())
        if not stamps:
            return Seen(
                "", f"{self.run}: the run folder is gone, or holds no run any more; nothing more will come"
            )
        clock = time.strftime("%H:%M:%S", time.localtime(max(stamp[2] for stamp in stamps) / 1e9))
        text, share = self._progress()
        return Seen(
            f"{hash(tuple(stamps)) & 0xFFFFFFFFFFFF:x}",
            f"{self.run.name}: {text} · last change {clock}",
            share,
        )

    def _progress(self) -> tuple[str, float]:
        """How far the run is, or the runs of a study are, in words and as a part."""
        folders = list(run_folders(self.run))
        found = [(progress_of(folder), is_written(folder)) for folder in folders[:MAX_RUNS]]
        if len(folders) == 1:
            only, going = found[0]
            begun = "preparing: no step is done yet" if going else "no step was done"
            return (only.text(going=going), only.share) if only else (begun, 0.0)
        done = [progress.share if progress else 0.0 for progress, _ in found]
        through, live = sum(share == 1 for share in done), sum(going for _, going in found)
        said = f"{len(folders)} runs, {through} through all steps, {live} going on"
        return said, sum(done) / len(done)

    def page(self) -> tuple[int, bytes]:
        """Status and the report's bytes: 200, 410 if the run is gone, 503 if it cannot be shown now."""
        with self._making:
            seen = self.look()
            if not seen.version:
                return 410, notice(seen.text).encode()
            if seen.version == self._made[0]:
                return 200, self._made[1]
            if (early := self._next - time.monotonic()) > 0:  # wait rather than show what is out of date
                time.sleep(early)
                seen = self.look()
            start = time.process_time()
            try:
                made = self._make()
            except (KalmanRLError, OSError) as error:
                if not self.look().version:
                    return 410, notice(self.look().text).encode()
                return 503, notice(f"The report cannot be made now: {error}").encode()
            pause = max(self.least, (time.process_time() - start) * (1 / SHARE - 1))
            self._made, self._next = (seen.version, made), time.monotonic() + pause
            return 200, made

    def _make(self) -> bytes:
        with tempfile.TemporaryDirectory(prefix="kalman-rl-board-") as folder:
            return write_report([self.run], Path(folder) / "page.html").read_bytes()

    def _stamps(self) -> Iterator[tuple[str, int, int]]:
        """(name, size, time of change) of the files that the page shows, and whether a process writes them."""
        for folder in run_folders(self.run):
            yield str(folder), int(is_written(folder)), 0
            for name in WATCHED_FILES:
                try:
                    state = (folder / name).lstat()
                except OSError:
                    continue
                yield str(folder / name), state.st_size, state.st_mtime_ns
