"""Beliefs about prompts: what each one's mean reward is now, and the unbiased advantages that follow."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from inspect import signature
from typing import Any

from kalman_rl.beliefs.base import TableBelief
from kalman_rl.beliefs.beta import BetaBelief
from kalman_rl.beliefs.by_source import BySource, Sources
from kalman_rl.beliefs.gaussian import GaussianBelief
from kalman_rl.beliefs.protocol import Advantages, Belief, Observed
from kalman_rl.beliefs.regression import RegressionBelief
from kalman_rl.beliefs.spo import SPOBelief
from kalman_rl.errors import ConfigError, quote
from kalman_rl.registry import Registry, unknown_option

_TABLE: dict[str, Callable[..., Belief]] = {
    "auto": RegressionBelief,
    "beta": BetaBelief,
    "gaussian": GaussianBelief,
    "spo": SPOBelief,
}

BELIEFS: Registry[Belief] = Registry("belief", _TABLE, "kalman_rl.beliefs", Belief)
"""Every belief by name: ours (``BELIEFS.table``), then those of installed packages. "auto" learns noise, drift and
prior, with features and without."""


def make_belief(
    name: str = "auto", *, source: Callable[[Any], Hashable] | None = None, **options: Any
) -> Belief:
    """A belief by name.

    Args:
        name: a key of BELIEFS, or your own ``module:function``.
        source: prompt id -> source, for beliefs that learn apart (see :class:`BySource`, and :class:`Sources` for a
            table that is filled as prompts come); None = one for all.
        options: of the belief's class, or function.

    Raises: ConfigError for an unknown name or option, and what the class raises.

    >>> make_belief("beta", forgetting=0.98).predict(["a"], step=0).mean.item()
    0.5
    """

    def make() -> Belief:
        known = signature(BELIEFS[name]).parameters
        for option in options:
            if option not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                raise unknown_option("belief", name, option, known)
        return BELIEFS.built(name, **options)

    if source is not None and not callable(source):
        raise ConfigError(
            f"source: got {quote(source)}, expected a function from a prompt's id to its source"
        )
    return make() if source is None else BySource(lambda: _table_belief(name, make()), source)


def _table_belief(name: str, belief: Belief) -> TableBelief:
    if not isinstance(belief, TableBelief):
        raise ConfigError(
            f"source: got one with belief {quote(name)}, a {type(belief).__name__}; expected a TableBelief, "
            "which can check every source before any is written"
        )
    return belief


__all__ = [
    "BELIEFS",
    "Advantages",
    "Belief",
    "BetaBelief",
    "BySource",
    "GaussianBelief",
    "Observed",
    "RegressionBelief",
    "SPOBelief",
    "Sources",
    "TableBelief",
    "make_belief",
]
