"""The published methods, each a composition: advantage x ratio x trust x aggregate.

Read this folder first: ``by_advantage``, ``by_ratio``, ``by_filter`` and ``by_trust`` hold one short
function a method, and nothing else, sorted by what the method changes. ``METHODS`` is what the command line, the
trainers and every invariance test go through. Equations, use and citations are in ``cards.toml``, shown by
the command ``kalman-rl methods NAME``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from kalman_rl.methods import by_advantage, by_filter, by_ratio, by_trust
from kalman_rl.methods.aliases import translated
from kalman_rl.objectives.loss import Method
from kalman_rl.registry import Registry

_TABLE: dict[str, Callable[..., Method]] = {
    name: build
    for module in (by_advantage, by_ratio, by_filter, by_trust)
    for name, build in vars(module).items()
    if getattr(build, "__module__", None) == module.__name__ and not name.startswith("_")
}

METHODS: Registry[Method] = Registry("method", _TABLE, "kalman_rl.methods", Method)
"""Every method by name: ours (``METHODS.table``), then those of installed packages."""


def make_method(name: str, **options: float | bool | None) -> Method:
    """Build a method of the table by name, with its options; hosts' names for them are in :mod:`.aliases`.

    Args:
        name: a key of METHODS, or your own ``module:function``.
        options: of the method's own function, units and ranges there.

    Returns: the :class:`~kalman_rl.objectives.Method`, for :func:`~kalman_rl.objectives.policy_loss` and the trainers.
        One that is not ours is called what it was asked for by.
    Raises: ConfigError for an unknown name or option, naming the nearest one, and for a package or module that
        gives no Method; NumericError for a value out of range.

    >>> make_method("kpo", low=0.05, high=0.05).trust
    Clip(low=0.05, high=0.05, dual=None)
    """
    method = METHODS.make(name, translated(name, options))
    return method if name in METHODS.table else dataclasses.replace(method, name=name)
