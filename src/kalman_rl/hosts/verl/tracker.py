"""A belief about every prompt of verl's dataset: settings, names of prompts, counts before sampling, advantages after.

Nothing here touches verl or Ray; the trainer fetches the columns and hands them over.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.beliefs.advantage import Tracked
from kalman_rl.beliefs.base import TableBelief
from kalman_rl.beliefs.by_source import Sources
from kalman_rl.errors import ConfigError, quote, unknown_name
from kalman_rl.hosts.verl.estimators import TRACKED
from kalman_rl.methods import make_method
from kalman_rl.sampling.allocate import allocate
from kalman_rl.sampling.budget import Budget
from kalman_rl.sampling.tracking import Tracking, fixed_groups, outcome_metrics


@dataclass(frozen=True)
class TrackerSettings(Budget):
    """What stands under ``algorithm.kalman_rl``: a budget, read for the allocation "predictive", and

    Args:
        belief, belief_options: a name of :func:`kalman_rl.beliefs.make_belief` and its options; read for the
            estimator ``kalman_rl/tracked``, while ``kalman_rl/k_grpo`` and ``kalman_rl/spo`` name their own.
        prompt_key: columns of the dataset that name a prompt for good. verl's ``index`` is
            ``extra_info.index``, often counted anew in every file, hence ``data_source`` beside it.
        source_key: column that says where a prompt comes from: the belief learns noise, drift, prior and scale for each
            source by itself. With a single source nothing changes. None = one belief for all, and so is the default
            with a belief of your own that is no :class:`~kalman_rl.beliefs.TableBelief`.
        prior_key: column with solve rates of the start model, ``{"rate": 0.25, "count": 8}`` or nothing: the belief
            begins with them. None = it begins with nothing.

    verl samples ``rollout.n`` completions per prompt on average, all at once: ``budget`` and rounds stay as they are.
    """

    belief: str = "auto"
    belief_options: Mapping[str, Any] = field(default_factory=dict)
    prompt_key: Sequence[str] = ("data_source", "index")
    source_key: str | None = "data_source"
    prior_key: str | None = None

    def __post_init__(self) -> None:
        if self.allocation not in ("fixed", "predictive"):
            raise ConfigError(
                f"algorithm.kalman_rl.allocation: got {quote(self.allocation)}, expected fixed or predictive; "
                "rounds need a rollout that waits for rewards, which verl's does not"
            )
        for name in ("budget", "rounds", "max_rounds"):
            if (value := getattr(self, name)) != (default := getattr(Budget, name)):
                raise ConfigError(
                    f"algorithm.kalman_rl.{name}: got {quote(value)}, expected {quote(default)} because verl "
                    "samples rollout.n completions per prompt on average, all at once"
                )
        if isinstance(self.prompt_key, str) or not self.prompt_key:
            raise ConfigError(
                f"algorithm.kalman_rl.prompt_key: got {quote(self.prompt_key)}, expected a list of columns, "
                "like [index]"
            )
        if self.source_key is not None and (not isinstance(self.source_key, str) or not self.source_key):
            raise ConfigError(
                f"algorithm.kalman_rl.source_key: got {quote(self.source_key)}, expected a column, or null for "
                "one belief"
            )
        if self.prior_key is not None and (not isinstance(self.prior_key, str) or not self.prior_key):
            raise ConfigError(
                f"algorithm.kalman_rl.prior_key: got {quote(self.prior_key)}, expected a column, or null"
            )
        if not isinstance(self.belief_options, Mapping):
            raise ConfigError(
                f"algorithm.kalman_rl.belief_options: got {quote(self.belief_options)}, expected options by name"
            )
        try:
            super().__post_init__()
        except ConfigError as error:
            raise ConfigError(f"algorithm.kalman_rl: {error}") from None


def read_settings(values: Mapping[str, Any]) -> TrackerSettings:
    """Settings from a mapping. Raises: ConfigError for an unknown name or a value out of range."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"algorithm.kalman_rl: got {quote(values)}, expected settings by name")
    known = [f.name for f in dataclasses.fields(TrackerSettings)]
    for name in values:
        if name not in known:
            raise unknown_name("algorithm.kalman_rl", name, known)
    return TrackerSettings(**values)


def make_tracking(estimator: str, settings: TrackerSettings) -> Tracking:
    """An empty belief for ``kalman_rl/ESTIMATOR`` with its books. Raises: ConfigError."""
    if estimator == TRACKED:
        part = Tracked(settings.belief, tuple(settings.belief_options.items()))
    else:
        own: Any = make_method(estimator).advantage
        if settings.belief not in (TrackerSettings.belief, own.belief):
            raise ConfigError(
                f"algorithm.kalman_rl.belief: got {quote(settings.belief)} for kalman_rl/{estimator}, expected "
                f"{quote(own.belief)}; take adv_estimator=kalman_rl/{TRACKED} to choose the belief"
            )
        part = Tracked(own.belief, tuple({**dict(own.options), **settings.belief_options}.items()))
    default = settings.source_key == TrackerSettings.source_key
    if settings.source_key is None or (default and not isinstance(part.make(), TableBelief)):
        return Tracking(part.make(), settings)
    sources = Sources("algorithm.kalman_rl.source_key")
    return Tracking(part.make(sources), settings, sources)


class PromptNames:
    """Names of prompts from columns of the dataset, refusing one name for two prompts."""

    def __init__(self, key: Sequence[str]) -> None:
        self.key = tuple(key)
        self._seen: dict[Hashable, int] = {}

    def of(self, columns: Mapping[str, Sequence[Any]]) -> list[Hashable]:
        """A text per row, "gsm8k/17" for the key (data_source, index)."""
        return ["/".join(str(value) for value in row) for row in zip(*(columns[name] for name in self.key))]

    def check(self, names: Sequence[Hashable], prompts: Sequence[Any]) -> None:
        """Raise ConfigError if a name stood for another prompt before."""
        for name, prompt in zip(names, prompts):
            text = hash("\0".join(_texts(prompt)))
            if self._seen.setdefault(name, text) != text:
                raise ConfigError(
                    f"{'/'.join(self.key)}: got {quote(str(name))} for two different prompts, expected one "
                    "name per prompt "
                    "because beliefs are kept by it; give every row of the dataset its own extra_info.index (verl "
                    "takes 0 where there is none), or name other columns in algorithm.kalman_rl.prompt_key"
                )


def _texts(value: Any) -> Iterator[str]:
    """Every text in the messages of a prompt; images are left out, their objects differ from visit to visit."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)


def candidates_of(budget: Budget, *, prompts: int, n: int, fetch: int, pool: int) -> int | None:
    """Candidates of a batch of ``prompts`` prompts, in multiples of ``fetch``, which verl's loader brings at once.

    None where every prompt is sampled. Raises: ConfigError.
    """
    if budget.allocation == "fixed" or budget.completions_min:
        return None
    try:
        among = budget.chooses_among(prompts, prompts * n, pool)
    except ConfigError as error:
        raise ConfigError(f"algorithm.kalman_rl.{error}") from None
    if budget.candidates is not None and among % fetch:
        raise ConfigError(
            f"algorithm.kalman_rl.candidates: got {among}, expected a multiple of {fetch}, the prompts that verl's "
            "loader brings at once (data.gen_batch_size, or else data.train_batch_size)"
        )
    return max(among // fetch * fetch, prompts)


def chosen_counts(tracking: Tracking, names: list[Hashable], *, step: int, total: int) -> list[int]:
    """Completions of each candidate, ``total`` in all, 0 for those that are passed over.

    A name that comes again (the dataset's end and beginning in one batch) gets none the second time.
    """
    counts = dict(_divided(tracking, list(dict.fromkeys(names)), step, total, 0))
    return [counts.pop(name, 0) for name in names]


def planned_counts(tracking: Tracking, names: list[Hashable], *, step: int, n: int) -> list[int]:
    """Completions of each row of a prompt batch, ``n`` times its length in all, and at least one for each row.

    A name that comes twice (the dataset's end and beginning in one batch) is left at ``n`` each time.
    """
    budget, often = tracking.budget, Counter(names)
    single = [name for name in names if often[name] == 1]
    if budget.allocation == "fixed" or not single:
        return [n] * len(names)
    counts = dict(_divided(tracking, single, step, n * len(single), min(max(budget.completions_min, 1), n)))
    return [counts.get(name, n) for name in names]


def _divided(
    tracking: Tracking, names: list[Hashable], step: int, total: int, least: int
) -> Iterator[tuple[Hashable, int]]:
    budget = tracking.budget
    found = allocate(
        tracking.belief,
        names,
        step=step,
        total=total,
        aim=budget.aim,
        n_min=least,
        n_max=max(budget.completions_max, -(-total // len(names))),
        reward_range=budget.reward_range,
        reward_noise_variance=budget.reward_noise_variance,
        coverage=tracking.coverage,
    )
    return zip(names, found.counts.tolist())


class Rows(NamedTuple):
    """verl's trajectories, (B,) each: the prompt's ``name``, the ``session`` a row belongs to, and whether the row is
    ``counted``: the last output of its session and no padding."""

    name: list[Hashable]
    session: list[str]
    counted: list[bool]

    @property
    def prompts(self) -> int:
        """Number of prompt groups that were sampled."""
        return len({s.rsplit("_", 1)[0] for s, counted in zip(self.session, self.counted) if counted})


def rows_of(keys: Sequence[str], tags: Sequence[Mapping[str, Any]], names: list[Hashable]) -> Rows:
    """Read verl's keys ``{uid}_{session}_{output}``."""
    session, output = zip(*(key.rsplit("_", 1) for key in keys))
    last: dict[str, int] = {}
    for name, number in zip(session, output):
        last[name] = max(last.get(name, -1), int(number))
    counted = [
        int(number) == last[name] and not tag.get("is_padding", False)
        for name, number, tag in zip(session, output, tags)
    ]
    return Rows(names, list(session), counted)


def tracked_advantages(
    tracking: Tracking,
    rows: Rows,
    reward: Tensor,
    *,
    global_step: int,
    n: int,
    prompts: int | None = None,
    weight: Mapping[Hashable, float] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Advantages (B,) float64 of verl's rows, and metrics; the belief absorbs the rewards.

    Every output of a session gets the advantage of its last one; padding gets 0.

    Args:
        tracking: read, then updated.
        rows: of :func:`rows_of`.
        reward: (B,), NaN = missing.
        global_step: verl's.
        n: ``rollout.n``, for what a fixed allocation would have used.
        prompts: of verl's batch, where those of ``rows`` were chosen among candidates.
        weight: of each prompt's loss, where a stream drew them. None = 1.
    """
    counted = torch.tensor(rows.counted)
    names = [name for name, yes in zip(rows.name, rows.counted) if yes]
    if not names:
        return torch.zeros(len(reward), dtype=torch.float64), {}
    step = tracking.tick(global_step)
    predicted = tracking.before(list(dict.fromkeys(names)), step)
    known = reward.detach().double().cpu()[counted]
    sampled = fixed_groups(tracking, names, known, step, equal=tracking.budget.allocation == "predictive")
    if weight is not None:
        drawn = torch.tensor([weight[name] for name in names], dtype=torch.float64)
        sampled = sampled._replace(weight=sampled.weight * drawn)
    metrics = outcome_metrics(sampled, (names, known), predicted, tracking, (prompts or rows.prompts) * n)
    tracking.note(sampled)
    sessions = [session for session, yes in zip(rows.session, rows.counted) if yes]
    found = dict(zip(sessions, (sampled.advantage * sampled.weight).tolist()))
    return torch.tensor([found.get(session, 0.0) for session in rows.session], dtype=torch.float64), metrics
