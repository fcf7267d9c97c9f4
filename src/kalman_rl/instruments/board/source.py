"""What the board shows: the report of a run, made anew when the run's files have changed."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kalman_rl.errors import KalmanRLError
from kalman_rl.instruments.board.page import notice
from kalman_rl.instruments.report import write_report

WATCHED_FILES = ("manifest.json", "metrics.jsonl", "alarms.jsonl", "config.toml")
SKIPPED = ("checkpoints", "model", "traces")


@dataclass(frozen=True)
class Seen:
    """State of the run's files at one look: ``version`` changes when they do; empty = the run is gone."""

    version: str
    text: str


class Source:
    """Reads a run's folder and never writes to it; takes no lock, so that training cannot wait for it.

    Args:
        run: directory of a run, or of a study.
        least: seconds between two makings of the page, or as long as the last one took, if longer.
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
        size = sum(stamp[1] for stamp in stamps if stamp[0].endswith("metrics.jsonl"))
        clock = time.strftime("%H:%M:%S", time.localtime(max(stamp[2] for stamp in stamps) / 1e9))
        text = f"{self.run.name}: last change {clock}, {size:,} bytes of metrics"
        return Seen(f"{hash(tuple(stamps)) & 0xFFFFFFFFFFFF:x}", text)

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
            start = time.monotonic()
            try:
                made = self._make()
            except (KalmanRLError, OSError) as error:
                if not self.look().version:
                    return 410, notice(self.look().text).encode()
                return 503, notice(f"The report cannot be made now: {error}").encode()
            took = time.monotonic() - start
            self._made, self._next = (seen.version, made), time.monotonic() + max(self.least, took)
            return 200, made

    def _make(self) -> bytes:
        with tempfile.TemporaryDirectory(prefix="kalman-rl-board-") as folder:
            return write_report([self.run], Path(folder) / "page.html").read_bytes()

    def _stamps(self) -> Iterator[tuple[str, int, int]]:
        """(name, size, time of change) of the files that the page shows."""
        for folder, inner, _ in os.walk(self.run):
            inner[:] = sorted(name for name in inner if name not in SKIPPED and name[:1] != ".")
            for name in WATCHED_FILES:
                try:
                    state = os.stat(os.path.join(folder, name), follow_symlinks=False)
                except OSError:
                    if name == "manifest.json":  # not a run
                        break
                    continue
                yield os.path.join(os.path.relpath(folder, self.run), name), state.st_size, state.st_mtime_ns
