"""The page: one self-contained HTML file from run directories, with a script for the parts one can touch."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kalman_rl.engine.runs.files import replacing_file
from kalman_rl.engine.runs.reading import RunRecord, find_runs
from kalman_rl.errors import RunError, extra
from kalman_rl.instruments.report import sections
from kalman_rl.instruments.report.sections import Context
from kalman_rl.instruments.report.stats.study import ACCURACIES, noop_share
from kalman_rl.instruments.report.words import decimal, duration, listing, signed

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("common.js", "strips.js", "inspector.js")


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write ``report.html``: charts, tables, the token inspector and a summary in plain words, in one file.

    Args:
        runs: run directories, or directories that hold runs at any depth (a demo, a stress study).
        output: the file to write; without it, ``report.html`` in the first directory.

    Returns: the path of the page.
    Raises: ConfigError for an empty list; RunError for a path without a run or a page that cannot be written.
    """
    text = page(runs)
    target = Path(output) if output is not None else Path(runs[0]) / "report.html"
    _write(target, text)
    return target


def page(run_paths: Sequence[Path]) -> str:
    """The page as text, of runs as they are now; they may still be going on.

    Raises: ConfigError, RunError as :func:`write_report`; AdapterError without jinja2.
    """
    runs = find_runs(run_paths)
    environment = _environment()
    scripts = [_source(name) for name in SCRIPTS]
    style = environment.get_template("page.css").render()
    context = Context.of(runs)
    contents, bodies = _sections(environment, context)
    return environment.get_template("page.html").render(
        title=_title(context),
        subtitle=_subtitle(runs),
        lead=context.summary.lead,
        key_figures=_key_figures(context),
        contents=contents,
        sections=bodies,
        data={name: as_json(value) for name, value in context.data.items()},
        style=Markup(style),
        scripts=[Markup(text) for text in scripts],
        policy=Markup(policy(scripts, style)),
    )


def _sections(environment: Any, context: Context) -> tuple[list[tuple[str, str]], list[Markup]]:
    """(title, anchor) of every section there is something for, and their HTML, in the order of the list."""
    contents, bodies = [], []
    for section in sections.SECTIONS:
        built = section.build(context)
        if built is not None:
            contents.append((section.title, section.anchor))
            bodies.append(Markup(environment.get_template(section.template).render(section=built)))
        elif section.absent:
            context.absent.append(section.absent)
    return contents, bodies


def policy(scripts: Sequence[str], style: str) -> str:
    """The page's content security policy: nothing is loaded, and only these scripts and this style count."""
    hashes = " ".join(_hash(text) for text in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"


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
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _source(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _title(context: Context) -> str:
    main = context.first
    if not main:
        return "Stress study"
    labels = main[0].labels
    subject = labels.get("model") or main[0].name
    if len(context.subjects) > 1 and all(context.subjects):
        return listing(list(context.subjects)) if len(context.subjects) < 4 else f"{len(main)} runs"
    if len(main) > 1:
        return f"{len(main)} runs compared"
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


def _write(target: Path, page: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(target) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="replace")
    except RunError:
        raise
    except OSError as error:
        raise RunError(f"report: got {error.strerror or error}, expected a writable file; {target}; "
                       "choose another output") from error  # fmt: skip
