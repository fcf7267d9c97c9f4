"""Dropout in training: two passes of one policy over one completion then differ, and ratio and clip take it for change.

At learning rate 0, dropout 0.1 moves log-ratios by more than a nat and leaves the clip a third of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from kalman_rl.terminal import logger

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def dropout_of(model: nn.Module) -> dict[str, float]:
    """Rate of every part of a model that drops something in training, by name: modules, and rates kept as attributes.

    >>> dropout_of(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.Dropout(0.0)))
    {'1.p': 0.1}
    """
    return {name: rate for name, _, _, rate in _rates(model)}


def switch_off_dropout(model: nn.Module) -> dict[str, float]:
    """Set every rate of :func:`dropout_of` to 0, in place; returns what the rates were."""
    found = list(_rates(model))
    for _, module, attribute, _ in found:
        setattr(module, attribute, 0.0)
    return {name: rate for name, _, _, rate in found}


def warn_of_dropout(model: nn.Module) -> None:
    """Name the parts that drop something, if any do."""
    if found := dropout_of(model):
        name, rate = max(found.items(), key=lambda pair: pair[1])
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        logger.warning(
            "dropout: got %s = %g%s, expected 0 because its noise enters every log-ratio as if the policy had moved; "
            "call kalman_rl.hosts.trl.switch_off_dropout(model)",
            name,
            rate,
            more,
        )


def _rates(model: nn.Module) -> Iterator[tuple[str, Any, str, float]]:
    for name, module in model.named_modules():
        names = ["p"] if isinstance(module, DROPOUTS) else [key for key in vars(module) if "drop" in key]
        for attribute in names:
            rate = getattr(module, attribute)
            if isinstance(rate, float) and rate > 0:
                yield f"{name}.{attribute}".lstrip("."), module, attribute, rate
