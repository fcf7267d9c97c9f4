"""What a method may ask for beyond log-probabilities, rewards and groups, and how to supply it.

A part of a method lists such names in ``inputs``; :attr:`kalman_rl.objectives.loss.Method.inputs` collects them. A
host states what it provides as one set of names, and :func:`check_provided` refuses a method that asks for more,
before anything starts. :func:`required` refuses to go on without a value.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from torch import Tensor

from kalman_rl.errors import ConfigError, quote


class Asks(Protocol):
    """What is read here of a :class:`~kalman_rl.objectives.Method`; its parts are read by the names in PARTS."""

    @property
    def name(self) -> str: ...

    @property
    def advantage(self) -> Any: ...

    @property
    def learns(self) -> dict[str, Any]: ...


PARTS = ("advantage", "ratio", "trust", "aggregate", "penalty", "correction")
"""The parts of a method."""

INPUTS: dict[str, str] = {
    "logp_behaviour": "(B, T) log-probabilities of the behaviour policy; pass Rollouts(logp_behaviour=...), or "
    "logp_old if the behaviour policy is the old policy. KalmanGRPOTrainer passes vLLM's, else the old policy's",
    "top_behaviour": "(B, T, k) log-probabilities of the behaviour policy's top tokens; pass them in Rollouts("
    "top_behaviour=...), made with divergence.top_k_with_sampled. KalmanGRPOTrainer does so without vLLM",
    "top_logp": "(B, T, k) current log-probabilities of the tokens behind top_behaviour; pass "
    "Current(logp, top_logp=...) for logp. KalmanGRPOTrainer does so",
    "lag": "(B, T) optimizer steps from the behaviour policy to the current one; pass Rollouts(lag=...). "
    "KalmanGRPOTrainer counts them",
    "step": "the effect of each token's own optimizer step on the last layer; pass Current(logp, "
    "step=curvature.last_layer_step(...)) for logp. KalmanGRPOTrainer does so",
    "reward": "one number per completion (B,) for advantages; put reward into Rollouts, or pass advantage=",
    "rewards": "(B, K) one number per completion and reward function; call the advantage with rewards=, and pass "
    "what it gives as advantage=. KalmanGRPOTrainer does so",
    "group": "one integer per completion (B,) for advantages; put group into Rollouts, or pass advantage=",
    "length": "(B,) trained tokens per completion; Rollouts has it as .length",
    "mask": "(B, T) trained tokens; Rollouts has it as .mask",
    "score_norm_squared": "(B, T) squared norms of the score; pass Rollouts(sum_pi_squared=...), (B, T) "
    "sum_v pi_old(v)^2, which gives .score_norm_squared. "
    "KalmanGRPOTrainer does so",
}
"""Name of an input -> what it is and how to supply it."""

STEPS: dict[str, tuple[str, str]] = {
    "ratio": ("past_steps", "the statistics of past optimizer steps, which its ratio learns from"),
    "trust": ("whole_step", "the statistics of the whole optimizer step, on which its bounds are chosen"),
}
"""A part that learns -> the name of what it learns from, as a host provides it, and what that is."""


def inputs_of(part: object) -> tuple[str, ...]:
    """What one part of a method asks for."""
    inputs: tuple[str, ...] = getattr(part, "inputs", ())
    return inputs


def missing(method: Asks, provided: Collection[str]) -> dict[str, str]:
    """What a method asks for and a host does not provide: name -> what it is.

    Args:
        provided: names of :data:`INPUTS`; ``past_steps`` and ``whole_step`` from a host that carries what a method
            :attr:`~kalman_rl.objectives.loss.Method.learns`; and names of :data:`PARTS` that the host computes
            itself, whose inputs are then not asked for.

    >>> from kalman_rl.methods import make_method
    >>> missing(make_method("bapo"), {"logp_behaviour"})
    {'whole_step': 'the statistics of the whole optimizer step, on which its bounds are chosen'}
    >>> missing(make_method("opo"), {"advantage"})
    {}
    """
    asked = {
        name: INPUTS.get(name, "no known input").partition(";")[0]
        for part in PARTS
        if part not in provided
        for name in inputs_of(getattr(method, part))
    }
    asked |= dict(STEPS[part] for part in method.learns)
    return {name: asked[name] for name in sorted(asked) if name not in provided}


def check_provided(method: Asks, provided: Collection[str], host: str, advice: str) -> None:
    """Refuse a method that asks for what a host does not provide.

    Args: provided: as in :func:`missing`. host: who refuses. advice: what to do instead.
    Raises: ConfigError that names all that is missing.
    """
    lacking = missing(method, provided)
    if lacking:
        names = ", ".join(f"{name} ({what})" for name, what in lacking.items())
        raise ConfigError(
            f"method: got {quote(method.name)} for {host}, expected one that does without {names}, which "
            f"{host} does not provide; {advice}"
        )


def needs_groups(advantage: object) -> bool:
    """Whether an advantage is 0 for every completion that is alone in its group, as the part itself says.

    >>> from kalman_rl.objectives import advantage
    >>> needs_groups(advantage.leave_one_out), needs_groups(advantage.batch_leave_one_out)
    (True, False)
    """
    return bool(getattr(advantage, "needs_groups", False))


def check_group_size(method: Asks, size: int, setting: str, tracked: str) -> None:
    """Refuse single completions for a method whose advantage would then be 0 everywhere.

    Args: size: completions per prompt. setting: its name. tracked: how the host asks for tracked advantages.
    Raises: ConfigError.
    """
    if size == 1 and needs_groups(method.advantage):
        raise ConfigError(
            f"{setting}: got 1 for method {quote(method.name)}, expected at least 2 because its advantage compares "
            f"completions of one prompt; take the tracked advantage for single completions ({tracked})"
        )


def required(name: str, value: Tensor | None, who: str = "this method") -> Tensor:
    """The value, or a ConfigError that names what is missing, who asks for it and how to supply it.

    >>> required("length", None, "opo")
    Traceback (most recent call last):
    kalman_rl.errors.ConfigError: length: got None for opo, expected (B,) trained tokens per completion; \
Rollouts has it as .length
    """
    if value is None:
        raise ConfigError(f"{name}: got None for {who}, expected {INPUTS[name]}")
    return value
