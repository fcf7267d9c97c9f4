"""What a section of the page is, and what all of them are built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kalman_rl.engine.runs.reading import RunRecord
from kalman_rl.instruments.report.sections.summary import Summary, summarise
from kalman_rl.instruments.report.stats.pool import Group, pooled
from kalman_rl.instruments.report.stats.study import Study, StudyArm, arm, split


@dataclass
class Context:
    """What was read, in the parts that sections share; and what they say elsewhere on the page.

    ``main`` are the runs outside the stress study, ``groups`` the same with those that differ only by seed as one,
    ``arms`` their measured accuracies; ``study`` holds all other runs. A section may add to ``notes`` (run, sentence)
    and ``absent`` (sentences), which the details show, and to ``data``, JSON for the page's scripts by the id of its
    element.
    """

    runs: list[RunRecord]
    main: list[RunRecord]
    groups: list[Group]
    arms: list[StudyArm]
    study: Study | None
    notes: list[tuple[str, str]]
    absent: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: Sequence[RunRecord]) -> Context:
        main, study = split(runs)
        groups = pooled(main)
        arms = [arm(group.first.labels.get("method", group.first.name), "", group.runs) for group in groups]
        context = cls(list(runs), main, groups, arms, study, [])
        context.notes += [(run.name, note) for run in runs for note in run.notes]
        context.notes += [("", note) for note in (study.notes if study else [])]
        return context

    @property
    def first(self) -> list[RunRecord]:
        """The first seed of each group."""
        return [group.first for group in self.groups]

    @property
    def subjects(self) -> dict[str, list[Group]]:
        """Groups by what was trained on what, in the order of their first runs."""
        found: dict[str, list[Group]] = {}
        for group in self.groups:
            found.setdefault(group.subject, []).append(group)
        return found

    @property
    def shown(self) -> list[RunRecord]:
        """Every run that is counted."""
        return [*self.main, *self.stressed]

    @property
    def stressed(self) -> list[RunRecord]:
        """The runs of the study."""
        return self.study.runs if self.study else []

    @cached_property
    def summary(self) -> Summary:
        """What the numbers say, in plain words."""
        return summarise(self.first, self.arms, self.study, [group.name for group in self.groups])


@dataclass(frozen=True)
class Section:
    """A section of the page.

    ``build`` makes what ``template`` shows under the name ``section``, or None to leave the section out; the
    details then say ``absent``. The template's element has the id ``anchor``; ``title`` stands in the contents.
    """

    title: str
    anchor: str
    template: str
    build: Callable[[Context], Any]
    absent: str = ""
