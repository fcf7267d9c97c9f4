"""The page: one self-contained HTML file from run directories."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kalman_rl.errors import AdapterError, RunError
from kalman_rl.report.data import Run, find_runs
from kalman_rl.report.intervals import t_quantile
from kalman_rl.report.main_section import main_section
from kalman_rl.report.stress_section import stress_section
from kalman_rl.report.study import ACCURACIES, Arm, Study, arm, evaluations, names_of, noop_share, split
from kalman_rl.report.summary import summarise
from kalman_rl.report.tokens import token_strips
from kalman_rl.report.words import decimal, duration, signed

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
SHOWN_CONFIGS = 4


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write ``report.html``: charts, tables and a summary in plain words, in one file without any script.

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


def render(runs: Sequence[Run]) -> str:
    """The page as text. Raises: AdapterError without jinja2."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise AdapterError("jinja2: got no such package, expected 3.1 or later for reports; "
                           'install "kalman-rl[train]"') from error  # fmt: skip
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(_content(runs))


def _content(runs: Sequence[Run]) -> dict[str, Any]:
    main, study = split(runs)
    arms = [arm(run.labels.get("method", run.name), "", [run]) for run in main]
    shown = [*main, *(study.runs if study else [])]
    notes = [(run.name, note) for run in runs for note in run.notes]
    notes += [("", note) for note in (study.notes if study else [])]
    return {
        "policy": POLICY,
        "title": _title(main, study),
        "subtitle": _subtitle(runs),
        "summary": summarise(main, arms, study),
        "key_figures": _key_figures(main, arms, study),
        "main": main_section(main, arms) if main else None,
        "main_names": names_of(main),
        "study": study,
        "stress": stress_section(study) if study else None,
        "tokens": token_strips(shown),
        "runs": [_run_row(run) for run in runs],
        "configs": [run for run in main if run.config][:SHOWN_CONFIGS]
        + [run for run in (study.runs if study else []) if run.config][:1],
        "facts": (main or shown)[0],
        "notes": notes,
        "t_factor": decimal(t_quantile(study.seeds[0] - 1)) if study and study.seeds[0] > 1 else "",
    }  # fmt: skip


def _title(main: Sequence[Run], study: Study | None) -> str:
    if not main:
        return "Stress study"
    labels = main[0].labels
    subject = labels.get("model") or main[0].name
    if len(main) > 1:
        return f"{len(main)} runs compared"
    return f"{subject} on {labels['task']}" if "task" in labels else subject


def _subtitle(runs: Sequence[Run]) -> str:
    created = min((run.facts["created"] for run in runs if run.facts.get("created")), default="")
    number = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return ", ".join(filter(None, (number, created[:10])))


def _key_figures(main: Sequence[Run], arms: Sequence[Arm], study: Study | None) -> list[dict[str, str]]:
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


def _run_row(run: Run) -> dict[str, str]:
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
    """Write beside the target and rename, so that a page is whole or absent."""
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".report-", suffix=".html")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(page)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise RunError(f"report: got {error.strerror or error}, expected a writable file; {target}; "
                       "choose another output") from error  # fmt: skip
