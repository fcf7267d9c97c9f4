"""Real runs: does a tracked baseline, or an adaptive budget, learn more from the same completions?

    python -m benchmarks.learning.adaptive            # every arm, 3 seeds; finished runs are kept, so it can be stopped
    python -m benchmarks.learning.adaptive --quick    # one seed, two arms, a few steps: does it work at all

The embedded tiny model sorts 4 to 24 digits (``sort_mixed``): after the warm start its success rate runs from about
0.65 on short questions to about 0.1 on long ones. It trains on a pool of 256 questions that come back again and again,
rewards 0 or 1 plus Gaussian noise. All arms share GRPO's ratio, clip and aggregation; only the advantage and the
division of completions differ. What is compared is the accuracy on that pool, each question weighing the same and
rewarded without noise: how well the objective is optimised. Accuracy on 256 held-out questions stands beside it.

Arms without memory: ``grpo`` (group mean and std), ``leave_one_out``, ``batch_mean``, ``james_stein``.
Arms with a belief: ``tracked``, and at groups of 8 ``predictive`` and ``rounds``, which spend the same completions
unevenly, and ``rounds at half`` the budget.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from kalman_rl.engine.config import TrainConfig, build, labels, load_toml, to_toml, validate
from kalman_rl.engine.runs.reading import read_manifest
from kalman_rl.engine.runs.run import Run
from kalman_rl.errors import ConfigError
from kalman_rl.palette import LIGHT

RESULTS = Path(__file__).parents[1] / "results" / "learning"
ROWS, UPDATES, POOL = 256, 4, 256
NOISES, GROUPS = (0.0, 0.5, 1.0), (2, 8)
STATELESS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "leave_one_out": {"advantage": "leave_one_out"},
    "batch_mean": {"advantage": "batch_mean"},
    "james_stein": {"advantage": "james_stein"},
}
TRACKED: dict[str, dict[str, Any]] = {"tracked": {"advantage": "tracked"}}
ADAPTIVE: dict[str, dict[str, Any]] = {
    "predictive": {"advantage": "tracked", "allocation": "predictive"},
    "rounds": {"advantage": "tracked", "allocation": "rounds"},
    "rounds at half": {"advantage": "tracked", "allocation": "rounds", "budget": 4.0},
}
ARMS = STATELESS | TRACKED | ADAPTIVE


def arms_of(group: int) -> dict[str, dict[str, Any]]:
    """Arms that are run with groups of this size."""
    return ARMS if group == 8 else STATELESS | TRACKED


def plan(
    root: Path, seeds: int, generations: int, arms: list[str] | None, noises: list[float], groups: list[int]
) -> list[tuple[dict[str, Any], TrainConfig]]:
    """(what the run is, its configuration), seeds outermost, so that an interrupted study is balanced."""
    plans = []
    for seed in range(seeds):
        for group in groups:
            for noise in noises:
                for name, changes in arms_of(group).items():
                    if arms and name not in arms:
                        continue
                    key = {"arm": name, "group": group, "noise": noise, "seed": seed}
                    config = TrainConfig(
                        method="grpo",
                        model="tiny",
                        task="sort_mixed",
                        train_size=POOL,
                        run=root / f"g{group}-n{noise:g}-{name.replace(' ', '_')}-s{seed}",
                        seed=seed,
                        steps=generations * UPDATES,
                        prompts_per_generation=ROWS // group,
                        completions_per_prompt=group,
                        updates_per_generation=UPDATES,
                        learning_rate=1.5e-4,
                        warmup_steps=20,
                        reward_noise=noise,
                        lora_rank=0,
                        dtype="float32",
                        eval_every=generations * UPDATES // 6,
                        eval_prompts=256,
                        pool_prompts=POOL,
                        eval_samples=2,
                        save_every=0,
                        traces_per_step=0,
                        threads=1,
                        log_every=1,
                        quiet=True,
                        **changes,
                    )
                    validate(config)
                    plans.append((key, config))
    return plans


def run_one(config: TrainConfig) -> int:
    """One run in a process of its own; 0 when it finished."""
    from kalman_rl.engine.train import train

    assert config.run is not None
    with Run.create(config.run, to_toml(config), labels(config), overwrite=True) as run:
        return train(config, run, cache=config.run.parent.parent / ".cache")


def finished(config: TrainConfig) -> bool:
    """Whether this very run is there."""
    assert config.run is not None
    try:
        saved = build(TrainConfig, load_toml(config.run / "config.toml"))
        return (
            replace(saved, run=config.run) == config and read_manifest(config.run).get("status") == "finished"
        )
    except (OSError, ConfigError):
        return False


def curve(config: TrainConfig) -> dict[str, list[float]]:
    """Completions spent and accuracies at every evaluation of a run, with means of its belief's metrics."""
    assert config.run is not None
    spent, at, accuracy, held_out = 0.0, [], [], []
    notes: dict[str, list[float]] = {}
    for line in (config.run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "train" and (row["step"] - 1) % UPDATES == 0:  # a generation batch was sampled
            spent += row.get("budget/used", ROWS)
            for name, value in row.items():
                if name.startswith(("belief/", "groups/", "budget/")):
                    notes.setdefault(name, []).append(value)
        elif row["kind"] == "eval":
            at.append(spent)
            accuracy.append(row["pool/sampled_accuracy"])
            held_out.append(row["eval/sampled_accuracy"])
    return {"spent": at, "accuracy": accuracy, "held_out": held_out} | {
        name: [float(np.mean(values))] for name, values in notes.items()
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and the half-width of its 95 % interval by Student's t over seeds; inf for one seed."""
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.inf
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def collect(plans: list[tuple[dict[str, Any], TrainConfig]]) -> list[dict[str, Any]]:
    """One row per (group, noise, arm): curves of all finished seeds, final accuracy with its interval."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for key, config in plans:
        if finished(config):
            found.setdefault((key["group"], key["noise"], key["arm"]), []).append(key | curve(config))
    rows = []
    for (group, noise, arm), runs in found.items():
        final, half = interval([run["accuracy"][-1] for run in runs])
        mean, mean_half = interval([float(np.mean(run["accuracy"][1:])) for run in runs])
        rows.append(
            {
                "group": group,
                "noise": noise,
                "arm": arm,
                "seeds": [run["seed"] for run in runs],
                "start": float(np.mean([run["accuracy"][0] for run in runs])),
                "final": final,
                "final_half_width": half,
                "mean_over_run": mean,
                "mean_half_width": mean_half,
                "held_out": float(np.mean([run["held_out"][-1] for run in runs])),
                "completions": float(np.mean([run["spent"][-1] for run in runs])),
                "curves": [{k: run[k] for k in ("seed", "spent", "accuracy", "held_out")} for run in runs],
                "belief": {
                    name: float(np.mean([run[name][0] for run in runs]))
                    for name in runs[0]
                    if name.startswith(("belief/", "groups/"))
                },
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracies by arm, and what may be said about them."""
    lines = [
        "| G | noise | arm | completions | final pool accuracy | mean over the run | held-out | seeds |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        lines.append(
            f"| {row['group']} | {row['noise']:g} | {row['arm']} | {row['completions']:.0f} | "
            f"{row['final']:.3f} ± {row['final_half_width']:.3f} | "
            f"{row['mean_over_run']:.3f} ± {row['mean_half_width']:.3f} | {row['held_out']:.3f} | {len(row['seeds'])} |"
        )
    return "\n".join([*lines, "", *verdicts(rows)])


def paired(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float]:
    """Difference of mean accuracy over the run, a minus b, paired by seed, with its half-width."""
    first, second = ({c["seed"]: float(np.mean(c["accuracy"][1:])) for c in row["curves"]} for row in (a, b))
    return interval([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """For every cell: the tracker against each arm without memory, and adaptive against fixed; or a tie."""
    by = {(row["group"], row["noise"], row["arm"]): row for row in rows}
    questions = [("tracked", name) for name in STATELESS] + [(name, "tracked") for name in ADAPTIVE]
    lines = []
    for group, noise in dict.fromkeys((row["group"], row["noise"]) for row in rows):
        words = []
        for ours, other in questions:
            if (group, noise, ours) in by and (group, noise, other) in by:
                mean, half = paired(by[group, noise, ours], by[group, noise, other])
                word = "ties with" if abs(mean) <= half else "beats" if mean > 0 else "loses to"
                words.append(f"{ours} {word} {other} ({mean:+.3f} ± {half:.3f})")
        lines.append(f"- G={group}, noise {noise:g}: " + "; ".join(words) + ".")
    return lines


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Pool accuracy against completions spent, a panel per group size and noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = dict(zip(ARMS, LIGHT))
    groups = sorted({row["group"] for row in rows})
    noises = sorted({row["noise"] for row in rows})
    size = (3.6 * len(noises) + 1.8, 3.0 * len(groups) + 0.6)
    fig, axes = plt.subplots(len(groups), len(noises), figsize=size, sharex=True, sharey=True, squeeze=False)
    for row in rows:
        ax = axes[groups.index(row["group"])][noises.index(row["noise"])]
        spent = np.mean([c["spent"] for c in row["curves"]], axis=0) / 1000
        values = np.array([c["accuracy"] for c in row["curves"]])
        colour = colours[row["arm"]]
        bold = row["arm"] in TRACKED | ADAPTIVE
        ax.plot(
            spent,
            values.mean(0),
            color=colour,
            lw=2.0 if bold else 1.2,
            label=row["arm"],
            zorder=3 if bold else 2,
        )
        ax.fill_between(spent, values.min(0), values.max(0), color=colour, alpha=0.10, lw=0)
    for i, group in enumerate(groups):
        for j, noise in enumerate(noises):
            axes[i][j].set_title(f"group of {group}, reward noise sd {noise:g}", fontsize=9, loc="left")
            axes[i][j].grid(alpha=0.25, lw=0.5)
            axes[i][j].spines[["top", "right"]].set_visible(False)
        axes[i][0].set_ylabel("accuracy on the pool (sampled)", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("completions spent, thousands", fontsize=9)
    handles = {h.get_label(): h for ax in axes.flat for h in ax.get_lines()}
    names = [name for name in ARMS if name in handles]
    fig.legend([handles[n] for n in names], names, loc="center right", fontsize=9, frameon=False)
    fig.tight_layout(rect=(0, 0, 1 - 1.5 / size[0], 1))
    fig.savefig(path, dpi=130)
    plt.close(fig)


def prepare(root: Path) -> None:
    """Warm-start the shared model once, before several processes would."""
    from kalman_rl.engine.models.load import load_model
    from kalman_rl.engine.tasks import load_task

    task = load_task("sort_mixed")
    load_model(
        "tiny", cache=root.parent / ".cache", dtype="float32", task=task, progress=lambda text: print(text)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--generations", type=int, default=48, help="generation batches of 256 completions")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS))
    parser.add_argument("--noises", nargs="*", type=float, default=list(NOISES))
    parser.add_argument("--groups", nargs="*", type=int, default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=Path, default=Path("runs/adaptive/runs"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table-only", action="store_true", help="only collect what is finished")
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.generations, given.noises, given.groups = 1, 8, [0.5], [8]
        given.arms = given.arms or ["leave_one_out", "rounds"]
        given.runs, given.output = given.runs.parent / "quick", given.runs.parent
    plans = plan(given.runs, given.seeds, given.generations, given.arms, given.noises, given.groups)
    todo = [] if given.table_only else [config for _, config in plans if not finished(config)]
    print(f"{len(plans)} runs, {len(todo)} to do, {given.jobs} at a time", file=sys.stderr)
    if todo:
        prepare(given.runs)
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
            running = {pool.submit(run_one, config): config for config in todo}
            for number, done in enumerate(as_completed(running), 1):
                name = running[done].run
                print(
                    f"{number}/{len(todo)} {name}: {'ok' if done.result() == 0 else 'stopped'}",
                    file=sys.stderr,
                )
    rows = collect(plans)
    given.output.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.learning.adaptive " + " ".join(
        a for a in sys.argv[1:] if a != "--table-only"
    )
    settings = asdict(plans[0][1]) | {"run": None}
    written = {"command": command.strip(), "settings": settings, "rows": rows}
    (given.output / "adaptive.json").write_text(json.dumps(written, indent=1, default=str) + "\n")
    text = table(rows)
    (given.output / "adaptive.md").write_text(text + "\n")
    figure(rows, given.output / "adaptive.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
