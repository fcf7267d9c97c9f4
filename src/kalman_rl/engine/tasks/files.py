"""Rows of a file as it has them: JSON Lines, Parquet or CSV, each with the place it stands at."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from kalman_rl.engine.tasks.task import Row
from kalman_rl.errors import ConfigError, quote


def read_rows(file: Path) -> list[tuple[str, Row]]:
    """All rows, each after its place, for errors.

    Raises: ConfigError for an ending that no reader knows, and for what is unreadable, with file and line.
    """
    if file.suffix not in READERS:
        raise ConfigError(
            f"rows: got a file named {quote(file.name)}, expected one ending in {', '.join(READERS)}; {file}"
        )
    return list(READERS[file.suffix](file))


def _json_lines(file: Path) -> Iterator[tuple[str, Row]]:
    for number, raw in enumerate(_read(file).split(b"\n"), start=1):
        where = f"{file}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"rows: got bytes that are not UTF-8 ({error.reason} at byte {error.start}), expected UTF-8 "
                f"text; {where}; save the file as UTF-8"
            ) from error
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
            raise ConfigError(
                f"rows: got invalid JSON ({error}), expected one object per line; {where}"
            ) from error
        if not isinstance(row, dict):
            raise ConfigError(
                f'rows: got a {type(row).__name__}, expected an object such as {{"prompt": ...}}; {where}'
            )
        yield where, row


def _parquet(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    _read(file, 4)
    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(
            f"rows: got a file that Parquet cannot read ({error}), expected Parquet; {file}"
        ) from error
    for number, row in enumerate(table.to_pylist()):
        yield f"{file} row {number}", row


def _csv(file: Path) -> Iterator[tuple[str, Row]]:
    """Cells are texts, an empty one is None: 007 stays 007, and no cell becomes a list."""
    try:
        lines = csv.reader(io.StringIO(_read(file).decode("utf-8-sig"), newline=""), strict=True)
        names = next(lines, [])
        if "" in names or len(set(names)) < len(names):
            raise ConfigError(
                f"rows: got the header {quote(', '.join(names))}, expected one name for each column, each once; "
                f"{file}:1"
            )
        for cells in lines:
            where = f"{file}:{lines.line_num}"
            if cells and len(cells) != len(names):
                raise ConfigError(
                    f"rows: got {len(cells)} cells, expected {len(names)}, one for each column of the header; {where}; "
                    "put a cell with a comma or a line break in quotes"
                )
            if any(cells):
                yield where, {name: cell or None for name, cell in zip(names, cells, strict=True)}
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"rows: got bytes that are not UTF-8 ({error.reason} at byte {error.start}), expected UTF-8 text; {file}; "
            "save the file as UTF-8"
        ) from error
    except csv.Error as error:
        raise ConfigError(
            f"rows: got invalid CSV ({error}), expected cells between commas; {file}"
        ) from error


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".csv": _csv,
}


def _read(file: Path, count: int = -1) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(count)
    except OSError as error:
        raise ConfigError(f"rows: got {error.strerror or error}, expected a readable file; {file}") from error
