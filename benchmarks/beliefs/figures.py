"""One figure per claim, drawn from the stored numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.beliefs.targets import find
from kalman_rl.palette import INK, LIGHT, MUTED, RULE

Row = dict[str, Any]
OURS, WARN, LOOSE = LIGHT[0], LIGHT[1], LIGHT[3]
WHISKERS = "whiskers: 95 % intervals"


def draw(results: Row, out: Path) -> list[Path]:
    """Write every figure whose tasks were run; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.edgecolor": INK,
            "legend.frameon": False,
        }
    )
    written = []
    for name, make in (("error", _error), ("compute", _compute), ("robustness", _robustness)):
        figure = make(results, plt)
        if figure is not None:
            path = out / f"{name}.png"
            figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
            plt.close(figure)
            written.append(path)
    return written


def _error(results: Row, plt: Any) -> Any:
    """Gain over the group mean and over the constant, by noise and by group size."""
    by_noise = [({"group": 8, "noise": s, "walk": 0.3}, f"{s:g}") for s in (0.0, 0.5, 1.0, 2.0, 4.0)]
    by_group = [({"group": g, "noise": 4.0, "walk": 0.3}, f"{g}") for g in (2, 4, 8, 16)]
    panels = [
        (by_noise, "score noise (sd); groups of 8"),
        (by_group, "group size; score noise 4"),
    ]
    panels = [
        ([(t, x) for c, x in cells if (t := find(results, "clean", c))], label) for cells, label in panels
    ]
    if not any(cells for cells, _ in panels):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, gridspec_kw={"width_ratios": [5, 4]})
    bars = (
        ("gain", "over the group mean", OURS),
        ("over_const", "over a constant (mean of the pool)", MUTED),
    )
    for axis, (cells, label) in zip(axes, panels):
        for k, (key, name, colour) in enumerate(bars):
            for i, (task, _) in enumerate(cells):
                mean, half, _n = task["rows"]["ours"][key]
                place = i + (k - 0.5) * 0.38
                axis.bar(place, mean - 1, 0.36, bottom=1, color=colour, label=name if i == 0 else None)
                axis.errorbar(place, mean, half or 0, color=INK, lw=1, capsize=2)
                inside = key == "gain"  # above that bar lies the ceiling
                high = (mean - (half or 0)) / 1.1 if inside else max(mean + (half or 0), 1) * 1.1
                side, ink = ("top", "white") if inside else ("bottom", INK)
                axis.text(place, high, f"{mean:.1f}", ha="center", va=side, fontsize=9, color=ink)
        for i, (task, _) in enumerate(cells):
            top = task["rows"]["ceiling"]["gain"][0]
            axis.plot(
                [i - 0.37, i - 0.01],
                [top, top],
                color=WARN,
                lw=1.5,
                label="ceiling, over the group mean" if i == 0 else None,
            )
        axis.axhline(1, color=INK, lw=0.8)  # as good as the reference: bars begin here, on a log scale
        axis.set_yscale("log")
        axis.set_xticks(range(len(cells)), [x for _, x in cells])
        axis.set_xlabel(label)
    axes[0].set_ylabel("reference's squared error / ours")
    axes[0].set_yticks([1, 10, 100], ["1", "10", "100"])
    axes[0].set_ylim(0.7, 400)
    axes[0].legend(loc="upper left", fontsize=9)
    figure.suptitle(
        f"How much closer is the belief to a prompt's true value? (drift 0.3, log scale; {WHISKERS})",
        x=0.06,
        ha="left",
    )
    figure.tight_layout()
    return figure


def _compute(results: Row, plt: Any) -> Any:
    """Completions saved against groups of eight, by rule, for both aims."""
    task = find(results, "allocation", {"pool": "U-shaped warm"})
    if task is None:
        return None
    rows = dict(task["rows"])
    rounds = find(results, "rounds", {"pool": "U-shaped warm"})
    rows |= rounds["rows"] if rounds else {}
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 5.4))
    for axis, key, title in zip(
        axes, ("gradient", "informative"), ("at equal gradient quality", "at an equal number of mixed groups")
    ):
        names = _shown(rows, key)
        reached = sorted((n for n in names if rows[n][key]), key=lambda n: rows[n][key][0])
        missing = [n for n in names if not rows[n][key]]
        order = missing + reached
        for i, name in enumerate(order):
            value = rows[name][key]
            if value is None:
                axis.text(0.03, i, "not reached", va="center", fontsize=9, color=WARN)
                continue
            colour = OURS if name.startswith(("ours", "RoundPlan")) else MUTED
            axis.barh(i, value[0], color=colour, height=0.7)
            axis.errorbar(value[0], i, xerr=value[1] or 0, color=INK, lw=1, capsize=2)
            axis.text(value[0] + (value[1] or 0) + 0.03, i, f"{value[0]:.2f}", va="center", fontsize=9)
        axis.set_yticks(range(len(order)), [_label(n, key) for n in order])
        axis.axvline(1, color=INK, lw=0.8)
        axis.set_xlim(0, 3.4)
        axis.set_ylim(-0.7, len(order) - 0.3)
        axis.set_title(title)
        axis.set_xlabel("completions of groups of 8 / completions needed")
    figure.suptitle(
        "Completions saved, pool of mostly easy and hopeless prompts, warm (blue: this package's rules; "
        f"{WHISKERS})",
        x=0.02,
        ha="left",
    )
    figure.tight_layout()
    return figure


def _shown(rows: Row, key: str) -> list[str]:
    """For counts of mixed groups the baseline does not matter, so one row per rule."""
    if key == "gradient":
        return [n for n in rows if not n.startswith("width")]
    return [
        n
        for n in rows
        if n.endswith("[loo]")
        or (n.startswith(("ours mixed_groups", "RoundPlan mixed_groups")) and n.endswith("[tau]"))
    ]


def _label(name: str, key: str) -> str:
    rule, _, baseline = name.partition(" [")
    baseline = baseline.rstrip("]")
    if key != "gradient" or baseline == "loo":
        return rule
    return f"{rule}, {'summed' if baseline == 'tau' else 'belief as baseline'}"


def _robustness(results: Row, plt: Any) -> Any:
    """Gain over the group mean in worlds the model does not describe."""
    worlds = [t for t in results["tasks"] if t["kind"] == "wrong"]
    if not worlds:
        return None
    series = (
        ("ours", "ours: learned noise and drift", OURS),
        ("fixed_Q1e-05", "fixed Q = 1e-5 (too stiff)", WARN),
        ("fixed_Q0.1", "fixed Q = 0.1 (too loose)", LOOSE),
        ("krpo_constants", "KRPO's constants, kept across visits", MUTED),
        ("const", "constant (mean of the pool)", RULE),
    )
    figure, axis = plt.subplots(figsize=(11.5, 4.6))
    for k, (key, name, colour) in enumerate(series):
        for i, task in enumerate(worlds):
            mean, half, _n = task["rows"][key]["gain"]
            place = i + (k - 2) * 0.165
            axis.bar(place, mean - 1, 0.155, bottom=1, color=colour, label=name if i == 0 else None)
            axis.errorbar(place, mean, min(half or 0, 0.95 * mean), color=INK, lw=1, capsize=1.5)
            if key == "ours":
                axis.text(place, max(mean + (half or 0), 1) * 1.08, f"{mean:.1f}", ha="center", fontsize=9)
    axis.axhline(1, color=INK, lw=0.8)
    axis.set_yscale("log")
    axis.set_yticks([0.1, 0.3, 1, 3, 10, 30], ["0.1", "0.3", "1", "3", "10", "30"])
    axis.set_xticks(range(len(worlds)), [t["cell"]["label"].replace(", ", ",\n") for t in worlds])
    axis.set_ylabel("group mean's squared error / method's")
    axis.set_ylim(0.08, 90)
    axis.set_title(f"Below 1 a filter is worse than no filter (groups of 8, log scale; {WHISKERS})")
    axis.legend(loc="upper left", fontsize=9, ncols=3)
    figure.tight_layout()
    return figure
