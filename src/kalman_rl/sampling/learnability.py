"""How much a prompt can teach according to a belief, as the sampling rules need it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from torch import Tensor

from kalman_rl.beliefs.protocol import Belief
from kalman_rl.checks import is_real
from kalman_rl.errors import ConfigError, NumericError, quote
from kalman_rl.sampling.gains import beta_from_moments, beta_signal, noisy_signal


class Signal(NamedTuple):
    """Per prompt (N,): ``variance``, the expected variance of one reward without the scorer's noise; ``a, b`` of the
    Beta posterior of the success probability, None for real-valued rewards."""

    variance: Tensor
    a: Tensor | None
    b: Tensor | None


def read_signal(
    belief: Belief,
    ids: Sequence[Hashable],
    *,
    step: int,
    features: Tensor | None = None,
    reward_range: str = "unit",
    reward_noise_variance: float = 0.0,
) -> Signal:
    """Ask a belief about each id.

    Args:
        belief, ids, step, features: as in :class:`~kalman_rl.beliefs.protocol.Belief`.
        reward_range: "unit" for rewards in [0, 1]: the Beta of the value's moments gives ``E[p (1 - p)]``, for 0/1
            rewards exactly the variance and for other rewards in [0, 1] a bound. "real" for any others: the
            noise variance R the belief predicts with, minus ``reward_noise_variance``.
        reward_noise_variance: of the scorer, >= 0, in squared reward units; read for "real" only.

    Returns: :class:`Signal`, detached.
    Raises: ConfigError if ``belief`` is none, NumericError for a noise variance out of range, and what the belief
        raises.
    """
    if not callable(getattr(belief, "predict", None)):
        raise ConfigError(
            f"belief: got {type(belief).__name__}, expected a belief such as make_belief() gives"
        )
    if not (is_real(reward_noise_variance) and 0 <= reward_noise_variance < math.inf):
        raise NumericError(
            f"reward_noise_variance: got {quote(reward_noise_variance)}, expected a finite variance >= 0"
        )
    if reward_range == "unit":
        a, b = beta_from_moments(belief.predict(ids, step=step, features=features))
        return Signal(beta_signal(a, b), a, b)
    value = belief.predict(ids, step=step, features=features)
    new = belief.predictive(ids, step=step, features=features)
    return Signal(
        noisy_signal((new.variance - value.variance).clamp(min=0.0), reward_noise_variance), None, None
    )
