"""Prompts by name: beliefs are kept by ``prompt_id``, so one name must stand for one row of the dataset."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable
from typing import Any

import numpy as np

from kalman_rl.beliefs.by_source import Sources
from kalman_rl.errors import ConfigError, quote
from kalman_rl.sampling.priors import absorb_priors, read_priors
from kalman_rl.sampling.tracking import Tracking

Row = dict[str, Any]


def prompts_by_id(rows: Iterable[Row]) -> dict[Hashable, Row]:
    """The dataset's row of every prompt.

    Raises: ConfigError for rows without a usable ``prompt_id``, or two different rows under one: only the first would
        be sampled and scored.
    """
    by_id: dict[Hashable, Row] = {}
    for row in rows:
        name = row.get("prompt_id")
        if not isinstance(name, (str, int)) or isinstance(name, bool):
            raise ConfigError(
                f"prompt_id: got {quote(name)}, expected a text or integer in every row of the dataset because beliefs "
                "are kept by prompt; add one, e.g. dataset.map(lambda row, i: {'prompt_id': i}, with_indices=True)"
            )
        first = by_id.setdefault(name, row)
        differ = (
            [] if first is row else [key for key in first | row if not same(first.get(key), row.get(key))]
        )
        if differ:
            raise ConfigError(
                f"prompt_id: got {quote(name)} for two different rows (they differ in {', '.join(differ)}), "
                "expected one name per row; beliefs about them would be mixed; give each its own name"
            )
    return by_id


def check_prompts(columns: Collection[str] | None) -> None:
    """Refuse rows without a prompt, where no environment makes it. Args: columns: of the rows; None = not known yet."""
    if columns is not None and "prompt" not in columns:
        raise ConfigError(
            f"train_dataset: got the columns {', '.join(columns)}, expected a column prompt (text or messages) because "
            "no environment makes the prompts; rename yours, or give an environment_factory"
        )


def check_names(dataset: Any) -> None:
    """Look at all rows that share a name, where the dataset can be looked at before training.

    Raises: as :func:`prompts_by_id`.
    """
    if "prompt_id" not in (getattr(dataset, "column_names", None) or ()) or not hasattr(dataset, "__len__"):
        return
    places: dict[Hashable, list[int]] = {}
    for place, name in enumerate(dataset["prompt_id"]):
        places.setdefault(name, []).append(place)
    for shared in places.values():
        if len(shared) > 1:
            prompts_by_id(dataset[place] for place in shared)


def names_in(dataset: Any, setting: str) -> list[Hashable]:
    """The ``prompt_id`` of every row of a dataset that ``setting`` needs as a whole.

    Raises: ConfigError for a dataset without length or without this column, and as :func:`check_names`.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "column_names"):
        raise ConfigError(
            f"{setting}: got a {type(dataset).__name__}, expected a dataset with a length because all of its prompts "
            "are looked at before training; load it as a whole, or do without this setting"
        )
    if not len(dataset):
        return []
    if "prompt_id" not in dataset.column_names:
        raise ConfigError(
            f"prompt_id: got a dataset without this column, expected one with {setting} because beliefs are kept by "
            "prompt; add one, e.g. dataset.map(lambda row, i: {'prompt_id': i}, with_indices=True)"
        )
    check_names(dataset)
    return list(dataset["prompt_id"])


def note_all_sources(sources: Sources | None, column: str | None, dataset: Any) -> None:
    """:func:`note_sources` for every row of a dataset, where beliefs are kept by source."""
    if sources is not None and column is not None and len(dataset):
        known = [name for name in ("prompt_id", column) if name in dataset.column_names]
        note_sources(sources, column, dataset.select_columns(known))


def take_priors(tracking: Tracking, names: list[Hashable], dataset: Any, column: str) -> None:
    """Absorb the solve rates in a column of a dataset, whose rows have these names.

    Raises: ConfigError for a dataset without the column, and what ``read_priors`` refuses.
    """
    if names and column not in dataset.column_names:
        raise ConfigError(
            f"prior_column: got {quote(column)}, expected a column of the dataset, which has "
            f"{', '.join(dataset.column_names)}"
        )
    absorb_priors(tracking, read_priors(names, dataset[column] if names else [], column))


def note_sources(sources: Sources, column: str, rows: Iterable[Row]) -> None:
    """Learn where prompts come from. Raises: ConfigError for rows without the column, and what ``sources`` refuses."""
    rows = list(rows)
    if missing := [row for row in rows if column not in row]:
        raise ConfigError(
            f"source_column: got {quote(column)}, expected a column of the dataset, which has {', '.join(missing[0])}"
        )
    sources.note([row["prompt_id"] for row in rows], [row[column] for row in rows])


def same(one: Any, other: Any) -> bool:
    """Whether two values of a row are the same; NaN is NaN, and arrays and images are compared by content.

    >>> same({"x": [1, float("nan")]}, {"x": [1, float("nan")]}), same([1], [2])
    (True, False)
    """
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    if hasattr(one, "__array__") and hasattr(other, "__array__"):
        return np.array_equal(np.asarray(one), np.asarray(other))
    return bool(one == other)
