"""Rewards on disk beside their completions, so that a resumed run scores no batch again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from kalman_rl.terminal import logger


def digest(*content: Any) -> str:
    """SHA-256 of what was scored, the same for the same content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()


class RewardRecord:
    """A file of JSON lines: the digest of completions, the optimizer step they were sampled at, and their answer.

    Of a call whose completions come again after a resume the answer is read instead of asked for. An answer is written
    before it is trained on. A run that starts at step 0 forgets an older record, unless ``keep``.

    Args: path: of the file. keep: this run goes on, also at step 0.
    """

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        self.path, self.keep = path, keep
        self._known: dict[tuple[int, str], deque[dict[str, Any]]] | None = None
        self._warned = False

    def _read(self, step: int) -> None:
        """Begin at an optimizer step."""
        self._known = defaultdict(deque)
        with contextlib.suppress(FileNotFoundError):
            if step == 0 and not self.keep:
                self.path.unlink()
                return
            for line in self.path.read_bytes().splitlines():
                with contextlib.suppress(
                    ValueError, KeyError, TypeError, StopIteration
                ):  # a line that was cut off
                    row = json.loads(line)
                    if row["step"] >= step:
                        answers = self._known[row["step"], row["completions"]]
                        if row["again"]:  # of what had failed
                            del answers[next(i for i, answer in enumerate(answers) if answer["failed"])]
                        answers.append(row["answer"])

    def find(self, step: int, completions: str) -> dict[str, Any] | None:
        """The answer to a call that was recorded before the resume, once."""
        if self._known is None:
            self._read(step)
        assert self._known is not None
        known = self._known.get((step, completions))
        return known.popleft() if known else None

    def add(self, step: int, completions: str, answer: dict[str, Any], *, again: bool = False) -> None:
        """Append an answer, or that of a call whose recorded one had failures. Where it cannot be written there is one
        warning, and a resumed run asks again."""
        row = {"step": step, "completions": completions, "again": again, "answer": answer}
        line = json.dumps(row) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                if file.tell() and not self._ends_in_newline():
                    line = "\n" + line
                file.write(line.encode())
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "rewards: cannot write %s (%s); a resumed run scores again", self.path, error.strerror
                )
            self._warned = True

    def _ends_in_newline(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
