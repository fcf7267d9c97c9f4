"""Knobs under the names that hosts give them, accepted where the meaning is certain.

The same word can mean two things: CISPO's ``epsilon_high`` is the bound itself in TRL, while verl's
``clip_ratio_high`` is its distance from 1. A host's name is translated with its own meaning. Names that are
ambiguous here are not accepted (TRL's ``epsilon`` is a clip distance, ours a term beside a standard deviation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kalman_rl.errors import ConfigError, quote

Knobs = dict[str, tuple[str, Callable[[float], float]]]


def _same(value: float) -> float:
    return value


def _above_one(value: float) -> float:
    return 1 + value


def _below_one(value: float) -> float:
    return 1 - value


CLIP: Knobs = {
    "clip_ratio_low": ("low", _same),  # verl
    "clip_ratio_high": ("high", _same),  # verl
    "epsilon_high": ("high", _same),  # TRL
}
DUAL: Knobs = {"clip_ratio_c": ("dual", _same), "delta": ("dual", _same)}  # verl, TRL
DIVERGENCE: Knobs = CLIP | {"clip_ratio_c": ("cap", _same)}  # verl gives DPPO's thresholds PPO's names
FILTER: Knobs = {"kalman_Q": ("process_noise", _same), "kalman_R": ("observation_noise", _same)}  # KPO's fork

FOREIGN: dict[str, Knobs] = {
    **dict.fromkeys(("dr_grpo", "dapo", "opo", "otb", "krpo", "krpo_invariant", "k_score", "k_grpo"), CLIP),
    **dict.fromkeys(
        ("gspo", "gspo_token", "luspo", "gmpo", "minpro_clipped", "capo", "ratio_one", "kpo_noise"), CLIP
    ),
    **dict.fromkeys(("kpo", "kpo_diffuse", "kpo_auto", "kpo_robust"), CLIP | FILTER),
    **dict.fromkeys(("grpo", "spo"), CLIP | DUAL),
    "kpo_unclipped": FILTER,
    "cispo": {
        "clip_ratio_low": ("low", _below_one),  # verl: distances from 1
        "clip_ratio_high": ("high", _above_one),
        "epsilon_high": ("high", _same),  # TRL: the bound itself
    },
    "sapo": {
        "tau_pos": ("positive", _same),  # verl
        "tau_neg": ("negative", _same),
        "sapo_temperature_pos": ("positive", _same),  # TRL
        "sapo_temperature_neg": ("negative", _same),
    },
    "vespo": {  # TRL
        "vespo_k_pos": ("positive_power", _same),
        "vespo_lambda_pos": ("positive_decay", _same),
        "vespo_k_neg": ("negative_power", _same),
        "vespo_lambda_neg": ("negative_decay", _same),
    },
    "dro": {"dro_beta": ("beta", _same)},  # verl
    **dict.fromkeys(("dppo_tv", "dppo_kl"), DIVERGENCE),
}
"""Method -> a host's name -> our option and the conversion."""


def translated(method: str, options: Mapping[str, object]) -> dict[str, object]:
    """Options with every host's name replaced by ours, converted.

    Raises: ConfigError where one knob is given under two names.

    >>> translated("cispo", {"clip_ratio_high": 0.28}), translated("cispo", {"epsilon_high": 5.0})
    ({'high': 1.28}, {'high': 5.0})
    """
    found: dict[str, object] = {}
    given: dict[str, str] = {}
    for name, value in options.items():
        own, convert = FOREIGN.get(method, {}).get(name, (name, _same))
        if own in found:
            raise ConfigError(
                f"method option {own}: got it twice for {method}, as {quote(given[own])} and {quote(name)}, "
                "expected one name"
            )
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        found[own], given[own] = convert(value) if number else value, name  # type: ignore[arg-type]
    return found
