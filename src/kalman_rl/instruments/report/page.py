"""The page: one self-contained HTML file from run directories, with a script for the parts one can touch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kalman_rl.engine.runs.files import explained, replacing_file
from kalman_rl.engine.runs.reading import RunRecord, find_runs
from kalman_rl.errors import PlaceError, extra
from kalman_rl.instruments.policy import policy
from kalman_rl.instruments.report import sections
from kalman_rl.instruments.report.sections import Context
from kalman_rl.instruments.report.stats.study import ACCURACIES, noop_share
from kalman_rl.instruments.report.words import decimal, duration, listing, signed
from kalman_rl.palette import DARK, LIGHT

TEMPLATES = Path(__file__).parent / "templates"
UPLOT = Path(__file__).parent / "uplot"
SCRIPTS = ("common.js", "charts.js", "strips.js", "inspector.js", "completions.js")
"""The page's own scripts, in order; uPlot goes before them."""


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write ``report.html``: charts, tables, the token inspector and a summary in plain words, in one file.

    Args:
        runs: run directories, or directories that hold runs at any depth (a demo, a stress study).
        output: the file to write; without it, ``report.html`` in the first directory.

    Returns: the path of the page.
    Raises: ConfigError for an empty list; RunError for a path without a run or a page that cannot be written.
    """
    text = page(runs)
    return _write(Path(output) if output is not None else Path(runs[0]) / "report.html", text)


def page(run_paths: Sequence[Path]) -> str:
    """The page as text, of runs as they are now; they may still be going on.

    Raises: ConfigError, RunError as :func:`write_report`; AdapterError without jinja2.
    """
    runs = find_runs(run_paths)
    context = Context.of(runs)
    bodies = []
    for section in sections.SECTIONS:
        built = section.build(context)
        if built is not None:
            bodies.append((section.title, section.anchor, section.template, built))
        elif section.absent:
            context.absent.append(section.absent)
    eyebrow = f"Training report · {_subtitle(runs)}"
    return _rendered(
        PageParts(_title(context), eyebrow, context.summary.lead, bodies, context.data, _key_figures(context))
    )


@dataclass(frozen=True)
class PageParts:
    """Of what a page is made: ``bodies`` are (title, anchor, template, what it shows), ``data`` is for the scripts."""

    title: str
    eyebrow: str
    lead: Sequence[str]
    bodies: Sequence[tuple[str, str, str, Any]]
    data: Mapping[str, Any]
    key_figures: Sequence[dict[str, str]] = ()


def write_page(parts: PageParts, target: Path) -> Path:
    """Write a page of these parts, with the scripts and the policy of every page. Raises: as :func:`write_report`."""
    return _write(target, _rendered(parts))


def _rendered(parts: PageParts) -> str:
    environment = _environment()
    scripts = [uplot(), *((TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS)]
    css = (UPLOT / "uPlot.min.css").read_text(encoding="utf-8")
    style = environment.get_template("page.css").render(uplot=Markup(css), light=LIGHT, dark=DARK)
    return environment.get_template("page.html").render(
        parts=parts,
        sections=[
            Markup(environment.get_template(template).render(section=shown))
            for _, _, template, shown in parts.bodies
        ],
        data={name: as_json(value) for name, value in parts.data.items()},
        style=Markup(style),
        scripts=[Markup(text) for text in scripts],
        policy=Markup(policy(scripts, style)),
    )


def uplot() -> str:
    """The script of the charts' library, under its licence."""
    licence, script = (
        (UPLOT / name).read_text(encoding="utf-8") for name in ("LICENSE", "uPlot.iife.min.js")
    )
    return f"/*!\n{licence}\n*/\n{script}"


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
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = as_json
    return environment


def _title(context: Context) -> str:
    main = context.first
    if not main:
        return "Stress study"
    labels = main[0].labels
    subject = labels.get("model") or main[0].name
    if len(context.subjects) > 1 and all(context.subjects):
        return listing(list(context.subjects)) if len(context.subjects) < 4 else f"{len(context.main)} runs"
    if len(main) > 1:
        return f"{len(context.main)} runs compared"
    return f"{subject} on {labels['task']}" if "task" in labels else subject


def _subtitle(runs: Sequence[RunRecord]) -> str:
    created = min((run.facts["created"] for run in runs if run.facts.get("created")), default="")
    number = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return ", ".join(filter(None, (number, created[:10])))


def _key_figures(context: Context) -> list[dict[str, str]]:
    figures, study = [], context.study
    main = [group.first for group in next(iter(context.subjects.values()), [])]
    if len(main) == 1:
        for key, numbers in context.arms[0].measured.items():
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


def _write(target: Path, page: str) -> Path:
    with explained(target, "write", kind=PlaceError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(target) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="replace")
    return target
