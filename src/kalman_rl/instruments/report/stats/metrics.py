"""Which training metrics the page draws, and how: one table."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kalman_rl.engine.runs.reading import RunRecord
from kalman_rl.instruments.report.stats.series import complement, same

OF_RATIO = ("ratio/", "trust/", "policy/", "effective_sample_size/")
"""Where the names of metrics begin that a ratio decides."""
REWARD_OF = re.compile(r"rewards/(.+)/mean")
MOST_REWARDS = 8


@dataclass(frozen=True)
class Figure:
    """A titled chart, as data."""

    title: str
    note: str
    chart: dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One line of a small chart: its name, the metric, and what to do with the value."""

    name: str
    key: str
    change: Callable[[float], float] = same
    dashed: bool = False


@dataclass(frozen=True)
class Metric:
    """A small chart of the training log; ``limits`` are the least and, if there is one, the greatest value."""

    title: str
    note: str
    unit: str
    panels: Sequence[Panel]
    log: bool = False
    limits: Sequence[float] = ()

    @property
    def of_ratio(self) -> bool:
        """Only defined where some log-ratio is not zero."""
        return any(panel.key.startswith(OF_RATIO) for panel in self.panels)

    def inside(self, low: float, high: float) -> tuple[float, float]:
        """An interval cut to the values the metric can have."""
        floor, ceiling = (*self.limits, *(-math.inf, math.inf)[len(self.limits) :])
        return max(low, floor), min(high, ceiling)


REWARD = Metric(
    "Training reward",
    "Mean reward of the completions drawn for each update.",
    "reward",
    [Panel("reward", "reward")],
)
HELD_OUT = Metric(
    "Held-out reward",
    "Mean reward of the replies to held-out prompts.",
    "held-out reward",
    [Panel("sampled", "eval/sampled_reward"), Panel("greedy", "eval/greedy_reward", dashed=True)],
)
ENTROPY = Metric(
    "Entropy",
    "Mean entropy of the next token; near zero, sampling has become deterministic.",
    "nats per token",
    [Panel("entropy", "entropy")],
    limits=(0.0,),
)
KL = Metric(
    "KL to the old policy",
    "How far the policy has moved since its batch was started (k3 estimate).",
    "nats per token",
    [Panel("KL", "policy/kl_old")],
    limits=(0.0,),
)
VARIANCE = Metric(
    "Variance of the log-ratio",
    "Before and after the method's transform. Log scale; zero lies on the floor.",
    "nats²",
    [
        Panel("filtered", "ratio/filtered_log_variance"),
        Panel("raw", "ratio/raw_log_variance", dashed=True),
    ],
    log=True,
)
SAMPLE_SIZE = Metric(
    "Effective sample size",
    "Kish's share of the tokens that the weights leave; 1 means equal weights.",
    "share of tokens",
    [
        Panel("after the method", "effective_sample_size/tokens"),
        Panel("raw", "effective_sample_size/tokens_raw", dashed=True),
    ],
    limits=(0.0, 1.0),
)
SEQUENCE_SIZE = Metric(
    "Effective sample size of sequences",
    "The same for whole completions; raw weights are products of token ratios. It measures how far the updates go, "
    "and announces no collapse.",
    "share of sequences",
    [
        Panel("after the method", "effective_sample_size/sequences"),
        Panel("raw", "effective_sample_size/sequences_raw", dashed=True),
    ],
    limits=(0.0, 1.0),
)
CLIPPED = Metric(
    "Clipped share",
    "Tokens without gradient because they left the trust region.",
    "share of tokens",
    [Panel("clipped", "trust/kept", complement)],
    limits=(0.0, 1.0),
)
FILTERED = Metric(
    "Variance of the filtered log-ratio",
    "After the method's transform. Log scale; zero lies on the floor.",
    "nats²",
    VARIANCE.panels[:1],
    log=True,
)

SIGN_SWITCH = Metric(
    "Sign switches of the log-ratio",
    "Neighbouring tokens whose log-ratio changes sign: 0.5 for white noise, less the more is smoothed.",
    "share of neighbours",
    [
        Panel("filtered", "ratio/filtered_sign_switch"),
        Panel("raw", "ratio/raw_sign_switch", dashed=True),
    ],
    limits=(0.0, 1.0),
)
REFERENCE = Metric(
    "KL to the reference",
    "How far the policy is from the model that training started with (k3 estimate).",
    "nats per token",
    [Panel("KL", "kl")],
    limits=(0.0,),
)
LARGEST = Metric(
    "Largest log-ratio",
    "The single token whose probability moved most in each update.",
    "nats",
    [Panel("largest", "ratio/max_abs_log_ratio")],
    limits=(0.0,),
)
LENGTH = Metric(
    "Completion length",
    "Mean number of tokens of the completions drawn for each update.",
    "tokens",
    [Panel("length", "completions/mean_length")],
    limits=(0.0,),
)
TOKENS = Metric(
    "Tokens sampled",
    "Prompt and completion tokens so far, as the trainer counts them.",
    "tokens",
    [Panel("tokens", "num_tokens")],
    limits=(0.0,),
)
CLOCK = Metric(
    "Time",
    "On the run's clock, evaluations and checkpoints included.",
    "seconds",
    [Panel("time", "time")],
    limits=(0.0,),
)

PACE = Metric(
    "Time of a step",
    "Of an optimizer step, with the sampling before it; without evaluations and checkpoints.",
    "seconds",
    [Panel("step", "step_time")],
    limits=(0.0,),
)
MEMORY = Metric(
    "Memory",
    "The most that the training process took so far, and its tensors on a GPU.",
    "GB",
    [Panel("process", "memory/process_most"), Panel("GPU", "memory/device_most", dashed=True)],
    limits=(0.0,),
)

LEARNING = (REWARD, HELD_OUT, ENTROPY, LENGTH)
RATIOS = (VARIANCE, SAMPLE_SIZE, SEQUENCE_SIZE, CLIPPED, SIGN_SWITCH, LARGEST, KL, REFERENCE)
COSTS = (CLOCK, PACE, TOKENS, MEMORY)
CUMULATIVE = frozenset({"num_tokens", "time", "memory/process_most", "memory/device_most"})
"""Series that grow or stand: never smoothed."""
STRESS = (FILTERED, CLIPPED, KL)


def each_reward(runs: Sequence[RunRecord]) -> Metric | None:
    """The reward functions of runs one by one, None where there is one alone."""
    found = (REWARD_OF.fullmatch(name) for run in runs for row in run.train for name in row)
    names = list(dict.fromkeys(match[1] for match in found if match))
    panels = [
        Panel(name, f"rewards/{name}/mean", dashed=place > 0)
        for place, name in enumerate(names[:MOST_REWARDS])
    ]
    note = "Mean of each reward function, before weights."
    return Metric("Rewards one by one", note, "reward", panels) if len(panels) > 1 else None
