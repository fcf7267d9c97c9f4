"""What is left of an experiment: its numbers as JSON, a figure, and its rows in the table of evidence."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kalman_rl.engine.runs.files import write_file
from kalman_rl.engine.runs.received import read_json
from kalman_rl.instruments.reproduce.claim import Records, judge
from kalman_rl.instruments.reproduce.experiment import TUNING_SEEDS, Experiment, Tuned

HIDDEN = ("seconds",)
"""Numbers of a run that say nothing about its arm."""
HEAD = """# Evidence

Written by `kalman-rl reproduce`. Every claim had its acceptance before it was run: **reproduced** means that the 95 %
interval (Student's t over seeds, paired where arms are compared; one comparison at a time, not corrected for their
number) lies inside the accepted range, **refuted** that it lies outside, **not decided** that it reaches over the
bound. Claims come from the published sources (K-GRPO, KPO) or from this project. Test seeds are 1000 and on; rates
and clips were chosen on seeds {tuning}. Accuracy is the exact probability of the right reply, and its mean over the
run where nothing else is said. "Fewer completions" compares the budget with the completions at which an arm first has
the other's final accuracy; a noisy curve has its own final accuracy before its end too, which flatters such a factor a
little. All of it is a tiny model of 113k parameters that sorts digits, unless a model is named: directions and factors,
no promises for large models. SmolLM2 computes in bfloat16: the same seed run again soon samples another reply.

| experiment | claim | from | accepted | result | verdict | seeds |
|---|---|---|---|---|---|---|
"""


def summary(
    experiment: Experiment, records: Records, choices: Mapping[str, Tuned], model: str, command: str
) -> dict[str, Any]:
    """All that is kept of an experiment, for JSON."""
    arms: dict[str, Any] = {}
    for arm, found in records.items():
        runs = [found[seed] for seed in sorted(found)]
        entry: dict[str, Any] = {"trial": repr(experiment.arms[arm]), "seeds": sorted(found)}
        entry["numbers"] = {key: [run[key] for run in runs] for key in _numbers(runs)}
        if runs and "accuracy" in runs[0]:
            entry["spent"] = runs[0]["spent"]
            entry["accuracy"] = [run["accuracy"] for run in runs]
        if runs and "watched" in runs[0]:
            entry["watched"] = {name: [run["watched"][name] for run in runs] for name in runs[0]["watched"]}
        if arm in choices:
            tuned = choices[arm]
            entry["tuning"] = {
                "chosen": tuned.name,
                "mean": tuned.means,
                "seeds": list(experiment.tuning_seeds),
            }
            entry["trial"] = repr(tuned.trial)
        arms[arm] = entry
    claims = []
    for claim in experiment.claims:
        finding = judge(claim, records)
        claims.append(
            {
                "claim": claim.text,
                "source": claim.source,
                "accepted": claim.acceptance,
                "low": claim.low,
                "high": claim.high,
                "factor": claim.factor,
                "value": finding.value,
                "interval": finding.interval,
                "per_seed": finding.per_seed,
                "verdict": finding.verdict,
            }
        )
    return {
        "name": experiment.name if model == "tiny" else f"{experiment.name}-{model}",
        "question": experiment.question,
        "pool": experiment.pool,
        "model": model,
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "seconds": sum(run.get("seconds", 0.0) for found in records.values() for run in found.values()),
        "claims": claims,
        "arms": arms,
    }


def write(folder: Path, result: Mapping[str, Any]) -> None:
    """``NAME.json`` and ``NAME.png`` in the folder, and the table of all that is there beside the folder."""
    from kalman_rl.instruments.reproduce.figure import draw

    text = json.dumps(_finite(result), indent=1) + "\n"
    write_file(folder / f"{result['name']}.json", text.encode())
    draw(result, folder / f"{result['name']}.png")


def table(folder: Path, order: Sequence[str]) -> Path:
    """Write the page about every experiment with numbers in the folder; it is called as the folder, with ``.md``."""
    paths = [
        path for name in order for path in (folder / f"{name}.json", *sorted(folder.glob(f"{name}-*.json")))
    ]
    found = [read_json(path.parent, path.name) for path in paths if path.exists()]
    page = HEAD.format(tuning=" and ".join(map(str, TUNING_SEEDS)))
    page += "".join(line(result, claim) for result in found for claim in result["claims"])
    page += "".join(section(result, folder.name) for result in found)
    path = folder.with_suffix(".md")
    write_file(path, page.encode())
    return path


def line(result: Mapping[str, Any], claim: Mapping[str, Any]) -> str:
    """A claim's row of the table."""
    seeds = len(claim["per_seed"])
    return (
        f"| [{result['name']}](#{result['name']}) | {claim['claim']} | {claim['source']} | {claim['accepted']} | "
        f"{outcome(claim)} | **{claim['verdict']}** | {seeds} |\n"
    )


def outcome(claim: Mapping[str, Any]) -> str:
    """``+0.055 (+0.047 to +0.063)``, or ``x1.90 (1.60 to 2.30)`` for a factor."""
    if claim["value"] is None:
        return "-"

    def number(value: float | None) -> str:
        if value is None:
            return "inf"
        if 0 < abs(value) < 5e-4:
            return f"{value:+.0e}"
        return f"{value:.2f}" if claim["factor"] or abs(value) >= 10 else f"{value:+.3f}"

    text = ("x" if claim["factor"] else "") + number(claim["value"])
    if claim["interval"] and claim["interval"][0] != claim["interval"][1]:
        text += f" ({number(claim['interval'][0])} to {number(claim['interval'][1])})"
    return text


def section(result: Mapping[str, Any], folder: str) -> str:
    """An experiment's part of the page: question, pool, arms, figure, command."""
    lines = [
        f"\n## {result['name']}\n",
        f"{result['question']} {result['pool'][0].upper()}{result['pool'][1:]}.\n",
    ]
    arms = result["arms"].values()
    keys = list(dict.fromkeys(key for arm in arms for key in arm.get("numbers", ())))
    if keys:
        head = ["arm", *(key.replace("_", " ") for key in keys)]
        tuned = [arm["tuning"]["seeds"] for arm in arms if "tuning" in arm]
        head += [f"chosen (tried: mean on seeds {', '.join(map(str, tuned[0]))})"] if tuned else []
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name, arm in result["arms"].items():
            tuning = arm.get("tuning")
            tried = ""
            if tuning:
                tried = ", ".join(f"{rate}: {mean:.3f}" for rate, mean in tuning["mean"].items())
                tried = f"{tuning['chosen']} ({tried})"
            cells = [_mean(arm.get("numbers", {}).get(key)) for key in keys]
            lines.append("| " + " | ".join([name, *cells, *([tried] if tuned else [])]) + " |")
        lines.append("")
    for name, arm in result["arms"].items():
        if "watched" in arm:
            lines += _watched(name, arm)
    lines.append(f"![{result['name']}]({folder}/{result['name']}.png)\n")
    lines.append(
        f"`{result['command']}`, {result['date']}, {result['machine']}, {result['seconds'] / 60:.0f} minutes of runs, "
        f"model {result['model']}.\n"
    )
    return "\n".join(lines)


def _watched(name: str, arm: Mapping[str, Any]) -> list[str]:
    """How far beliefs that only watched an arm were from the exact success."""
    lines = [
        f"Squared error about p of beliefs that saw the rewards of *{name}*, by completions spent:\n",
        "| belief | " + " | ".join(map(str, arm["spent"][1:])) + " |",
        "|---|" + "---|" * len(arm["spent"][1:]),
    ]
    for belief, runs in arm["watched"].items():
        cells = [_mean(values) for values in list(zip(*runs))[1:]]
        lines.append("| " + " | ".join([belief, *cells]) + " |")
    return [*lines, ""]


def _mean(values: Sequence[float | None] | None) -> str:
    """Mean and half of its interval, of the runs that have the number."""
    from kalman_rl.instruments.report.stats.intervals import t_interval

    known = [value for value in values or () if value is not None]
    if not known:
        return ""
    mean, interval = sum(known) / len(known), t_interval(known)
    half = 0.0 if interval is None else interval[1] - mean
    digits = 3 if abs(mean) < 10 else 1
    if 0 < abs(mean) < 5e-4:
        return f"{mean:.0e}"
    return f"{mean:.{digits}f}" if half == 0 else f"{mean:.{digits}f} ± {half:.{digits}f}"


def _numbers(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    first = runs[0] if runs else {}
    return [key for key, value in first.items() if isinstance(value, float | int) and key not in HIDDEN]


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
