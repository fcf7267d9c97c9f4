"""Checkpoints that can be trusted: ``complete.json``, written last, holds the SHA-256 of every file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from kalman_rl.engine.runs.files import FORMAT, explained, sync, write_file
from kalman_rl.engine.runs.received import MAX_JSON, read_bytes, read_json
from kalman_rl.errors import RunError, quote

SEAL = "complete.json"

CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})")


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint.

    >>> step_of(Path("checkpoint-20"))
    20
    """
    return int(folder.name.rpartition("-")[2])


def seal_checkpoint(folder: Path) -> None:
    """Sync every file of a checkpoint to disk, then write ``complete.json`` with their sizes and SHA-256.

    Raises: RunError if ``trainer_state.json`` is missing, something is neither file nor directory, or a weight is NaN
        or infinite.
    """
    content = _checkpoint_content(Path(folder), flush=True)
    _check_weights(Path(folder))
    write_file(Path(folder) / SEAL, content)
    sync(Path(folder).parent)


def verify_checkpoint(folder: Path) -> None:
    """Check that a checkpoint is exactly what was sealed. Raises: RunError saying what differs."""
    folder = Path(folder)
    if not (folder / SEAL).is_file():
        raise RunError(f"{folder}: has no {SEAL}: the save was cut short")
    sealed = read_json(folder, SEAL)
    if sealed.get("format") != FORMAT:
        raise RunError(
            f"{folder}: got a checkpoint of format {quote(sealed.get('format'))}, expected {FORMAT}"
        )
    content = _checkpoint_content(folder)
    if read_bytes(folder, SEAL, MAX_JSON) != content:
        then, now = sealed.get("files"), json.loads(content)["files"]
        names = now.keys() | (then.keys() if isinstance(then, dict) else set())
        changed = sorted(n for n in names if not isinstance(then, dict) or then.get(n) != now.get(n)) or [
            SEAL
        ]
        raise RunError(f"{folder}: changed since it was saved: {', '.join(changed[:5])}")
    _check_weights(folder)


def _check_weights(folder: Path) -> None:
    from kalman_rl.hosts.state import broken_tensor  # here, because it brings in torch

    if (name := broken_tensor(folder)) is not None:
        raise RunError(f"{folder}: got NaN or infinity in {name}, expected finite weights; take an older one")


def _checkpoint_content(folder: Path, *, flush: bool = False) -> bytes:
    """What ``complete.json`` must contain, byte for byte, about the files that are there now."""
    match = CHECKPOINT.fullmatch(folder.name)
    if not match:
        raise RunError(f"{folder}: got the name {quote(folder.name)}, expected checkpoint-N")
    files = digests(folder, flush=flush)
    if "trainer_state.json" not in files:
        raise RunError(f"{folder}: got no trainer_state.json, expected a complete checkpoint")
    content = {"format": FORMAT, "step": int(match[1]), "files": files}
    return (json.dumps(content, indent=1) + "\n").encode()


def digests(folder: Path, *, flush: bool = False) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a folder but its seal, by name.

    Args: flush: sync each file to disk.
    Raises: RunError for something that is neither file nor directory.
    """
    files: dict[str, dict[str, Any]] = {}
    with explained(folder, "read"):
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode) and path.name.startswith(".tmp-"):
                continue
            if stat.S_ISREG(mode) and name != SEAL:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                    files[name] = {"size": os.fstat(file.fileno()).st_size, "sha256": digest}
                    if flush:
                        os.fsync(file.fileno())
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise RunError(f"{path}: got a link or device in {folder.name}, expected files only")
            elif flush and stat.S_ISDIR(mode):
                sync(path)
    return files
