"""The recorded outputs of published code: how they are stored, and how exactly they are to be met."""

from __future__ import annotations

import functools
import json
import lzma
import math
from collections.abc import Iterable
from importlib import resources
from typing import Any

FILE = "published_losses.json.xz"
TOLERANCE = {"float32": 2e-5, "sequence": 2e-8, "token": 1e-12}
"""Relative. The recorded KPO works in float32 inside; verl's sequence means carry 1e-8 in a denominator, and
A-3PO's lags become float32."""
DECIMALS = {"float32": 7, "sequence": 10, "token": 12}
"""Decimals of a stored log-probability."""
INPUTS, GRADIENT = ("old_log_prob", "log_prob"), "grad_log_prob"

Record = dict[str, Any]
Table = dict[str, list[Record]]


@functools.cache
def records() -> Table:
    """The record, ``policy_losses`` and ``advantages``; do not change it."""
    data = resources.files("kalman_rl.instruments.verify").joinpath(FILE).read_bytes()
    table: Table = json.loads(lzma.decompress(data))
    for record in table["policy_losses"]:
        mask = record["mask"] = [[int(digit) for digit in row] for row in record["mask"]]
        for key in (*INPUTS, GRADIENT):
            values = iter(record[key])
            record[key] = [[next(values) if trained else 0.0 for trained in row] for row in mask]
    return table


def packed(table: Table) -> bytes:
    """The content of the file: trained tokens only, digits as far as a hundredth of the tolerance.

    The same table gives the same bytes.
    """
    losses = [_short(record) for record in table["policy_losses"]]
    text = json.dumps({**table, "policy_losses": losses}, separators=(",", ":"))
    return lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)


def precision(record: Record) -> str:
    """How exact the recorded numbers are: a key of :data:`TOLERANCE`."""
    if record["method"] == "kpo":
        return "float32"
    loose = record["aggregation"] == "seq-mean-token-mean" or record["method"] == "a3po"
    return "sequence" if loose else "token"


def _short(record: Record) -> Record:
    kind = precision(record)
    largest = max(abs(value) for row in record[GRADIENT] for value in row)
    decimals = dict.fromkeys(INPUTS, DECIMALS[kind])
    decimals[GRADIENT] = math.ceil(-math.log10(largest * TOLERANCE[kind] / 100))
    trained = {key: _trained(record[key], record["mask"], places) for key, places in decimals.items()}
    mask = ["".join("1" if digit else "0" for digit in row) for row in record["mask"]]
    return {**record, **trained, "mask": mask}


def _trained(rows: Iterable[list[float]], mask: Iterable[list[int]], decimals: int) -> list[float]:
    pairs = [pair for values, trained in zip(rows, mask) for pair in zip(values, trained)]
    return [round(value, decimals) or 0 for value, kept in pairs if kept]
