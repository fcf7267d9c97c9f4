"""What each method does to the tokens on the page, computed by the code of ``kalman-rl replay``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kalman_rl.engine.runs.reading import clean
from kalman_rl.errors import KalmanRLError, one_line
from kalman_rl.instruments.replay import Field, TraceBatch, batch_of, field_of
from kalman_rl.methods import METHODS
from kalman_rl.objectives.loss import Method

COMPARED = ("grpo", "gspo", "kpo", "kpo_diffuse", "dppo_tv")
"""Methods that are shown beside the run's own; all of them need nothing but what traces hold."""
BELOW, ABOVE = "l", "h"
"""Marks of a dropped token whose weight is below or above 1; a kept token has ``1``."""


def on_tokens(
    completions: Sequence[dict[str, list[Any]]], own: Method | None, notes: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Adds ``by`` (one entry per method: log-weights, coefficients, marks), and what the run's filter believed
    (``deviation`` of the posterior, ``innovation``) to each completion.

    Args: own, notes: of :func:`kalman_rl.instruments.replay.own_method`.
    Returns: ``{"methods": [...]}`` with a name and the clip's bounds for each, the recorded one first; and notes.
    """
    names = [name for name in COMPARED if own is None or name != own.name]
    recorded = {"name": own.name if own else "recorded", "recorded": True, **_bounds(own)}
    others = [METHODS.table[name]() for name in names]
    methods = [recorded, *({"name": method.name, **_bounds(method)} for method in others)]
    for columns in completions:
        columns["by"] = [_as_recorded(columns)]
    try:
        batch = batch_of(_joined(completions))
        fields = [field_of(method, batch) for method in others]
    except (KalmanRLError, ValueError, TypeError, KeyError) as error:
        why = clean(one_line(error), 160)
        return {"methods": methods[:1]}, [f"Other methods are not shown: the traces lack something ({why})."]
    for field in fields:
        _deal(field, completions)
    if own is not None:
        _believed(own, batch, completions)
    return {"methods": methods}, [_said(notes)] if notes else []


def _said(notes: Sequence[str]) -> str:
    return (
        f"The run's own method was not recomputed ({clean(notes[0].removeprefix('no self-check: '), 200)})."
    )


def _bounds(method: Method | None) -> dict[str, Any]:
    """The trust region in words, and its bounds on the weight where it is a clip."""
    if method is None:
        return {"trust": ""}
    trust = method.trust
    low, high, dual = (getattr(trust, name, None) for name in ("low", "high", "dual"))
    known = type(trust).__name__ == "Clip"
    described = clean(re.sub(r"<function (\w+) at \w+>", r"\1", repr(trust)), 120)
    return {"trust": described} | ({"low": low, "high": high, "dual": dual} if known else {})


def _joined(completions: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """All completions as one table with sequences numbered anew."""
    names = ("position", "token", "logp_old", "logp_behaviour", "logp", "log_ratio", "filtered_log_ratio")
    joined: dict[str, list[Any]] = {
        name: [] for name in (*names, "sequence", "coefficient", "kept", "advantage")
    }
    for number, columns in enumerate(completions):
        size = len(columns["token"])
        for name, values in joined.items():
            if name == "sequence":
                values += [number] * size
            else:
                values += columns[name] if name in columns else _absent(name, size)
    return joined


def _absent(name: str, size: int) -> list[Any]:
    """What stands in for a column that no other method reads. Raises: ValueError where one would."""
    if name == "logp_behaviour":
        return [None] * size
    if name in ("filtered_log_ratio", "coefficient"):
        return [0.0] * size
    raise ValueError(f"got no {name}")


def _deal(field: Field, completions: Sequence[dict[str, list[Any]]]) -> None:
    start = 0
    for columns in completions:
        end = start + len(columns["token"])
        weight, coefficient, kept = (values[start:end].tolist() for values in field)
        columns["by"].append(_entry(weight, coefficient, kept))
        start = end


def _entry(weight: Sequence[Any], coefficient: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
    marks = "".join(
        "1" if keep else BELOW if w is not None and w < 0 else ABOVE for w, keep in zip(weight, kept)
    )
    return [_short(weight), _short(coefficient), marks]


def _as_recorded(columns: dict[str, list[Any]]) -> list[Any]:
    size = len(columns["token"])
    nothing = [None] * size
    weight, coefficient = columns.get("filtered_log_ratio", nothing), columns.get("coefficient", nothing)
    return _entry(weight, coefficient, [keep is not False for keep in columns.get("kept", nothing)])


def _short(values: Sequence[Any]) -> list[float | None]:
    return [
        float(f"{value:.4g}") if isinstance(value, (int, float)) and math.isfinite(value) else None
        for value in values
    ]


def _believed(own: Method, batch: TraceBatch, completions: Sequence[dict[str, list[Any]]]) -> None:
    """Standard deviation of the posterior and the innovation at each token, from the run's own filter."""
    try:
        ratio = own.ratio(batch.logp, batch.rollouts)
    except KalmanRLError:
        return
    if ratio.info is None:
        return
    gain, total = ratio.info.gain.double(), ratio.info.innovation_variance.double()
    noise = (1 - gain) * total  # P + R, less P
    first = getattr(own.ratio, "observation_noise", math.nan)
    noise = torch.where(noise.isfinite(), noise, torch.as_tensor(first, dtype=noise.dtype))
    deviation, innovation = (gain * noise).sqrt()[batch.place], ratio.info.innovation[batch.place]
    start = 0
    for columns in completions:
        end = start + len(columns["token"])
        columns["deviation"], columns["innovation"] = (
            _listed(deviation[start:end]),
            _listed(innovation[start:end]),
        )
        start = end


def _listed(values: Tensor) -> list[float | None]:
    return _short(values.tolist())
