"""Reading the files of a run, which may be somebody else's: regular files inside it, of bounded size and depth.

Every file of a run is opened here. No link is followed below the run's folder, so that a received run shows nothing
that lies outside of it; a pipe, device or folder in a file's place is named and not opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from kalman_rl.engine.runs.files import explained
from kalman_rl.errors import RunError, quote

MAX_JSON = 16_000_000
"""Bytes of a file that is one JSON object."""
MAX_TOML = 64_000
"""Bytes of a run's settings; reading a key of n dotted parts takes n squared steps."""
MAX_ROWS = 512_000_000
"""Bytes of a file of JSON lines."""
MAX_LINE = 4_000_000
"""Bytes of one line; a longer one counts as damaged."""
MAX_DEPTH = 32
"""Levels of objects, lists and tables in one another."""
DEEPEST_FOLDER = 32
"""Levels of folders that are searched for runs."""
MANIFEST = "manifest.json"
RUN_FOLDERS = frozenset({"checkpoints", "model", "traces"})
"""Folders of a run that hold no other run."""

_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextlib.contextmanager
def opened(run: Path, name: str, limit: int) -> Iterator[BinaryIO]:
    """A regular file of a run, open for reading.

    Args:
        run: folder of the run; it is the reader's own choice and may be reached through links.
        name: path of the file inside it, with slashes.
        limit: in bytes.

    Raises: RunError that names the file, for a link on the way, something that is no file, or a file above ``limit``.
    """
    path = Path(run) / name
    with explained(path, "read"), contextlib.ExitStack() as stack:
        descriptor = _descriptor(Path(run), name)
        stack.callback(os.close, descriptor)
        state = os.fstat(descriptor)
        _expect_file(path, state.st_mode)
        if state.st_size > limit:
            raise RunError(f"{path}: got {state.st_size:,} bytes, expected no more than {limit:,} bytes")
        yield stack.enter_context(os.fdopen(descriptor, "rb", closefd=False))


def _descriptor(run: Path, name: str) -> int:
    *folders, last = PurePosixPath(name).parts
    if not {"/", ".."}.isdisjoint([*folders, last]):
        raise RunError(f"{run}: got the name {quote(name)}, expected one inside the run")
    here = os.open(run, _FOLDER)
    try:
        for part in folders:
            inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = inner
        # Asked first, because opening a device can move it; the open file is asked again.
        _expect_file(run / name, os.stat(last, dir_fd=here, follow_symlinks=False).st_mode)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(last, flags, dir_fd=here)
    finally:
        os.close(here)


def _expect_file(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise RunError(f"{path}: got {kind}, expected a regular file inside the run")


def read_bytes(run: Path, name: str, limit: int) -> bytes:
    """Content of a file of a run. Raises: RunError as :func:`opened`."""
    with opened(run, name, limit) as file:
        data = file.read(limit + 1)
    if len(data) > limit:  # it has grown
        raise RunError(f"{Path(run) / name}: got more than {limit:,} bytes")
    return data


def read_lines(run: Path, name: str, limit: int = MAX_ROWS, longest: int = MAX_LINE) -> Iterator[bytes]:
    """Lines of a file of a run, one at a time; one above ``longest`` is cut. Raises: RunError as :func:`opened`."""
    with opened(run, name, limit) as file:
        left = limit
        while left > 0 and (line := file.readline(longest)):
            left -= len(line)
            yield line
            while left > 0 and len(line) == longest and not line.endswith(b"\n"):
                line = file.readline(longest)
                left -= len(line)


def read_json(run: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a run. Raises: RunError as :func:`opened`, and if it is none."""
    data = read_bytes(run, name, MAX_JSON)
    value = None
    with contextlib.suppress(ValueError):
        value = parse_json(data)
    if not isinstance(value, dict):
        raise RunError(f"{Path(run) / name}: got no JSON object; the file is damaged")
    return value


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """A JSON value; with ``finite``, NaN and infinity are None. Raises: ValueError, also beyond ``MAX_DEPTH``.

    >>> parse_json("[NaN]", finite=True)
    [None]
    """
    try:
        value = json.loads(text, parse_constant=(lambda name: None) if finite else None)
    except RecursionError:
        value = _NESTED
    return _shallow(value)


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML table. Raises: ValueError, also beyond ``MAX_DEPTH``."""
    try:
        value: Any = tomllib.loads(text)
    except RecursionError:
        value = _NESTED
    table: dict[str, Any] = _shallow(value)
    return table


_NESTED = object()


def _shallow(value: Any) -> Any:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for outer in level
            if isinstance(outer, dict | list)
            for part in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(part, dict | list)
        ]
        if not level:
            break
    if level or value is _NESTED:
        raise ValueError(f"got more than {MAX_DEPTH} levels in one another")
    return value


def names_in(run: Path, folder: str) -> list[str]:
    """Names in a folder of a run, in order; none if it is missing or a link."""
    try:
        here = os.open(Path(run), _FOLDER)
        try:
            inner = os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=here)
        finally:
            os.close(here)
        try:
            return sorted(os.listdir(inner))
        finally:
            os.close(inner)
    except OSError:
        return []


def run_folders(root: Path) -> Iterator[Path]:
    """Every folder with a manifest from ``root`` down, in order of their paths.

    No link is followed; hidden folders and a run's own are not entered, nor any beyond ``DEEPEST_FOLDER`` levels.
    """
    stack = [(Path(root), 0)]
    while stack:
        folder, depth = stack.pop()
        inner, is_run = [], False
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    is_run |= entry.name == MANIFEST
                elif entry.name[:1] != ".":
                    inner.append(entry.name)
        if is_run:
            yield folder
            inner = [name for name in inner if name not in RUN_FOLDERS]
        if depth < DEEPEST_FOLDER:
            stack += [(folder / name, depth + 1) for name in sorted(inner, reverse=True)]
