"""Experiments on ratios: stale samples, a sampler with coarser weights, KPO's published settings, the stress table."""

from __future__ import annotations

from dataclasses import replace

from kalman_rl.instruments.reproduce.claim import Claim, difference, value
from kalman_rl.instruments.reproduce.experiment import Experiment
from kalman_rl.instruments.reproduce.loop import Arm, Setting, Training, clipped
from kalman_rl.objectives.correction import FilteredTruncated, Truncated

TEACHING = (0.1, 0.8, 0.1)
PLENTY = "256 questions, 10 % hopeless, 80 % in between, 10 % solved"


CLIPS = (0.01, 0.03, 0.1, 0.2)
"""Tried on tuning seeds, for every method the same."""
PUBLISHED = (("low", 3e-4), ("high", 4e-4))
"""KPO's clip, where only the filter's start is to differ from KPO."""


def to_sampler(method: str, clip: float) -> Arm:
    """A method whose ratio is taken to the sampler, with this clip on both sides."""
    return clipped(Arm(method, rate=1e-4), clip)


_LATE = Setting(mix=TEACHING, lag=8, budget=4096)
STALE = Experiment(
    "stale",
    "Does smoothing a ratio pay on stale samples?",
    f"{PLENTY}; 4096 completions, groups of 8, 128 a batch, 4 updates, the sampler 8 batches behind; ratios to the "
    "sampler, each at its own best of four clips",
    {
        "GRPO": Training(_LATE, to_sampler("grpo", 0.05), clips=CLIPS),
        "GSPO": Training(_LATE, to_sampler("gspo", 0.01), clips=CLIPS),
        "kpo_diffuse": Training(_LATE, to_sampler("kpo_diffuse", 0.03), clips=CLIPS),
        "kpo_noise": Training(_LATE, to_sampler("kpo_noise", 0.01), clips=CLIPS),
    },
    (
        *(
            Claim(
                f"On stale samples {name} beats GRPO's token ratio.",
                source,
                difference(name, "GRPO"),
                low=0.01,
            )
            for name, source in (("GSPO", "project"), ("kpo_diffuse", "KPO"), ("kpo_noise", "KPO"))
        ),
        *(
            Claim(
                f"On stale samples {name} and GSPO are alike.",
                "project",
                difference(name, "GSPO"),
                low=-0.03,
                high=0.03,
            )
            for name in ("kpo_diffuse", "kpo_noise")
        ),
    ),
    seeds=6,
)

_COARSE = Setting(mix=TEACHING, bits=4, budget=3072)
_OWN = Arm(old="trainer", rate=1e-4)
MISMATCH = Experiment(
    "mismatch",
    "What helps where the sampler's weights are not the trainer's?",
    f"{PLENTY}; 3072 completions, groups of 8, 128 a batch, 4 updates, the sampler with 4-bit weights",
    {
        "none": Training(_COARSE, _OWN),
        "TIS": Training(_COARSE, replace(_OWN, correction=Truncated(2.0))),
        "sequence TIS": Training(_COARSE, replace(_OWN, correction=Truncated(2.0, "sequence"))),
        "GSPO to the sampler": Training(_COARSE, to_sampler("gspo", 0.2)),
        "kpo_diffuse to the sampler": Training(_COARSE, to_sampler("kpo_diffuse", 0.2)),
        "filtered correction": Training(_COARSE, replace(_OWN, correction=FilteredTruncated())),
    },
    (
        Claim(
            "Under a mismatch truncated importance sampling beats no correction.",
            "project",
            difference("TIS", "none"),
            low=0.07,
        ),
        *(
            Claim(
                f"Under a mismatch truncated importance sampling beats {name}.",
                "project",
                difference("TIS", name),
                low=0.0,
            )
            for name in ("kpo_diffuse to the sampler", "filtered correction")
        ),
    ),
)

_STRESS = Setting(mix=TEACHING, updates=8)
_METHODS = {
    "grpo": Arm(batch=256),
    "gspo": Arm("gspo", batch=256),
    "kpo, published": Arm("kpo", batch=256),
    "ratio := 1, same clip": Arm("ratio_one", batch=256),
    "kpo_diffuse": Arm("kpo_diffuse", PUBLISHED, batch=256),
}
_RATES = {"A": 1e-4, "C": 3e-4}
_STRESSED = {
    f"{name}, {condition}": Training(_STRESS, replace(arm, rate=rate))
    for condition, rate in _RATES.items()
    for name, arm in _METHODS.items()
}
_HARSH = f"{PLENTY}; 8192 completions, groups of 8, 256 a batch, 8 updates; rate A 1e-4, C 3e-4"
STRESS = Experiment(
    "stress",
    "Which methods stand many updates per batch and a rate three times as large?",
    _HARSH,
    _STRESSED,
    (
        *(
            Claim(
                f"Under {condition} a diffuse start keeps KPO from its collapse as published.",
                "project",
                difference(f"kpo_diffuse, {condition}", f"kpo, published, {condition}"),
                low=0.05,
            )
            for condition in _RATES
        ),
        *(
            Claim(
                f"Under {condition} kpo_diffuse and {other} tie.",
                "project",
                difference(f"kpo_diffuse, {condition}", f"{other}, {condition}"),
                low=-0.05,
                high=0.05,
            )
            for condition in _RATES
            for other in ("grpo", "gspo")
        ),
    ),
)

KPO = Experiment(
    "kpo",
    "Is KPO with its published settings more stable than GRPO and GSPO?",
    _HARSH,
    _STRESSED
    | {
        f"kpo, unclipped, {condition}": Training(_STRESS, Arm("kpo_unclipped", batch=256, rate=rate))
        for condition, rate in _RATES.items()
    },
    (
        *(
            Claim(
                f"Under {condition} KPO as published beats {other}.",
                "KPO",
                difference(f"kpo, published, {condition}", f"{other}, {condition}"),
                low=0.0,
            )
            for condition in _RATES
            for other in ("grpo", "gspo")
        ),
        *(
            Claim(
                f"Under {condition} KPO {form} keeps over 0.9 of its best accuracy to the end.",
                "KPO",
                value(f"kpo, {form}, {condition}", "kept"),
                low=0.9,
            )
            for condition in _RATES
            for form in ("published", "unclipped")
        ),
        Claim(
            "Under A KPO as published does what no ratio with the same clip does.",
            "project",
            difference("kpo, published, A", "ratio := 1, same clip, A"),
            low=-0.03,
            high=0.03,
        ),
    ),
)

RATIOS = (STALE, MISMATCH, STRESS, KPO)
