"""``run_adaptive_sampling``: complete one prompt until its value is known well enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.checks import is_real, is_whole
from kalman_rl.errors import ConfigError, NumericError, RewardError, ShapeError, quote
from kalman_rl.numerics.feature_filter import KalmanPreferenceTracker
from kalman_rl.numerics.kalman import Gaussian, update
from kalman_rl.sampling.budget import check_rounds
from kalman_rl.sampling.gains import beta_from_moments
from kalman_rl.sampling.one_prompt.environment import PreferenceEnvironment

LARGEST_BINARY_VARIANCE = 0.25
"""Variance of a fair 0/1 reward: what one reward of an unknown prompt is worth at most."""
_UNKNOWN = Gaussian(torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.125, dtype=torch.float64))
"""Moments of Beta(1/2, 1/2), Jeffreys' prior of a success probability."""


class _Start(NamedTuple):
    """Before the first completion: the tracker's belief about the value, and its noise of one reward."""

    value: Gaussian
    noise: float
    strength: float


def run_adaptive_sampling(
    env: PreferenceEnvironment,
    tracker: KalmanPreferenceTracker,
    threshold: float = 1.5,
    *,
    rounds: Sequence[int] = (2,),
    n_min: int = 2,
    n_max: int = 32,
    gap: float = 1.0,
) -> tuple[int, list[dict[str, Any]]]:
    """Sample a prompt in rounds until the confidence in its mean reward reaches a threshold.

        confidence = log(V_ref / V) / 2    nats,       stop when confidence >= threshold

    V is the posterior variance of the prompt's value given the rewards of this call, starting from what the
    tracker believes at the prompt's features. V_ref is the variance of one reward: 1/4 for 0/1 rewards, the
    tracker's R for others. So the threshold is how much narrower than one reward the belief must be: at
    0/1 rewards the default 1.5 asks for a standard deviation of ``exp(-1.5) / 2 = 0.11``, and each further
    0.69 halves it. Useful values are 0.8 to 2: below 0.7 a new prompt stops at 2 completions, and at 2 an
    even one needs 53.

    For 0/1 rewards the posterior is a Beta, whose width depends on the rewards and not only on their
    number: a prompt that always or never succeeds is clear after 6 completions, one with p = 1/2 takes about
    18, and a hard but solvable one lies between (it looks hopeless until its first success). For other
    rewards it is a Gaussian with R learned from this prompt's own rewards around the tracker's.

    The published rule, a threshold on the log-determinant of the filter's covariance, is not kept: that
    matrix depends on the features and their number alone, the rule never reads a reward, and every prompt
    stops after the same number of completions whatever its difficulty.

    Args:
        env: the prompt, see :class:`~kalman_rl.sampling.one_prompt.environment.PreferenceEnvironment`.
        tracker: learns from every round; ``gap`` units of time pass for it at the start.
        threshold: nats, > 0 and finite.
        rounds: completions per round; the last entry repeats.
        n_min, n_max: completions at least and at most (1 <= n_min <= n_max). A missing reward counts as
            taken.
        gap: time since the tracker's last prompt, in its units, >= 0.

    Returns:
        The number of completions taken, and a dict per round: ``mean`` and ``variance`` of the value, ``n``
        taken and ``known`` rewards so far, ``criterion`` (the confidence), ``stop_reason`` (None but in the
        last round: "confident", "max_samples", or "no_rewards" if n_max were taken and all were missing).

    Raises:
        ConfigError, NumericError: an option is out of range. ShapeError, NumericError: features are not (F,)
        or not finite, or a reward is infinite. RewardError: the environment returned something else than k
        rewards. Whatever the environment raises comes through, with a note on how far sampling had come.

    >>> from kalman_rl import KalmanPreferenceTracker, SimulatedPreferenceEnv
    >>> k_taken, history = run_adaptive_sampling(SimulatedPreferenceEnv(1.0), KalmanPreferenceTracker())
    >>> k_taken, history[-1]["stop_reason"]
    (6, 'confident')
    """
    if not isinstance(env, PreferenceEnvironment):
        raise ConfigError(f"env: got {type(env).__name__}, expected an object with features() and sample(k)")
    if not isinstance(tracker, KalmanPreferenceTracker):
        raise ConfigError(f"tracker: got {type(tracker).__name__}, expected a KalmanPreferenceTracker")
    _check_options(threshold, rounds, n_min, n_max)
    phi = _features(env)
    rewards = torch.zeros(0, dtype=torch.float64)
    start: _Start | None = None
    history: list[dict[str, Any]] = []
    while True:
        taken = len(rewards)
        k = min(max(rounds[min(len(history), len(rounds) - 1)], n_min - taken), n_max - taken)
        new = _sample(env, k, taken)
        if start is None:  # only now, so that a failing environment leaves the tracker as it was
            tracker.value(phi)  # checks the features before time passes
            tracker.predict(gap)
            start = _Start(_first(tracker.value(phi)), tracker.noise, tracker.noise_strength or math.inf)
        tracker.update(phi.expand(k, -1), new)
        rewards = torch.cat((rewards, new))
        value, reference = _posterior(start, rewards)
        confidence = 0.5 * math.log(reference / value.variance.item())
        history.append(
            {
                "mean": value.mean.item(),
                "variance": value.variance.item(),
                "n": len(rewards),
                "known": int((~rewards.isnan()).sum()),
                "criterion": confidence,
                "stop_reason": None,
            }
        )
        reason = _stop_reason(history[-1], threshold, n_max)
        if reason is not None:
            history[-1]["stop_reason"] = reason
            return len(rewards), history


def _stop_reason(now: dict[str, Any], threshold: float, n_max: int) -> str | None:
    if now["known"] and now["criterion"] >= threshold:
        return "confident"
    if now["n"] < n_max:
        return None
    return "max_samples" if now["known"] else "no_rewards"


def _posterior(start: _Start, rewards: Tensor) -> tuple[Gaussian, float]:
    """Belief about the value after these rewards, and the variance of one reward that it is compared with."""
    known = rewards[~rewards.isnan()]
    n = len(known)
    if bool(((known == 0) | (known == 1)).all()):
        # A tracker that knows nothing is a Gaussian wider than [0, 1]: it is used beside Jeffreys' prior.
        prior, _ = update(_UNKNOWN, start.value.mean, start.value.variance)
        a, b = beta_from_moments(prior)
        a, b = a + known.sum(), b + n - known.sum()
        mean = a / (a + b)
        return Gaussian(mean, mean * (1 - mean) / (a + b + 1)), LARGEST_BINARY_VARIANCE
    noise = start.noise
    if n > 1 and math.isfinite(start.strength):  # pooled with the tracker's R, as that learns it
        spread = (known - known.mean()).square().sum().item()
        noise = (start.strength * start.noise + spread) / (start.strength + n - 1)
    after, _ = update(start.value, known.mean(), noise / n)
    return after, start.noise


def _sample(env: PreferenceEnvironment, k: int, taken: int) -> Tensor:
    try:
        reward = env.sample(k)
    except Exception as error:
        error.add_note(f"raised by env.sample({k}) after {taken} completions of this prompt")
        raise
    if not isinstance(reward, Tensor) or reward.shape != (k,):
        got = tuple(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
        raise RewardError(f"env.sample({k}): got {got}, expected a tensor ({k},) of rewards, NaN for missing")
    reward = reward.detach().to(device="cpu", dtype=torch.float64)
    if reward.isinf().any():
        row = int(reward.isinf().nonzero()[0])
        raise NumericError(
            f"env.sample({k}): got reward {reward[row].item()} at row {row}, expected a finite number, "
            "or NaN for missing"
        )
    return reward


def _features(env: PreferenceEnvironment) -> Tensor:
    """(1, F)"""
    phi = env.features()
    if not isinstance(phi, Tensor) or phi.dim() != 1 or not len(phi) or not phi.is_floating_point():
        got = f"{phi.dtype} {tuple(phi.shape)}" if isinstance(phi, Tensor) else type(phi).__name__
        raise ShapeError(f"env.features(): got {got}, expected a floating tensor (F,), one prompt's features")
    if not phi.isfinite().all():
        place = int((~phi.isfinite()).nonzero()[0])
        raise NumericError(
            f"env.features(): got {phi[place].item()} at position {place}, expected finite numbers"
        )
    return phi.detach().to(device="cpu", dtype=torch.float64)[None]


def _first(value: Gaussian) -> Gaussian:
    return Gaussian(value.mean[0], value.variance[0])


def _check_options(threshold: float, rounds: Sequence[int], n_min: int, n_max: int) -> None:
    if not (is_real(threshold) and 0 < threshold < math.inf):
        raise ConfigError(
            f"threshold: got {quote(threshold)}, expected a finite number of nats > 0, such as 1.5"
        )
    check_rounds(rounds)
    if not (is_whole(n_min, 1) and is_whole(n_max, n_min)):
        raise ConfigError(
            f"n_min, n_max: got {quote(n_min)}, {quote(n_max)}, expected integers 1 <= n_min <= n_max"
        )
