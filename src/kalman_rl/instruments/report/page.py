"""The page: one self-contained HTML file from run directories, with a script for the parts one can touch."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kalman_rl.engine.runs.files import replacing
from kalman_rl.engine.runs.reading import RunRecord, find_runs
from kalman_rl.errors import RunError, extra
from kalman_rl.instruments.report.sections.beliefs import belief_section
from kalman_rl.instruments.report.sections.collapse import alarm_section
from kalman_rl.instruments.report.sections.positions import position_figure
from kalman_rl.instruments.report.sections.stress import stress_section
from kalman_rl.instruments.report.sections.summary import summarise
from kalman_rl.instruments.report.sections.tokens import inspected
from kalman_rl.instruments.report.sections.training import main_section, palette_of
from kalman_rl.instruments.report.stats.intervals import t_quantile
from kalman_rl.instruments.report.stats.pool import pooled
from kalman_rl.instruments.report.stats.study import (
    ACCURACIES,
    Arm,
    Study,
    arm,
    evaluations,
    noop_share,
    split,
)
from kalman_rl.instruments.report.words import decimal, duration, signed

SHOWN_CONFIGS = 4
SCRIPTS = ("common.js", "strips.js", "inspector.js")


@dataclass(frozen=True)
class Section:
    """A section that a caller adds; ``body`` is HTML that is already safe."""

    title: str
    body: Markup


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write ``report.html``: charts, tables, the token inspector and a summary in plain words, in one file.

    Args:
        runs: run directories, or directories that hold runs at any depth (a demo, a stress study).
        output: the file to write; without it, ``report.html`` in the first directory.

    Returns: the path of the page.
    Raises: ConfigError for an empty list; RunError for a path without a run or a page that cannot be written.
    """
    found = find_runs(runs)
    target = Path(output) if output is not None else Path(runs[0]) / "report.html"
    _write(target, render(found))
    return target


def page(
    run_paths: Sequence[Path],
    *,
    notice: str = "",
    extra: Sequence[Section] = (),
    scripts: Sequence[str] = (),
    connect: bool = False,
) -> str:
    """The page as text, of runs as they are now; they may still be going on.

    Args:
        notice: a sentence for the top.
        extra: sections to add before the details.
        scripts: script texts to add; they are allowed by their hash like the page's own.
        connect: allow scripts to talk to the server the page came from, and to nothing else.

    Raises: ConfigError, RunError as :func:`write_report`; AdapterError without jinja2.
    """
    return render(find_runs(run_paths), notice=notice, extra=extra, scripts=scripts, connect=connect)


def render(
    runs: Sequence[RunRecord],
    *,
    notice: str = "",
    extra: Sequence[Section] = (),
    scripts: Sequence[str] = (),
    connect: bool = False,
) -> str:
    """The page as text, of runs that were read. Arguments and errors as :func:`page`."""
    environment = _environment()
    texts = [*(_source(name) for name in SCRIPTS), *scripts]
    style = environment.get_template("page.css").render()
    content = _content(runs)
    return environment.get_template("page.html").render(
        **content,
        notice=notice,
        extra=extra,
        style=Markup(style),
        scripts=[Markup(text) for text in texts],
        policy=Markup(policy(texts, style, connect=connect)),
        contents=_contents(content, extra),
    )


def policy(scripts: Sequence[str], style: str, *, connect: bool = False) -> str:
    """The page's content security policy: nothing is loaded, and only these scripts and this style count."""
    hashes = " ".join(_hash(text) for text in scripts)
    rules = [
        "default-src 'none'",
        f"script-src {hashes}",
        f"style-src {_hash(style)}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join([*rules, "connect-src 'self'"] if connect else rules)


def as_json(data: Any) -> Markup:
    """JSON that may stand inside a script element: no ``<``, ``>`` or ``&``, and nothing but ASCII.

    >>> as_json("</script>")
    Markup('"\\\\u003c/script\\\\u003e"')
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _environment() -> Any:
    with extra("app", "kalman-rl report"):
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _source(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _content(runs: Sequence[RunRecord]) -> dict[str, Any]:
    main, study = split(runs)
    groups = pooled(main)
    arms = [arm(group.first.labels.get("method", group.first.name), "", group.runs) for group in groups]
    shown = [*main, *(study.runs if study else [])]
    notes = [(run.name, note) for run in runs for note in run.notes]
    notes += [("", note) for note in (study.notes if study else [])]
    section = main_section(groups, arms) if main else None
    if section and (figure := position_figure(groups, palette_of(groups))):
        section.ratios.append(figure)
    beliefs = belief_section(shown, notes)
    tokens = inspected(_one_of_each(groups, study))
    first = [group.first for group in groups]
    absent = ["There is no main run here: every run belongs to the stress study."] if not main else []
    absent += [] if study else ["No stress study was given, so methods are not compared under stress here."]
    absent += [] if beliefs else ["No run tracked beliefs about its prompts, so there are none to show."]
    return {
        "title": _title(first, study),
        "subtitle": _subtitle(runs),
        "summary": summarise(first, arms, study, [group.name for group in groups]),
        "key_figures": _key_figures(first, arms, study),
        "main": section,
        "alarms": alarm_section(shown),
        "beliefs": beliefs,
        "study": study,
        "stress": stress_section(study) if study else None,
        "inspected": tokens,
        "payload": as_json(tokens.data) if tokens.completions else "",
        "absent": absent,
        "runs": [_run_row(run) for run in runs],
        "configs": [run for run in first if run.config][:SHOWN_CONFIGS]
        + [run for run in (study.runs if study else []) if run.config][:1],
        "facts": (main or shown)[0],
        "notes": notes,
        "t_factor": decimal(t_quantile(study.seeds[0] - 1)) if study and study.seeds[0] > 1 else "",
    }  # fmt: skip


def _one_of_each(groups: Sequence[Any], study: Study | None) -> list[RunRecord]:
    """Runs whose tokens are worth a look: the first seed of each group, then those of the study."""
    return [*(group.first for group in groups), *(study.runs if study else [])]


def _contents(content: dict[str, Any], extra: Sequence[Section]) -> list[tuple[str, str]]:
    places = [("Runs", "runs")] if content["main"] else []
    places += [("Alarms", "alarms")] if content["alarms"] else []
    places += [("Beliefs and budget", "beliefs")] if content["beliefs"] else []
    places += [("Token by token", "tokens-section")]
    places += [("Stress study", "stress")] if content["stress"] else []
    places += [(section.title, f"extra-{i}") for i, section in enumerate(extra, 1)]
    return [*places, ("Details", "details")]


def _title(main: Sequence[RunRecord], study: Study | None) -> str:
    if not main:
        return "Stress study"
    labels = main[0].labels
    subject = labels.get("model") or main[0].name
    if len(main) > 1:
        return f"{len(main)} runs compared"
    return f"{subject} on {labels['task']}" if "task" in labels else subject


def _subtitle(runs: Sequence[RunRecord]) -> str:
    created = min((run.facts["created"] for run in runs if run.facts.get("created")), default="")
    number = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return ", ".join(filter(None, (number, created[:10])))


def _key_figures(main: Sequence[RunRecord], arms: Sequence[Arm], study: Study | None) -> list[dict[str, str]]:
    figures = []
    if len(main) == 1:
        for key, numbers in arms[0].measured.items():
            if numbers.start is not None:
                detail = (
                    f"{signed(numbers.change[0])} to {signed(numbers.change[1])} at 95%"
                    if numbers.change
                    else ""
                )
                figures.append(
                    {
                        "name": f"{ACCURACIES[key].capitalize()} accuracy",
                        "value": f"{decimal(numbers.start)} → {decimal(numbers.mean)}",
                        "detail": detail,
                    }
                )
        run = main[0]
        if run.steps:
            time = f"in {duration(run.seconds)}" if run.seconds else ""
            figures.append({"name": "Optimizer updates", "value": str(run.steps), "detail": time})
        share = noop_share(run)
        if share is not None:
            figures.append(
                {"name": "No-op updates", "value": f"{share:.0%}", "detail": "all log-ratios zero"}
            )
    if study:
        learned = sum(bool(arm.main and arm.main.verdict == "learned") for arm in study.arms)
        figures.append(
            {
                "name": "Stress study",
                "value": f"{learned} of {len(study.arms)}",
                "detail": "pairs of method and condition that learned",
            }
        )
    return figures


def _run_row(run: RunRecord) -> dict[str, str]:
    def last(key: str) -> str:
        rows = evaluations(run, key)
        return decimal(rows[-1][key]) if rows else "–"

    return {
        "name": run.name,
        "condition": run.labels.get("condition", "–"),
        "method": run.labels.get("method", "–"),
        "seed": run.labels.get("seed", "–"),
        "status": run.status,
        "steps": str(run.steps),
        "time": duration(run.seconds) if run.seconds is not None and run.seconds >= 0 else "–",
        "sampled": last("eval/sampled_accuracy"),
        "greedy": last("eval/greedy_accuracy"),
    }


def _write(target: Path, page: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"report: got {error.strerror or error}, expected a writable file; {target}; "
                       "choose another output") from error  # fmt: skip
