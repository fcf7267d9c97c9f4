"""Groups: main runs that differ by nothing but the seed are shown as one, with the spread over their seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kalman_rl.engine.runs.reading import RunRecord
from kalman_rl.instruments.report.stats.study import flat, names_of, subject_of

NOT_THE_SAME_RUN = frozenset({"seed", "run", "quiet", "threads", "report_to"})
"""Settings that do not make two runs different experiments."""
MAX_VALUE = 24


@dataclass(frozen=True)
class Group:
    """One experiment: its runs, each with another seed, and the name it is shown under."""

    name: str
    runs: list[RunRecord]

    @property
    def first(self) -> RunRecord:
        return self.runs[0]

    @property
    def subject(self) -> str:
        """What was trained on what; only groups of one subject are compared."""
        return subject_of(self.first)

    @property
    def seeds(self) -> int:
        return len(self.runs)


def pooled(runs: Sequence[RunRecord]) -> list[Group]:
    """Groups in the order of their first runs. A run without settings, or one that repeats a seed, stays alone."""
    groups: list[tuple[dict[str, str] | None, list[RunRecord]]] = []
    for run in runs:
        key = _experiment(run)
        seed = run.labels.get("seed")
        for other, members in groups:
            fresh = seed is not None and all(seed != member.labels.get("seed") for member in members)
            if key is not None and key == other and fresh:
                members.append(run)
                break
        else:
            groups.append((key, [run]))
    names = _names([members[0] for _, members in groups])
    return [Group(name, members) for name, (_, members) in zip(names, groups)]


def _experiment(run: RunRecord) -> dict[str, str] | None:
    settings = flat(run.config)
    if not settings:
        return None
    labels = {f"label {key}": value for key, value in run.labels.items() if key != "seed"}
    return labels | {
        key: value for key, value in settings.items() if key.split(".")[0] not in NOT_THE_SAME_RUN
    }


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """The method; the method and the settings that differ; or what :func:`names_of` falls back to."""
    methods = [run.labels.get("method", run.name) for run in runs]
    if len(set(methods)) == len(methods):
        return methods
    tables = [{**flat(run.config), "seed": run.labels.get("seed", "?")} for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for table in tables for key in table)
        if key.split(".")[0] not in NOT_THE_SAME_RUN - {"seed"}
        and len({table.get(key) for table in tables}) > 1
        and not key.startswith("method")
    ]
    if 1 <= len(keys) <= 2:
        told = [
            ", ".join(
                [method, *(f"{key.split('.')[-1]} {table.get(key, 'unset')[:MAX_VALUE]}" for key in keys)]
            )
            for method, table in zip(methods, tables)
        ]
        if len(set(told)) == len(told):
            return told
    return names_of(runs)
