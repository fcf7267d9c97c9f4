"""What a learner can be told; every field is an option of ``python -m kalman_rl.reppo``."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite

from kalman_rl.checks import is_real, is_whole
from kalman_rl.errors import ConfigError, quote


@dataclass(frozen=True)
class Settings:
    """What a learner can be told.

    Args:
        low, high: range of the critic in units of scaled rewards; three bins wider than the returns.
        reward_scale: every reward is multiplied by it; alpha and beta are meant for returns of order 100.
        gamma, lam: discount and lambda of the targets.
        kl_bound: kappa, the gate; infinite = no gate. beta, alpha: first values of the dual variables.
        target_entropy: None = -0.5 per dimension of the action, or half the log of the number of actions.
        gradient: of the actor: "expected" goes through the critic (pathwise, or the sum over actions); "score" is the
            control, four samples with a leave-one-out baseline on the same critic.
        critic: "categorical" (``bins`` of HL-Gauss), or the control "scalar".
        auxiliary: weight of predicting the next features; continuous actions only.
        next_actions: fresh actions that the value of the next state averages; sums are exact without.
        executed_entropy: the bonus of the next state is that of the action executed there, where there is one.
        entropy_at_end: pay the bonus of the next state on terminating steps too, as the released code does.
        hidden, lr, clip, epochs, minibatches: width, Adam's step size, largest gradient norm (infinite = any), passes,
            parts of a batch.
        dual_lr: Adam's step size of log alpha and log beta.
        least_std: added to the policy's standard deviation.

    Raises: ConfigError for a value out of range.
    """

    low: float
    high: float
    reward_scale: float = 1.0
    gamma: float = 0.99
    lam: float = 0.95
    kl_bound: float = 0.1
    alpha: float = 0.01
    beta: float = 0.01
    target_entropy: float | None = None
    gradient: str = "expected"
    critic: str = "categorical"
    bins: int = 151
    auxiliary: float = 0.0
    next_actions: int = 1
    executed_entropy: bool = False
    entropy_at_end: bool = False
    hidden: int = 256
    lr: float = 3e-4
    dual_lr: float = 3e-4
    clip: float = 0.5
    epochs: int = 4
    minibatches: int = 8
    least_std: float = 1e-6

    def __post_init__(self) -> None:
        ends = (self.low, self.high)
        _expect("low, high", is_real(*ends) and -inf < self.low < self.high < inf, ends, "low < high, finite")
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            _expect(name, is_real(value) and 0 <= value <= 1, value, "a number from 0 to 1")
        for name in ("kl_bound", "clip"):
            value = getattr(self, name)
            _expect(name, is_real(value) and value > 0, value, "a number above 0")
        for name in ("alpha", "beta", "lr", "dual_lr", "reward_scale"):
            value = getattr(self, name)
            _expect(name, is_real(value) and 0 < value < inf, value, "a finite number above 0")
        for name in ("auxiliary", "least_std"):
            value = getattr(self, name)
            _expect(name, is_real(value) and 0 <= value < inf, value, "a finite number of at least 0")
        target = self.target_entropy
        legal = target is None or (is_real(target) and isfinite(target))
        _expect("target_entropy", legal, target, "a finite number or None")
        for name, least in (
            ("bins", 3),
            ("next_actions", 1),
            ("hidden", 1),
            ("epochs", 1),
            ("minibatches", 1),
        ):
            value = getattr(self, name)
            _expect(name, is_whole(value, least), value, f"a whole number of at least {least}")
        _expect("gradient", self.gradient in ("expected", "score"), self.gradient, "'expected' or 'score'")
        _expect("critic", self.critic in ("categorical", "scalar"), self.critic, "'categorical' or 'scalar'")


def _expect(name: str, legal: bool, value: object, expected: str) -> None:
    if not legal:
        raise ConfigError(f"{name}: got {quote(value, 80)}, expected {expected}")
