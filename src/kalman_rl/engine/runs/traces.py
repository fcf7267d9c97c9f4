"""Trace files, one per step with one row per token: where they are, their columns, reading and making them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kalman_rl.engine.runs.received import names_in, read_bytes
from kalman_rl.errors import RunError, ShapeError, one_line

Table = dict[str, list[Any]]

FOLDER = "traces"
MAX_FILE = 512_000_000
"""Bytes of a trace file, packed or unpacked."""
MAX_TOKENS = 5_000_000
"""Rows of a trace file."""

TRACE_COLUMNS: dict[str, str] = {
    name: kind
    for kind, names in {
        "int64": "step sequence position token_id",
        "string": "prompt_id prompt completion token answer",
        "float32": "logp_old logp_behaviour logp log_ratio filtered_log_ratio gain coefficient "
        "advantage reward",
        "bool": "kept",
    }.items()
    for name in names.split()
}
"""Columns of a trace file and their Arrow types; one row per token."""

NULLABLE = {"logp_behaviour", "gain", "reward", "answer"}
"""Columns whose values may be missing (null)."""


def steps(run: Path) -> dict[int, Path]:
    """Trace files of a run's directory by step, in order."""
    names = (re.fullmatch(r"step-(\d{1,18})\.parquet", name) for name in names_in(run, FOLDER))
    return dict(sorted((int(match[1]), run / FOLDER / match[0]) for match in names if match))


def read(
    path: Path,
    columns: Sequence[str],
    problems: list[str],
    *,
    optional: Sequence[str] = (),
    limit: int | None = None,
    first_of: str = "",
) -> Table | None:
    """Columns of a trace file as lists, with the types of ``TRACE_COLUMNS``; None if the file is damaged.

    It is damaged if it is a link or no Parquet file, or has no row, not all columns, or values of another type.

    Args:
        columns: those that must be there.
        problems: receives why the file is damaged.
        optional: those that are read if they are there.
        limit: rows to read; None = all.
        first_of: a column of which only the first row of every value is given, with how many rows have it as ``rows``.
    """
    try:
        import numpy as np
        from pyarrow import ArrowException, BufferReader, array, parquet, type_for_alias
    except ImportError:
        problems.append("cannot read: got no package pyarrow; pip install pyarrow")
        return None
    try:
        data = read_bytes(path.parents[1], f"{FOLDER}/{path.name}", MAX_FILE)
        source = parquet.ParquetFile(BufferReader(data))
        _check_size(source.metadata)
        there = source.schema_arrow.names
        if missing := [name for name in columns if name not in there]:
            raise ValueError(f"got no {', '.join(missing)}")
        names = [*columns, *(name for name in optional if name in there)]
        rows = source.metadata.num_rows if limit is None else limit
        batch = next(source.iter_batches(max(rows, 1), columns=names), None)
        if not batch:
            raise ValueError("got no rows")
        counts: list[int] = []
        if first_of:
            _, places, counted = np.unique(batch[first_of].to_numpy(), return_index=True, return_counts=True)
            batch, counts = batch.take(array(places)), counted.tolist()
        table = {name: batch[name].cast(type_for_alias(TRACE_COLUMNS[name])).to_pylist() for name in names}
        return table | ({"rows": counts} if first_of else {})
    except RunError as error:
        problems.append(str(error).removeprefix(f"{path}: "))
    except (ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        problems.append(f"damaged trace: {one_line(error, 300)}")
    return None


def _check_size(metadata: Any) -> None:
    """A small file can hold a large table: refuse one before it is unpacked. Raises: ValueError."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    unpacked = sum(group.total_byte_size for group in groups)
    if metadata.num_rows > MAX_TOKENS or not 0 <= unpacked <= MAX_FILE:
        raise ValueError(
            f"got {metadata.num_rows:,} rows of {unpacked:,} bytes, expected up to {MAX_TOKENS:,} and {MAX_FILE:,}"
        )


def trace_table(step: int, columns: Mapping[str, Sequence[Any]]) -> Any:
    """The Arrow table of one step's traces, absent nullable columns filled with nulls."""
    import pyarrow as pa

    rows = max((len(values) for values in columns.values()), default=0)
    filled: dict[str, Sequence[Any]] = {"step": [step] * rows}
    filled |= {name: [None] * rows for name in NULLABLE}
    filled |= columns
    if filled.keys() != TRACE_COLUMNS.keys():
        wrong = sorted(filled.keys() ^ TRACE_COLUMNS.keys())
        raise ShapeError(f"trace columns: got missing or unknown {', '.join(wrong)}, expected TRACE_COLUMNS")
    arrays, specs = [], []
    for name, kind in TRACE_COLUMNS.items():
        values, nullable = filled[name], name in NULLABLE
        if kind == "string":  # half a UTF-8 character decodes to something that cannot be encoded
            values = [None if v is None else str(v).encode("utf-8", "replace").decode() for v in values]
        try:
            array = pa.array(values, pa.type_for_alias(kind))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise ShapeError(f"trace column {name}: expected {kind}: {error}") from None
        if len(array) != rows or (array.null_count and not nullable):
            raise ShapeError(
                f"trace column {name}: got {len(array)} rows, {array.null_count} of them missing, "
                f"expected {rows}{'' if nullable else ' and none missing'}"
            )
        arrays.append(array)
        specs.append(pa.field(name, pa.type_for_alias(kind), nullable))
    return pa.Table.from_arrays(arrays, schema=pa.schema(specs))
