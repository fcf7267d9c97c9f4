"""Beliefs about prompts: what each one's mean reward is now, and the unbiased advantages that follow."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from kalman_rl.beliefs.base import TableBelief
from kalman_rl.beliefs.beta import BetaBelief
from kalman_rl.beliefs.by_source import BySource
from kalman_rl.beliefs.gaussian import GaussianBelief
from kalman_rl.beliefs.protocol import Advantages, Belief, Observed
from kalman_rl.beliefs.regression import RegressionBelief
from kalman_rl.beliefs.spo import SPOBelief
from kalman_rl.errors import ConfigError, unknown_name

BELIEFS: dict[str, type[TableBelief]] = {
    "auto": RegressionBelief,
    "beta": BetaBelief,
    "gaussian": GaussianBelief,
    "spo": SPOBelief,
}
"""Names that :func:`make_belief` knows. "auto" learns noise, drift and prior, with features and without."""


def make_belief(
    name: str = "auto", *, source: Callable[[Any], Hashable] | None = None, **options: Any
) -> TableBelief | BySource:
    """A belief by name.

    Args:
        name: a key of BELIEFS.
        source: prompt id -> source, for beliefs that learn apart (see :class:`BySource`); None = one for all.
        options: of the belief's class.

    Raises: ConfigError for an unknown name or option, and what the class raises.

    >>> make_belief("beta", forgetting=0.98).predict(["a"], step=0).mean.item()
    0.5
    """
    if not isinstance(name, str) or name not in BELIEFS:
        raise unknown_name("belief", name, BELIEFS)

    def make() -> TableBelief:
        try:
            return BELIEFS[name](**options)
        except TypeError as error:
            raise ConfigError(f"options of belief {name!r}: {error}") from error

    if source is not None and not callable(source):
        raise ConfigError(f"source: got {source!r}, expected a function from a prompt's id to its source")
    return make() if source is None else BySource(make, source)


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
    "TableBelief",
    "make_belief",
]
