"""Table, text and picture of ``benchmarks.collapse``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks.collapse.recorded import Recorded
from kalman_rl.palette import LIGHT


def share(result: dict[str, Any]) -> str:
    """Warned of collapsed, with the Wilson interval."""
    hits, count = result["warned"], result["collapsed_runs"]
    if not count:
        return "no collapse"
    interval = stats.binomtest(hits, count).proportion_ci(method="wilson")
    return f"{hits} of {count} ({100 * interval.low:.0f} to {100 * interval.high:.0f} %)"


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """One line per detector."""
    lines = [
        "| detector | settings, chosen on seeds 0 and 1 | false alarms per 1000 steps (95 %) | "
        "warned of a collapse (95 %) | leads, steps | late by, steps | missed |",
        "|" + "---|" * 7,
    ]
    for name, entry in results.items():
        told, chosen = entry["reported"], ", ".join(f"{k}={v:g}" for k, v in entry["settings"].items())
        rate = f"{told['per_1000']:.2f} ({told['per_1000_low']:.2f} to {told['per_1000_high']:.2f})"
        missed = told["collapsed_runs"] - told["warned"] - len(told["late"])
        lines.append(
            f"| {name} | {chosen or 'none'} | {rate} | "
            f"{share(told)} | {_listed(told['leads'])} | {_listed(told['late'])} | {missed} |"
        )
    return lines


def picture(runs: list[Recorded], results: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy of every collapsed run, its collapse, and the first alarm of every detector that warned or was late."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    failed = [run for run in runs if run.group == "collapsed"]
    columns = 3
    figure, axes = plt.subplots(
        -(-len(failed) // columns), columns, figsize=(11, 2.3 * -(-len(failed) // columns)), squeeze=False
    )
    marks = dict(zip(results, zip(LIGHT, ("-", "-.", "--", ":"))))
    for axis, run in zip(axes.flat, failed):
        axis.plot(*zip(*run.accuracy), color="0.3", lw=1.2)
        axis.axvspan(run.collapse, run.steps, color="0.9", lw=0)
        for name, (colour, line) in marks.items():
            told = results[name]["reported"]["by_run"][run.name]
            first = told["first"] or told["late"]
            if first:
                axis.axvline(first, color=colour, ls=line, lw=1.8)
        axis.set_title(run.name, fontsize=9)
        axis.set_ylim(0, None)
    for axis in list(axes.flat)[len(failed) :]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step")
    axes[0, 0].set_ylabel("accuracy")
    handles = [plt.Line2D([], [], color=colour, ls=line, lw=1.8) for colour, line in marks.values()]
    handles.append(plt.Rectangle((0, 0), 1, 1, color="0.9"))
    figure.legend(
        handles, [*(f"first alarm: {name}" for name in marks), "collapsed"], ncol=5, loc="upper center"
    )
    figure.tight_layout(rect=(0, 0, 1, 0.97 if len(failed) > 6 else 0.93))
    figure.savefig(path, dpi=110)


def report(runs: list[Recorded], results: dict[str, dict[str, Any]], method: str) -> str:
    """The result as Markdown."""
    split = [[run for run in runs if (run.seed >= 2) == later] for later in (False, True)]
    lines = ["# Collapse warning: false alarms and lead time", "", *method.splitlines()[4:], ""]
    lines.append(
        f"{len(split[0])} runs of seeds 0 and 1 to choose on, {len(split[1])} others to report on: "
        f"{sum(run.group == 'held' for run in split[1])} held, "
        f"{sum(run.group == 'collapsed' for run in split[1])} collapsed, "
        f"{sum(run.group == 'neither' for run in split[1])} neither."
    )
    lines += [
        "",
        *table(results),
        "",
        "First metrics to warn, and false alarms, of the filter on the reported runs: ",
    ]
    told = results["filter"]["reported"]
    lines[-1] += ", ".join(f"{name} {count}" for name, count in sorted(told["by_metric"].items())) or "none"
    lines[-1] += f"; {told['too_early']} alarms of collapsed runs came too early to count as a warning."
    lines += [
        "",
        "| collapsed run | collapse at | " + " | ".join(results) + " |",
        "|" + "---|" * (2 + len(results)),
    ]
    for run in told["by_run"]:
        cells = [results[name]["reported"]["by_run"][run] for name in results]
        lines.append(f"| {run} | {cells[0]['collapse']} | {' | '.join(map(_when, cells))} |")
    return "\n".join(lines) + "\n"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "none"


def _when(cell: dict[str, Any]) -> str:
    if cell["first"]:
        return f"{cell['first']} ({cell['metric']})"
    return f"late, {cell['late']}" if cell["late"] else "none"
