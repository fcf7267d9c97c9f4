"""Replay: any method on the stored tokens of a run, without model or GPU.

Traces hold a few completions per step, not whole groups: the stored advantages are used as they are, and
bounds that a method chooses on its batch are chosen on the traced rows. Steps are read one at a time; what
stays in memory is 8 bytes a token.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.checks import is_whole
from kalman_rl.engine.config import TrainConfig, build, settings_of
from kalman_rl.engine.runs import traces
from kalman_rl.engine.runs.reading import read_manifest
from kalman_rl.errors import ConfigError, KalmanRLError, RunError, one_line, quote
from kalman_rl.methods import METHODS, make_method
from kalman_rl.objectives.inputs import check_provided
from kalman_rl.objectives.loss import Method, Tokens, policy_loss
from kalman_rl.objectives.rollouts import Rollouts

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SELF_CHECK = 1e-5
"""Largest difference of the run's own method to the stored columns, relative to 1 or the value."""

MAX_POSITIONS = 1_000_000
"""Positions that a completion may span; a larger number in a file is damage."""

PROVIDED = {"logp_behaviour", "length", "mask", "reward", "group", "past_steps", "whole_step"}
"""What a method finds in a replay. For both kinds of steps there is a stand-in: see :func:`chosen_in_training`."""
_REFUSAL = (
    "a replay",
    "take another one, because traces hold numbers of the sampled tokens, and one advantage each",
)
_COLUMNS = tuple(
    "sequence position token logp_old logp_behaviour logp log_ratio filtered_log_ratio coefficient kept "
    "advantage".split()
)


class Field(NamedTuple):
    """What a method does to n tokens, (n,) each: log-weight, coefficient, kept."""

    log_weight: Tensor
    coefficient: Tensor
    kept: Tensor


class FieldSummary(NamedTuple):
    """A coefficient field in numbers; ``effective_sample_size`` is Kish's share, NaN if nothing is kept."""

    kept: float
    effective_sample_size: float
    quantiles: dict[str, float]


class StepReplay(NamedTuple):
    """One step: its number of tokens and sequences, both fields in numbers, their cosine."""

    step: int
    tokens: int
    sequences: int
    method: FieldSummary
    against: FieldSummary
    cosine: float


class Disagreement(NamedTuple):
    """A token on which two methods differ; pairs hold the method's value, then the other's."""

    step: int
    sequence: int
    position: int
    token: str
    log_ratio: float
    log_weight: tuple[float, float]
    coefficient: tuple[float, float]


@dataclass(frozen=True)
class ReplayResult:
    """Result of :func:`replay`; ``self_check`` is the error of the run's own method, None without one."""

    method: str
    against: str
    own: str | None
    self_check: float | None
    flipped: int
    steps: list[StepReplay]
    overall: StepReplay
    disagreements: list[Disagreement]
    notes: list[str] = field(default_factory=list)


def replay(
    run: Path,
    method: str | Method,
    options: Mapping[str, float] | None = None,
    *,
    against: str | Method | None = None,
    steps: tuple[int, int] | None = None,
    top: int = 20,
) -> ReplayResult:
    """Recompute a method on the stored tokens of a run and compare it with another.

    Args:
        run: directory with ``traces/step-*.parquet``. Nothing is written.
        method, options: a name with options, or a composition.
        against: what to compare with; None = the columns the run recorded.
        steps: first and last step to read; None = all.
        top: tokens to list, those with the largest difference of coefficients first.

    Raises:
        ConfigError: unknown method or option, one that asks for what traces do not hold, or no trace in ``steps``.
        RunError: no run, no traces, or a damaged file.
    """
    run = Path(run)
    read_manifest(run)
    ours = make_method(method, **(options or {})) if isinstance(method, str) else method
    other = make_method(against) if isinstance(against, str) else against
    for name, each in (("method", ours), ("against", other)):
        if not isinstance(each, Method) and (each is not None or name == "method"):
            raise ConfigError(f"{name}: got {quote(each)}, expected the name of a method, or a Method")
        if each is not None:
            check_provided(each, PROVIDED, *_REFUSAL)
    own, notes = own_method(run, named=(method, against))
    if not is_whole(top):
        raise ConfigError(f"top: got {quote(top)}, expected a number of tokens >= 0")
    if steps is not None and not (isinstance(steps, tuple) and len(steps) == 2 and all(map(is_whole, steps))):
        raise ConfigError(f"steps: got {quote(steps)}, expected the first and the last step, or None for all")
    collected = _Collected(top)
    for step, path in _files(run, steps):
        collected.add(step, path, ours, other, own)
    notes += _notes(ours, other, collected.borrowed)
    return ReplayResult(
        ours.name,
        "as recorded" if other is None else other.name,
        None if own is None else own.name,
        collected.self_check if own is not None else None,
        collected.flipped,
        collected.steps,
        collected.overall(),
        collected.disagreements(),
        notes,
    )


def own_method(run: Path, named: Collection[object] = ()) -> tuple[Method | None, list[str]]:
    """The method the run was trained with, from its settings, if it can be replayed.

    A ``module:function`` in a run's file is code that the file names: it is imported only if the caller
    ``named`` it too.
    """
    try:
        config = build(TrainConfig, settings_of(run))
        if ":" in config.method and config.method not in named:
            raise ConfigError(
                f"method: got {quote(config.method)} in the run's settings, expected a name, because reading a "
                "run imports "
                f"nothing that its files name; to run that code: kalman-rl replay RUN --method {config.method}"
            )
        if ":" not in config.method and config.method not in METHODS:
            raise ConfigError(
                f"method: got {quote(config.method)}, expected one that is installed here; install its package"
            )
        method = make_method(config.method, **config.method_options)
        check_provided(method, PROVIDED, *_REFUSAL)
    except KalmanRLError as error:
        return None, [f"no self-check: {error}"]
    if why := chosen_in_training(method):
        return None, [f"no self-check: {method.name}: {why}"]
    return method, []


def chosen_in_training(method: Method) -> str | None:
    """What a replay takes for what training chose on data that is not stored."""
    if "trust" in method.learns:
        return "clip bounds are chosen on the traced rows only, not on the batch"
    if "ratio" in method.learns:
        return "noises learned in training are not stored; its start values are used"
    return None


def _notes(ours: Method, other: Method | None, borrowed: bool) -> list[str]:
    notes = ["advantages are the stored ones; traces hold a few completions per step, not whole groups"]
    used = [method for method in (ours, other) if method is not None]
    for method in used:
        if why := chosen_in_training(method):
            notes.append(f"{method.name}: {why}")
    if borrowed and any("logp_behaviour" in method.inputs for method in used):
        notes.append(
            "no log-probabilities of a behaviour policy are stored: the old policy's stand in for them"
        )
    return notes


def _files(run: Path, steps: tuple[int, int] | None) -> Iterator[tuple[int, Path]]:
    first, last = steps or (0, 2**63)
    found = traces.steps(run)
    if not found:
        raise RunError(f"{run}: got no traces, expected some; train with traces_per_step > 0")
    if not (chosen := [step for step in found if first <= step <= last]):
        raise ConfigError(
            f"steps: got {first}-{last}, expected some of the {len(found)} in {run}, which lie between "
            f"{min(found)} and {max(found)}"
        )
    yield from ((step, found[step]) for step in chosen)


class TraceBatch(NamedTuple):
    """One step's file: padded (B, T) ``rollouts``, ``logp`` and ``advantage``; ``place`` the (row, column) of each of
    its n tokens; ``stored`` and ``log_ratio`` (n,) as the run recorded them; ``columns`` the file's own."""

    rollouts: Rollouts
    logp: Tensor
    advantage: Tensor
    place: tuple[Tensor, Tensor]
    stored: Field
    log_ratio: Tensor
    columns: dict[str, list[Any]]


def _read(path: Path) -> TraceBatch:
    """One step's file as a batch in the precision of training; RunError if it is damaged."""
    problems: list[str] = []
    columns = traces.read(path, _COLUMNS, problems)
    if columns is None:
        raise RunError(f"{path}: {problems[0]}")
    try:
        return batch_of(columns)
    except (ValueError, KalmanRLError, TypeError) as error:
        raise RunError(f"{path}: damaged trace: {one_line(error, 300)}") from None


def batch_of(columns: dict[str, list[Any]]) -> TraceBatch:
    """Tokens of a trace file as a batch. Raises: ValueError, TypeError for columns that are no trace."""
    sequences, positions = columns["sequence"], columns["position"]
    if not sequences:
        raise ValueError("got no rows")
    starts: dict[int, int] = {}
    for sequence, position in zip(sequences, positions):
        starts[sequence] = min(starts.get(sequence, position), position)
    index = {sequence: row for row, sequence in enumerate(starts)}
    rows = torch.tensor([index[sequence] for sequence in sequences])
    steps = torch.tensor([p - starts[s] for s, p in zip(sequences, positions)])
    width = int(steps.max()) + 1
    if width > MAX_POSITIONS or len(index) * width > 200 * len(sequences) + MAX_POSITIONS:
        raise ValueError(f"got a completion over {width} positions, expected up to {MAX_POSITIONS:,}")
    if len(set(zip(sequences, positions))) != len(sequences):
        raise ValueError("got a position of a completion twice")
    shape = (len(index), width)

    def spread(name: str) -> Tensor:
        values = torch.tensor(columns[name], dtype=torch.float32)
        return torch.zeros(shape).index_put((rows, steps), values)

    def flat(name: str) -> Tensor:
        return torch.tensor(columns[name], dtype=torch.float32)

    mask = torch.zeros(shape, dtype=torch.bool).index_put((rows, steps), torch.tensor(True))
    missing = any(value is None for value in columns["logp_behaviour"])
    logp_behaviour = spread("logp_old" if missing else "logp_behaviour")
    rollouts = Rollouts(spread("logp_old"), mask, logp_behaviour=logp_behaviour)
    kept = torch.tensor(columns["kept"], dtype=torch.bool)
    stored = Field(flat("filtered_log_ratio"), flat("coefficient"), kept)
    if not all(torch.isfinite(values).all() for values in stored[:2]):
        raise ValueError("got a coefficient or log-weight that is not finite")
    return TraceBatch(
        rollouts, spread("logp"), spread("advantage"), (rows, steps), stored, flat("log_ratio"), columns
    )


def field_of(method: Method, batch: TraceBatch) -> Field:
    """What a method does to the n tokens of a batch, with the stored advantages."""
    tokens: Tokens = policy_loss(method, batch.rollouts, batch.logp, advantage=batch.advantage).tokens
    return Field(*(values[batch.place] for values in (tokens.log_weight, tokens.coefficient, tokens.kept)))


class _Collected:
    """What remains of the steps that were read."""

    def __init__(self, top: int) -> None:
        self.top, self.flipped, self.self_check, self.borrowed = top, 0, 0.0, False
        self.steps: list[StepReplay] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._kept = [0, 0]
        self._heap: list[tuple[float, int, Disagreement]] = []

    def add(self, step: int, path: Path, ours: Method, other: Method | None, own: Method | None) -> None:
        batch = _read(path)
        try:
            mine = field_of(ours, batch)
            theirs = batch.stored if other is None else field_of(other, batch)
            if own is not None:
                self._compare(field_of(own, batch), batch.stored)
        except KalmanRLError as error:
            raise RunError(f"{path}: {error}") from None
        self.borrowed |= any(value is None for value in batch.columns["logp_behaviour"])
        pair = mine.coefficient, theirs.coefficient
        self._pairs.append(pair)
        kept = int(mine.kept.sum()), int(theirs.kept.sum())
        self._kept = [total + more for total, more in zip(self._kept, kept)]
        self.steps.append(_numbers(step, len(batch.rollouts.mask), pair, kept))
        self._rank(step, batch, mine, theirs)

    def _compare(self, again: Field, stored: Field) -> None:
        same = again.kept == stored.kept
        self.flipped += int((~same).sum())
        for found, expected in zip(again[:2], stored[:2]):
            error = (found - expected).abs() / expected.abs().clamp(min=1.0)
            self.self_check = max(self.self_check, error.max().item())

    def _rank(self, step: int, batch: TraceBatch, mine: Field, theirs: Field) -> None:
        difference = (mine.coefficient - theirs.coefficient).abs()
        best = difference.topk(min(self.top, len(difference)))
        for value, i in zip(best.values.tolist(), best.indices.tolist()):
            if value == 0:
                break
            entry = Disagreement(
                step,
                batch.columns["sequence"][i],
                batch.columns["position"][i],
                str(batch.columns["token"][i]),
                batch.log_ratio[i].item(),
                (mine.log_weight[i].item(), theirs.log_weight[i].item()),
                (mine.coefficient[i].item(), theirs.coefficient[i].item()),
            )
            heapq.heappush(self._heap, (value, -len(self.steps) * MAX_POSITIONS - i, entry))
            if len(self._heap) > self.top:
                heapq.heappop(self._heap)

    def disagreements(self) -> list[Disagreement]:
        return [entry for _, _, entry in sorted(self._heap, reverse=True)]

    def overall(self) -> StepReplay:
        pair = torch.cat([a for a, _ in self._pairs]), torch.cat([b for _, b in self._pairs])
        sequences = sum(step.sequences for step in self.steps)
        return _numbers(-1, sequences, pair, (self._kept[0], self._kept[1]))


def _numbers(step: int, sequences: int, pair: tuple[Tensor, Tensor], kept: tuple[int, int]) -> StepReplay:
    first, second = (values.double() for values in pair)
    size = (first.square().sum() * second.square().sum()).sqrt().item()
    cosine = (first * second).sum().item() / size if size > 0 else math.nan
    mine, theirs = _summary(first, kept[0]), _summary(second, kept[1])
    return StepReplay(step, len(first), sequences, mine, theirs, cosine)


def _summary(values: Tensor, kept: int) -> FieldSummary:
    ordered, squares = values.sort().values, values.square().sum().item()
    ends = {f"{q:g}": ordered[round(q * (len(ordered) - 1))].item() for q in QUANTILES}  # nearest rank
    size = values.sum().item() ** 2 / (len(values) * squares) if squares > 0 else math.nan
    return FieldSummary(kept / len(values), size, ends)
