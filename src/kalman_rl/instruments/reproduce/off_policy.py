"""Experiments on what makes samples off-policy: lag, long completions, a quantised sampler; every clip tuned alike.

Each method takes its ratio to the sampler and has the best of four clips on the same tuning seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kalman_rl.instruments.reproduce.claim import Claim, difference
from kalman_rl.instruments.reproduce.experiment import Experiment
from kalman_rl.instruments.reproduce.loop import Arm, Setting, Training
from kalman_rl.instruments.reproduce.ratios import CLIPS, PLENTY, TEACHING, to_sampler
from kalman_rl.objectives.correction import Truncated

FILTERS = ("kpo_diffuse", "kpo_noise")
METHODS = {"GRPO": "grpo", "GSPO": "gspo"} | {name: name for name in FILTERS}
SMALL = (3e-4, 1e-3, 3e-3, 1e-2)
"""Clips of ratios that average over a long completion: GSPO's published one is 3e-4."""
LAGS = (1, 4, 16)
"""Optimizer steps by which the sampler is behind."""


def tuned(
    setting: Setting, batch: int, where: str, averaged: tuple[float, ...] = CLIPS
) -> dict[str, Training]:
    """The four methods in one setting, each to choose among four clips; ``averaged`` are those of all but GRPO."""
    return {
        f"{name}{where}": Training(
            setting,
            replace(to_sampler(method, 0.03), batch=batch),
            clips=CLIPS if name == "GRPO" else averaged,
        )
        for name, method in METHODS.items()
    }


def filtering(condition: str, where: str) -> tuple[Claim, ...]:
    """Where filtering wins over the token ratio, and that it ties with the sequence's mean."""
    beats = (
        Claim(
            f"{condition} {name} beats GRPO's token ratio.",
            "KPO",
            difference(f"{name}{where}", f"GRPO{where}"),
            low=0.0,
        )
        for name in FILTERS
    )
    alike = (
        Claim(
            f"{condition} {name} and GSPO are alike.",
            "project",
            difference(f"{name}{where}", f"GSPO{where}"),
            low=-0.03,
            high=0.03,
        )
        for name in FILTERS
    )
    return (*beats, *alike)


def behind(lag: int) -> Setting:
    """One optimizer step per generation batch, so that a lag of k batches is a lag of k steps."""
    return Setting(mix=TEACHING, updates=1, lag=lag, budget=2560, points=8)


def steps(lag: int) -> str:
    """``1 step``, ``4 steps``."""
    return f"{lag} step" + ("s" if lag > 1 else "")


_LAGGED: Mapping[str, Training] = {
    name: arm for lag in LAGS for name, arm in tuned(behind(lag), 32, f", lag {lag}").items()
}
LAG = Experiment(
    "lag",
    "What does a sampler cost that is some optimizer steps behind, and does smoothing the ratio pay?",
    f"{PLENTY}; 2560 completions, groups of 8, 32 a batch, one update a batch, rate 1e-4; ratios to the sampler, each "
    "at its own best of four clips; without a lag all ratios are 1",
    {"no lag": Training(behind(0), Arm(batch=32)), **_LAGGED},
    (
        Claim(
            "A lag of 1 step costs GRPO's token ratio less than 0.02.",
            "VCPO",
            difference("no lag", "GRPO, lag 1"),
            high=0.02,
        ),
        Claim(
            "A lag of 16 steps costs GRPO's token ratio over 0.02.",
            "VCPO",
            difference("no lag", "GRPO, lag 16"),
            low=0.02,
        ),
        *(
            claim
            for lag in LAGS
            for claim in filtering(f"With a sampler {steps(lag)} behind", f", lag {lag}")
        ),
    ),
    quick_seeds=0,
)

_COARSE = Setting(mix=TEACHING, bits=4, budget=3072, points=8)
_OWN = replace(to_sampler("grpo", 0.2), old="trainer")
QUANTISED = Experiment(
    "quantised",
    "Does smoothing the ratio pay where the sampler's weights are coarser than the trainer's?",
    f"{PLENTY}; 3072 completions, groups of 8, 128 a batch, 4 updates, the sampler with 4-bit weights; ratios to the "
    "sampler, and truncated importance sampling, each at its own best of four clips",
    {
        **tuned(_COARSE, 128, ""),
        "TIS": Training(_COARSE, replace(_OWN, correction=Truncated(2.0)), clips=CLIPS),
        "no correction": Training(_COARSE, _OWN, clips=CLIPS),
    },
    (
        Claim(
            "With a 4-bit sampler truncated importance sampling beats no correction.",
            "project",
            difference("TIS", "no correction"),
            low=0.0,
        ),
        *filtering("With a 4-bit sampler", ""),
        *(
            Claim(
                f"With a 4-bit sampler truncated importance sampling beats {name}.",
                "project",
                difference("TIS", name),
                low=0.0,
            )
            for name in FILTERS
        ),
    ),
    quick_seeds=0,
)

_LONG = Setting(mix=(0.0, 1.0, 0.0), size=128, budget=3072, points=8)
LONG = Experiment(
    "long",
    "Does smoothing the ratio pay on completions of 65 to 152 tokens?",
    "128 questions in between; 3072 completions, groups of 8, 128 a batch, 4 updates, rate 1e-4; each method at its "
    "own best of four clips, from 0.01 to 0.2 for GRPO, from 3e-4 to 0.01 for the others",
    tuned(_LONG, 128, "", SMALL),
    filtering("On completions of 65 to 152 tokens", ""),
    model="tiny-long",
)
OFF_POLICY = (LAG, QUANTISED, LONG)
