"""Kalman-RL: noise-aware estimators for reinforcement learning of language models."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kalman_rl.beliefs import BELIEFS, make_belief
    from kalman_rl.errors import KalmanRLError
    from kalman_rl.methods import METHODS, make_method
    from kalman_rl.numerics.feature_filter import KalmanPreferenceTracker
    from kalman_rl.numerics.kalman import Filtered, Gaussian, causal_filter, causal_mean
    from kalman_rl.objectives.aggregate import Totals
    from kalman_rl.objectives.loss import Loss, Method, estimate_advantage, policy_loss
    from kalman_rl.objectives.rollouts import Current, Rollouts
    from kalman_rl.sampling.one_prompt.environment import SimulatedPreferenceEnv
    from kalman_rl.sampling.one_prompt.language_model import LanguageModelEnvironment
    from kalman_rl.sampling.one_prompt.loop import run_adaptive_sampling

try:
    __version__ = version("kalman-rl")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_HOMES = {
    **dict.fromkeys(("BELIEFS", "make_belief"), "beliefs"),
    **dict.fromkeys(("METHODS", "make_method"), "methods"),
    **dict.fromkeys(("Filtered", "Gaussian", "causal_filter", "causal_mean"), "numerics.kalman"),
    **dict.fromkeys(("Loss", "Method", "estimate_advantage", "policy_loss"), "objectives.loss"),
    **dict.fromkeys(("Current", "Rollouts"), "objectives.rollouts"),
    **{"KalmanRLError": "errors", "Totals": "objectives.aggregate"},
    "KalmanPreferenceTracker": "numerics.feature_filter",
    "LanguageModelEnvironment": "sampling.one_prompt.language_model",
    "SimulatedPreferenceEnv": "sampling.one_prompt.environment",
    "run_adaptive_sampling": "sampling.one_prompt.loop",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``kalman-rl --help`` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kalman_rl' has no attribute {name!r}")
    return getattr(import_module(f"kalman_rl.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """What ``dir``, ``help`` and tab completion show: the public names."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


__all__ = [
    "BELIEFS",
    "METHODS",
    "Current",
    "Filtered",
    "Gaussian",
    "KalmanPreferenceTracker",
    "KalmanRLError",
    "LanguageModelEnvironment",
    "Loss",
    "Method",
    "Rollouts",
    "SimulatedPreferenceEnv",
    "Totals",
    "__version__",
    "causal_filter",
    "causal_mean",
    "estimate_advantage",
    "make_belief",
    "make_method",
    "policy_loss",
    "run_adaptive_sampling",
]
