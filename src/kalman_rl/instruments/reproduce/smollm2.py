"""SmolLM2-135M on products and sums: the same arms on a language model, small enough for one core.

Rank-16 adapters on q, v and o of the upper 15 of 30 layers are trained. Two solved examples precede every question. A
reply is a whole number of at most 4 digits and the token that ends it. Difficulty is measured first, not assumed.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch

from kalman_rl.engine.models.load import Progress, load_model
from kalman_rl.engine.tasks.task import Row, make_prompt_id
from kalman_rl.instruments.reproduce.claim import Claim, Measure, Records, difference, saved
from kalman_rl.instruments.reproduce.experiment import Experiment
from kalman_rl.instruments.reproduce.loop import Arm, Setting, Training
from kalman_rl.instruments.reproduce.pool import Limits, World
from kalman_rl.instruments.reproduce.upper import UpperPolicy
from kalman_rl.instruments.reproduce.watch import Watched

LEAD = "9 * 6 = 54\n12 * 7 = 84\n"
LONGEST = 5
LIMITS = Limits(hopeless=0.02, between=(0.03, 0.9), solved=0.95)
SMALL, LARGE = range(13), range(13, 100)
PRODUCTS, PRODUCTS_OF_LARGE = 0.9, 0.5  # shares; the others are sums


def smollm2_world(cache: Path, progress: Progress) -> World:
    """SmolLM2 as it comes, on a GPU where there is one, and questions with their measured difficulty."""
    loaded = load_model("smollm2", cache=cache, progress=progress)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = UpperPolicy(loaded.model.to(device), loaded.tokenizer, lead=LEAD, longest=LONGEST)
    bank = questions(large=20_000 if device.type == "cuda" else 200)
    progress(f"measuring the difficulty of {len(bank)} questions, once a process")
    success = policy.success(bank)
    for row, hidden in zip(bank, policy.features(bank)):
        row["features"] = hidden
    return World(policy, policy.state(), bank, success, LIMITS)


def questions(large: int) -> list[Row]:
    """Products and sums; a pair of numbers occurs once, so held-out questions share no pair with the pool.

    Every pair with one number up to 12 and the other up to 99, such pairs with 100 to 245 by fives, and at most
    ``large`` pairs of larger numbers.
    """
    rng = random.Random("smollm2 bank")
    small = [(a, b) for b in SMALL for a in range(b, 100)]
    small += [(a, b) for b in SMALL for a in range(100, 250, 5)]
    others = [(a, b) for b in LARGE for a in range(b, 100)]
    found: list[Row] = []
    for a, b in small + rng.sample(others, min(large, len(others))):
        product = rng.random() < (PRODUCTS if b in SMALL else PRODUCTS_OF_LARGE)
        sign, answer = ("*", a * b) if product else ("+", a + b)
        question = f"{a} {sign} {b} = "
        found.append(
            {
                "prompt": LEAD + question,
                "prompt_id": make_prompt_id("smollm2", question),
                "answer": str(answer),
                "source": f"{len(str(a))} {sign} {len(str(b))} digits",
            }
        )
    return found


def watched_difference(name: str, other: str, spent: int) -> Measure:
    """Squared error of one watched belief minus another's, on the rewards of the tracked arm."""

    def measure(records: Records) -> list[float]:
        runs = [run for _, run in sorted(records.get("tracked, single", {}).items())]
        errors = [(run["watched"], run["spent"].index(spent)) for run in runs]
        return [found[name][point] - found[other][point] for found, point in errors]

    return measure


GRPO = Arm(batch=64, rate=3e-4)
BATCH_MEAN = Arm(advantage="batch_mean", group=1, batch=64, rate=7e-4)
JAMES_STEIN = Arm(advantage="james_stein", group=2, batch=64, rate=7e-4)
TRACKED = Arm(advantage="k_grpo", group=1, batch=64, rate=7e-4)
STREAM = replace(TRACKED, draw="stream")
SHARP = (("expected_noise", True),)

SETTING = Setting(size=192, budget=1920, updates=2, warm_up=4, points=6)
WATCHED = (
    Watched("auto"),
    Watched("auto by source", by_source=True),
    Watched("auto on features", features=True),
    Watched("expected noise", SHARP),
    Watched("expected noise by source", SHARP, by_source=True),
    Watched("expected noise on features", SHARP, features=True),
)
"""Options chosen on the rewards of tuning seed 900."""
POOL = "40 % hopeless (p < 0.02), 30 % in between (0.03 to 0.9), 30 % solved (p > 0.95) under SmolLM2-135M"
RATES = (3e-4, 7e-4, 1.5e-3)
ARMS = {
    "GRPO, groups of 8": GRPO,
    "batch mean, single": BATCH_MEAN,
    "James-Stein, groups of 2": JAMES_STEIN,
    "tracked, single": TRACKED,
    "stream, single": STREAM,
}
SHARES = Experiment(
    "shares",
    "On SmolLM2-135M, how much is single completions, how much the belief, how much the selection?",
    f"192 questions, {POOL}; 1920 completions, 64 a batch, 2 updates; each arm at its own best of three rates",
    {
        name: Training(replace(SETTING, watched=WATCHED) if arm is TRACKED else SETTING, arm, RATES)
        for name, arm in ARMS.items()
    },
    (
        Claim(
            "On SmolLM2 single completions with the tracked baseline need over 1.5 times fewer completions than GRPO.",
            "project",
            saved("tracked, single", "GRPO, groups of 8"),
            low=1.5,
            factor=True,
        ),
        Claim(
            "On SmolLM2 the stream needs over 1.5 times fewer completions than GRPO.",
            "project",
            saved("stream, single", "GRPO, groups of 8"),
            low=1.5,
            factor=True,
        ),
        Claim(
            "On SmolLM2 single completions alone, with a batch mean, beat GRPO.",
            "project",
            difference("batch mean, single", "GRPO, groups of 8"),
            low=0.0,
        ),
        Claim(
            "On SmolLM2 the belief adds: tracked beats the batch mean of single completions.",
            "project",
            difference("tracked, single", "batch mean, single"),
            low=0.0,
        ),
        Claim(
            "On SmolLM2 tracked beats James-Stein groups of 2.",
            "project",
            difference("tracked, single", "James-Stein, groups of 2"),
            low=0.0,
        ),
        Claim(
            "On SmolLM2 the selection adds: the stream beats tracked.",
            "project",
            difference("stream, single", "tracked, single"),
            low=0.0,
        ),
        Claim(
            "On SmolLM2 the stream is better than GRPO on held-out questions.",
            "project",
            difference("stream, single", "GRPO, groups of 8", "held_out"),
            low=0.0,
        ),
        Claim(
            "On SmolLM2 the stream is better than tracked on held-out questions.",
            "project",
            difference("stream, single", "tracked, single", "held_out"),
            low=0.0,
        ),
        *(
            Claim(
                f"After {spent} completions on SmolLM2, {name} errs less about p than auto does (squared error).",
                "project",
                watched_difference(name, "auto", spent),
                high=0.0,
            )
            for name, spent in (
                ("expected noise", 320),
                ("expected noise", 640),
                ("expected noise", 1920),
                ("auto by source", 320),
                ("auto on features", 640),
            )
        ),
    ),
    quick_seeds=1,
    model="smollm2",
)

_LARGE = Setting(size=1024, budget=65_536, updates=4, warm_up=8, points=16)
SHARES_LARGE = Experiment(
    "shares_large",
    "The same on a larger pool; for a GPU.",
    f"1024 questions, {POOL}; 65536 completions, 512 a batch, 4 updates; each arm at its own best of three rates",
    {
        name: Training(_LARGE, replace(arm, batch=512), RATES)
        for name, arm in {
            **ARMS,
            "tracked, expected noise": replace(TRACKED, belief=SHARP),
            "stream, expected noise": replace(STREAM, belief=SHARP),
        }.items()
    },
    (
        *SHARES.claims[:8],
        Claim(
            "On SmolLM2 the belief with expected noise adds: tracked with it beats tracked.",
            "project",
            difference("tracked, expected noise", "tracked, single"),
            low=0.0,
        ),
        Claim(
            "On SmolLM2 the stream with expected noise beats the stream.",
            "project",
            difference("stream, expected noise", "stream, single"),
            low=0.0,
        ),
    ),
    tuning_seeds=(900,),
    model="smollm2",
)

_SINGLES = ("GRPO, groups of 8", "batch mean, single", "tracked, single")


def _beats(where: str, source: str) -> tuple[Claim, ...]:
    """The tracked baseline beats GRPO, and the batch mean of single completions."""
    return tuple(
        Claim(
            f"On SmolLM2 {where} the tracked baseline beats {name}.",
            source,
            difference("tracked, single", other),
            low=0.0,
        )
        for name, other in (("GRPO", "GRPO, groups of 8"), ("the batch mean", "batch mean, single"))
    )


SHARES_NOISE = Experiment(
    "shares_noise",
    "On SmolLM2-135M, what is left of it under reward noise?",
    f"192 questions, {POOL}; 1920 completions, 64 a batch, 2 updates; N(0, 0.5) is added to every 0/1 reward; rates "
    "as `shares` chose them",
    {name: Training(replace(SETTING, noise=0.5), ARMS[name]) for name in _SINGLES},
    _beats("at reward noise of sd 0.5", "K-GRPO"),
    seeds=3,
    quick_seeds=1,
    model="smollm2",
)
SHARES_OFFSETS = Experiment(
    "shares_offsets",
    "On SmolLM2-135M, does the tracked baseline pay where every question has a reward offset of its own?",
    f"192 questions, {POOL}; 1920 completions, 64 a batch, 2 updates; a constant N(0, 1) per question is added to its "
    "reward; rates as `shares` chose them",
    {name: Training(replace(SETTING, offset=1.0), ARMS[name]) for name in _SINGLES},
    _beats("with offsets", "project"),
    seeds=3,
    quick_seeds=1,
    model="smollm2",
)
SHARES_EARLY = Experiment(
    "shares_early",
    "On SmolLM2-135M, does a belief that makes more of the first visits train better?",
    f"192 questions, {POOL}; 1920 completions, 64 a batch, 2 updates; `expected_noise` against the default, rates as "
    "`shares` chose them",
    {
        "GRPO, groups of 8": Training(SETTING, GRPO),
        "batch mean, single": Training(SETTING, BATCH_MEAN),
        "tracked, single": Training(replace(SETTING, watched=WATCHED), TRACKED),
        "stream, single": Training(SETTING, STREAM),
        "tracked, expected noise": Training(SETTING, replace(TRACKED, belief=SHARP)),
        "stream, expected noise": Training(SETTING, replace(STREAM, belief=SHARP)),
    },
    (
        Claim(
            "On SmolLM2 tracked with expected noise needs over 1.5 times fewer completions than GRPO.",
            "project",
            saved("tracked, expected noise", "GRPO, groups of 8"),
            low=1.5,
            factor=True,
        ),
        Claim(
            "On SmolLM2 the stream with expected noise needs over 1.5 times fewer completions than GRPO.",
            "project",
            saved("stream, expected noise", "GRPO, groups of 8"),
            low=1.5,
            factor=True,
        ),
        Claim(
            "On SmolLM2 tracked with expected noise beats the batch mean of single completions.",
            "project",
            difference("tracked, expected noise", "batch mean, single"),
            low=0.0,
        ),
        Claim(
            "On SmolLM2 expected noise adds to tracked.",
            "project",
            difference("tracked, expected noise", "tracked, single"),
            low=0.0,
        ),
        Claim(
            "On SmolLM2 expected noise adds to the stream.",
            "project",
            difference("stream, expected noise", "stream, single"),
            low=0.0,
        ),
    ),
    quick_seeds=1,
    model="smollm2",
)
SHARES_VISITS = Experiment(
    "shares_visits",
    "On SmolLM2-135M, what do twice the visits change?",
    f"192 questions, {POOL}; 3840 completions, 20 visits a question in place of 10, 64 a batch, 2 updates; rates as "
    "`shares` chose them",
    {
        name: Training(replace(SETTING, budget=3840, points=12), ARMS[name])
        for name in (*_SINGLES, "stream, single")
    },
    (
        Claim(
            "On SmolLM2 with 20 visits the tracked baseline needs over 1.5 times fewer completions than GRPO.",
            "project",
            saved("tracked, single", "GRPO, groups of 8"),
            low=1.5,
            factor=True,
        ),
        Claim(
            "On SmolLM2 with 20 visits the stream needs over 1.5 times fewer completions than GRPO.",
            "project",
            saved("stream, single", "GRPO, groups of 8"),
            low=1.5,
            factor=True,
        ),
        Claim(
            "On SmolLM2 with 20 visits the belief adds: tracked beats the batch mean of single completions.",
            "project",
            difference("tracked, single", "batch mean, single"),
            low=0.0,
        ),
        Claim(
            "On SmolLM2 with 20 visits the selection adds: the stream beats tracked.",
            "project",
            difference("stream, single", "tracked, single"),
            low=0.0,
        ),
    ),
    seeds=3,
    quick_seeds=1,
    model="smollm2",
)

SMOLLM2 = (SHARES, SHARES_EARLY, SHARES_OFFSETS, SHARES_NOISE, SHARES_VISITS, SHARES_LARGE)
