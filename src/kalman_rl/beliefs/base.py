"""What all beliefs kept in a table share: checked batches, one advantage formula."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.beliefs.groups import Groups, group_rewards, only_known, sum_of_others, unique_ids
from kalman_rl.beliefs.noise import ROBUST_INFLATION, AdvantageScale, RewardNoise, restored
from kalman_rl.beliefs.protocol import Advantages, Observed
from kalman_rl.beliefs.table import PromptTable, clock_of
from kalman_rl.checks import reading, saved
from kalman_rl.errors import ConfigError, NumericError, ShapeError, quote
from kalman_rl.numerics.kalman import Gaussian, update

FORMAT = 1
SAME_FEATURES = 0.02
"""Rows of one prompt may differ by this share of their length: bfloat16 states depend on the padding."""
ROUNDING = 1e-7
"""An advantage below this share of the reward is rounding: rows are stored as float32."""
FIRST_ROUNDING = 1e-14
"""The same before anything is stored: all is float64."""


class Prior(NamedTuple):
    """Before the rewards of a batch, per prompt (u,): belief about the value, variance R of a reward."""

    value: Gaussian
    noise: Tensor


def check_kind(state: dict[str, Any], kind: str) -> None:
    """Raise ConfigError for a saved state of another class or format."""
    got = saved("belief state", state, "format", "kind")
    if got != (FORMAT, kind):
        raise ConfigError(
            f"belief state: got format {quote(got[0])} of {quote(got[1])}, expected format {FORMAT} of "
            f"{quote(kind)}; load it with the class and version that saved it"
        )


class TableBelief(ABC):
    """A belief with one row per prompt; subclasses define what a row means.

    A subclass provides :meth:`_prior` (read only) and :meth:`_absorb` (writes rows), and names its options in
    ``_options``, which a saved state must match.
    """

    def __init__(self, table: PromptTable, *, scale: bool) -> None:
        self._table = table
        self._noise = RewardNoise()
        self._scale = AdvantageScale()
        self._scaled = scale

    def __len__(self) -> int:
        """Number of prompts that were visited."""
        return len(self._table)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        return f"<{type(self).__name__}({options}), prompts: {len(self)}>"

    @property
    def bytes_per_prompt(self) -> int:
        """Bytes of tensor data per visited prompt; the dictionary of ids comes on top (see PromptTable)."""
        return self._table.bytes_per_prompt

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the tensors that hold the rows, with the room for growth."""
        return self._table.allocated_bytes

    @property
    def reward_noise(self) -> RewardNoise:
        """What is known about noise: ``binary``, ``pooled``, ``excess_kurtosis``, ``robust``."""
        return copy.copy(self._noise)

    # ---- the protocol

    def predict(self, ids: Sequence[Hashable], *, step: int, features: Tensor | None = None) -> Gaussian:
        """Belief about the value of each id at ``step``, (n,); see :class:`Belief`."""
        prior, index = self._predicted(ids, step, features)
        return Gaussian(prior.value.mean[index], prior.value.variance[index])

    def predictive(self, ids: Sequence[Hashable], *, step: int, features: Tensor | None = None) -> Gaussian:
        """Of one new reward of each id: variance P + R; see :class:`Belief`."""
        prior, index = self._predicted(ids, step, features)
        return Gaussian(prior.value.mean[index], (prior.value.variance + prior.noise)[index])

    def advantages(
        self, ids: Sequence[Hashable], reward: Tensor, *, step: int, features: Tensor | None = None
    ) -> Advantages:
        """Reward minus the leave-one-out predictive mean, over the lagged scale; see :class:`Belief`."""
        groups = group_rewards(ids, reward)
        self._check(groups, step, 0)
        inputs = self._inputs(groups.ids, groups.place, features)
        raw, baseline = self._unscaled(groups, self._before(groups, step, inputs))
        scale = torch.tensor(self._scale.value if self._scaled else 1.0, dtype=torch.float64)
        return Advantages(raw / scale, baseline, scale)

    def update(
        self,
        ids: Sequence[Hashable],
        reward: Tensor,
        *,
        step: int,
        features: Tensor | None = None,
        part: int = 0,
    ) -> Observed:
        """Absorb the known rewards of a batch; see :class:`Belief`."""
        groups, rows, inputs = self._checked(ids, reward, step, features, part)
        if not groups.ids:
            empty = torch.zeros(0, dtype=torch.float64)
            return Observed([], empty, empty, empty, empty)
        prior = self._before(groups, step, inputs)
        raw, _ = self._unscaled(groups, prior)
        expected, noise = self._reported(prior)
        observed = Observed(
            groups.ids,
            groups.size,
            groups.mean,
            groups.mean - expected.mean,
            expected.variance + noise / groups.size,
        )
        gap = self._table.gap(rows, step)
        self._absorb(groups, rows, gap, step, inputs)
        self._scale.learn(raw, groups.known)
        rows = self._table.rows(groups.ids)
        self._table.clock[rows] = self._table.clock[rows].clamp(min=clock_of(step, part))
        return observed

    def state_dict(self) -> dict[str, Any]:
        """Everything learned; see :class:`Belief`."""
        return {
            "format": FORMAT,
            "kind": type(self).__name__,
            "options": dict(self._options),
            "table": self._table.state_dict(),
            "noise": self._noise.state_dict(),
            "scale": self._scale.state_dict(),
            **self._extra_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the saved belief; see :class:`Belief`."""
        with reading("belief state", state):
            self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        check_kind(state, type(self).__name__)
        options, rows, noise, scale = saved("belief state", state, "options", "table", "noise", "scale")
        if options != self._options:
            raise ConfigError(
                f"belief state: got options {options}, expected {self._options}; build the belief with the saved "
                "options"
            )
        table = self._table.checked(rows)
        noise, scale = restored(RewardNoise, noise), restored(AdvantageScale, scale)
        self._load_extra(state)
        self._table, self._noise, self._scale = table, noise, scale

    def check(
        self,
        ids: Sequence[Hashable],
        reward: Tensor,
        *,
        step: int,
        features: Tensor | None = None,
        part: int = 0,
    ) -> None:
        """Raise what :meth:`update` would raise, and change nothing."""
        self._checked(ids, reward, step, features, part)

    # ---- for subclasses

    @property
    def _robust(self) -> bool:
        """Whether rewards are clipped and variances inflated: only where the noise was learned from rewards."""
        return False

    @property
    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """Settings that give the numbers in the state their meaning."""

    @abstractmethod
    def _prior(self, rows: Tensor, gap: Tensor, step: int, inputs: Tensor | None) -> Prior:
        """Belief about the prompts in ``rows`` (-1 = never visited), ``gap`` steps after their last visit."""

    @abstractmethod
    def _absorb(self, groups: Groups, rows: Tensor, gap: Tensor, step: int, inputs: Tensor | None) -> None:
        """Write what follows from the rewards; every group has at least one. A negative gap is a late batch."""

    def _resolution(self, baseline: Tensor) -> Tensor | float:
        """How far a (n,) baseline may be off because of how rows are stored."""
        return 0.0

    def _before(self, groups: Groups, step: int, inputs: Tensor | None) -> Prior:
        """The belief that baselines of this batch are made of."""
        rows = self._table.rows(groups.ids)
        return self._prior(rows, self._table.gap(rows, step).clamp(min=0), step, inputs)

    def _extra_state(self) -> dict[str, Any]:
        return {}

    def _load_extra(self, state: dict[str, Any]) -> None:  # noqa: B027 most have nothing more to restore
        """Restore what _extra_state saved; validate everything before writing anything."""

    def _inputs(self, names: list[Hashable], index: Tensor, features: Tensor | None) -> Tensor | None:
        """(u, F) features of each prompt, checked; beliefs without features ignore them."""
        return None

    def _check(self, groups: Groups, step: int, part: int) -> None:
        """Refuse what this belief cannot absorb."""
        clock_of(step, part)

    # ---- details

    def _checked(
        self, ids: Sequence[Hashable], reward: Tensor, step: int, features: Tensor | None, part: int
    ) -> tuple[Groups, Tensor, Tensor | None]:
        """Groups with a known reward, their rows, their features; every refusal happens here."""
        everything = group_rewards(ids, reward)
        self._check(everything, step, part)
        inputs = self._inputs(everything.ids, everything.place, features)
        groups, kept = only_known(everything)
        rows = self._table.rows(groups.ids)
        self._table.check_new(groups.ids, rows, step, part)
        return groups, rows, None if inputs is None else inputs[kept]

    def _predicted(self, ids: Sequence[Hashable], step: int, features: Tensor | None) -> tuple[Prior, Tensor]:
        clock_of(step)
        names, index = unique_ids(ids)
        rows = self._table.rows(names)
        inputs = self._inputs(names, index, features)
        prior = self._prior(rows, self._table.gap(rows, step).clamp(min=0), step, inputs)
        return self._reported(prior), index

    def _reported(self, prior: Prior) -> Prior:
        """What is reported of a prior: clipped rewards look more certain than they are."""
        if not self._robust:
            return prior
        mean, variance = prior.value
        return Prior(Gaussian(mean, ROBUST_INFLATION * variance), ROBUST_INFLATION * prior.noise)

    def _unscaled(self, groups: Groups, prior: Prior) -> tuple[Tensor, Tensor]:
        """Advantage and baseline (n,) in reward units, in the order of the batch."""
        index = groups.place
        state = Gaussian(prior.value.mean[index], prior.value.variance[index])
        noise = prior.noise[index]
        shown = groups.reward
        if self._robust:
            shown = self._noise.clip(groups, prior.value.mean, prior.value.variance + prior.noise).reward
        others = (groups.size[index] - groups.known.double()).clamp(min=0)
        mean_of_others = sum_of_others(shown, index) / others.clamp(min=1)
        # A group of one has no others: infinite noise leaves the prediction as it is.
        per_mean = torch.where(others > 0, noise / others.clamp(min=1), torch.inf)
        baseline = update(state, mean_of_others, per_mean)[0].mean
        return self._difference(groups, baseline), baseline

    def _difference(self, groups: Groups, baseline: Tensor) -> Tensor:
        """``r - b`` (n,), 0 where missing and where nothing but rounding is left of it.

        Divided by a scale learned from such residue, residue would count as much as any advantage.
        """
        raw = groups.reward - baseline
        largest = torch.maximum(groups.reward.abs(), baseline.abs())
        stored = len(self._table) > 0
        least = ROUNDING * largest + self._resolution(baseline) if stored else FIRST_ROUNDING * largest
        return torch.where(groups.known & (raw.abs() > least), raw, 0.0)


def check_features(features: Tensor | None, count: int) -> None:
    """Refuse what is not None or a floating (count, F) tensor. Raises: ShapeError."""
    if features is None:
        return
    if (
        not isinstance(features, Tensor)
        or features.dim() != 2
        or len(features) != count
        or not features.is_floating_point()
    ):
        tensor = isinstance(features, Tensor)
        got = f"{features.dtype} {tuple(features.shape)}" if tensor else type(features).__name__
        raise ShapeError(f"features: got {got}, expected floating ({count}, F): one row per id")


def prompt_features(features: Tensor, index: Tensor, count: int) -> Tensor:
    """(u, F) features of each prompt, float32 at least, from the (n, F) of each completion.

    The first row of each id is taken.

    Args:
        features: (n, F) floating, detached here.
        index: (n,) the prompt of each row, from 0 to count - 1.
        count: u, number of prompts.

    Raises: ShapeError for another shape, NumericError for NaN, infinity, or rows of one id that differ by
    more than SAME_FEATURES.
    """
    check_features(features, len(index))
    values = features.detach().cpu()
    values = values if values.dtype == torch.float64 else values.float()
    first = torch.full((count,), len(index), dtype=torch.long)
    first.scatter_reduce_(0, index, torch.arange(len(index)), "amin")
    per_prompt = values[first]
    if torch.equal(values, per_prompt[index]) and torch.isfinite(per_prompt).all():
        return per_prompt
    bad = ~torch.isfinite(values)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise NumericError(
            f"features: got {values[row, column].item()} at row {row}, column {column}, expected finite "
            "numbers"
        )
    apart = (values - per_prompt[index]).norm(dim=1)
    differs = apart > SAME_FEATURES * per_prompt[index].norm(dim=1)
    if differs.any():
        row = int(differs.nonzero()[0])
        raise NumericError(
            f"features: got row {row} different from an earlier row of the same id, expected features of the "
            "prompt only; features of the completion would leak its reward into its own baseline"
        )
    return per_prompt
