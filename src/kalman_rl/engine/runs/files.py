"""Files that are whole or absent, and the system's errors as RunErrors that name the path."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kalman_rl.errors import KalmanRLError, NoSpaceError, PlaceError, RunError

FORMAT = 1
"""Version of the layout, in ``manifest.json`` and ``complete.json``."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""The system's numbers for a disk without room, or a user without any left."""


@contextlib.contextmanager
def explained(
    path: Path, action: str, needed: int | None = None, kind: type[RunError] = RunError
) -> Iterator[None]:
    """Turn the operating system's errors into a RunError with path, reason and, for a write, free space.

    A full disk is a NoSpaceError, everything else of ``kind``.
    """
    try:
        yield
    except KalmanRLError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if needed is not None:
            with contextlib.suppress(OSError):
                reason += f"; needed {needed:,} bytes, free {shutil.disk_usage(path.parent).free:,}"
        if getattr(error, "errno", None) in FULL:
            kind = NoSpaceError
        raise kind(f"{path}: cannot {action}: {reason}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` at which to make a file or a folder; it becomes ``path`` if nothing is raised.

    After a crash at any time the old version or the new one is there, whole. Two processes that write the same
    path do not meet. A folder replaces nothing, or an empty folder.

    Raises: OSError as the system does.
    """
    temporary = path.parent / f".tmp-{secrets.token_hex(4)}-{path.name}"
    try:
        yield temporary
        for made in [temporary, *temporary.rglob("*")]:
            sync(made)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """:func:`replacing` at a name that somebody gave: only a regular file is replaced. Raises: also PlaceError."""
    path = Path(path)
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise PlaceError(
            f"{path}: got a link, folder or device there, expected a file or nothing; choose another output"
        )
    with replacing(path) as temporary:
        yield temporary


def write_file(path: Path, data: bytes) -> None:
    """Replace a file by ``data``, whole or not at all. Raises: RunError with path, reason and free space."""
    with explained(path, "write", len(data)), replacing(path) as temporary:
        temporary.write_bytes(data)


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte, however many calls it takes."""
    while data:
        data = data[os.write(descriptor, data) :]


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line to a file that is no link, in one write. Raises: OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    try:
        write_all(descriptor, (json.dumps(row) + "\n").encode())
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Make the content of a file or the entries of a folder durable (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
