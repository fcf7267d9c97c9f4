"""The table of a trace file: one row per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kalman_rl.errors import ShapeError

TRACE_COLUMNS: dict[str, str] = {
    name: kind
    for kind, names in {
        "int64": "step sequence position token_id",
        "string": "prompt_id prompt completion token",
        "float32": "logp_old logp_behaviour logp log_ratio filtered_log_ratio gain coefficient "
        "advantage reward",
        "bool": "kept",
    }.items()
    for name in names.split()
}
"""Columns of a trace file and their Arrow types; one row per token."""

NULLABLE = {"logp_behaviour", "gain", "reward"}
"""Columns whose values may be missing (null)."""


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
