"""Settings of a method that do not fit the length of the completions."""

from __future__ import annotations

import math
from typing import Any

from kalman_rl.objectives import ratio, trust
from kalman_rl.objectives.loss import Method

SHORT, NARROW = 50, 3e-3
"""Tokens up to which a wide clip of an averaged ratio was tried and held; the widest that held on 65 to 152 tokens."""


def notes_on_length(method: Method, longest: int) -> list[str]:
    """One sentence for each setting of the method that completions of up to ``longest`` tokens make useless or unsafe.

    A filter that starts at ratio 1 cannot leave it in few tokens. A ratio that averages over many tokens hardly varies,
    so that a clip chosen on few never acts: ``kalman-rl reproduce long --model tiny-long``.

    >>> from kalman_rl.methods import make_method
    >>> notes_on_length(make_method("kpo_diffuse"), 16), notes_on_length(make_method("grpo"), 4096)
    ([], [])
    >>> notes_on_length(make_method("kpo_diffuse"), 256)[0][:52]
    'kpo_diffuse: got a clip of 0.03 for a ratio averaged'
    """
    notes = []
    own = method.ratio
    if isinstance(own, ratio.KalmanFiltered) and own.initial_variance == 0:
        constants = own.time_constants(longest)
        if constants < 0.5:
            notes.append(
                f"{method.name} with a zero start and Q/R = {own.process_noise / own.observation_noise:g} has "
                f"{constants:.3g} filter time constants in {longest} tokens (< 0.5): the ratio stays at 1 and the clip "
                "never acts; kpo_diffuse, or a larger process_noise, avoids this"
            )
    clip = clip_of(method.trust)
    if longest > SHORT and averages(own) and NARROW < clip < math.inf:
        notes.append(
            f"{method.name}: got a clip of {clip:g} for a ratio averaged over up to {longest} tokens, expected one of "
            f"{NARROW:g} or less because wider ones collapse on about 100 tokens; set low and high to 1e-3 "
            "in the method's options, unless your completions stay short"
        )
    return notes


def averages(own: Any) -> bool:
    """Whether a ratio is a mean over the tokens so far, or over all of them."""
    if own is ratio.sequence_mean or isinstance(own, (ratio.NoiseFiltered, ratio.RobustFiltered)):
        return True
    return isinstance(own, ratio.KalmanFiltered) and own.initial_variance > 0


def clip_of(region: Any) -> float:
    """The wider of the two distances that a clip keeps from a ratio of 1; 0 for other trust regions."""
    return max(region.low, region.high) if isinstance(region, (trust.Clip, trust.Band)) else 0.0
