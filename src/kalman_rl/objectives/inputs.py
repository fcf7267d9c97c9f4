"""What a method may ask for beyond log-probabilities, rewards and groups, and how to supply it.

A part of a method lists such inputs in ``needs``; :attr:`kalman_rl.objectives.loss.Method.needs` collects them, a
trainer reads them before it starts, and :func:`need` refuses to go on without one.
"""

from __future__ import annotations

from torch import Tensor

from kalman_rl.errors import ConfigError

NEEDS: dict[str, str] = {
    "logp_behaviour": "(B, T) log-probabilities of the sampler; pass Rollouts(logp_behaviour=...), or "
    "logp_old if the sampler is the old policy. KalmanGRPOTrainer passes vLLM's, else the old policy's",
    "top_behaviour": "(B, T, k) log-probabilities of the sampler's top tokens; pass them in Rollouts("
    "top_behaviour=...), made with divergence.top_k_with_sampled. KalmanGRPOTrainer does so without vLLM",
    "top_logp": "(B, T, k) current log-probabilities of the tokens behind top_behaviour; pass "
    "Current(logp, top_logp=...) for logp. KalmanGRPOTrainer does so",
    "step": "the effect of each token's own optimizer step on the last layer; pass Current(logp, "
    "step=curvature.last_layer_step(...)) for logp. KalmanGRPOTrainer does so",
    "reward": "one number per completion (B,) for advantages; put reward into Rollouts, or pass advantage=",
    "group": "one integer per completion (B,) for advantages; put group into Rollouts, or pass advantage=",
    "length": "(B,) trained tokens per completion; Rollouts has it as .length",
    "mask": "(B, T) trained tokens; Rollouts has it as .mask",
    "energy": "(B, T) squared score norms; pass Rollouts(collision=sum_v pi_old(v)^2), which gives .energy. "
    "KalmanGRPOTrainer does so",
}
"""Name of an input -> what it is and how to supply it."""


def need(name: str, value: Tensor | None, who: str = "this method") -> Tensor:
    """The value, or a ConfigError that says what is missing, who needs it and how to supply it.

    >>> need("length", None, "opo")
    Traceback (most recent call last):
    kalman_rl.errors.ConfigError: length: got None for opo, expected (B,) trained tokens per completion; \
Rollouts has it as .length
    """
    if value is None:
        raise ConfigError(f"{name}: got None for {who}, expected {NEEDS[name]}")
    return value
